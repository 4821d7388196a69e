"""What fewer bits cost: one student with ternary, two-bit real or complex weights, trained with cross-entropy alone or
with the teacher, on the same tokens, over several seeds.

    python -m benchmarks.quantiser_quality                  small models trained on the spot on real text; minutes
    python -m benchmarks.quantiser_quality --scale small    every fifth layer of SmolLM2-135M; an hour of a core
    python -m benchmarks.quantiser_quality --for-s 540      starts no run after that time; the next call continues

Every arm starts from a student trained in full precision and continues for the same steps on the same text. The weights
of its linear layers are quantised from the first step, activations are not, and no norm is added. Runs are kept in
runs/quantiser-quality, and finished ones are not repeated. `--docs` writes the table of docs/quantisers.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import machine, publish, report
from benchmarks.seeded_results import mean, spread
from benchmarks.small_models import export, make_untrained, run_afresh
from demo.comparison import markdown
from demo.prepare import STUDENT, TEACHER, prepare
from student_trainer.reporting.json_lines import read_lines

ROOT = Path("runs/quantiser-quality")
DOCS = Path("docs/quantisers.md")
# Only weights are quantised, which makes the four comparable.
WEIGHTS_ALONE = ["student.quantisation.sub_norm=none", "student.quantisation.quantise_activations=false"]
ARMS: dict[str, list[str]] = {
    "full precision": ["student.quantiser=none"],
    "ternary, absmean": ["student.quantiser=bitnet", *WEIGHTS_ALONE],
    "seq2, ParetoQ": ["student.quantiser=seq2", *WEIGHTS_ALONE],
    "Fairy2i, W1": ["student.quantiser=fairy2i", "student.quantisation.stages=1", *WEIGHTS_ALONE],
    "Fairy2i, W2": ["student.quantiser=fairy2i", "student.quantisation.stages=2", *WEIGHTS_ALONE],
}
LOSSES = {"cross-entropy alone": "distillation=cross_entropy", "with the teacher": "distillation=logits_only"}
FIGURES = ("cross_entropy", "kl", "agreement")


@dataclass(frozen=True)
class Scale:
    """How much is trained. `vocab_size`: of a tokenizer made here, as are teacher and student; None: SmolLM2's."""

    what: str
    vocab_size: int | None
    teacher_steps: int
    start_steps: int
    steps: int
    rows: int
    seq_len: int
    start_rate: float
    rate: float


SCALES = {
    "tiny": Scale(
        "A student of 0.4 M weights and a teacher of 1.9 M, 512 tokens", 512, 240, 240, 30, 8, 128, 3e-3, 1e-3
    ),
    "small": Scale("Every fifth layer of SmolLM2-135M", None, 0, 100, 60, 1, 256, 1e-3, 5e-4),
}
SHAPES = {"teacher": (192, 512, 4), "student": (96, 256, 3)}  # width, MLP width, layers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--steps", type=int, help="steps per arm, to try it out; default: the scale's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="choice and order of the texts")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--for-s", type=float, help="start no run after this many seconds; default: make all")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/quantisers.md")
    options = parser.parse_args()
    began = time.monotonic()
    prepare()
    ROOT.mkdir(parents=True, exist_ok=True)
    options.scale = SCALES[options.scale]
    options.steps = options.steps or options.scale.steps
    # Seed by seed, so that all arms have about equally many runs whenever time runs out.
    wanted = list(product(options.seeds, options.arms, LOSSES))
    missing = [each for each in wanted if result(options, *each) is None]
    teacher, start = models(options.scale)
    for number, (seed, arm, loss) in enumerate(missing):
        if options.for_s is not None and time.monotonic() - began > options.for_s:
            print(f"{len(missing) - number} of {len(wanted)} runs left: start it again to continue", flush=True)
            return 0
        folder = folder_of(options, seed, arm, loss)
        # The effect of quantising alone is the same for every seed and loss, so it is evaluated once.
        before = (seed, loss) == (options.seeds[0], next(iter(LOSSES)))
        run_afresh(folder, [
            *common(options.scale, start, options.scale.rate), "teacher.kind=local", f"teacher.model={teacher}",
            *ARMS[arm], LOSSES[loss], f"run.seed={seed}", f"run.steps={options.steps}",
            f"evaluation.every={options.steps}", f"evaluation.at_start={str(before).lower()}",
        ])  # fmt: skip
        shutil.rmtree(folder / "checkpoints")  # large: each holds AdamW's moments
        print(f"{arm}, {loss}, seed {seed}: {result(options, seed, arm, loss)}", flush=True)
    rows = write_table(options, start)
    if options.docs:
        publish(DOCS, f"{title_of(options)}:\n\n{markdown(rows)}")
    return 0


def models(scale: Scale) -> tuple[Path, Path]:
    """Folders of the teacher and of the run that every arm starts from, both trained in full precision; made once."""
    if scale.vocab_size is None:
        teacher, student, name = TEACHER, STUDENT, "start-small"
    else:
        teacher, student, name = ROOT / "teacher", ROOT / "untrained-student", "start-tiny"
        for role, shape in SHAPES.items():
            make_untrained(ROOT / f"untrained-{role}", scale.vocab_size, shape)
        if not teacher.is_dir():
            alone = ["teacher=none", "distillation=cross_entropy", "run.seed=101", "evaluation.every=0"]
            from_scratch = common(scale, ROOT / "untrained-teacher", scale.start_rate)
            run_afresh(ROOT / "teacher-run", [*from_scratch, *alone, f"run.steps={scale.teacher_steps}"])
            export(ROOT / "teacher-run", teacher)
    start = ROOT / name
    if not any((start / "checkpoints").glob("step-*")):
        run_afresh(start, [
            *common(scale, student, scale.start_rate), "teacher=none", "distillation=cross_entropy", "run.seed=100",
            f"run.steps={scale.start_steps}", f"evaluation.every={scale.start_steps}", "evaluation.at_start=false",
        ])  # fmt: skip
    return teacher, start


def common(scale: Scale, student: Path, rate: float) -> list[str]:
    return [
        "--config-folder", "demo/config", "data=stdlib", f"data.seq_len={scale.seq_len}", f"data.rows={scale.rows}",
        f"data.held_out_rows={max(4, scale.rows)}", "data.sources.code.weight=0.2", "data.sources.prose.weight=0.8",
        f"run.root={ROOT}", f"student.checkpoint_path={student}", "teacher.top_k=64", f"optim.learning_rate={rate}",
        "optim.weight_decay=0.01", "optim.schedule.warmup_steps=5", "checkpoint.every=0", "logging.wandb=off",
        "logging.progress=off", *([] if scale.vocab_size is None else ["student.compute=float32"]),
    ]  # fmt: skip


def folder_of(options: argparse.Namespace, seed: int, arm: str, loss: str) -> Path:
    words = re.sub("[^a-z0-9]+", "-", f"{arm} {loss}".lower()).strip("-")
    scale = next(name for name, each in SCALES.items() if each == options.scale)
    return ROOT / f"{scale}-{words}-{options.steps}-{seed}"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "evaluation.jsonl")


def result(options: argparse.Namespace, seed: int, arm: str, loss: str) -> dict[str, float] | None:
    """Held-out metrics at the end of a run, means over the tokens of all sources; None unless the run is finished."""
    lines = lines_of(folder_of(options, seed, arm, loss))
    if not lines or lines[-1]["step"] != options.steps:
        return None
    found = {figure: mean(lines[-1], figure) for figure in FIGURES}
    return found | ({"before": mean(lines[0], "cross_entropy")} if lines[0]["step"] == 0 else {})


def bits_of(arm: str, start: Path) -> float:
    """Bits per weight of the student's linear layers when packed, including scales."""
    import torch

    from student_trainer.checkpoint.earlier_run import load_student
    from student_trainer.cli.compose import compose_arguments
    from student_trainer.export.bits import bits_a_weight

    given = ["teacher=none", "distillation=cross_entropy", *ARMS[arm], f"student.checkpoint_path={start}"]
    bits = bits_a_weight(load_student(compose_arguments(given).student, torch.device("cpu")).model)
    return 16.0 if bits is None else bits.packed


def write_table(options: argparse.Namespace, start: Path) -> list[dict[str, Any]]:
    rows = []
    for arm, loss in product(options.arms, LOSSES):
        got = [r for seed in options.seeds if (r := result(options, seed, arm, loss)) is not None]
        if not got:
            continue
        rows.append({
            "weights": arm, "bits per weight": f"{bits_of(arm, start):.2f}", "loss": loss, "seeds": len(got),
            "cross-entropy": spread([r["cross_entropy"] for r in got], 3),
            "KL": spread([r["kl"] for r in got], 3),
            "agreement %": spread([100 * r["agreement"] for r in got], 1),
            "cross-entropy before": f"{before:.2f}" if (before := got[0].get("before")) else "",
        })  # fmt: skip
    report(
        "quantiser_quality", rows, title=title_of(options),
        notes=(
            "held-out figures, mean ± standard deviation over seeds; before: quantised, not yet trained",
            f"results of each run: {ROOT}/*/evaluation.jsonl",
        ),
    )  # fmt: skip
    return rows


def title_of(options: argparse.Namespace) -> str:
    scale = options.scale
    return (
        f"{scale.what}: {options.steps} steps of {scale.rows * scale.seq_len} tokens after {scale.start_steps} in full "
        f"precision, learning rate {scale.rate:g}, on a CPU ({machine()['cpu']})"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
