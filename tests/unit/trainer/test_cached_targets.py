"""A target store as a teacher: what is there comes back bit for bit, what is not is said or asked for, and answers of
two teachers are never mixed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.settings import TeacherSettings
from student_trainer.targets import open as open_module
from student_trainer.targets.background import EventThread
from student_trainer.targets.cached import CachedTargets, MissingTargetsError
from student_trainer.targets.protocol import Targets
from student_trainer.targets.queries import queries_of
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.errors import NotFoundError, WrongTeacherError
from teacher_proto.requests import TargetSpec
from teacher_proto.store.target_store import TargetStore
from tests.trainer_run import ScriptedTargets, teacher_script
from tests.unit.proto.fake_teacher import FakeClock, Replica, identity, network
from tests.unit.trainer.test_align import batch_of

ASK = TargetSpec(("top_k",), 8, (2.0,))
BATCH, OTHER = batch_of([7, 12, 1], [24]), batch_of([9, 11])


def run(targets: CachedTargets, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def opened() -> Any:
        try:
            return await work()
        finally:
            await targets.close()

    return asyncio.run(opened())


def fetch_all(targets: CachedTargets, *batches: Any) -> list[BatchTargets]:
    async def work() -> list[BatchTargets]:
        await targets.open()
        return [await targets.fetch(batch, queries_of(batch, ASK)) for batch in batches]

    return run(targets, work)


def assert_same(one: BatchTargets, other: BatchTargets) -> None:
    for ours, theirs in zip(one.documents, other.documents, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            for name, array in theirs.tensors().items():
                np.testing.assert_array_equal(ours.tensors()[name], array)


def test_what_is_missing_is_asked_for_once_and_kept(tmp_path: Path) -> None:
    truth = asyncio.run(ScriptedTargets().fetch(BATCH, queries_of(BATCH, ASK)))
    behind = ScriptedTargets()
    with TargetStore(tmp_path) as store:
        cached = CachedTargets(store, None, behind)
        for answered in fetch_all(cached, BATCH):
            assert_same(answered, truth)
        assert (cached.hits, cached.misses) == (0, 3)
        again = CachedTargets(store, None, ScriptedTargets())
        assert_same(fetch_all(again, BATCH)[0], truth)
        assert (again.hits, again.misses) == (3, 0)
    with TargetStore(tmp_path, readonly=True) as store:
        assert_same(fetch_all(CachedTargets(store, None), BATCH)[0], truth)


def test_a_miss_without_anybody_behind_says_how_many_and_what_to_do(tmp_path: Path) -> None:
    with TargetStore(tmp_path) as store:
        fetch_all(CachedTargets(store, None, ScriptedTargets()), BATCH)
    with TargetStore(tmp_path, readonly=True) as store:
        cached = CachedTargets(store, None)
        with pytest.raises(MissingTargetsError, match="lacks 2 of the 2 documents of batch 0") as caught:
            fetch_all(cached, BATCH, OTHER)
        said = str(caught.value)
        assert "s:0:0" in said and "2 documents so far" in said and "--temperatures 2" in said
        assert "stillhouse-teacher fill" in said and "teacher.on_miss=remote" in said


def test_a_store_alone_serves_neither_gather_nor_a_head(tmp_path: Path) -> None:
    with TargetStore(tmp_path) as store:
        fetch_all(CachedTargets(store, None, ScriptedTargets()), BATCH)
        cached = CachedTargets(store, None)

        async def work() -> None:
            assert (await cached.open()).kinds == ("top_k", "score", "sampled")
            await cached.head()

        with pytest.raises(NotFoundError, match="no output head"):
            run(cached, work)


def test_answers_of_two_teachers_are_never_mixed(tmp_path: Path) -> None:
    swapped = {"semantic.weights": '{"scripted": "swapped"}'}
    with TargetStore(tmp_path) as store:
        fetch_all(CachedTargets(store, None, ScriptedTargets()), BATCH)
        with pytest.raises(WrongTeacherError, match="the two would be mixed"):
            fetch_all(CachedTargets(store, None, ScriptedTargets(teacher_script(identity=swapped))), OTHER)
        other = ScriptedTargets(teacher_script(identity=swapped))
        info = asyncio.run(other.open()).info()
        store.remember(info)
        with pytest.raises(ValueError, match=r"choose one with teacher\.fingerprint"):
            fetch_all(CachedTargets(store, None), BATCH)
        named = ScriptedTargets().engine.identity.fingerprint
        assert fetch_all(CachedTargets(store, named), BATCH)[0].fingerprint == named
        with pytest.raises(MissingTargetsError):
            fetch_all(CachedTargets(store, info.fingerprint), BATCH)


def test_a_replica_with_other_rounding_writes_nothing_under_the_fingerprint_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Replica()
    make = partial(TeacherClient, transport=network(teacher), timing=FakeClock().timing())
    monkeypatch.setattr(open_module, "TeacherClient", make)
    settings = TeacherSettings(kind="cached", store=str(tmp_path), on_miss="remote", url=(teacher.url,))

    def fetch(thread: EventThread, targets: Targets, batch: Batch) -> BatchTargets:
        return thread.call(targets.fetch(batch, queries_of(batch, ASK)))

    with ExitStack() as stack:
        thread = stack.enter_context(EventThread())
        opened = open_module.open_teacher(settings, thread, stack)
        fetch(thread, opened.targets, BATCH)
        teacher.identity = identity(engine_version="2")
        with pytest.raises(WrongTeacherError, match=r"numeric\.engine_version"):
            fetch(thread, opened.targets, OTHER)
    with TargetStore(tmp_path, readonly=True) as store:
        fetch_all(CachedTargets(store, None), BATCH)
        with pytest.raises(MissingTargetsError, match="lacks 2 of the 2"):
            fetch_all(CachedTargets(store, None), OTHER)


def test_a_store_of_another_teacher_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    other = ScriptedTargets(teacher_script(identity={"semantic.dtype": "bfloat16"}))
    saved = asdict(asyncio.run(other.open()))
    with TargetStore(tmp_path) as store:
        fetch_all(CachedTargets(store, None, ScriptedTargets()), BATCH)
        with pytest.raises(WrongTeacherError, match=r"semantic\.dtype"):
            fetch_all(CachedTargets(store, None, None, saved), BATCH)


def test_an_empty_store_without_anybody_behind_says_so(tmp_path: Path) -> None:
    with TargetStore(tmp_path) as store, pytest.raises(ValueError, match="of no teacher"):
        fetch_all(CachedTargets(store, None), BATCH)
