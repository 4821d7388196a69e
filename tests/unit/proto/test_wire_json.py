"""The wire as JSON says what the wire as msgpack says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from teacher_proto.errors import EngineError, TruncatedError
from teacher_proto.wire.as_json import json_document, json_values
from teacher_proto.wire.records import header_fields
from teacher_proto.wire.responses import End, Failure, Targets
from tests.unit.proto.records import all_kinds, json_message, make_header, make_record, make_request


def test_document_holds_every_tensor_in_the_order_asked() -> None:
    request = all_kinds()
    answers = {i: make_record(request, i) for i in (1, 0)}
    document = json.loads(json_document(header_fields(make_header(request)), answers))
    assert document["fingerprint"] == "5e1f.c0de" and document["temperatures"] == [1.0, 2.0, 5.0]
    assert [sequence["index"] for sequence in document["sequences"]] == [0, 1]
    for i, sequence in enumerate(document["sequences"]):
        for name, array in answers[i].tensors().items():
            values = np.array(
                [math.nan if v is None else v for v in sequence[name]] if array.ndim == 1 else sequence[name]
            )
            np.testing.assert_array_equal(values.astype(array.dtype), array)


def test_nan_becomes_null_since_json_has_none() -> None:
    record = make_record(make_request())
    assert json_message(Targets(0, record))["next_logprob"][-1] is None
    assert json_values(np.array([[1.5, np.nan], [np.inf, -2]], np.float16)) == [[1.5, None], [None, -2.0]]


def test_a_failed_sequence_is_named_in_its_place() -> None:
    request = make_request()
    error = EngineError("no", got=float("nan"))
    document = json.loads(json_document(header_fields(make_header(request)), {0: error, 1: make_record(request, 1)}))
    assert document["sequences"][0]["error"]["code"] == "engine_failed"
    assert json_message(Failure(0, error))["message"] == "no" and json_message(End(2))["num_sequences"] == 2


def test_a_missing_answer_is_not_passed_over() -> None:
    request = make_request()
    with pytest.raises(TruncatedError, match=r"\[1\] of 2"):
        json_document(header_fields(make_header(request)), {0: make_record(request)})
