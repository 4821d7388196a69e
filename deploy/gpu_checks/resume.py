"""Checks that a run that is killed and started again makes the same steps as an undisturbed one, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from deploy.gpu_checks import trainers
from deploy.gpu_checks.models import TINY, save_qwen3, write_tokens
from deploy.gpu_checks.report import Options, Report
from student_trainer.checkpoint import checkpoints as checkpoint

STEPS, EVERY = 12, 3
# A save waits for the previous one: after the seventh step, the checkpoint of the third is on disk.
KILLED_AT = 7


def run(report: Report, options: Options) -> None:
    shape = TINY if options.tiny else TINY | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
    length = 48 if options.tiny else 512
    student = save_qwen3(options.folder / "student", shape)
    teacher = save_qwen3(options.folder / "teacher", TINY, seed=1)
    text = write_tokens(options.folder / "text.jsonl", 60 if options.tiny else 400, length // 2)

    def started(name: str) -> tuple[Any, Path]:
        folder = options.folder / name
        folder.mkdir(exist_ok=True)
        arguments = trainers.settings(
            options, folder, student, teacher, f"data.sources.text.path={text}", f"run.steps={STEPS}",
            f"data.seq_len={length}", "data.rows=4", f"checkpoint.every={EVERY}", "optim.learning_rate=1e-3",
        )  # fmt: skip
        return trainers.start(arguments, folder / "output.txt"), folder

    (straight, whole), (victim, cut) = started("straight"), started("killed")
    trainers.wait_for_step(victim, cut, KILLED_AT)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    made = len(trainers.metrics(cut))
    report.check("the run was killed midway", KILLED_AT <= made < STEPS, f"at step {made} of {STEPS}")
    kept = checkpoint.newest_step(cut / "run" / "checkpoints")
    again, _ = started("killed")
    for process, folder in ((straight, whole), (again, cut)):
        trainers.finish(process, folder / "output.txt")
    ours, theirs = trainers.trace(cut), trainers.trace(whole)
    first = next((a["step"] for a, b in zip(ours, theirs, strict=False) if a != b), None)
    report.check(
        f"metrics of all {STEPS} steps, resumed at step {kept}", ours == theirs and kept >= EVERY,
        "" if ours == theirs else f"{len(ours)} and {len(theirs)} lines, first difference at step {first}",
    )  # fmt: skip
    report.check("parameters, moments and random states at the end", *_same_tensors(cut, whole))


def _same_tensors(ours: Path, theirs: Path) -> tuple[bool, str]:
    ends = [checkpoint.newest(folder / "run" / "checkpoints") for folder in (ours, theirs)]
    assert all(end is not None and end.step == STEPS for end in ends), "a run did not save its last step"
    flat = [
        {f"{file}/{name}": tensor for file, tensors in end.tensors.items() for name, tensor in tensors.items()}
        for end in ends if end is not None
    ]  # fmt: skip
    if flat[0].keys() != flat[1].keys():
        return False, "the tensors have different names"
    differ = [name for name, tensor in flat[0].items() if not tensor.equal(flat[1][name])]
    return not differ, f"{len(differ)} of {len(flat[0])} tensors differ, for example {differ[0]}" if differ else ""
