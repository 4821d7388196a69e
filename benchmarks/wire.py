"""Bytes and microseconds per token: our wire format compared with JSON in the form of vLLM's `prompt_logprobs`.

    python -m benchmarks.wire

Decoding is what the client does with a body from a socket: 64 KiB chunks into numpy arrays, checksums, and every check
of `check_targets`. JSON is decoded into the same arrays. Its encoding starts from ready-made dictionaries, which vLLM
must build first. The bodies hold 8 sequences of 512 tokens with one temperature besides 1.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.report import report
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets, check_targets
from teacher_proto.wire.records import TARGETS_FORMAT, Header, encode_header, encode_targets
from teacher_proto.wire.responses import ResponseDecoder, Targets, encode_end

SEQUENCES, LENGTH = 8, 512
TOKENS = SEQUENCES * LENGTH
TEMPERATURE = 2.0
CHUNK = 64 * 1024


def synthetic(vocab_size: int, top_k: int, rng: np.random.Generator) -> tuple[np.ndarray, TokenTargets]:
    """A sequence [T] and a valid record of it; every next token is the teacher's first choice."""
    ids_RK = np.stack([rng.choice(vocab_size, top_k, replace=False) for _ in range(LENGTH)])
    weights_RK = -np.sort(-rng.gamma(0.3, size=(LENGTH, top_k)), axis=1) + 1e-4
    tail_R = rng.uniform(0.01, 0.4, LENGTH)
    logprobs_RK = np.log(weights_RK / weights_RK.sum(axis=1, keepdims=True) * (1 - tail_R)[:, None])
    tokens_T = np.append(rng.integers(0, vocab_size), ids_RK[:-1, 0])
    next_logprob_R = logprobs_RK[:, 0].astype(np.float32)
    next_logprob_R[-1] = np.nan
    softened_R = np.exp(logprobs_RK / TEMPERATURE).sum(axis=1) + tail_R
    return tokens_T, TokenTargets(
        start=0,
        ids=ids_RK.astype(np.uint16 if vocab_size <= 65_536 else np.int32),
        logprobs=logprobs_RK.astype(np.float16),
        lse=rng.normal(20, 3, LENGTH).astype(np.float32),
        next_logprob=next_logprob_R,
        log_z=np.log(softened_R)[:, None].astype(np.float32),
    )


def encode(records: list[TokenTargets], header: Header) -> bytes:
    parts = [encode_targets(i, record, header.vocab_size) for i, record in enumerate(records)]
    return b"".join([encode_header(header), *parts, encode_end(len(records))])


def decode(body: bytes, request: TargetsRequest | None, vocab_size: int) -> list[TokenTargets]:
    decoder = ResponseDecoder(TARGETS_FORMAT)
    answers = []
    for at in range(0, len(body), CHUNK):
        for message in decoder.feed(body[at : at + CHUNK]):
            if isinstance(message, Targets):
                if request is not None:
                    check_targets(message.targets, request.query(message.index), vocab_size)
                answers.append(message.targets)
    decoder.close()
    return answers


def as_prompt_logprobs(record: TokenTargets) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per position a map from id to logprob, rank and decoded token; None for the first."""
    assert record.ids is not None and record.logprobs is not None
    rows: list[dict[str, Any] | None] = [None]
    for ids_K, logprobs_K in zip(record.ids[:-1].tolist(), record.logprobs[:-1].tolist(), strict=True):
        rows.append(
            {
                str(token): {"logprob": logprob, "rank": rank + 1, "decoded_token": f" tok{token % 1000}"}
                for rank, (token, logprob) in enumerate(zip(ids_K, logprobs_K, strict=True))
            }
        )
    return rows


def decode_json(body: str) -> list[tuple[np.ndarray, np.ndarray]]:
    answers = []
    for choice in json.loads(body)["choices"]:
        rows = choice["prompt_logprobs"][1:]
        ids_RK = np.array([[int(token) for token in row] for row in rows], dtype=np.int32)
        answers.append((ids_RK, np.array([[entry["logprob"] for entry in row.values()] for row in rows], np.float32)))
    return answers


def microseconds(work: Callable[[], Any], rounds: int) -> float:
    """Median processor time of `work` per token, after a warm-up round; other processes do not count."""
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times[1:]) / TOKENS * 1e6


def measure(vocab_size: int, top_k: int) -> dict[str, Any]:
    rng = np.random.default_rng(top_k)
    pairs = [synthetic(vocab_size, top_k, rng) for _ in range(SEQUENCES)]
    records = [record for _, record in pairs]
    request = TargetsRequest(sequences=tuple(tokens for tokens, _ in pairs), top_k=top_k, temperatures=(TEMPERATURE,))
    header = Header("r" * 32, "f" * 49, SEQUENCES, vocab_size, top_k, (TEMPERATURE,))
    body = encode(records, header)
    for record, answer in zip(records, decode(body, request, vocab_size), strict=True):
        for name, array in record.tensors().items():
            assert array.tobytes() == answer.tensors()[name].tobytes(), f"{name} changed on the wire"
    tree = {"choices": [{"prompt_logprobs": as_prompt_logprobs(record)} for record in records]}
    json_body = json.dumps(tree)
    return {
        "V": vocab_size,
        "K": top_k,
        "bytes": len(body) / TOKENS,
        "encode us": microseconds(lambda: encode(records, header), 20),
        "decode us": microseconds(lambda: decode(body, request, vocab_size), 20),
        "of which checks": microseconds(lambda: decode(body, request, vocab_size), 20)
        - microseconds(lambda: decode(body, None, vocab_size), 20),
        "JSON bytes": len(json_body) / TOKENS,
        "JSON encode us": microseconds(lambda: json.dumps(tree), 3),
        "JSON decode us": microseconds(lambda: decode_json(json_body), 3),
    }


def main() -> None:
    rows = [measure(vocab_size, top_k) for vocab_size in (49_152, 151_936) for top_k in (16, 64, 256)]
    ratios = {
        f"V{row['V']}_K{row['K']}": {
            "bytes": row["JSON bytes"] / row["bytes"],
            "encode": row["JSON encode us"] / row["encode us"],
            "decode": row["JSON decode us"] / row["decode us"],
        }
        for row in rows
    }
    at_64 = [row for row in rows if row["K"] == 64]
    within = all(row["bytes"] <= 6.5 * 64 + 64 and row["decode us"] <= 2.0 for row in at_64)
    notes = [
        "Per token; the ratios are JSON over wire.",
        f"At K = 64, at most {6.5 * 64 + 64:.0f} bytes and 2 us to decode: {'met' if within else 'not met'}.",
    ]
    report("wire", rows, ratios, title="Targets on the wire, per token", notes=notes)
    if not within:
        sys.exit(1)


if __name__ == "__main__":
    main()
