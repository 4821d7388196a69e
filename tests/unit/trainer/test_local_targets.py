"""A teacher in the trainer's process against the service's engine over the same model: who it is, what it answers to
every kind, and that an answer depends on its batch alone.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from serving.engine import Job
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.settings.teacher import TeacherSettings
from student_trainer.targets.local import LocalTargets
from student_trainer.targets.protocol import TeacherCard
from student_trainer.targets.queries import queries_of
from teacher_proto import hardware
from teacher_proto.errors import OutOfRangeError, WrongTeacherError
from teacher_proto.requests import KINDS, TargetSpec
from teacher_service.engines.hf import HfEngine
from tests.models import VOCAB_SIZE, save_tiny_llama

ASK = TargetSpec(KINDS, 16, (2.0,), num_samples=20, sample_temperature=1.0, seed=3, hidden_dtype="float16")


def batch_of(*lengths: int, seed: int = 0) -> Batch:
    """A row for each document."""
    draw = np.random.default_rng(seed)
    rows = [[Placed(0, f"d{i}", draw.integers(0, VOCAB_SIZE, n).astype(np.int32), None)] for i, n in enumerate(lengths)]
    return build_batch(0, rows, max(lengths), 0, ("a",))


def gathered(batch: Batch) -> list[np.ndarray]:
    draw = np.random.default_rng(5)
    return [draw.integers(0, VOCAB_SIZE, (max(d.stop - d.start - 1, 1), 4)) for d in batch.documents]


def fetch(targets: LocalTargets, *batches: Batch) -> list[BatchTargets]:
    async def run() -> list[BatchTargets]:
        await targets.open()
        try:
            asked = [queries_of(batch, ASK, gathered(batch)) for batch in batches]
            return await asyncio.gather(*map(targets.fetch, batches, asked))
        finally:
            await targets.close()

    return asyncio.run(run())


@pytest.fixture()
def settings(tiny_llama: Path) -> TeacherSettings:
    return TeacherSettings(kind="local", model=str(tiny_llama), max_batch_tokens=300)


def test_it_is_who_the_service_is_and_answers_every_kind_as_it_does(settings: TeacherSettings) -> None:
    batch = batch_of(3, 120, 64, 1, 70, 118, 17)
    local = LocalTargets(settings)
    answered = fetch(local, batch)[0]

    async def ask_engine() -> tuple[str, list[object]]:
        engine = HfEngine(settings.model, dtype="float32")
        await engine.start()
        asked = queries_of(batch, ASK, gathered(batch))
        try:
            jobs = [Job(query, "test") for query in asked if query is not None]
            return engine.identity.fingerprint, [await engine.score(job) for job in jobs]
        finally:
            await engine.close()

    fingerprint, expected = asyncio.run(ask_engine())
    assert answered.fingerprint == fingerprint
    given = [answer for answer in answered.documents if answer is not None]
    assert len(given) == len(expected) == 6 and answered.documents[3] is None
    for ours, theirs in zip(given, expected, strict=True):
        assert ours.tensors().keys() == theirs.tensors().keys()
        for name in ("lse", "next_logprob", "log_z", "logprobs", "gather_logprobs", "hidden"):
            one, other = getattr(ours, name), getattr(theirs, name)
            np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=2e-3, atol=2e-3)
        assert (ours.ids == theirs.ids).mean() > 0.98


def test_an_answer_depends_on_its_batch_alone(settings: TeacherSettings) -> None:
    one, other = batch_of(100, 90, 31), batch_of(80, 85, seed=1)
    alone = fetch(LocalTargets(settings), one)[0]
    for among in (fetch(LocalTargets(settings), other, one, other)[1], fetch(LocalTargets(settings), one)[0]):
        for ours, theirs in zip(among.documents, alone.documents, strict=True):
            for name, array in ours.tensors().items():
                np.testing.assert_array_equal(array, theirs.tensors()[name])


def test_its_head_makes_its_logits_of_its_hidden_states(settings: TeacherSettings) -> None:
    async def run() -> tuple[BatchTargets, bytes]:
        targets = LocalTargets(settings)
        await targets.open()
        batch = batch_of(50)
        try:
            return await targets.fetch(batch, queries_of(batch, ASK, gathered(batch))), await targets.head()
        finally:
            await targets.close()

    answered, file = asyncio.run(run())
    weight_VD = load(file)["weight"].numpy()
    (document,) = answered.documents
    logits_RV = document.hidden.astype(np.float32) @ weight_VD.T
    served_RK = document.logprobs.astype(np.float32) + document.lse[:, None]
    computed_RK = np.take_along_axis(logits_RV, document.ids.astype(np.int64), 1)
    np.testing.assert_allclose(computed_RK, served_RK, atol=2e-2)


def test_another_model_than_the_run_began_with_is_refused(settings: TeacherSettings, tmp_path: Path) -> None:
    async def card_of(targets: LocalTargets) -> object:
        try:
            return await targets.open()
        finally:
            await targets.close()

    saved = asdict(asyncio.run(card_of(LocalTargets(settings))))
    assert asyncio.run(card_of(LocalTargets(settings, saved))).fingerprint == saved["fingerprint"]
    other = settings.model_copy(update={"model": str(save_tiny_llama(tmp_path / "other", seed=1))})
    with pytest.raises(WrongTeacherError, match=r"semantic\.weights"):
        asyncio.run(card_of(LocalTargets(other, saved)))
    damaged = saved | {"canary": [x + 0.1 for x in saved["canary"]]}
    with pytest.raises(WrongTeacherError, match="canary"):
        asyncio.run(card_of(LocalTargets(settings, damaged)))


def test_a_token_that_it_has_not_is_named(settings: TeacherSettings) -> None:
    batch = batch_of(20)
    batch.tokens_BT[0, 7] = VOCAB_SIZE
    with pytest.raises(OutOfRangeError, match="d0 has token 512 at position 7"):
        fetch(LocalTargets(settings), batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_run_that_goes_on_keeps_its_dtype_on_other_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """It begins where bfloat16 is computed, or where it is not, and goes on where it is the other way."""
    folder = save_tiny_llama(tmp_path / "model", dtype=torch.bfloat16)
    settings = TeacherSettings(kind="local", model=str(folder))
    card: dict[str, Any] | None = None
    for able in (dtype == torch.bfloat16, dtype != torch.bfloat16):
        monkeypatch.setattr(hardware, "_computes", lambda asked, device, able=able: asked == torch.float32 or able)
        opened = asyncio.run(open_and_close(LocalTargets(settings, card)))
        assert opened.identity is not None and opened.identity["semantic"]["dtype"] == str(dtype)[6:]
        card = asdict(opened)


async def open_and_close(targets: LocalTargets) -> TeacherCard:
    try:
        return await targets.open()
    finally:
        await targets.close()
