"""The client and who answers: every response under the right fingerprint, every connect with the canary."""

from __future__ import annotations

import base64
import hashlib
import logging
from typing import Any

import httpx
import pytest

from teacher_proto.client.expectation import LENGTHS, Canary, canary_request, tolerance
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.errors import NotFoundError, TruncatedError, WireError, WrongTeacherError
from teacher_proto.identity import compare_fingerprints
from teacher_proto.requests import TargetsRequest
from tests.unit.proto.fake_teacher import (
    FakeClock,
    Replica,
    identity,
    network,
    problem,
    refuse,
    same_bits,
    sequences,
    truth,
)

REQUEST = TargetsRequest(sequences=tuple(sequences(5, 9)), top_k=4)
SEMANTIC: dict[str, Any] = {
    "model": "other/model", "revision": "2", "config_sha256": "x", "tokenizer_sha256": "x",
    "weights": {"a.safetensors": "x"}, "dtype": "bfloat16", "quantization": "fp8", "vocab_size": 299,
    "options": {"kv_cache_dtype": "fp8"},
}  # fmt: skip
NUMERIC = {"engine": "x", "engine_version": "2", "device": "x", "parallel": "tp2", "attention_backend": "x"}


def client_of(*replicas: Replica, **arguments: Any) -> TeacherClient:
    timing = FakeClock().timing()
    return TeacherClient([r.url for r in replicas], transport=network(*replicas), timing=timing, **arguments)


@pytest.mark.parametrize("field", SEMANTIC)
@pytest.mark.parametrize("as_text", [False, True])
async def test_every_semantic_field_is_compared_at_connect(field: str, as_text: bool) -> None:
    teacher = Replica(**{field: SEMANTIC[field]})
    expect = identity().fingerprint if as_text else identity()
    async with client_of(teacher, expect=expect) as client:
        for ask in (client.teacher(), client.targets(REQUEST), client.teacher(wait_s=5)):
            with pytest.raises(WrongTeacherError) as caught:
                await ask
            assert (identity().fingerprint if as_text else f"semantic.{field}") in str(caught.value)
    assert teacher.posts == []


@pytest.mark.parametrize("field", NUMERIC)
async def test_every_numeric_field_is_compared_and_can_be_refused(field: str, caplog: pytest.LogCaptureFixture) -> None:
    teacher = Replica(**{field: NUMERIC[field]})
    async with client_of(teacher, expect=identity()) as client:
        with caplog.at_level(logging.WARNING):
            await client.targets(REQUEST)
            await client.targets(REQUEST)
        assert client.stats.numeric_changes == 1
        assert len(caplog.records) == 1 and f"numeric.{field}" in caplog.text
    async with client_of(teacher, expect=identity(), refuse_numeric_change=True) as client:
        with pytest.raises(WrongTeacherError, match=f"numeric.{field}"):
            await client.targets(REQUEST)


async def test_the_expected_teacher_is_let_in_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    async with client_of(Replica(), expect=identity()) as client:
        await client.targets(REQUEST)
        assert client.stats.numeric_changes == 0
    assert caplog.records == []


async def test_a_teacher_swapped_behind_its_port_stops_the_call_with_the_difference() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        await client.targets(REQUEST)
        teacher.identity = identity(revision="2")
        with pytest.raises(WrongTeacherError, match=r"semantic\.revision: expected 1, got 2"):
            await client.targets(REQUEST)
        with pytest.raises(WrongTeacherError):
            await client.targets(REQUEST)
    assert len(teacher.posts) == 2


async def test_a_swapped_teacher_that_does_not_look_at_the_fingerprint_is_noticed_by_its_answer() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        await client.targets(REQUEST)
        teacher.identity = identity(dtype="bfloat16")
        teacher.faults.append(lambda _: {})
        with pytest.raises(WrongTeacherError, match=r"semantic\.dtype: expected float32, got bfloat16"):
            await client.targets(REQUEST)


async def test_a_teacher_restarted_with_other_rounding_is_counted_and_used() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        await client.targets(REQUEST)
        teacher.identity = identity(engine_version="2")
        answers = await client.targets(REQUEST)
        assert all(same_bits(answer, truth(REQUEST, i)) for i, answer in enumerate(answers))
        assert client.stats.numeric_changes == 1
        assert [post.fingerprint for post in teacher.posts][-1] == teacher.identity.fingerprint


async def test_one_wrong_replica_among_right_ones_is_not_passed_over() -> None:
    right, wrong = Replica("t0"), Replica("t1", revision="2")
    async with client_of(right, wrong, expect=identity()) as client:
        with pytest.raises(WrongTeacherError, match="http://t1"):
            await client.teacher()


async def test_a_requests_own_fingerprint_is_held_against_the_teacher() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        await client.targets(REQUEST.model_copy(update={"fingerprint": identity().fingerprint}))
        with pytest.raises(WrongTeacherError, match=r"expected f00d\.0001"):
            await client.targets(REQUEST.model_copy(update={"fingerprint": "f00d.0001"}))
    assert len(teacher.posts) == 1


async def test_damaged_weights_under_the_right_name_are_caught_at_connect() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        await client.targets(REQUEST)
        canary = client.canary
    assert canary is not None and len(canary.logprobs) == sum(LENGTHS) - len(LENGTHS)
    async with client_of(teacher, expect=identity(), expect_canary=canary) as client:
        await client.targets(REQUEST)
    teacher.noise = 1e-2
    async with client_of(teacher, expect=identity(), expect_canary=canary) as client:
        with pytest.raises(WrongTeacherError, match=r"its canary is 0\.00"):
            await client.teacher()
    assert len(teacher.posts) == 2


async def test_a_replica_that_computes_otherwise_is_caught_without_an_earlier_run() -> None:
    right, damaged = Replica("t0"), Replica("t1")
    damaged.noise = 1e-2
    async with client_of(right, damaged) as client:
        with pytest.raises(WrongTeacherError, match="canary"):
            await client.teacher()


async def test_the_canary_is_scored_again_at_every_reconnect() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        await client.targets(REQUEST)
        teacher.faults.append(refuse(httpx.ReadTimeout("hangs")))
        await client.targets(REQUEST)
        assert teacher.canaries == 2
        teacher.noise = 1e-2
        teacher.faults.append(refuse(httpx.ReadTimeout("hangs")))
        with pytest.raises(WrongTeacherError, match="canary"):
            await client.targets(REQUEST)


def test_canaries_of_other_sequences_or_of_nan_never_match() -> None:
    assert Canary((1.0, 2.0)).distance(Canary((1.0,))) == float("inf")
    distance = Canary((1.0,)).distance(Canary((float("nan"),)))
    assert not distance <= 1e9


def test_rounding_is_allowed_by_what_the_weights_are() -> None:
    assert tolerance(identity()) == tolerance(identity(dtype="torch.float32")) == 1e-3
    assert tolerance(identity(dtype="bfloat16")) == tolerance(identity(quantization="fp8")) == 5e-2


def test_canary_fits_a_teacher_of_short_sequences_and_few_words() -> None:
    info = Replica().info
    small = info.model_copy(
        update={"limits": info.limits.model_copy(update={"max_sequence_length": 4, "vocab_size": 7})}
    )
    request = canary_request(small)
    assert request is not None and [len(tokens) for tokens in request.sequences] == [4] * 4
    assert max(int(tokens.max()) for tokens in request.sequences) < 7
    again = canary_request(info)
    assert again is not None and len({tokens.tobytes() for tokens in again.sequences}) == 4
    assert canary_request(info.model_copy(update={"kinds": ("hidden",)})) is None


def test_fingerprints_tell_which_half_changed() -> None:
    ours = identity().fingerprint
    assert compare_fingerprints(ours, ours) == "same"
    assert compare_fingerprints(ours, identity(device="x").fingerprint) == "numeric"
    assert compare_fingerprints(ours, identity(revision="x").fingerprint) == "semantic"
    assert compare_fingerprints(ours, ours.split(".")[0]) == "semantic"
    assert compare_fingerprints("", "") == "same" and compare_fingerprints("", ".") == "semantic"


def test_fingerprints_do_not_depend_on_the_order_of_files() -> None:
    one, two = identity(weights={"a": "1", "b": "2"}), identity(weights={"b": "2", "a": "1"})
    assert one.fingerprint == two.fingerprint != identity(weights={"a": "2", "b": "1"}).fingerprint


class HeadReplica(Replica):
    """Gives out a head under the fingerprint `says`; None: its own. `missing` has none to give."""

    def __init__(self, name: str, says: str | None = None, missing: bool = False):
        super().__init__(name)
        self.says, self.missing = says, missing

    def handle(self, http: httpx.Request) -> httpx.Response:
        if http.url.path != "/v1/head":
            return super().handle(http)
        if self.missing:
            return problem(404, "not_found", "no head here")
        headers = {"x-teacher-fingerprint": self.says or self.identity.fingerprint}
        return httpx.Response(200, headers=headers, content=self.url.encode())


async def test_the_head_comes_from_the_teacher_that_is_expected_or_not_at_all() -> None:
    stranger, sound = HeadReplica("a", says="00ff.00ff"), HeadReplica("b")
    async with client_of(stranger, sound) as client:
        assert await client.head() == b"http://b:8000"
    async with client_of(stranger) as client:
        with pytest.raises(WrongTeacherError, match=r"head of teacher 00ff\.00ff"):
            await client.head()
    async with client_of(HeadReplica("a", missing=True)) as client:
        with pytest.raises(NotFoundError, match="no head here"):
            await client.head()


class CorruptingReplica(HeadReplica):
    """Changes a byte of the first `times` heads on their way; leaves off their end where `cut`."""

    def __init__(self, name: str, times: int, cut: bool = False):
        super().__init__(name)
        self.times, self.cut, self.asked = times, cut, []

    def handle(self, http: httpx.Request) -> httpx.Response:
        if http.url.path != "/v1/head":
            return super().handle(http)
        file = b"head" * 100
        digest = base64.b64encode(hashlib.sha256(file).digest()).decode()
        headers = {
            "x-teacher-fingerprint": self.identity.fingerprint,
            "repr-digest": f"sha-256=:{digest}:",
            "etag": "e",
        }
        self.asked.append(http.headers.get("range"))
        if len(self.asked) <= self.times:
            file = file[:150] if self.cut else b"H" + file[1:]
            return httpx.Response(200, headers=headers | {"content-length": "400"}, stream=httpx.ByteStream(file))
        if http.headers.get("range") == "bytes=150-":
            headers["content-range"] = "bytes 150-399/400"
            return httpx.Response(206, headers=headers, content=file[150:])
        return httpx.Response(200, headers=headers, content=file)


async def test_a_head_that_was_changed_is_refused_and_asked_for_again() -> None:
    once, always = CorruptingReplica("a", times=1), CorruptingReplica("b", times=100)
    async with client_of(once) as client:
        assert await client.head() == b"head" * 100
    assert once.asked == [None, None]
    async with client_of(always) as client:
        with pytest.raises(WireError, match="corrupted in transit"):
            await client.head()
    assert 2 <= len(always.asked) <= 8


async def test_the_rest_of_a_head_is_asked_for_and_not_the_whole() -> None:
    once, always = CorruptingReplica("a", times=1, cut=True), CorruptingReplica("b", times=100, cut=True)
    async with client_of(once) as client:
        assert await client.head() == b"head" * 100
    assert once.asked == [None, "bytes=150-"]
    async with client_of(always) as client:
        with pytest.raises(TruncatedError, match="150 of 400 bytes"):
            await client.head()
    assert 2 <= len(always.asked) <= 8
