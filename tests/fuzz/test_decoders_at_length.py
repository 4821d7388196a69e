"""Millions of spoilt bodies through every decoder, both directions: nothing but our errors comes, and none takes long.

Slow: `STILLHOUSE_FUZZ_SECONDS` says for how long, a minute if it does not. The property tests have the short form.
"""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np
import pytest

from teacher_proto.errors import RequestError, WireError
from teacher_proto.request_checks import parse_body
from teacher_proto.requests import Limits, TargetsRequest, check_request
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.as_json import decode_json_request
from teacher_proto.wire.records import (
    TARGETS_FORMAT,
    Header,
    decode_request,
    encode_header,
    encode_request,
    encode_targets,
)
from teacher_proto.wire.responses import ResponseDecoder, encode_end, encode_failure

SECONDS = float(os.environ.get("STILLHOUSE_FUZZ_SECONDS", "60"))
LIMITS = Limits(vocab_size=512, max_sequence_length=2048)
# Bytes that mean something to msgpack: containers, sizes and numbers of every width.
TELLING = bytes([0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0), 0xFF])


def seeds() -> list[bytes]:
    """Bodies of both directions that hold every field and every message."""
    request = TargetsRequest(
        sequences=([1, 2, 3], list(range(20))), kinds=("top_k", "sampled", "gather"), top_k=4, temperatures=(2.0, 5.0),
        num_samples=3, rows=((0, 2), (3, 20)), gather_ids=(np.ones((2, 2), np.int64), np.ones((17, 2), np.int64)),
    )  # fmt: skip
    ids_RK, logprobs_RK = (
        np.arange(12, dtype=np.uint16).reshape(3, 4),
        -np.arange(1, 13, dtype=np.float16).reshape(3, 4),
    )
    column_R = np.ones(3, np.float32)
    record = TokenTargets(start=0, ids=ids_RK, logprobs=logprobs_RK, lse=column_R, next_logprob=-column_R,
                          log_z=np.ones((3, 2), np.float32))  # fmt: skip
    header = Header("r" * 32, "f" * 49, 2, 512, 4, (2.0, 5.0))
    answer = [encode_header(header), encode_targets(0, record, 512),
              encode_failure(1, WireError("spoilt")), encode_end(2)]  # fmt: skip
    as_json = b'{"sequences": [[1, 2, 3], [4]], "kinds": ["top_k"], "top_k": 4, "rows": [[0, 2], null], "seed": 1}'
    return [encode_request(request), b"".join(answer), as_json, *answer]


def spoil(body: bytes, generator: np.random.Generator) -> bytes:
    spoilt = bytearray(body)
    for _ in range(int(generator.integers(1, 5))):
        at, other = (int(i) for i in generator.integers(0, len(spoilt) + 1, 2))
        match generator.integers(5):
            case 0:
                spoilt[at : at + 1] = generator.bytes(1)
            case 1:
                spoilt[at : at + 1] = TELLING[int(generator.integers(len(TELLING)))].to_bytes()
            case 2:
                del spoilt[min(at, other) : max(at, other)]
            case 3:
                spoilt[at:at] = spoilt[other : other + int(generator.integers(1, 64))]
            case _:
                spoilt[at : at + 4] = generator.bytes(4)
    return bytes(spoilt)


def decode_everything(body: bytes) -> None:
    with contextlib.suppress(WireError):
        list(ResponseDecoder(TARGETS_FORMAT).feed(body))
    for decode in (decode_request, decode_json_request):
        with contextlib.suppress(WireError, RequestError):
            check_request(parse_body(TargetsRequest, decode(body, LIMITS)), LIMITS)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
def test_spoilt_bodies_end_in_our_errors_only() -> None:
    generator = np.random.default_rng()
    corpus, count, slowest = seeds(), 0, 0.0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        body = spoil(corpus[count % len(corpus)], generator)
        began = time.process_time()
        try:
            decode_everything(body)
        except Exception as error:
            raise AssertionError(f"{error!r} from {body.hex()}") from error
        slowest = max(slowest, time.process_time() - began)
        count += 1
    print(f"{3 * count:,} decodings of spoilt bodies in {SECONDS:.0f} s, the slowest {1000 * slowest:.1f} ms")
    assert slowest < 1.0
