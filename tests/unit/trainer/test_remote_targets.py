"""`RemoteTargets` against teachers without sockets: what has come is kept, what can't be asked is refused at the start,
and a document that no engine survives is named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from student_trainer.batch.batch import Batch, Document
from student_trainer.cli.compose import compose
from student_trainer.settings import TeacherSettings
from student_trainer.targets.admission import Admits, check_admission
from student_trainer.targets.patience import retry_until
from student_trainer.targets.protocol import TeacherCard
from student_trainer.targets.queries import queries_of
from student_trainer.targets.remote import RemoteTargets
from teacher_proto.client.replicas import RetryPolicy
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.errors import DeadlyRequestError, TeacherUnavailableError
from teacher_proto.requests import Limits, TargetSpec
from tests.unit.proto.fake_teacher import VOCAB, FakeClock, Replica, network, problem, spoil_body

MARK = b"\xa4type\xa7targets"
ASK = TargetSpec(("top_k",), top_k=4)


def batch_of(*lengths: int, token: int | None = None) -> Batch:
    """A row a document; the last of them holds `token`."""
    width = max(lengths)
    tokens_BT = np.random.default_rng(0).integers(0, 200, (len(lengths), width)).astype(np.int32)
    if token is not None:
        tokens_BT[-1, 1] = token
    mask_BT = np.arange(width) < np.array(lengths)[:, None] - 1
    documents = tuple(Document(n, 0, length, "a", f"a:{n}") for n, length in enumerate(lengths))
    zeros_BT = np.zeros((len(lengths), width), np.int32)
    return Batch(
        number=0, tokens_BT=tokens_BT, position_ids_BT=zeros_BT, document_ids_BT=zeros_BT, loss_mask_BT=mask_BT,
        source_ids_BT=zeros_BT, source_names=("a",), documents=documents,
    )  # fmt: skip


def targets_of(teacher: Replica, clock: FakeClock, deadline_s: float = 300.0, **settings: Any) -> RemoteTargets:
    return RemoteTargets(
        lambda: TeacherClient(
            teacher.url, transport=network(teacher), timing=clock.timing(), policy=RetryPolicy(deadline_s=deadline_s)
        ),
        [teacher.url],
        TeacherSettings(**settings),
    )


def cut_after(teacher: Replica, records: int, then: Callable[[], None] = lambda: None) -> Callable[..., Any]:
    def fault(http: httpx.Request) -> Any:
        then()
        return spoil_body(lambda body: body[: [m for m in range(len(body)) if body.startswith(MARK, m)][records] - 1])(
            http
        )

    return fault


async def test_records_that_came_before_a_deadline_are_not_asked_for_again() -> None:
    teacher, clock = Replica(), FakeClock()
    targets = targets_of(teacher, clock, deadline_s=5.0)
    await targets.open()

    def leave() -> None:
        teacher.down = httpx.ConnectError("gone")

    def come_back(reason: str) -> None:
        if reason:
            teacher.down = None

    note = targets._note

    def hear(reason: str) -> None:
        note(reason)
        come_back(reason)

    targets._note = hear  # type: ignore[method-assign]
    teacher.faults += [cut_after(teacher, 3, leave), cut_after(teacher, 1, leave)]
    batch = batch_of(5, 9, 30, 12, 7, 8)
    answer = await targets.fetch(batch, queries_of(batch, ASK))
    await targets.close()
    assert all(document is not None for document in answer.documents)
    asked = [len(tokens_T) for post in teacher.posts for tokens_T in post.sequences]
    # The fake answers the last first: three come, then one of the rest, then the others; one by one, since a teacher
    # that vanished twice over them may have died of one.
    assert [len(post.sequences) for post in teacher.posts] == [6, 3, 1, 1]
    assert asked == [5, 9, 30, 12, 7, 8, 5, 9, 30, 5, 9]
    assert client_errors(targets) >= 2


def client_errors(targets: RemoteTargets) -> int:
    assert targets.client is not None
    return sum(targets.client.stats.errors.values())


async def test_what_comes_between_keeps_the_patience_alive() -> None:
    came, tries = [0], [0]

    async def attempt() -> str:
        tries[0] += 1
        came[0] += tries[0] < 4
        if tries[0] < 5:
            raise TeacherUnavailableError("busy")
        return "all"

    # There are four pauses of half a second, three of them after something came.
    assert await retry_until(attempt, 0.9, lambda reason: None, "teacher", lambda: came[0]) == "all"
    tries[0] = 10

    async def never() -> str:
        raise TeacherUnavailableError("busy")

    with pytest.raises(TeacherUnavailableError, match=r"teacher.outage_timeout_s is 0.1"):
        await retry_until(never, 0.1, lambda reason: None, "teacher", lambda: came[0])


async def test_a_document_that_the_engine_dies_of_is_named_with_its_tokens() -> None:
    teacher, clock = Replica(), FakeClock()

    def die(http: httpx.Request) -> Any:
        deadly = any((tokens_T == 299).any() for tokens_T in teacher.posts[-1].sequences)
        return problem(503, "engine_dead", "the engine is dead", retryable=True) if deadly else None

    teacher.faults += [die] * 50
    targets = targets_of(teacher, clock)
    await targets.open()
    batch = batch_of(5, 9, 12, token=299)
    with pytest.raises(
        DeadlyRequestError, match=r"document a:2: the engine dies on one sequence of 12 tokens"
    ) as caught:
        await targets.fetch(batch, queries_of(batch, ASK))
    await targets.close()
    assert str(batch.tokens_BT[2, 0]) in str(caught.value) and "299" in str(caught.value)
    # All at once, the others alone, and this one alone twice.
    assert [len(post.sequences) for post in teacher.posts] == [3, 1, 1, 1, 1]


def card(**limits: Any) -> TeacherCard:
    teacher = Replica()
    teacher.limits = Limits(vocab_size=VOCAB, max_sequence_length=4096, **limits)
    info = teacher.info
    return TeacherCard("fake", info.fingerprint, VOCAB, 4096, "t", 256, info.kinds, admits=Admits.of(info))


GATHER = ("distillation.terms.rkl.kind=reverse_kl", "distillation.terms.rkl.support=gather")
FULL = ("distillation.terms.fkl.kind=forward_kl", "distillation.terms.fkl.support=full")


@pytest.mark.parametrize(
    ("limits", "overrides", "message"),
    [
        ({}, GATHER, None),
        ({}, FULL, None),
        ({"max_cost": 1024 * 65}, (), None),
        ({"max_cost": 1024 * 65 - 1}, (), r"costs 66560 .*admits 66559: lower data.seq_len to 1023.*--capacity 66560"),
        ({"max_cost": 1024 * 4161}, FULL, None),
        ({"max_cost": 1024 * 4161 - 1}, FULL, r"top_k of 64 costs .* lower data.seq_len to 1023"),
        ({"max_gather": 32}, GATHER, r"gather_k of 64: the teacher gathers at most 32 ids per token"),
        (
            {"max_body_bytes": 200_000},
            GATHER,
            r"gather_k of 64 needs a request of \d+ bytes, but the teacher reads 200000",
        ),
        ({"max_request_tokens": 1000}, (), r"accepts 1000 tokens per request, lower data.seq_len"),
    ],
)
def test_what_would_not_fit_is_refused_before_anything_is_asked(
    limits: dict[str, Any], overrides: tuple[str, ...], message: str | None
) -> None:
    settings = compose(["distillation=none", "distillation.terms.kl.kind=top_k_kl", "data.seq_len=1024", *overrides])
    if message is None:
        check_admission(settings, card(**limits))
        return
    with pytest.raises(ValueError, match=message):
        check_admission(settings, card(**limits))
