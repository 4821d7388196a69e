"""How often an update waits for its device: once, when its metrics are read. Counted on a CPU, by the operations whose
result a GPU would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.losses import chunks, token_term
from student_trainer.losses.metrics import LossSums
from student_trainer.optim.optimizer import build_optimizer
from student_trainer.settings import OptimSettings, StudentSettings
from student_trainer.students.causal import wrap_causal
from student_trainer.students.student import Student
from tests.unit.students.tiny import tiny_model
from tests.unit.trainer.test_align import SAMPLED, batch_of, micro_batches, targets_of

SPEC = replace(SAMPLED, temperatures=(2.0,))
TERMS = (
    token_term("ce", "cross_entropy", 0.5),
    token_term("kd", "top_k_kl", 1.0),
    token_term("soft", "jsd", 1.0, temperature=2.0),
    token_term("drawn", "sampled", 1.0),
    token_term("own", "reverse_kl", 1.0, support="gather"),
)
# Operations with a shape or a number that only the device knows.
WAITING = (
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "unique_dim",
    "equal", "bincount", "is_nonzero", "_assert_async",
)  # fmt: skip


class Waits(TorchDispatchMode):
    """Names of the operations that a GPU would be waited for in, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or repeats:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Also of what reads a tensor out in Python, which on a CPU is no operation."""
    counted = Waits()
    for name in ("tolist", "cpu", "numpy"):
        plain = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
            counted.names.append(name)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, read)
    yield counted


def student_and_parts() -> tuple[Student, tuple[MicroBatch, ...], tuple[str, ...]]:
    model = tiny_model("llama", vocab_size=64)
    student = replace(
        wrap_causal(model, "sdpa", StudentSettings(checkpoint_path="x", compute="float32")), shared_vocab=64
    )
    batch = batch_of([9, 12], [20], [5, 5, 5])
    parts = []
    for part in micro_batches(batch, targets_of(batch, SPEC), rows=1):
        count = len(part.view.labels_N)
        assert part.teacher is not None
        teacher = replace(
            part.teacher, gather_ids_NG=torch.arange(6).expand(count, -1),
            gather_logprobs_NG=torch.randn(count, 6).log_softmax(-1),
        )  # fmt: skip
        parts.append(replace(part, teacher=teacher).to(student.device))
    return student, tuple(parts), batch.source_names


class Nothing:
    """Stands for a kernel: what is launched is not waited for."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: None


def test_an_update_waits_for_the_device_once(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three micro batches forward and backward through the kernels' side of the losses, norm, clipping, AdamW."""
    from student_trainer.losses.fused import launch

    monkeypatch.setattr(chunks, "kernels_serve", lambda device: True)
    for name in ("normalise", "compare", "gradient"):
        monkeypatch.setattr(launch, name, Nothing())
    student, parts, sources = student_and_parts()
    optimizer = build_optimizer(OptimSettings(), student.model, student.head_module, 10)
    with waits:
        sums = LossSums(TERMS, sources)
        for part in parts:
            loss = student.loss(part, TERMS, None)
            (loss.total / 40).backward()
            sums.add(loss, part)
        norm = torch.nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])
        assert waits.names == []
        sums.metrics(norm)
        assert waits.names == ["tolist"]
        torch.nn.utils.clip_grads_with_norm_(optimizer.parameters, 1.0, norm)
        optimizer.step(0)
        optimizer.zero_grad()
    assert waits.names == ["tolist"]


def test_what_waits_is_seen(waits: Waits) -> None:
    """Each of the ways in which a loss used to wait."""
    values = torch.arange(4)
    with waits:
        values[values > 1]
        (values > 1).nonzero()
        int(values.max())
        values.tolist()
        torch.repeat_interleave(values, values)
        values[torch.tensor([0, 1])]
    assert waits.names == ["index", "nonzero", "_local_scalar_dense", "tolist", "repeat_interleave"]


@pytest.mark.parametrize("wrong", ["label", "id", "nan"])
def test_what_an_update_leaves_unchecked_is_refused_with_its_metrics(wrong: str) -> None:
    """Before anything is changed, in the words of an immediate check; until then nothing reaches beyond a row."""
    student, (part, *_), sources = student_and_parts()
    teacher = part.teacher
    assert teacher is not None and teacher.ids_NK is not None and teacher.logprobs_NK is not None
    words = {"label": "label 64 on row 3", "id": "ids are from -5", "nan": "contain NaN"}[wrong]
    if wrong == "label":
        labels_N = part.view.labels_N.clone()
        labels_N[3] = 64
        part = replace(part, view=replace(part.view, labels_N=labels_N))
    elif wrong == "id":
        part = replace(part, teacher=replace(teacher, ids_NK=teacher.ids_NK.where(teacher.ids_NK != 7, -5)))
        assert part.teacher is not None and part.teacher.ids_NK is not None and (part.teacher.ids_NK == -5).any()
    else:
        part = replace(part, teacher=replace(teacher, logprobs_NK=teacher.logprobs_NK * torch.nan))
    sums = LossSums(TERMS, sources)
    loss = student.loss(part, TERMS, None)
    loss.total.backward()
    sums.add(loss, part)
    with pytest.raises(ValueError, match=words):
        sums.metrics()
