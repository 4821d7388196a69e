"""What quantising costs a training step: each quantiser compared with a plain step on the same tokens, compiled or not.

    python -m benchmarks.quantisers                     the small student, 2 rows of 256 tokens
    python -m benchmarks.quantisers --compute float32 --rounds 5 --compiled false

A step is forward, cross-entropy, backward, clipping and AdamW's update. Plain and quantised steps alternate in one
process, so that other load on the machine affects both; the ratio is that of the medians. Besides wall-clock time, the
CPU time of all threads is reported, which a busy machine lengthens less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.report import report
from demo.prepare import STUDENT, prepare

LIMIT = 1.3
ALONE = ["student.quantisation.sub_norm=none", "student.quantisation.quantise_activations=false"]
ARMS: dict[str, list[str]] = {
    "ternary, weights alone": ["student.quantiser=bitnet", *ALONE],
    "ternary, SubLN and int8 activations": ["student.quantiser=bitnet"],
    "seq2": ["student.quantiser=seq2"],
    "Fairy2i, W1": ["student.quantiser=fairy2i", "student.quantisation.stages=1"],
    "Fairy2i, W2": ["student.quantiser=fairy2i", "student.quantisation.stages=2"],
}
# Warm-up steps, which allocate and, if requested, compile.
WARM = 2

Step = Callable[[], tuple[float, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each, in turn")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--compute", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--compiled", choices=("false", "true"), nargs="+", default=["false", "true"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    options = parser.parse_args()
    prepare(("teacher", "student", "text"))
    rows, dtype = [], ""
    for compiled in options.compiled:
        plain, dtype = step_of(options, ["student.quantiser=none", f"student.compile={compiled}"])
        for arm in options.arms:
            quantised, _ = step_of(options, [*ARMS[arm], f"student.compile={compiled}"])
            taken = [(plain(), quantised()) for _ in range(WARM + options.rounds)][WARM:]
            (wall, cpu), (plain_wall, plain_cpu) = (
                tuple(statistics.median(each[which][clock] for each in taken) for clock in (0, 1)) for which in (1, 0)
            )
            rows.append({
                "weights": arm, "compiled": compiled, "s a step": round(wall, 3), "plain": round(plain_wall, 3),
                "times": round(wall / plain_wall, 2), "CPU s": round(cpu, 3), "plain, CPU s": round(plain_cpu, 3),
                "times, CPU": round(cpu / plain_cpu, 2),
            })  # fmt: skip
            print(rows[-1], flush=True)
    ratios = {
        f"{row['weights']}{', compiled' if row['compiled'] == 'true' else ''} (target {LIMIT})": row["times, CPU"]
        for row in rows
    }
    report("quantisers", rows, ratios, title=f"{options.rows} rows of {options.seq_len} tokens, {dtype}")
    return 0


def step_of(options: argparse.Namespace, given: list[str]) -> tuple[Step, str]:
    """A function that makes a training step and returns its wall-clock and CPU seconds, and the student's dtype."""
    import torch

    from student_trainer.batch.align import cut
    from student_trainer.batch.view import ViewSeed
    from student_trainer.build_components import load_tokenizer
    from student_trainer.checkpoint.earlier_run import load_student
    from student_trainer.cli.compose import compose_arguments
    from student_trainer.data.loader import BatchSource
    from student_trainer.losses.kinds import terms_of
    from student_trainer.optim.optimizer import build_optimizer

    settings = compose_arguments([
        "--config-folder", "demo/config", "data=stdlib", f"data.seq_len={options.seq_len}", f"data.rows={options.rows}",
        "teacher=none", "distillation=cross_entropy", f"student.checkpoint_path={STUDENT}", *given,
        f"student.compute={options.compute}",
    ])  # fmt: skip
    student = load_student(settings.student, torch.device("cpu"))
    optimizer = build_optimizer(settings.optim, student.model, student.head_module, settings.run.steps)
    source = BatchSource(settings.data, load_tokenizer(settings), settings.run.seed)
    batch, _ = source.batch(source.initial_state(), 0)
    source.close()
    (micro,) = cut(batch, None, student, ViewSeed(settings.run.seed))
    terms = terms_of(settings.distillation)
    number = 0

    def step() -> tuple[float, float]:
        nonlocal number
        wall, cpu = time.perf_counter(), time.process_time()
        loss: Any = student.loss(micro, terms, None).total / len(micro.view.labels_N)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
        optimizer.step(number)
        optimizer.zero_grad()
        number += 1
        return time.perf_counter() - wall, time.process_time() - cpu

    return step, str(student.compute).removeprefix("torch.")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
