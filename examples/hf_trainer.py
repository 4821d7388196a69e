"""A plain Hugging Face `Trainer` on a served teacher: `compute_loss` in five lines, with our client and fused head.

    pip install 'stillhouse[losses]' transformers accelerate datasets
    python examples/hf_trainer.py http://localhost:8000 HuggingFaceTB/SmolLM2-135M 'corpus/*.txt' --steps 20

The loss is cross-entropy plus KL(teacher || student) at temperature 2 on the teacher's top K, with the rest as one
bucket. Logits over the whole vocabulary are never stored: `head_loss` computes loss and gradient chunk by chunk.
"""

from __future__ import annotations

import argparse
import glob
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from student_trainer.losses import head_loss, teacher_rows, token_term
from teacher_proto.client.sync_client import SyncTeacherClient
from teacher_proto.requests import TargetsRequest

TEMPERATURE = 2.0
TERMS = [
    token_term("cross_entropy", "cross_entropy", 0.5),
    token_term("kl", "top_k_kl", temperature=TEMPERATURE, temperature_squared=True),
]


class TaughtTrainer(Trainer):
    """Requests targets from `teacher` for every sequence of a batch, without its padding."""

    teacher: SyncTeacherClient

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"].bool()
        asked = TargetsRequest(sequences=rows_of(ids_BT, mask_BT), top_k=64, temperatures=[TEMPERATURE])
        rows = teacher_rows(self.teacher.targets(asked), [TEMPERATURE]).to(ids_BT.device)
        hidden_ND = model.base_model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state[mask_BT]
        loss = head_loss(hidden_ND, model.lm_head.weight, next_tokens(inputs["labels"])[mask_BT], rows, TERMS)
        return loss.total / (num_items_in_batch or mask_BT.sum())


def rows_of(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[list[int]]:
    """Token ids of each sequence, without its padding."""
    return [ids_T[mask_T].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]


def next_tokens(labels_BT: torch.Tensor) -> torch.Tensor:
    """The label of each position; -100 where there is none, as at the end of a sequence."""
    return torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=-100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("student")
    parser.add_argument("text", help="glob pattern of text files")
    for name, value in (("steps", 20), ("rows", 4), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", default="outputs/hf")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    files = sorted(glob.glob(options.text))  # noqa: PTH207 - a pattern
    texts = [tokenizer(Path(name).read_text(), truncation=True, max_length=options.length) for name in files]
    trainer = TaughtTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
        train_dataset=Dataset.from_list([dict(each) for each in texts]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.rows,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
    )
    with SyncTeacherClient(options.url) as trainer.teacher:
        print(f"taught by {trainer.teacher.teacher().identity.semantic.model}")
        trainer.train()
    print("losses", [line["loss"] for line in trainer.state.log_history if "loss" in line])


if __name__ == "__main__":
    main()
