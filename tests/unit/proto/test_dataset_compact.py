"""The compact codec: the same ids, the largest and the next token's logprob, an error that is measured and told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_proto.dataset.check import check_dataset, dataset_stats, merge_dataset
from teacher_proto.dataset.codecs import parse_codec
from teacher_proto.dataset.compact import tail_kl
from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.dataset.folder import Folder
from teacher_proto.dataset.manifest import Manifest
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import Query
from teacher_proto.store.entry import split
from teacher_proto.targets import TokenTargets, check_targets
from tests.unit.proto.fake_teacher import Replica, same_bits
from tests.unit.proto.test_store import ask, truth

GOLDEN = Path(__file__).parents[2] / "golden" / "dataset_compact1"


def info(vocab: int) -> TeacherInfo:
    limits = Replica().info.limits.model_copy(update={"vocab_size": vocab})
    return Replica().info.model_copy(update={"limits": limits})


def kept(folder: Path, asked: list[Query], bits: int, vocab: int = 300, codec: str = "compact") -> list[TokenTargets]:
    """What comes out of a dataset that these were put into."""
    owner = info(vocab)
    manifest = Manifest(owner, asked[0].spec, parse_codec(f"{codec}:{bits}"))
    with TargetDataset(str(folder), create=manifest) as dataset:
        dataset.add_shard([split(owner.fingerprint, one, truth(one, vocab)) for one in asked])
    with TargetDataset(str(folder), readonly=True) as dataset:
        answers = [dataset.get(owner.fingerprint, one) for one in asked]
    assert all(answer is not None for answer in answers)
    return [answer for answer in answers if answer is not None]


def by_id(targets: TokenTargets) -> tuple[np.ndarray, np.ndarray]:
    assert targets.ids is not None and targets.logprobs is not None
    order = np.argsort(targets.ids, axis=1)
    return (np.take_along_axis(targets.ids, order, 1),
            np.take_along_axis(targets.logprobs, order, 1).astype(np.float64))  # fmt: skip


@pytest.mark.parametrize(("bits", "most"), [(2, 0.2), (4, 5e-3), (8, 2e-5)])
@pytest.mark.parametrize("vocab", [300, 70_000])
def test_what_comes_back_is_near_what_went_in(tmp_path: Path, bits: int, most: float, vocab: int) -> None:
    asked = [ask(seed=n, length=20 + n, vocab=vocab, top_k=16) for n in range(6)]
    for one, answer in zip(asked, kept(tmp_path, asked, bits, vocab), strict=True):
        exact = truth(one, vocab)
        check_targets(answer, one, vocab)
        (ids, logprobs), (kept_ids, kept_logprobs) = by_id(exact), by_id(answer)
        assert (ids == kept_ids).all() and answer.ids is not None and exact.ids is not None
        assert exact.logprobs is not None and answer.logprobs is not None
        # The largest as it was; all of them together weigh no more than they did, and no less but for few bits.
        assert (answer.logprobs[:, 0] == exact.logprobs[:, 0]).all()
        mass, kept_mass = np.exp(logprobs).sum(1), np.exp(kept_logprobs).sum(1)
        assert (kept_mass <= mass + 2e-3).all() and (kept_mass >= mass - {2: 0.02, 4: 0.01, 8: 2e-3}[bits]).all()
        assert tail_kl(logprobs, kept_logprobs).mean() < most
        for name, steps in (("lse", 2.0**-11), ("next_logprob", 2.0**-11), ("log_z", 2.0**-11)):
            np.testing.assert_allclose(getattr(answer, name), getattr(exact, name), rtol=steps, equal_nan=True)


def test_the_next_tokens_logprob_is_that_of_float16(tmp_path: Path) -> None:
    """Its own rounding alone, also where it is among the K: a label's logprob is not one level of four."""
    asked = [ask(seed=n, length=40, top_k=32) for n in range(4)]
    seen = 0
    for one, answer in zip(asked, kept(tmp_path, asked, 2), strict=True):
        exact = truth(one)
        assert answer.ids is not None and answer.logprobs is not None and exact.next_logprob is not None
        rows, columns = np.nonzero(answer.ids[:-1] == one.tokens_T[1:, None])
        seen += len(rows)
        assert (answer.logprobs[rows, columns] == exact.next_logprob[rows].astype(np.float16)).all()
    assert seen > 5


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_few_logprobs_are_kept_too(tmp_path: Path, top_k: int) -> None:
    asked = [ask(seed=n, top_k=top_k) for n in range(3)]
    for one, answer in zip(asked, kept(tmp_path, asked, 8), strict=True):
        (_, logprobs), (_, kept_logprobs) = by_id(truth(one)), by_id(answer)
        assert kept_logprobs == pytest.approx(logprobs, abs=4e-3)


def test_part_of_the_rows_and_of_the_k_comes_out(tmp_path: Path) -> None:
    asked = [ask(seed=1, length=20, top_k=16)]
    (whole,) = kept(tmp_path, asked, 8)
    with TargetDataset(str(tmp_path), readonly=True) as dataset:
        spec = ask(seed=1, length=20, top_k=4, temperatures=(2.0,)).spec
        part = dataset.get(dataset.manifest.teacher.fingerprint, Query(asked[0].tokens_T, (3, 9), spec))
    cut = whole.narrow(3, 9, 4)
    assert part is not None and cut.ids is not None and cut.logprobs is not None
    assert (part.ids == cut.ids).all() and (part.logprobs == cut.logprobs).all() and part.log_z is not None
    assert part.log_z.shape == (6, 1)


def test_logprobs_that_are_nothing_cost_the_others_no_resolution(tmp_path: Path) -> None:
    """A teacher that rules ids out gives them -65504."""
    one = ask(seed=3, length=12, top_k=16)
    exact = truth(one)
    assert exact.logprobs is not None
    forbidden = exact.logprobs.copy()
    forbidden[:, -2:] = -65504
    owner, manifest = info(300), Manifest(info(300), one.spec, parse_codec("compact:8"))
    targets = TokenTargets(exact.start, **(exact.tensors() | {"logprobs": forbidden}))
    with TargetDataset(str(tmp_path), create=manifest) as dataset:
        dataset.add_shard([split(owner.fingerprint, one, targets)])
        answer = dataset.get(owner.fingerprint, one)
    assert answer is not None and answer.logprobs is not None
    np.testing.assert_allclose(answer.logprobs[:, :-2].astype(float), forbidden[:, :-2].astype(float), atol=0.2)
    assert (answer.logprobs[:, -2:] < -50).all()


def test_the_error_that_is_told_is_the_one_that_was_made(tmp_path: Path) -> None:
    asked = [ask(seed=n, length=30, top_k=16) for n in range(5)]
    answers = kept(tmp_path, asked, 4)
    sums: dict[str, list[float]] = {"kl": [], "kl_at_2": [], "kl_at_5": []}
    for one, answer in zip(asked, answers, strict=True):
        exact = truth(one)
        (_, logprobs), (_, kept_logprobs) = by_id(exact), by_id(answer)
        assert exact.log_z is not None and answer.log_z is not None
        for column, name in enumerate(sums):
            t = (1.0, 2.0, 5.0)[column]
            p = np.exp(logprobs / t - exact.log_z[:, column, None])
            q = np.exp(kept_logprobs / t - answer.log_z[:, column, None])
            tail_p, tail_q = (np.maximum(1 - x.sum(1), 1e-6) for x in (p, q))
            sums[name] += ((p * np.log(p / q)).sum(1) + tail_p * np.log(tail_p / tail_q)).tolist()
    stats = dataset_stats(Folder(str(tmp_path)))
    for name, values in sums.items():
        assert stats.errors[f"sum_{name}"] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-9)
        assert stats.errors[f"max_{name}"] == pytest.approx(max(values), rel=1e-3, abs=1e-9)


def test_kinds_that_are_no_top_k_are_kept_as_they_are_and_all_of_it_is_checked(tmp_path: Path) -> None:
    asked = [ask(kinds=("top_k", "sampled"), seed=n) for n in range(4)]
    answers = kept(tmp_path, asked, 8)
    for one, answer in zip(asked, answers, strict=True):
        exact = truth(one)
        assert all((getattr(answer, name) == getattr(exact, name)).all() for name in ("sampled_ids", "sampled_counts"))
        assert not same_bits(answer, exact)
    folder = Folder(str(tmp_path))
    assert list(check_dataset(folder)) == [] and merge_dataset(folder) == 1


def test_a_shard_is_smaller_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    asked = [ask(seed=n, length=200, top_k=64) for n in range(30)]
    sizes = {}
    for name, codec in (("a", "compact"), ("b", "compact:8"), ("c", "compact:3"), ("d", "lossless")):
        owner = info(300)
        with TargetDataset(str(tmp_path / name), create=Manifest(owner, asked[0].spec, parse_codec(codec))) as dataset:
            note = dataset.add_shard([split(owner.fingerprint, one, truth(one)) for one in asked])
        sizes[name] = note.bytes, note.sha256
    assert sizes["a"] == sizes["b"] and sizes["c"][0] < sizes["a"][0] < sizes["d"][0]


@pytest.mark.parametrize("text", ["compact:9", "compact:1", "small", "compact:x", "lossless:8"])
def test_a_codec_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--codec .*lossless, compact or compact:BITS"):
        parse_codec(text)


def test_a_codec_of_a_later_version_is_told(tmp_path: Path) -> None:
    manifest: Any = Manifest(info(300), ask().spec, {"name": "smaller"})
    with TargetDataset(str(tmp_path), create=manifest) as dataset, pytest.raises(ValueError, match="update stillhouse"):
        dataset.add_shard([split(info(300).fingerprint, ask(), truth(ask()))])


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("vocab", [300, 70_000])
def test_both_layouts_keep_the_same(tmp_path: Path, bits: int, vocab: int) -> None:
    asked = [ask(seed=n, length=5 + 9 * n, vocab=vocab, top_k=7) for n in range(4)]
    old, new = (kept(tmp_path / name, asked, bits, vocab, name) for name in ("compact1", "compact"))
    assert all(same_bits(one, other) for one, other in zip(old, new, strict=True))


def test_a_dataset_of_the_first_layout_is_read_and_gone_on_with(tmp_path: Path) -> None:
    """`golden/dataset_compact1` was written when there was no other, with 4 bits."""
    shutil.copytree(GOLDEN, tmp_path / "old")
    asked = [ask(seed=n, length=12 + n) for n in range(5)]
    with TargetDataset(
        str(tmp_path / "old"), create=Manifest(info(300), asked[0].spec, parse_codec("compact1:4"))
    ) as old:
        assert old.holds([one.tokens_T for one in asked]).tolist() == [True] * 3 + [False] * 2
        old.add_shard([split(info(300).fingerprint, one, truth(one)) for one in asked[3:]])
        for one in asked:
            answer = old.get(info(300).fingerprint, one)
            assert answer is not None
            check_targets(answer, one, 300)
            (ids, logprobs), (kept_ids, kept_logprobs) = by_id(truth(one)), by_id(answer)
            assert (ids == kept_ids).all() and tail_kl(logprobs, kept_logprobs).mean() < 5e-3
    assert list(check_dataset(Folder(str(tmp_path / "old")))) == []


def test_a_dataset_of_the_first_layout_takes_no_shards_of_another(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "old")
    with pytest.raises(ValueError, match=r"settings differ .* \(codec\.name: compact2 vs compact\)"):
        TargetDataset(str(tmp_path / "old"), create=Manifest(info(300), ask().spec, parse_codec("compact:4")))
