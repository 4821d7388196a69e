"""Targets that do not belong to the tokens they came for are seen before the first step; sound ones pass."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.targets.queries import queries_of
from student_trainer.targets.sanity import check_alignment
from teacher_proto.errors import InvalidTargetsError
from teacher_proto.requests import TargetSpec
from tests.models import VOCAB_SIZE
from tests.trainer_run import ScriptedTargets, write_documents

ASK = TargetSpec(("top_k",), 16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Sequences that the scripted teacher would write."""
    path = write_documents(tmp_path_factory.mktemp("sanity") / "text.jsonl", 24, seed=5)
    documents = [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]
    rows = [[Placed(0, f"s:{i}", np.array(tokens, np.int32), None)] for i, tokens in enumerate(documents)]
    return build_batch(0, rows, 64, 0, ("x",))


def noise(rows: int) -> Batch:
    draw = np.random.default_rng(0)
    placed = [[Placed(0, "s", draw.integers(0, VOCAB_SIZE, 40, dtype=np.int32), None)] for _ in range(rows)]
    return build_batch(0, placed, 64, 0, ("x",))


def answer(batch: Batch, ask: TargetSpec = ASK, **script: object) -> BatchTargets:
    return asyncio.run(ScriptedTargets({"vocab_size": VOCAB_SIZE, **script}).fetch(batch, queries_of(batch, ask)))


@pytest.mark.parametrize("top_k", [1, 16, 512])
def test_a_sound_teacher_passes(text: Batch, top_k: int) -> None:
    check_alignment(text, answer(text, TargetSpec(("top_k",), top_k)), VOCAB_SIZE)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_teacher_that_is_off_by_one_is_seen(text: Batch, shift: int) -> None:
    with pytest.raises(InvalidTargetsError, match="off by one"):
        check_alignment(text, answer(text, shift=shift), VOCAB_SIZE)


def test_tensors_of_different_rows_contradict_each_other(text: Batch) -> None:
    sound = answer(text)
    mixed = [
        None if t is None or t.next_logprob is None else replace(t, next_logprob=np.roll(t.next_logprob, 1))
        for t in sound.documents
    ]
    with pytest.raises(InvalidTargetsError, match="contradict"):
        check_alignment(text, replace(sound, documents=tuple(mixed)), VOCAB_SIZE)


def test_a_teacher_of_other_ids_is_absurd(text: Batch) -> None:
    """The same text with its ids permuted: what a wrong tokenizer looks like."""
    permuted = replace(text, tokens_BT=(text.tokens_BT * 7 + 3) % VOCAB_SIZE)
    with pytest.raises(InvalidTargetsError, match="blind guessing"):
        check_alignment(permuted, answer(permuted), VOCAB_SIZE)


def test_a_batch_too_small_to_tell_passes() -> None:
    batch = build_batch(0, [[Placed(0, "s", np.arange(6, dtype=np.int32), None)]], 8, 0, ("x",))
    check_alignment(batch, answer(batch, shift=1), VOCAB_SIZE)


def finding(batch: Batch, targets: BatchTargets) -> str:
    """What is found wrong; empty where nothing is."""
    try:
        check_alignment(batch, targets, VOCAB_SIZE)
    except InvalidTargetsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_noise_is_not_called_shifted(shift: int) -> None:
    """On text that nobody can predict no shift wins, whatever it is; that it is noise is another finding."""
    batch = noise(8)
    assert "blind guessing" in finding(batch, answer(batch, shift=shift))


def test_text_of_one_token_again_and_again_is_not_called_shifted() -> None:
    draw = np.random.default_rng(1)
    rows = [[Placed(0, "s", np.full(40, draw.integers(VOCAB_SIZE), np.int32), None)] for _ in range(8)]
    batch = build_batch(0, rows, 64, 0, ("x",))
    assert "off by one" not in finding(batch, answer(batch))
