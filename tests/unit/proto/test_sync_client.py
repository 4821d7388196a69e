"""The synchronous face gives the same answers, from scripts and from inside a running loop."""

from __future__ import annotations

import threading

import pytest

from teacher_proto.client.sync_client import SyncTeacherClient
from teacher_proto.client.waiting import Waiting
from teacher_proto.errors import TeacherUnavailableError
from teacher_proto.requests import TargetsRequest
from tests.unit.proto.fake_teacher import Replica, network, same_bits, sequences, truth

REQUEST = TargetsRequest(sequences=tuple(sequences(5, 9)), top_k=4)


def test_targets_without_a_loop() -> None:
    teacher = Replica()
    with SyncTeacherClient(teacher.url, transport=network(teacher)) as client:
        assert client.teacher().kinds[0] == "top_k"
        answers = client.targets(REQUEST)
    assert all(same_bits(answer, truth(REQUEST, i)) for i, answer in enumerate(answers))
    assert not any(thread.name == "teacher-client" for thread in threading.enumerate())
    client.close()


def test_progress_and_what_came_before() -> None:
    teacher, heard = Replica(), list[Waiting]()
    with SyncTeacherClient(teacher.url, transport=network(teacher)) as client:
        assert client.waiting() is None
        given = {0: truth(REQUEST, 0)}
        answers = client.targets(REQUEST, given=given, on_progress=heard.append)
        assert [len(post.sequences) for post in teacher.posts] == [1]
    assert sorted(given) == [0, 1] and same_bits(answers[1], truth(REQUEST, 1))
    assert [(waiting.tokens_done, waiting.tokens) for waiting in heard] == [(9, 9)]


async def test_targets_inside_a_loop() -> None:
    teacher = Replica()
    with SyncTeacherClient(teacher.url, transport=network(teacher)) as client:
        assert len(client.targets(REQUEST)) == 2


def test_errors_come_through() -> None:
    with SyncTeacherClient("http://nobody", transport=network()) as client, pytest.raises(TeacherUnavailableError):
        client.teacher()
