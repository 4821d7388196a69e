"""What each part of BitDistill's loss contributes: one ternary student, equal tokens, several seeds.

    python -m benchmarks.bitdistill                      the table of docs/guides/bitdistill.md; half an hour on 2 cores
    python -m benchmarks.bitdistill --steps 2 --pretraining-steps 3 --seeds 0      a few minutes, to try it out

The student is the demo's small one (every fifth layer of SmolLM2-135M), made ternary and trained once on text alone.
Every arm continues from there for the same steps on the same text. The teacher and the attention service run in
separate processes. Runs are kept in runs/bitdistill-ablation, and finished ones are not repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.report import report
from benchmarks.seeded_results import mean, spread
from demo.prepare import STUDENT, TEACHER, prepare
from demo.processes import Processes
from demo.screen import Screen
from student_trainer.reporting.json_lines import read_lines

ROOT = Path("runs/bitdistill-ablation")
STAGE2 = "stage2"
# Arm -> (whether it uses the attention service, its settings).
ARMS: dict[str, tuple[bool, list[str]]] = {
    "cross-entropy": (False, ["distillation=cross_entropy"]),
    "+ logits": (False, ["distillation=bitdistill", "distillation.attention.coefficient=null"]),
    "+ attention": (True, ["distillation=attention_only"]),
    "+ both": (True, ["distillation=bitdistill"]),
    "+ both, attention at 1e3": (True, ["distillation=bitdistill", "distillation.attention.coefficient=1e3"]),
}  # fmt: skip
TERMS = ("cross_entropy", "top_k_kl", "attention")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining-steps", type=int, default=80)
    parser.add_argument("--steps", type=int, default=40, help="steps per arm")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="choice and order of the texts")
    parser.add_argument("--pretraining-learning-rate", type=float, default=1e-3)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="learning rate of the arms")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    options = parser.parse_args()
    prepare()
    ROOT.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(Screen()))
        teacher = [str(TEACHER), "--engine", "hf", "--dtype", "float32", "--store", str(ROOT / "store")]
        url = stack.enter_context(processes.serve("stillhouse-teacher", teacher, ROOT / "teacher.log"))
        options_beside = [str(TEACHER), "--dtype", "float32"]
        attention = stack.enter_context(processes.serve("stillhouse-attention", options_beside, ROOT / "attention.log"))
        beside = [f"teacher.attention_url={attention()}"]
        settings = [*common(options), f"teacher.url={url()}"]
        learn(STAGE2, [
            *settings, "recipe=bitnet_pretraining", "optim=adamw", "teacher=remote",
            f"student.checkpoint_path={STUDENT}",
            f"run.steps={options.pretraining_steps}",
            f"student.quantisation.warmup_steps={options.pretraining_steps // 2}",
            f"evaluation.every={options.pretraining_steps}", "run.seed=100",
            f"optim.learning_rate={options.pretraining_learning_rate}",
        ])  # fmt: skip
        for seed in options.seeds:
            for arm in options.arms:
                asks, loss = ARMS[arm]
                place = [f"student.checkpoint_path={ROOT / STAGE2}", f"run.seed={seed}", f"run.steps={options.steps}"]
                learn(name_of(arm, seed), [
                    *settings, "recipe=bitdistill", "optim=adamw", *loss, *(beside if asks else []), *place,
                    f"evaluation.every={options.steps}", f"optim.learning_rate={options.learning_rate}",
                ])  # fmt: skip
    write_table(options)
    return 0


def common(options: argparse.Namespace) -> list[str]:
    return [
        "--config-folder", "demo/config", "data=stdlib", f"data.seq_len={options.seq_len}", "data.held_out_rows=4",
        f"run.root={ROOT}", "run.resume=never", "teacher.top_k=64", "optim.weight_decay=0.01",
        "optim.schedule.warmup_steps=5", "checkpoint.every=0", "logging.wandb=off", "logging.progress=off",
    ]  # fmt: skip


def learn(name: str, arguments: list[str]) -> None:
    """Run `stillhouse-train` in this process, unless the run already has both of its evaluations."""
    from student_trainer import main as trainer

    if len(lines_of(name, "evaluation.jsonl")) < 2 and (code := trainer.run([*arguments, f"run.id={name}"])):
        raise SystemExit(f"stillhouse-train ended with code {code} in {name}")


def name_of(arm: str, seed: int) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in arm.lower()).split()
    return "-".join([*words, str(seed)])


def lines_of(name: str, file: str) -> list[dict[str, float]]:
    return read_lines(ROOT / name / file)


def write_table(options: argparse.Namespace) -> None:
    rows = []
    for arm in options.arms:
        ends = [lines_of(name_of(arm, seed), "evaluation.jsonl")[-1] for seed in options.seeds]
        last = lines_of(name_of(arm, options.seeds[0]), "metrics.jsonl")[-1]
        rows.append({
            "loss": arm,
            "cross-entropy": spread([mean(line, "cross_entropy") for line in ends], 3),
            "KL": spread([mean(line, "kl") for line in ends], 3),
            "agreement %": spread([100 * mean(line, "agreement") for line in ends], 1),
            **{f"weighted {name}": round(last.get(f"weighted/{name}", 0.0), 3) for name in TERMS},
        })  # fmt: skip
    before = lines_of(STAGE2, "evaluation.jsonl")
    peers = {
        f"{figure}, {when}": mean(line, figure)
        for when, line in (("SubLN added, not yet ternary", before[0]), ("after stage 2", before[-1]))
        for figure in ("cross_entropy", "kl")
    }
    report(
        "bitdistill", rows, peers,
        title=f"{options.steps} steps of {options.seq_len} tokens after {options.pretraining_steps} of stage 2, "
        f"{len(options.seeds)} seeds",
        notes=(
            "held-out figures, mean ± standard deviation over seeds; weighted: of the first seed's last step",
            f"results of each run: {ROOT}/*/evaluation.jsonl",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
