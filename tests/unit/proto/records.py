"""Valid requests and records of every kind for the wire's tests, by the scripted teacher's arithmetic."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from teacher_proto.requests import KINDS, TargetsRequest
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.as_json import json_values, sequence_fields
from teacher_proto.wire.records import Header, encode_header, encode_targets, header_fields
from teacher_proto.wire.responses import End, Failure, Progress, Targets, encode_end
from teacher_service.engines.scripted_model import reduce_sequence, scripted_head, scripted_hidden

FINGERPRINT = "5e1f.c0de"
Message = Header | Targets[TokenTargets] | Failure | Progress | End


def make_request(vocab_size: int = 300, lengths: tuple[int, ...] = (6, 3), **fields: Any) -> TargetsRequest:
    rng = np.random.default_rng(len(lengths))
    sequences = tuple(rng.integers(0, vocab_size, length) for length in lengths)
    return TargetsRequest(sequences=sequences, **({"top_k": 5} | fields))


def all_kinds(vocab_size: int = 300, hidden_dtype: str = "int8", lengths: tuple[int, ...] = (6, 3)) -> TargetsRequest:
    rng = np.random.default_rng(1)
    gather_ids = tuple(rng.integers(0, vocab_size, (length, 4)) for length in lengths)
    return make_request(
        vocab_size, lengths, kinds=KINDS, temperatures=(1.0, 2.0, 5.0), gather_ids=gather_ids, num_samples=9, seed=3,
        hidden_dtype=hidden_dtype,
    )  # fmt: skip


def make_record(request: TargetsRequest, index: int = 0, vocab_size: int = 300) -> TokenTargets:
    query = request.query(index)
    return reduce_sequence(query, scripted_hidden(query.tokens_T), scripted_head(vocab_size))


def make_header(request: TargetsRequest, vocab_size: int = 300, request_id: str = "test") -> Header:
    spec = request.spec
    return Header(request_id, FINGERPRINT, len(request.sequences), vocab_size, spec.top_k, spec.temperatures)


def make_body(request: TargetsRequest, vocab_size: int = 300) -> bytes:
    parts = [encode_header(make_header(request, vocab_size))]
    parts += [encode_targets(i, make_record(request, i, vocab_size), vocab_size) for i in range(len(request.sequences))]
    return b"".join([*parts, encode_end(len(request.sequences))])


def json_message(message: Message) -> dict[str, Any]:
    """A message of an answer as a JSON-ready map, with the keys that its msgpack form has."""
    if isinstance(message, Header):
        return {"type": "header", **header_fields(message)}
    if isinstance(message, Targets):
        fields = sequence_fields(message.index, message.targets)
        return {"type": "targets"} | {n: json_values(v) if isinstance(v, np.ndarray) else v for n, v in fields.items()}
    if isinstance(message, Failure):
        return {"type": "error", "index": message.index, **message.error.to_json()}
    if isinstance(message, Progress):
        return {"type": "progress", **asdict(message)}
    return {"type": "end", "num_sequences": message.num_sequences}
