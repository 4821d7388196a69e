"""Prune and heal: the sizes at which `quality` compares, one run of a student, and its held-out metrics.

A teacher, students with fewer of its layers, and runs that heal one of them on the text of one seed. Runs are made in
this process by `build` and `loop`, as `stillhouse-train` does. Used by the `quality_*` tables.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.small_models import export, keep_layers, make_untrained, run_afresh
from demo.prepare import TEACHER, prepare

ROOT = Path("runs/quality")


@dataclass(frozen=True)
class Size:
    """How much is trained. `trained_here`: vocabulary, shape and steps of a teacher trained here; None: SmolLM2-135M.

    `keep`: how many of the teacher's `layers` each of the two students has.
    """

    name: str
    what: str
    layers: int
    keep: tuple[int, int]
    steps: int
    rows: int
    seq_len: int
    rate: float
    held_out_rows: int
    seeds: tuple[int, ...]
    trained_here: tuple[int, tuple[int, int, int], int] | None = None

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.seq_len

    def shortened(self, share: float) -> Size:
        """The same with fewer steps. Runs see the beginning of the longer ones' text, and so need no other targets."""
        return replace(self, steps=round(self.steps * share))

    @property
    def compute(self) -> str:
        return "float32" if self.trained_here else "auto"


SIZES = {
    "small": Size(
        "small", "A teacher of 0.8 M weights", 6, (4, 2), 50, 16, 128, 1e-3, 16, (0, 1, 2), (1024, (96, 256, 6), 250),
    ),
    "smollm2": Size("smollm2", "SmolLM2-135M", 30, (24, 15), 400, 1, 256, 2e-4, 8, (0, 1, 2)),
}  # fmt: skip


def teacher_of(size: Size) -> Path:
    """The folder of the teacher, which is made if missing."""
    if size.trained_here is None:
        prepare(("teacher", "text"))
        return TEACHER
    prepare(("text",))
    vocab_size, shape, steps = size.trained_here
    folder, untrained = ROOT / size.name / "teacher", ROOT / size.name / "untrained"
    if not folder.is_dir():
        make_untrained(untrained, vocab_size, shape, ("prose", "code"))
        run = ROOT / size.name / "teacher-run"
        run_afresh(run, [
            *common(size, untrained, 100), "teacher=none", "distillation=cross_entropy", f"run.steps={steps}",
            "data.rows=32", "optim=muon_clip", "optim.learning_rate=3e-3", "optim.schedule.warmup_steps=20",
        ])  # fmt: skip
        export(run, folder)
        shutil.rmtree(run)
    return folder


def student_of(size: Size, keep: int) -> Path:
    """The folder of the teacher with only `keep` of its layers."""
    dtype = "float32" if size.trained_here else "bfloat16"
    return keep_layers(teacher_of(size), keep, ROOT / size.name / f"student-{keep}", dtype)


def common(size: Size, student: Path, seed: int) -> list[str]:
    """The settings that all arms share; the seed decides the choice and order of the texts."""
    return [
        "--config-folder", "demo/config", "data=stdlib", f"data.seq_len={size.seq_len}", f"data.rows={size.rows}",
        f"data.held_out_rows={size.held_out_rows}", f"run.root={ROOT / size.name}", f"run.seed={seed}",
        f"run.steps={size.steps}", f"student.checkpoint_path={student}", f"student.compute={size.compute}",
        "teacher.top_k=64", f"optim.learning_rate={size.rate}", "optim.weight_decay=0.01",
        f"optim.schedule.warmup_steps={max(1, size.steps // 8)}", "evaluation.every=0", "checkpoint.every=0",
        "logging.wandb=off", "logging.progress=off",
    ]  # fmt: skip


def local_teacher(size: Size) -> list[str]:
    """Settings for a teacher in this process."""
    return ["teacher=local", f"teacher.model={teacher_of(size)}", "teacher.dtype=float32"]


def alone(kind: str, name: str = "loss", **fields: Any) -> list[str]:
    """Settings for one loss alone, with coefficient 1."""
    settings = {"kind": kind, "coefficient": 1.0, **fields}
    return ["distillation=none", *(f"distillation.terms.{name}.{key}={value}" for key, value in settings.items())]


def heal(size: Size, student: Path, seed: int, settings: Sequence[str]) -> Any:
    """Run the trainer to the end and return its student. SystemExit if it is stopped."""
    from student_trainer import loop
    from student_trainer.build import build
    from student_trainer.cli.compose import compose_arguments
    from teacher_proto.process.stopping import StopSignals

    folder = ROOT / size.name / "run"
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [*common(size, student, seed), "run.id=run", "run.resume=never", *settings]
    with ExitStack() as stack, StopSignals() as signals:
        run = build(compose_arguments(arguments), signals, stack)
        if loop.train(run) != loop.DONE:
            raise SystemExit("stopped: start it again to continue; finished runs are not repeated")
        return run.student


@cache
def held_out_texts(size: Size) -> dict[str, list[np.ndarray]]:
    """Token ids of the held-out pieces by source; the same for every seed and student."""
    from student_trainer.build_components import load_tokenizer
    from student_trainer.cli.compose import compose_arguments
    from student_trainer.data.loader import BatchSource

    settings = compose_arguments([*common(size, teacher_of(size), 0), "teacher=none", "distillation=cross_entropy"])
    source = BatchSource(settings.data, load_tokenizer(settings), 0)
    texts = {
        name: [
            batch.tokens_BT[d.row, d.start : d.stop].astype(np.int64)
            for batch in source.held_out(name) for d in batch.documents if d.stop - d.start > 1
        ]
        for name in source.names
    }  # fmt: skip
    source.close()
    return texts


@cache
def exact_teacher(size: Size) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(teacher_of(size), dtype=torch.float32).eval()


def measure(size: Size, model: Any) -> dict[str, float]:
    """Held-out metrics, means over the tokens of all sources: cross-entropy, both KLs over the whole vocabulary in
    nats, and the percentage of tokens on which student and teacher have the same top choice.
    """
    return compare(model, exact_teacher(size), [text for texts in held_out_texts(size).values() for text in texts])


@torch.no_grad()
def compare(student: Any, teacher: Any, texts: Sequence[np.ndarray], after: int = 1) -> dict[str, float]:
    """The metrics on the tokens from position `after` on, in float32, one text at a time: no packing or padding."""
    sums = dict.fromkeys(("cross_entropy", "kl", "reverse_kl", "agreement"), 0.0)
    count = 0
    student.eval()
    for text_T in texts:
        ids_1T = torch.from_numpy(text_T.astype(np.int64))[None]
        rows = slice(after - 1, len(text_T) - 1)
        log_q_RV = student(input_ids=ids_1T).logits[0, rows].float().log_softmax(-1)
        log_p_RV = teacher(input_ids=ids_1T).logits[0, rows].float().log_softmax(-1)
        sums["cross_entropy"] += float(F.nll_loss(log_q_RV, ids_1T[0, after:], reduction="sum"))
        sums["kl"] += float((log_p_RV.exp() * (log_p_RV - log_q_RV)).sum())
        sums["reverse_kl"] += float((log_q_RV.exp() * (log_q_RV - log_p_RV)).sum())
        sums["agreement"] += 100 * float((log_q_RV.argmax(-1) == log_p_RV.argmax(-1)).sum())
        count += len(log_q_RV)
    return {name: total / count for name, total in sums.items()}
