"""The student's side of `measure`: a process that loads it while the teacher starts, and then follows orders.

    python -m demo.student_speed OUT NAME=VALUE ...

Orders are lines of JSON on standard input, and responses lines of JSON on standard output. The response to
`{"do": "measure"}` is `StudentSpeed`. `{"do": "write", "held_out_rows": N, "model": FOLDER}` has that model continue
the beginnings of held-out texts into OUT, as the trainer has its student do, and ends the process.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_proto.process.parent import end_with_parent_if_asked

if TYPE_CHECKING:
    from student_trainer.run import Run

# Steps are timed for at least this long, after one that warms up.
MEASURE_S = 4.0


@dataclass(frozen=True)
class StudentSpeed:
    """`tokens_per_second`: trained, in whole steps. `start_s`: from the process's start until a step could begin."""

    cpu: str
    compute: str
    start_s: float
    tokens_per_second: float
    evaluation_tokens_per_second: float


def main(arguments: list[str]) -> int:
    began = time.monotonic()
    end_with_parent_if_asked()
    out, settings = Path(arguments[0]), arguments[1:]
    from student_trainer.build import build
    from student_trainer.cli.compose import compose_arguments
    from teacher_proto.process.stopping import StopSignals

    with ExitStack() as stack:
        run = build(compose_arguments(settings), StopSignals(), stack)
        start_s = time.monotonic() - began
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "measure":
                print(json.dumps(asdict(measure(run, start_s))), flush=True)
            else:
                stack.close()
                del run
                changes = [f"student.checkpoint_path={order['model']}", f"data.held_out_rows={order['held_out_rows']}"]
                write_texts(compose_arguments([*settings, *changes]), out)
                break
    return 0


def measure(run: Run, start_s: float) -> StudentSpeed:
    """Time real steps of the run, which trains on text alone, and a real evaluation."""
    from student_trainer import loop
    from teacher_proto.hardware import cpu_name

    tokens, seconds = 0, 0.0
    loop.step(run, run.prefetch.next(run.while_waiting))
    while seconds < MEASURE_S:
        ready = run.prefetch.next(run.while_waiting)
        began = time.monotonic()
        tokens += loop.step(run, ready).losses.tokens
        seconds += time.monotonic() - began
    began = time.monotonic()
    evaluated = sum(document.tokens for document in run.evaluator.evaluate(run.student).documents)
    return StudentSpeed(
        cpu=cpu_name(), compute=str(run.student.compute).removeprefix("torch."), start_s=start_s,
        tokens_per_second=tokens / seconds, evaluation_tokens_per_second=evaluated / (time.monotonic() - began),
    )  # fmt: skip


def write_texts(settings: Any, out: Path) -> None:
    """Write a line of JSON for each text, with the fields of `samples.jsonl`."""
    import torch

    from student_trainer.build_components import load_tokenizer
    from student_trainer.checkpoint.earlier_run import load_student
    from student_trainer.data.loader import BatchSource
    from student_trainer.data.tokenise import pad_id
    from student_trainer.evaluation.samples import SampleWriter
    from student_trainer.rollouts.sampler import GenerateSampler, ends_of_text

    tokenizer = load_tokenizer(settings)
    source = BatchSource(settings.data, tokenizer, settings.run.seed)
    held_out = {name: source.held_out(name) for name in source.names}
    student = load_student(settings.student, torch.device("cpu"))
    sampler = GenerateSampler(student, ends_of_text(student, tokenizer), pad_id(tokenizer))
    writer = SampleWriter(settings.evaluation, held_out, sampler, lambda ids: str(tokenizer.decode(ids)))
    out.write_text("".join(json.dumps(vars(sample)) + "\n" for sample in writer.write()))
    source.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
