"""Block by block: what is written, by which rows, in how many passes, with and without the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student_trainer.batch.align import cut
from student_trainer.batch.batch import Placed, build_batch
from student_trainer.batch.view import ViewSeed
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.rollouts.block_decoding import BlockDecoder, _Filling
from student_trainer.rollouts.open import sampler_of
from student_trainer.rollouts.sampler import GenerateSampler, Passes
from student_trainer.settings import DiffusionSettings, StudentSettings
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.student import Student
from tests.models import VOCAB_SIZE, save_tiny_llama

CPU = torch.device("cpu")
MASK = VOCAB_SIZE  # a new token behind the vocabulary
PROMPTS = [np.arange(3, 3 + n, dtype=np.int32) * 7 % 60 for n in (1, 4, 9, 6)]
FAMILIES = ("in_place", "token_shift")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("student"))


def student_of(folder: Path, quantiser: str = "none", rank: int | None = None, **diffusion: Any) -> Student:
    settings: dict[str, Any] = {"lora": {"rank": rank}} if rank else {}
    return load_student(
        StudentSettings(
            checkpoint_path=str(folder), compute="float32", architecture="diffusion", quantiser=quantiser,
            diffusion=DiffusionSettings(**{"block_size": 4, **diffusion}), **settings,
        ),
        CPU,
    )  # fmt: skip


def decoder_of(student: Student, **changes: Any) -> BlockDecoder:
    assert isinstance(student.reader, DiffusionReader)
    return BlockDecoder(student, student.reader.record, **changes)


def with_masks(ids_N: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([ids_N, np.full(count, MASK, np.int32)])


@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_nothing(folder: Path, family: str, clean_half: str) -> None:
    """Tokens, the order they were written in, passes; at temperature 0 and drawn, prompts of all lengths beside each
    other."""
    student = student_of(folder, family=family, clean_half=clean_half)
    sequences = [with_masks(ids_N, 11) for ids_N in PROMPTS]
    for temperature in (0.0, 1.0):
        found = [
            decoder_of(student, threshold=0.015, temperature=temperature, cached=cached).fill_in(
                sequences, [np.random.default_rng(seed) for seed in range(len(sequences))]
            )
            for cached in (True, False)
        ]
        for kept, anew in zip(*found, strict=True):
            assert np.array_equal(kept.ids_N, anew.ids_N) and np.array_equal(kept.written_at_N, anew.written_at_N)
            assert kept.passes == anew.passes and kept.logprob == pytest.approx(anew.logprob, rel=1e-4)
            assert (kept.written_at_N > 0).sum() == 11 and not (kept.ids_N == MASK).any()
        assert any(len(np.unique(kept.written_at_N)) < 12 for kept in found[0]), "some were written side by side"


@pytest.mark.parametrize("quantiser, rank", [("bitnet", None), ("none", 4), ("bitnet", 4)])
def test_quantised_and_adapted_students_decode_with_the_cache_as_without(
    folder: Path, quantiser: str, rank: int | None
) -> None:
    student = student_of(folder, quantiser, rank)
    student.before_step(10)
    sequences = [with_masks(ids_N, 9) for ids_N in PROMPTS]
    kept, anew = (decoder_of(student, threshold=0.015, cached=cached).fill_in(sequences) for cached in (True, False))
    for one, other in zip(kept, anew, strict=True):
        # Int8 activations on a tie of rounding may tell the two apart; these seeds have none.
        assert np.array_equal(one.ids_N, other.ids_N)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_is_written_the_same_alone_as_beside_others(folder: Path, family: str) -> None:
    student = student_of(folder, family=family)
    decoder = decoder_of(student, threshold=0.015, temperature=0.8)
    sequences = [with_masks(ids_N, 6 + len(ids_N)) for ids_N in PROMPTS]
    together = decoder.fill_in(sequences, [np.random.default_rng(seed) for seed in range(4)])
    for row, sequence in enumerate(sequences):
        (alone,) = decoder.fill_in([sequence], [np.random.default_rng(row)])
        assert np.array_equal(alone.ids_N, together[row].ids_N) and alone.passes == together[row].passes


def test_at_block_one_and_token_shift_it_is_autoregressive_decoding(folder: Path) -> None:
    """The tokens that transformers' own generate gives, a pass a token, and the same probability of the whole."""
    student = student_of(folder, block_size=1, family="token_shift")
    causal = load_student(StudentSettings(checkpoint_path=str(folder), compute="float32"), CPU)
    expected = GenerateSampler(causal, (1,), 0).sample(PROMPTS, None, new_tokens=10)
    sampler = sampler_of(student, (1,), 0)
    assert sampler is not None
    for ours, theirs in zip(sampler.sample(PROMPTS, None, new_tokens=10), expected, strict=True):
        assert np.array_equal(ours.ids_N, theirs.ids_N) and ours.ended == theirs.ended
        assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-4)
        # The prefill gives the first token, every commit the next one; nothing follows the last.
        assert ours.passes == Passes(prefill=1, denoising=0, commit=len(ours.ids_N) - 1)


@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_shows_what_the_noisy_half_shows_in_training(
    folder: Path, family: str, clean_half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each state of the trajectory, read as a training row, has the hidden rows that the decoder wrote by."""
    student = student_of(folder, family=family, clean_half=clean_half)
    reader: Any = student.reader
    seen: list[tuple[np.ndarray, int, np.ndarray]] = []
    forward = _Filling.forward

    def watched(self: Any, start: int, stop: int, clean: bool, keep: bool) -> torch.Tensor:
        hidden_PSD = forward(self, start, stop, clean, keep)
        if not clean:
            seen.append((self.rows.tokens_PC[0].copy(), start, hidden_PSD[0].numpy().copy()))
        return hidden_PSD

    monkeypatch.setattr(_Filling, "forward", watched)
    (filled,) = decoder_of(student, threshold=0.06).fill_in([with_masks(PROMPTS[3], 10)])
    assert len(seen) > 4
    batch = build_batch(0, [[Placed(0, "x", filled.ids_N, np.arange(16) >= 6)]], 16, 0, ("x",))
    for tokens_C, start, hidden_SD in seen:
        masked_BT = np.zeros((1, 16), bool)
        masked_BT[0, start : start + 4] = tokens_C[start : start + 4] == MASK
        view = reader._view(batch, masked_BT, None)
        with torch.no_grad():
            rows_TD = student.body(view.input_ids_BT, view.position_ids_BT, view.attention)[0, :16].numpy()
        assert np.abs(rows_TD[start : start + 4] - hidden_SD).max() < 2e-5
        for row, label in zip(view.rows_N.tolist(), view.labels_N.tolist(), strict=True):
            place = row + (1 if family == "token_shift" else 0)
            assert masked_BT[0, place] and filled.ids_N[place] == label


def test_what_is_sure_is_written_side_by_side_and_else_the_surest(folder: Path) -> None:
    student = student_of(folder)
    sequence = with_masks(PROMPTS[1], 8)
    one_by_one = decoder_of(student, threshold=1.0).fill_in([sequence])[0]
    assert sorted(one_by_one.written_at_N[4:]) == list(range(1, 9)), "a token a pass"
    assert one_by_one.passes == Passes(prefill=1, denoising=8, commit=1)
    at_once = decoder_of(student, threshold=1e-9).fill_in([sequence])[0]
    assert at_once.written_at_N[4:].tolist() == [1] * 4 + [2] * 4
    assert at_once.passes == Passes(prefill=1, denoising=2, commit=1)
    # The first write of the run one by one is of the surest place.
    with torch.no_grad():
        view_tokens = torch.from_numpy(sequence[None, :8].astype(np.int64))
        batch = build_batch(0, [[Placed(0, "x", np.r_[sequence[:4], np.zeros(4, np.int32)], None)]], 8, 0, ("x",))
        reader: Any = student.reader
        view = reader._view(batch, np.array([[False] * 4 + [True] * 4]), None)
        assert torch.equal(view.input_ids_BT[:, :8], view_tokens)
        hidden_TD = student.body(view.input_ids_BT, view.position_ids_BT, view.attention)[0, 4:8]
        logits_SV = student.head.logits(hidden_TD)[:, :VOCAB_SIZE]
    best_S = torch.softmax(logits_SV.double(), -1).amax(-1)
    assert int(best_S.argmax()) == int(np.flatnonzero(one_by_one.written_at_N[4:8] == 1)[0])
    assert at_once.ids_N[4:8].tolist() == logits_SV.argmax(-1).tolist()


def test_masks_within_given_tokens_are_filled_with_both_sides_in_sight(folder: Path) -> None:
    student = student_of(folder)
    given_N = np.arange(5, 17, dtype=np.int32)
    sequence = given_N.copy()
    sequence[[5, 6, 9]] = MASK
    other = sequence.copy()
    other[7] += 1  # right of the first masks, in their block
    filled, changed = decoder_of(student).fill_in([sequence, other])
    assert np.array_equal(np.flatnonzero(filled.written_at_N), [5, 6, 9])
    assert np.array_equal(filled.ids_N[filled.written_at_N == 0], np.delete(given_N, [5, 6, 9]))
    assert filled.logprob != changed.logprob
    assert filled.passes.prefill == 1 and filled.passes.commit == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_ends_at_its_first_end_once_all_before_it_is_written(folder: Path, family: str) -> None:
    student = student_of(folder, family=family)
    sampler = sampler_of(student, (), 0)
    assert sampler is not None
    free = sampler.sample(PROMPTS, [1, 2, 3, 4], new_tokens=16)
    ends = {int(free[2].ids_N[6]), int(free[0].ids_N[9])}
    ending = sampler_of(student, tuple(ends), 0)
    assert ending is not None
    samples = ending.sample(PROMPTS, [1, 2, 3, 4], new_tokens=16)
    for sample, before in zip(samples, free, strict=True):
        first = np.flatnonzero(np.isin(before.ids_N, list(ends)))
        assert sample.ended == bool(len(first))
        stop = int(first[0]) + 1 if len(first) else 16
        assert np.array_equal(sample.ids_N, before.ids_N[:stop])
        assert sample.passes is not None and before.passes is not None
        assert sample.passes.writing <= before.passes.writing
    assert any(sample.ended for sample in samples)


def test_the_mask_token_and_what_the_teacher_lacks_are_never_written(folder: Path) -> None:
    """A mask token within the vocabulary too."""
    student = student_of(folder, mask_token_id=40)
    student.shared_vocab = 50
    with torch.no_grad():
        student.head.weight_VD[40] += 10 * student.head.weight_VD.norm()  # a head that would love to say it
    decoder = decoder_of(student, temperature=1.0, threshold=0.1)
    masks_N = np.full(40, 40, np.int32)
    rows = [np.concatenate([ids_N % 40, masks_N]) for ids_N in PROMPTS]
    for filled in decoder.fill_in(rows, [np.random.default_rng(seed) for seed in range(4)]):
        wrote_N = filled.ids_N[filled.written_at_N > 0]
        assert wrote_N.max() < 50 and not (wrote_N == 40).any()


def test_draws_are_of_the_students_distribution(folder: Path) -> None:
    """One masked token after a prompt, often."""
    student = student_of(folder, block_size=2)
    prompt_N = np.array([5, 9, 30], np.int32)
    decoder = decoder_of(student, temperature=0.8)
    draws = [np.random.default_rng(seed) for seed in range(3000)]
    drawn = [one.ids_N[3] for one in decoder.fill_in([with_masks(prompt_N, 1)] * 3000, draws)]
    batch = build_batch(0, [[Placed(0, "x", np.r_[prompt_N, 0].astype(np.int32), None)]], 4, 0, ("x",))
    reader: Any = student.reader
    view = reader._view(batch, np.array([[False, False, False, True]]), None)
    (micro,) = cut(batch, None, _Fixed(view), ViewSeed(0))
    p_V = torch.softmax(student.logits(micro)[0, :VOCAB_SIZE].double() / 0.8, -1).numpy()
    counts_V = np.bincount(drawn, minlength=VOCAB_SIZE)
    likely = p_V > 0.005
    error_V = (counts_V / 3000 - p_V) / np.sqrt(p_V * (1 - p_V) / 3000)
    assert likely.sum() > 2 and np.abs(error_V[likely]).max() < 4.5


class _Fixed:
    """A reader of one view."""

    autoregressive = False

    def __init__(self, view: Any):
        self._view = view

    def views(self, batch: Any, seed: Any) -> Any:
        return (self._view,)


def test_what_cannot_be_filled_is_refused(folder: Path) -> None:
    student = student_of(folder)
    with pytest.raises(ValueError, match="its first token must be given"):
        decoder_of(student).fill_in([with_masks(np.array([], np.int32), 3)])
    with pytest.raises(ValueError, match=r"threshold: got 0\.0, expected a probability"):
        decoder_of(student, threshold=0.0)
    with pytest.raises(ValueError, match="temperature: got -1"):
        decoder_of(student, temperature=-1.0)
    with pytest.raises(ValueError, match="no random generators to draw from"):
        decoder_of(student, temperature=1.0).fill_in([with_masks(PROMPTS[0], 3)])
    assert decoder_of(student).fill_in([]) == []
