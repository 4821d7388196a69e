"""Teachers without sockets for the client's tests: a clock that jumps, and replicas whose faults are a list."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np

from teacher_proto.client.replicas import Timing
from teacher_proto.errors import StillhouseError
from teacher_proto.identity import NumericIdentity, SemanticIdentity, TeacherIdentity, compare_fingerprints
from teacher_proto.info import TeacherInfo
from teacher_proto.request_checks import parse_body
from teacher_proto.requests import KINDS, Limits, TargetsRequest
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.records import Header, decode_request, encode_header, encode_targets
from teacher_proto.wire.responses import SEQUENCE_CRC_HEADER, encode_end, encode_failure, sequence_crc
from teacher_service.engines.scripted_model import reduce_sequence, scripted_head, scripted_hidden

VOCAB = 300
Fault = Callable[[httpx.Request], Any]


class FakeClock:
    """Time that passes only when everybody sleeps: then it jumps to the first who wakes. `slept` is what was asked."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.slept: list[float] = []
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._driver: asyncio.Task[None] | None = None

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        waker = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.time + seconds, len(self.slept), waker))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        await waker

    async def _drive(self) -> None:
        while self._sleepers:
            for _ in range(50):
                await asyncio.sleep(0)
            due, _, waker = heapq.heappop(self._sleepers)
            if not waker.done():
                self.time = max(self.time, due)
                waker.set_result(None)

    def timing(self, seed: int = 0) -> Timing:
        return Timing(now=self.now, sleep=self.sleep, random=random.Random(seed))


def identity(**changes: Any) -> TeacherIdentity:
    semantic = {
        "model": "fake/teacher", "revision": "1", "config_sha256": "c", "tokenizer_sha256": "t",
        "weights": {"a.safetensors": "w"}, "dtype": "float32", "quantization": None, "vocab_size": VOCAB,
        "options": {},
    }  # fmt: skip
    numeric = {
        "engine": "fake", "engine_version": "1", "device": "cpu", "parallel": "1", "attention_backend": "none",
    }  # fmt: skip
    semantic |= {name: value for name, value in changes.items() if name in semantic}
    numeric |= {name: value for name, value in changes.items() if name in numeric}
    return TeacherIdentity(semantic=SemanticIdentity(**semantic), numeric=NumericIdentity(**numeric))


def truth(request: TargetsRequest, index: int, noise: float = 0.0) -> TokenTargets:
    """What a healthy teacher answers."""
    tokens_T = request.sequences[index]
    hidden, head = scripted_hidden(tokens_T), scripted_head(VOCAB)
    return reduce_sequence(request.query(index), hidden, head, noise)


class Replica:
    """One teacher. `faults` are taken one for each POST that is not a canary; when they are used up it is healthy.

    A fault gets the HTTP request and returns a response, raises, or returns bytes -> bytes to spoil the body with,
    or TokenTargets -> TokenTargets to spoil each record with.
    """

    def __init__(self, name: str = "t0", **changes: Any):
        self.url = f"http://{name}:8000"
        self.identity = identity(**changes)
        self.limits = Limits(vocab_size=VOCAB, max_sequence_length=512)
        self.noise = 0.0
        self.crcs = True
        self.faults: deque[Fault] = deque()
        self.down: Exception | None = None
        self.posts: list[TargetsRequest] = []
        self.canaries = 0
        self.infos = 0

    @property
    def info(self) -> TeacherInfo:
        identity = self.identity
        return TeacherInfo(identity=identity, fingerprint=identity.fingerprint, limits=self.limits, kinds=KINDS)

    def handle(self, http: httpx.Request) -> httpx.Response:
        if self.down is not None:
            raise self.down
        if http.url.path == "/v1/teacher":
            self.infos += 1
            return httpx.Response(200, json=self.info.model_dump(mode="json"))
        if http.url.path != "/v1/targets":
            return httpx.Response(404)
        request = parse_body(TargetsRequest, decode_request(http.content, self.info.limits))
        if [len(s) for s in request.sequences] == [min(n, self.limits.max_sequence_length) for n in (8, 16, 24, 32)]:
            self.canaries += 1
            return self.answer(http, request)
        self.posts.append(request)
        fault = self.faults.popleft() if self.faults else None
        outcome = fault(http) if fault is not None else None
        if isinstance(outcome, httpx.Response):
            return outcome
        ours = self.identity.fingerprint
        if request.fingerprint is not None and compare_fingerprints(request.fingerprint, ours) == "semantic":
            return problem(409, "wrong_teacher", f"this is {ours}")
        return self.answer(http, request, outcome)

    def answer(self, http: httpx.Request, request: TargetsRequest, spoil: Any = None) -> httpx.Response:
        spoil = spoil or {}
        header = Header(
            http.headers["x-request-id"], self.identity.fingerprint, len(request.sequences), VOCAB, request.spec.top_k,
            request.spec.temperatures,
        )  # fmt: skip
        parts = [encode_header(header)]
        for i in reversed(range(len(request.sequences))):
            error = spoil.get("errors", {}).get(i)
            if error is not None:
                parts.append(encode_failure(i, error))
                continue
            targets = spoil.get("record", lambda t, i: t)(truth(request, i, self.noise), i)
            crc = sequence_crc(i, request.sequences[i]) if SEQUENCE_CRC_HEADER in http.headers and self.crcs else None
            parts.append(encode_targets(i, targets, VOCAB, crc))
        parts.append(encode_end(len(request.sequences)))
        body = spoil.get("body", lambda b: b)(b"".join(parts))
        return httpx.Response(200, headers={"content-type": "application/msgpack"}, content=body)


def network(*replicas: Replica) -> httpx.MockTransport:
    by_host = {httpx.URL(replica.url).host: replica for replica in replicas}

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.host not in by_host:
            raise httpx.ConnectError("connection refused")
        return by_host[request.url.host].handle(request)

    return httpx.MockTransport(handle)


def problem(
    status: int, code: str, message: str = "no", retry_after: float | None = None, **more: Any
) -> httpx.Response:
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return httpx.Response(status, json={"code": code, "message": message, **more}, headers=headers)


def refuse(error: Exception) -> Fault:
    def fault(_: httpx.Request) -> None:
        raise error

    return fault


def respond(response: httpx.Response) -> Fault:
    return lambda _: response


def spoil_body(change: Callable[[bytes], bytes]) -> Fault:
    return lambda _: {"body": change}


def spoil_record(change: Callable[[TokenTargets, int], TokenTargets]) -> Fault:
    return lambda _: {"record": change}


def fail_sequences(errors: dict[int, StillhouseError]) -> Fault:
    return lambda _: {"errors": errors}


def same_bits(a: TokenTargets, b: TokenTargets) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return (
        a.start == b.start
        and ours.keys() == theirs.keys()
        and all(ours[n].shape == theirs[n].shape and ours[n].tobytes() == theirs[n].tobytes() for n in ours)
    )


def sequences(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length) for length in lengths]
