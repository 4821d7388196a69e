"""Seconds per step: distilling from stored targets, compared with plain fine-tuning by TRL's SFTTrainer.

    python -m benchmarks.step                 the small student, the same rows of tokens for both, in turn
    python -m benchmarks.step --steps 4 --rounds 1

Ours trains on cross-entropy and top-64 KL, with targets over HTTP from the teacher's store, and is timed over the whole
step: waiting for targets, forward, loss, backward, clipping, update. TRL is timed between its callbacks `on_step_begin`
and `on_step_end`: forward, loss (with the token accuracy and entropy that it logs), backward, clipping, update. Both
use AdamW and float32, with no document longer than a row; ours masks attention between a row's documents, TRL does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import report
from benchmarks.served_teacher import fill, serve_teacher
from demo.prepare import STUDENT, prepare

ROOT = Path("runs/step")
OURS, PEER, ALONE = (
    "stillhouse: distillation, stored targets",
    "trl SFTTrainer: cross-entropy",
    "stillhouse: cross-entropy",
)
# The first steps warm caches and thread pools; they are not counted.
WARM = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contender, in turn")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        print(json.dumps(trl_steps(np.load(options.peer), options.rows)))
        return 0
    prepare()
    ROOT.mkdir(parents=True, exist_ok=True)
    steps = WARM + options.steps
    seconds: dict[str, list[float]] = {OURS: [], PEER: [], ALONE: []}
    with serve_teacher(ROOT) as url:
        settings = settings_of(options, steps, url)
        fill(settings, steps, url)
        np.save(ROOT / "rows.npy", rows_of(settings, steps))
        for turn in range(options.rounds):
            seconds[OURS] += our_steps([*settings, "distillation=logits_only"], f"distilled-{turn}")
            seconds[PEER] += peer_steps(options)
            seconds[ALONE] += our_steps([*settings, "distillation=cross_entropy"], f"plain-{turn}")
    tokens = options.rows * options.seq_len
    rows = [
        {"contender": name, "steps": len(taken), "seconds a step, median": statistics.median(taken),
         "fastest": min(taken), "tokens a second": tokens / statistics.median(taken)}
        for name, taken in seconds.items()
    ]  # fmt: skip
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    least = {name: min(taken) for name, taken in seconds.items()}
    ratios = {
        "distillation step, SFTTrainer = 1 (target 1.05), medians": middle[OURS] / middle[PEER],
        "distillation step, SFTTrainer = 1, fastest steps": least[OURS] / least[PEER],
        "distillation step, our cross-entropy = 1, medians": middle[OURS] / middle[ALONE],
    }
    report("step", rows, ratios, title=f"{options.rows} rows of {options.seq_len} tokens, float32")
    return 0


def settings_of(options: argparse.Namespace, steps: int, url: str) -> list[str]:
    return [
        "--config-folder", "demo/config", "data=stdlib", f"data.seq_len={options.seq_len}", f"data.rows={options.rows}",
        f"run.root={ROOT}", f"run.steps={steps}", "run.resume=never", f"student.checkpoint_path={STUDENT}",
        "student.compute=float32",
        f"teacher.url={url}", "teacher.top_k=64", "optim.learning_rate=1e-4", "optim.schedule.kind=constant",
        "evaluation.every=0", "checkpoint.every=0", "logging.wandb=off", "logging.progress=off",
    ]  # fmt: skip


def rows_of(settings: list[str], steps: int) -> np.ndarray:
    """The tokens [steps, rows, T] of the run's batches."""
    from student_trainer.build_components import load_tokenizer
    from student_trainer.cli.compose import compose_arguments
    from student_trainer.data.loader import BatchSource

    composed = compose_arguments(settings)
    source = BatchSource(composed.data, load_tokenizer(composed), composed.run.seed)
    state, rows = source.initial_state(), []
    for number in range(steps):
        batch, state = source.batch(state, number)
        rows.append(batch.tokens_BT)
    source.close()
    return np.stack(rows)


def our_steps(settings: list[str], name: str) -> list[float]:
    """Make a run in its own process; returns the seconds of its timed steps, from its metrics.jsonl."""
    shutil.rmtree(ROOT / name, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "stillhouse-train"), *settings, f"run.id={name}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (ROOT / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines][WARM:]


def peer_steps(options: argparse.Namespace) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.step", "--peer", str(ROOT / "rows.npy"), "--rows", str(options.rows)]
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"SFTTrainer ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])[WARM:]


def trl_steps(rows_SBT: np.ndarray, batch_rows: int) -> list[float]:
    """Seconds of each step of SFTTrainer over the same rows, in this process."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    taken: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken.append(time.perf_counter() - self.began)

    steps, _, length = rows_SBT.shape
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32"),
        args=SFTConfig(
            output_dir=str(ROOT / "trl"), max_steps=steps, per_device_train_batch_size=batch_rows, max_length=length,
            learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows_SBT.reshape(-1, length).tolist()}),
        processing_class=AutoTokenizer.from_pretrained(STUDENT),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return taken


if __name__ == "__main__":
    sys.exit(main())
