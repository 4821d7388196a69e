"""TRL's `DistillationTrainer` on a served teacher: a subclass that requests `/v1/targets` and patches nothing.

    python examples/trl_distill.py http://localhost:8000 HuggingFaceTB/SmolLM2-135M --steps 2

Written for trl 1.16. Generation, buffers and metrics are TRL's own, and so are its settings `beta` and `temperature`.
The teacher's probabilities are exact at that temperature, K of them and the rest in one bucket, for any beta; TRL's own
server trainer supports the top K only for beta 0, and imports vLLM, which this one doesn't.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

from student_trainer.losses import TeacherRows, TokenTerm, head_loss, teacher_rows, token_term
from teacher_proto.client.sync_client import SyncTeacherClient
from teacher_proto.requests import TargetsRequest

PROMPTS = ["A still is", "The distillation of", "Python's assert statement", "To learn from a teacher"]


class ServedDistillationTrainer(DistillationTrainer):
    """Requests targets from `teacher` for the completions of each micro batch. `top_k`: logprobs per token."""

    def __init__(self, *arguments: Any, teacher: SyncTeacherClient, top_k: int = 64, **named: Any):
        super().__init__(*arguments, teacher_model=None, **named)
        self.teacher, self.top_k = teacher, top_k

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.model.training and inputs.get("num_items_in_batch") is not None:
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        student = self.accelerator.unwrap_model(model)
        total, count = self._forward_redirection(model, student, self.distance, student, inputs)
        loss = total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def distance(self, student: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss summed over the completions' tokens, and their number."""
        ids_BT = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask_BT = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        written_BC = inputs["completion_mask"].bool()
        learnt_BC = written_BC & inputs.get("tool_mask", written_BC).bool()
        labels_N = inputs["completion_ids"].masked_fill(~learnt_BC, -100)[written_BC]
        hidden_BCD = self._get_last_hidden_state(student, ids_BT, mask_BT, written_BC.shape[1])
        head = student.get_output_embeddings()
        loss = head_loss(
            hidden_BCD[written_BC], head.weight, labels_N, self.asked(ids_BT, mask_BT, inputs), [self.term()],
            head_bias_V=head.bias,
        )  # fmt: skip
        return loss.total, learnt_BC.sum()

    def asked(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, inputs: Any) -> TeacherRows:
        """The teacher's row for every token of the completions: the row before it. Padding is not sent."""
        sequences = [ids_T[mask_T].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT.bool(), strict=True)]
        lengths = inputs["completion_mask"].sum(1).tolist()
        rows = [(len(ids) - length - 1, len(ids) - 1) for ids, length in zip(sequences, lengths, strict=True)]
        temperatures = [] if self.temperature == 1.0 else [self.temperature]
        request = TargetsRequest(sequences=sequences, rows=rows, top_k=self.top_k, temperatures=temperatures)
        return teacher_rows(self.teacher.targets(request), temperatures).to(ids_BT.device)

    def term(self) -> TokenTerm:
        """TRL's beta as a loss term: 0 is KL(teacher || student), 1 the reverse KL, between them the JSD."""
        shape = {"temperature": self.temperature, "tail": "bucket"}
        if self.beta in (0, 1):
            return token_term("distance", "reverse_kl" if self.beta else "forward_kl", **shape)
        return token_term("distance", "jsd", beta=self.beta, **shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("student")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--output", default="outputs/trl")
    options = parser.parse_args()

    with SyncTeacherClient(options.url) as teacher:
        trainer = ServedDistillationTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(options.student),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * options.steps}),
            teacher=teacher,
            args=DistillationConfig(
                output_dir=options.output,
                beta=options.beta,
                temperature=2.0,
                max_completion_length=16,
                per_device_train_batch_size=2,
                max_steps=options.steps,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            ),
        )
        trainer.train()
    print("losses", [line["loss"] for line in trainer.state.log_history if "loss" in line])


if __name__ == "__main__":
    main()
