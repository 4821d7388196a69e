"""`POST /v1/targets` of a real service process, asked with urllib and msgpack alone, as any stranger would."""

from __future__ import annotations

import io
import json
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest

from teacher_service.engines.scripted_model import scripted_logits
from tests.teacher_process import TeacherProcess

VOCAB = 512


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess() as process:
        yield process


def post(teacher: TeacherProcess, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        teacher.url + "/v1/targets", msgpack.packb(body), {"Content-Type": "application/msgpack", **headers}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return list(msgpack.Unpacker(io.BytesIO(response.read())))


def read(tensor: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(tensor["data"], tensor["dtype"]).reshape(tensor["shape"])


def softmax(logits_RV: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits_RV.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_any_msgpack_library_rebuilds_exact_probabilities_at_any_temperature(teacher: TeacherProcess) -> None:
    sequences = [[5, 7, 300, 7, 12], list(range(100, 140))]
    messages = post(teacher, {"sequences": sequences, "kinds": ["top_k"], "top_k": 32, "temperatures": [2.0, 5.0]})
    assert [message["type"] for message in messages] == ["header", "targets", "targets", "end"]
    assert messages[0]["fingerprint"] == teacher.fingerprint
    for message in messages[1:3]:
        tokens = np.array(sequences[message["index"]])
        truth_RV = scripted_logits(tokens, VOCAB)
        ids, logprobs = read(message["ids"]), read(message["logprobs"]).astype(np.float64)
        assert (ids == np.argsort(-truth_RV, axis=1, kind="stable")[:, :32]).all()
        for column, temperature in enumerate([2.0, 5.0]):
            rebuilt = np.exp(logprobs / temperature - read(message["log_z"])[:, column, None])
            truth = np.take_along_axis(softmax(truth_RV, temperature), ids.astype(np.int64), axis=1)
            assert np.abs(rebuilt / truth - 1).max() < 2e-3
        raw = logprobs + read(message["lse"])[:, None]
        assert np.abs(raw - np.take_along_axis(truth_RV, ids.astype(np.int64), axis=1)).max() < 2e-2


def test_the_checksum_is_crc32_over_the_data_in_the_order_of_the_keys(teacher: TeacherProcess) -> None:
    (message,) = [m for m in post(teacher, {"sequences": [[1, 2, 3]], "top_k": 4}) if m["type"] == "targets"]
    checksum = 0
    for value in message.values():
        if isinstance(value, dict):
            checksum = zlib.crc32(value["data"], checksum)
    assert checksum == message["checksum"]


def test_a_record_says_whose_it_is_to_who_asks_for_it(teacher: TeacherProcess) -> None:
    body = {"sequences": [[1, 2, 3], [400, 5, 6]], "kinds": ["score"]}
    assert not any("sequence_crc" in message for message in post(teacher, body))
    told = {m["index"]: m["sequence_crc"] for m in post(teacher, body, **{"X-Sequence-CRC": "1"}) if "index" in m}
    assert told == {
        index: zlib.crc32(np.array([index, *tokens], "<i4").tobytes()) for index, tokens in enumerate(body["sequences"])
    }


def test_the_logprob_of_the_next_token_is_its_own_and_nan_on_the_last_row(teacher: TeacherProcess) -> None:
    tokens = [5, 7, 300, 7, 12]
    (message,) = [m for m in post(teacher, {"sequences": [tokens], "kinds": ["score"]}) if m["type"] == "targets"]
    got = read(message["next_logprob"])
    truth = np.log(softmax(scripted_logits(np.array(tokens), VOCAB), 1.0))[np.arange(4), tokens[1:]]
    assert np.abs(got[:4] - truth).max() < 1e-5 and np.isnan(got[4])


def test_rows_are_a_slice_of_the_whole_answer(teacher: TeacherProcess) -> None:
    tokens = list(range(60))
    whole, part = (
        next(m for m in post(teacher, {"sequences": [tokens], "top_k": 8, **extra}) if m["type"] == "targets")
        for extra in ({}, {"rows": [[20, 50]]})
    )
    assert part["start"] == 20
    for name in ("ids", "logprobs", "lse", "next_logprob"):
        assert (read(part[name]) == read(whole[name])[20:50]).all()


def test_json_says_the_same_as_msgpack(teacher: TeacherProcess) -> None:
    body = {"sequences": [[5, 7, 300]], "top_k": 4, "temperatures": [2.0]}
    request = urllib.request.Request(
        teacher.url + "/v1/targets", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        document = json.load(response)
    packed = next(message for message in post(teacher, body) if message["type"] == "targets")
    (sequence,) = document["sequences"]
    assert document["fingerprint"] == teacher.fingerprint and sequence["next_logprob"][-1] is None
    for name in ("ids", "logprobs", "lse", "log_z"):
        assert np.array_equal(np.array(sequence[name]), read(packed[name]))
