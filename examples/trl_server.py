"""TRL's server distillation with a Stillhouse teacher behind it, through `/v1/completions` in vLLM's format.

    python examples/trl_server.py http://localhost:8000 HuggingFaceTB/SmolLM2-135M --steps 2

Written for trl 1.16. Its client sends `temperature`, for which this teacher's response is exact. Stock vLLM ignores it,
so the loss compares a softened student with a teacher that is not softened.
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["A still is", "The distillation of", "Python's assert statement", "To learn from a teacher"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("student")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", default="outputs/trl")
    options = parser.parse_args()

    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.student)
    trainer = ServerDistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.student, dtype="float32"),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * options.steps}),
        args=ServerDistillationConfig(
            output_dir=options.output,
            teacher_model_server_url=options.url,
            loss_top_k=16,
            loss_add_tail=True,
            beta=0.0,
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
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print("losses", losses)


if __name__ == "__main__":
    main()
