"""The target store: what it answers out of what it has, bit for bit, and what leaves when it is full."""

from __future__ import annotations

import lzma
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_proto.requests import KINDS, Kind, Query, TargetSpec
from teacher_proto.store.entry import entry_key, requested_entries, split
from teacher_proto.store.target_store import TargetStore
from teacher_proto.store.writer import StoreWriter
from teacher_proto.targets import TokenTargets, check_targets
from teacher_service.engines.scripted_model import reduce_sequence, scripted_head, scripted_hidden
from tests.unit.proto.fake_teacher import Replica, same_bits
from tests.unit.proto.records import all_kinds, make_record

GOLDEN = Path(__file__).parents[2] / "golden" / "store_v1"
VOCAB = 300
FINGERPRINT = "5e1f.c0de"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TargetStore]:
    with TargetStore(tmp_path / "store", 64 * 2**20) as store:
        yield store


def ask(length: int = 12, rows: tuple[int, int] | None = None, seed: int = 0, vocab: int = VOCAB, **spec: Any) -> Query:
    rng = np.random.default_rng([seed, length])
    tokens_T = rng.integers(0, vocab, length)
    kinds: tuple[Kind, ...] = spec.pop("kinds", ("top_k",))
    defaults: dict[str, Any] = {}
    if "top_k" in kinds:
        defaults |= {"top_k": 8, "temperatures": (1.0, 2.0, 5.0)}
    if "gather" in kinds:
        defaults |= {"temperatures": (1.0, 2.0, 5.0)}
    if "sampled" in kinds:
        defaults |= {"num_samples": 9, "seed": 4}
    if "hidden" in kinds:
        defaults |= {"hidden_dtype": "int8"}
    rows = rows or (0, length)
    gather = rng.integers(0, vocab, (length, 3))[rows[0] : rows[1]] if "gather" in kinds else None
    return Query(tokens_T, rows, TargetSpec(kinds=kinds, **(defaults | spec)), gather)


def truth(asked: Query, vocab: int = VOCAB) -> TokenTargets:
    head, hidden = scripted_head(vocab), scripted_hidden(asked.tokens_T)
    return reduce_sequence(asked, hidden, head)


def put(store: TargetStore, *asked: Query) -> None:
    for one in asked:
        store.put(FINGERPRINT, one, truth(one))


def check(store: TargetStore, asked: Query, vocab: int = VOCAB) -> None:
    """The store answers, and with the bits of a teacher that was asked for exactly this."""
    answer = store.get(FINGERPRINT, asked)
    assert answer is not None
    assert same_bits(answer, truth(asked, vocab))


@pytest.mark.parametrize(
    "kinds", [(kind,) for kind in KINDS] + [KINDS, ("score", "hidden"), ("top_k", "score")], ids=str
)
@pytest.mark.parametrize("vocab", [VOCAB, 70_000])
def test_what_went_in_comes_out_bit_for_bit(store: TargetStore, kinds: tuple[Kind, ...], vocab: int) -> None:
    asked = ask(kinds=kinds, vocab=vocab)
    assert store.get(FINGERPRINT, asked) is None and not store.has(FINGERPRINT, asked)
    store.put(FINGERPRINT, asked, truth(asked, vocab))
    check(store, asked, vocab)
    assert store.has(FINGERPRINT, asked)
    assert (store.stats().hits, store.stats().misses) == (1, 1)


@pytest.mark.parametrize(("vocab", "hidden_dtype"), [(300, "int8"), (70_000, "float16")])
def test_what_an_earlier_version_stored_is_found_again(tmp_path: Path, vocab: int, hidden_dtype: str) -> None:
    """`store_v1` was written before queries were one record: keys, descriptions and bytes are those of then."""
    (tmp_path / "data.mdb").write_bytes(lzma.decompress((GOLDEN / "data.mdb.xz").read_bytes()))
    request = all_kinds(vocab, hidden_dtype)
    with TargetStore(tmp_path, 2**20, readonly=True) as store:
        described = {entry_key(entry) for entry, _ in store.entries()}
        assert len(described) == 16
        for index, query in enumerate(request.queries()):
            stored, expected = store.get(FINGERPRINT, query), make_record(request, index, vocab)
            assert stored is not None and {entry_key(e) for e, _ in split(FINGERPRINT, query, stored)} < described
            check_targets(stored, query, vocab)
            np.testing.assert_array_equal(stored.ids, expected.ids)
            np.testing.assert_allclose(stored.log_z, expected.log_z, atol=1e-4)
        assert (store.stats().damaged, store.stats().misses) == (0, 0)


LESS = {
    "fewer rows": ask(rows=(3, 9)),
    "the last row": ask(rows=(11, 12)),
    "smaller K": ask(top_k=3),
    "fewer temperatures": ask(temperatures=(2.0,)),
    "no temperature": ask(temperatures=()),
    "other order": ask(temperatures=(5.0, 1.0)),
    "score alone": ask(kinds=("score",)),
    "all of these": ask(rows=(5, 8), top_k=1, temperatures=(5.0,)),
    "top_k and score": ask(kinds=("top_k", "score"), top_k=2),
}


@pytest.mark.parametrize("name", LESS)
def test_more_answers_less(store: TargetStore, name: str) -> None:
    put(store, ask())
    check(store, LESS[name])


SAMPLED = ask(kinds=("sampled",))
GATHER = ask(kinds=("gather",))
MORE = {
    "more rows": (ask(rows=(2, 9)), ask(rows=(2, 10))),
    "rows before": (ask(rows=(2, 9)), ask(rows=(1, 9))),
    "larger K": (ask(), ask(top_k=9)),
    "another temperature": (ask(), ask(temperatures=(1.0, 3.0))),
    "top_k of a score": (ask(kinds=("score",)), ask()),
    "other tokens": (ask(), ask(seed=1)),
    "other gathered ids": (GATHER, replace(GATHER, gather_ids_RG=np.ones((12, 3), int))),
    "gathered rows": (GATHER, ask(kinds=("gather",), rows=(0, 6))),
    "other seed": (SAMPLED, replace(SAMPLED, spec=replace(SAMPLED.spec, seed=5))),
    "fewer draws": (SAMPLED, ask(kinds=("sampled",), num_samples=5)),
    "draws at another temperature": (SAMPLED, ask(kinds=("sampled",), sample_temperature=2.0)),
    "hidden of another dtype": (ask(kinds=("hidden",)), ask(kinds=("hidden",), hidden_dtype="float16")),
    "another kind too": (ask(), ask(kinds=("top_k", "hidden"))),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_less_never_answers_more(store: TargetStore, name: str) -> None:
    stored, asked = MORE[name]
    put(store, stored)
    assert store.get(FINGERPRINT, asked) is None
    put(store, asked)
    check(store, asked)


def test_another_teacher_is_never_answered_for(store: TargetStore) -> None:
    put(store, ask())
    assert store.get("5e1f.0000", ask()) is None and store.get("5e1f.c0d", ask()) is None


@pytest.mark.parametrize("kind", ["sampled", "hidden"])
def test_rows_of_samples_and_hidden_states_are_cut(store: TargetStore, kind: Kind) -> None:
    put(store, ask(kinds=(kind,)))
    check(store, ask(kinds=(kind,), rows=(4, 7)))


def test_kinds_asked_apart_answer_together(store: TargetStore) -> None:
    for kind in KINDS:
        put(store, ask(kinds=(kind,)))
    check(store, ask(kinds=KINDS))


def test_more_replaces_less_and_less_adds_nothing(store: TargetStore) -> None:
    put(store, ask(top_k=2), ask(kinds=("score",)), ask(rows=(2, 5)))
    assert store.stats().entries == 2
    put(store, ask(top_k=16))
    assert store.stats().entries == 1
    put(store, ask(), ask(kinds=("score",)))
    assert store.stats().entries == 1
    check(store, ask(top_k=16))


def test_entries_survive_closing_and_can_be_read_by_many(tmp_path: Path) -> None:
    with TargetStore(tmp_path, 2**24) as store:
        put(store, ask())
        info = Replica().info
        store.remember(info)
    with TargetStore(tmp_path, readonly=True) as store:
        check(store, ask(top_k=3))
        assert store.teachers() == [info]
        with pytest.raises(AssertionError):
            put(store, ask(seed=1))


def test_a_read_only_folder_can_be_read(tmp_path: Path) -> None:
    with TargetStore(tmp_path, 2**24) as store:
        put(store, ask())
    (tmp_path / "lock.mdb").unlink()
    tmp_path.chmod(0o555)
    try:
        with TargetStore(tmp_path, readonly=True) as store:
            check(store, ask())
    finally:
        tmp_path.chmod(0o755)


def test_no_store_another_format_and_a_file_in_the_way_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no target store at"):
        TargetStore(tmp_path / "none", readonly=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="can't be opened as a target store"):
        TargetStore(tmp_path / "file")
    with TargetStore(tmp_path / "store", 2**24) as store:
        lru = store._lru
        with lru.env.begin(write=True) as txn:
            txn.put(b"format", b"stillhouse targets 9", db=lru.meta)
    with pytest.raises(ValueError, match="'stillhouse targets 9', expected 'stillhouse targets 1'"):
        TargetStore(tmp_path / "store")


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    with TargetStore(tmp_path, 2 * 2**20) as store:
        put(store, ask(seed=0, length=200, top_k=32))
        number = 1
        while store.stats().evicted == 0:
            check(store, ask(seed=0, length=200, top_k=32))
            store.flush()
            put(store, ask(seed=number, length=200, top_k=32))
            number += 1
        assert number > 20
        check(store, ask(seed=0, length=200, top_k=32))
        assert store.get(FINGERPRINT, ask(seed=1, length=200, top_k=32)) is None
        check(store, ask(seed=number - 1, length=200, top_k=32))


def test_the_file_stays_within_its_limit_however_much_is_put(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    limit = 4 * 2**20
    with TargetStore(tmp_path, limit) as store:
        for number in range(150):
            put(store, ask(seed=number, length=int(rng.integers(1, 400)), top_k=int(rng.integers(1, 40))))
            assert (tmp_path / "data.mdb").stat().st_size <= limit
        stats = store.stats()
        assert stats.evicted > 0 and stats.refused == 0 and 0.5 * limit < stats.bytes <= 0.8 * limit
        assert stats.entries + stats.evicted == 150


def test_what_is_larger_than_the_store_is_refused_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with TargetStore(tmp_path, 2**20) as store:
        put(store, ask(length=800, top_k=100))
        assert store.stats().refused == 1 and "too large" in caplog.text
        put(store, ask())
        check(store, ask())


def test_a_smaller_limit_is_kept_to_from_then_on(tmp_path: Path) -> None:
    with TargetStore(tmp_path, 8 * 2**20) as store:
        for number in range(100):
            put(store, ask(seed=number, length=300, top_k=30))
    with TargetStore(tmp_path, 2 * 2**20) as store:
        put(store, ask(seed=1000, length=300, top_k=30))
        assert store.stats().bytes <= 2 * 2**20
        check(store, ask(seed=1000, length=300, top_k=30))


def spoil(store: TargetStore, asked: Query, at: int) -> None:
    """Change a byte of the stored bytes themselves."""
    with store._lru.env.begin(write=True) as txn:
        key = entry_key(next(iter(requested_entries(FINGERPRINT, asked))))
        value = bytearray(txn.get(key, db=store._lru.records))
        value[at] ^= 0x10
        txn.put(key, bytes(value), db=store._lru.records)


def test_every_changed_byte_of_an_entry_is_a_miss_and_is_written_again(store: TargetStore) -> None:
    asked = ask(length=3, top_k=2)
    put(store, asked)
    with store._lru.env.begin() as txn:
        size = len(txn.get(entry_key(requested_entries(FINGERPRINT, asked)[0]), db=store._lru.records))
    for at in range(size):
        spoil(store, asked, at)
        assert store.get(FINGERPRINT, asked) is None, f"byte {at} of {size}"
        put(store, asked)
        check(store, asked)
    store.flush()
    check(store, asked)
    assert store.stats().entries == 1 and store.stats().damaged > 0.9 * size


def test_an_entry_under_another_s_key_is_a_miss(store: TargetStore) -> None:
    mine, other = ask(seed=1), ask(seed=2)
    put(store, mine, other)
    with store._lru.env.begin(write=True) as txn:
        keys = [entry_key(next(iter(requested_entries(FINGERPRINT, each)))) for each in (mine, other)]
        txn.put(keys[0], bytes(txn.get(keys[1], db=store._lru.records)), db=store._lru.records)
    assert store.get(FINGERPRINT, mine) is None
    check(store, other)


def test_a_damaged_entry_that_nobody_writes_again_is_forgotten(store: TargetStore) -> None:
    put(store, ask(), ask(seed=1))
    spoil(store, ask(), 50)
    assert store.get(FINGERPRINT, ask()) is None
    store.flush()
    assert store.stats().entries == 1
    check(store, ask(seed=1))


def test_entries_can_all_be_walked_and_damaged_ones_are_passed_over(store: TargetStore) -> None:
    put(store, *(ask(seed=n) for n in range(5)))
    spoil(store, ask(seed=2), 60)
    walked = list(store.entries())
    assert len(walked) == 4
    for entry, targets in walked:
        found = next(n for n in range(5) if np.array_equal(entry.tokens_T, ask(seed=n).tokens_T))
        assert same_bits(targets, truth(ask(seed=found))) and entry.fingerprint == FINGERPRINT


def test_threads_may_share_a_store(store: TargetStore) -> None:
    faults: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 15):
                put(store, ask(seed=number % 20))
                check(store, ask(seed=number % 20, top_k=2))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(n * 3,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and store.stats().entries == 20


def test_writer_batches_and_closes_when_all_is_written(store: TargetStore) -> None:
    writer = StoreWriter(store, delay_s=0.01)
    for number in range(30):
        assert writer.add(FINGERPRINT, ask(seed=number), truth(ask(seed=number)))
    writer.flush()
    assert store.stats().entries == 30 and writer._pending_bytes == 0
    writer.add(FINGERPRINT, ask(seed=99), truth(ask(seed=99)))
    writer.close()
    check(store, ask(seed=99))
    assert not writer.add(FINGERPRINT, ask(), truth(ask())) and writer.dropped == 1


def test_writer_drops_what_it_has_no_memory_for(store: TargetStore) -> None:
    size = truth(ask()).nbytes
    writer = StoreWriter(store, max_pending_bytes=2 * size, delay_s=30)
    added = [writer.add(FINGERPRINT, ask(seed=n), truth(ask(seed=n))) for n in range(5)]
    assert added == [True, True, False, False, False] and writer.dropped == 3
    writer.close()
    assert store.stats().entries == 2


def test_a_disk_that_is_full_for_a_while_does_not_end_the_writing(
    store: TargetStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(batch: object) -> None:
        raise OSError(28, "No space left on device")

    writer = StoreWriter(store, delay_s=0.01)
    with monkeypatch.context() as patched:
        patched.setattr(store, "put_entries", full)
        assert writer.add(FINGERPRINT, ask(seed=1), truth(ask(seed=1)))
        writer.flush()
    assert writer.dropped == 1 and "No space left on device" in caplog.text
    assert writer.add(FINGERPRINT, ask(seed=2), truth(ask(seed=2)))
    writer.close()
    check(store, ask(seed=2))


def test_a_writer_that_a_bug_ended_keeps_nobody_waiting(store: TargetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    monkeypatch.setattr(store, "put_entries", lambda batch: 1 / 0)
    writer = StoreWriter(store, delay_s=0.01)
    writer.add(FINGERPRINT, ask(), truth(ask()))
    writer.flush()
    writer.close()
    assert seen and not writer.add(FINGERPRINT, ask(), truth(ask()))
