"""The entry of a model's config that says how a student is quantised: written, read again, and held to be sane."""

from __future__ import annotations

from typing import Any

import pytest

from student_trainer.students.quant_linear import quantise
from student_trainer.students.quantisers import QUANTISERS
from student_trainer.students.quantisers.record import Record, read_record, record_in, renewed, write_record
from tests.unit.students.tiny import tiny_config, tiny_model

OLD = {"sub_norm": "all", "eps": 1e-6, "quantise_activations": False}


@pytest.mark.parametrize("name", [name for name in QUANTISERS if name != "none"])
def test_a_quantised_model_says_how_it_is_quantised(name: str) -> None:
    model = quantise(tiny_model("llama"), name, eps=1e-6, sub_norm="all")
    expected = Record(name, "all", 1e-6, QUANTISERS[name].activations, stages=QUANTISERS[name].stages)
    assert read_record(model.config) == expected
    again = type(model.config).from_dict(model.config.to_dict())
    assert read_record(again) == read_record(model.config)


def test_an_older_trainers_entry_is_read_and_replaced() -> None:
    config = tiny_config("llama")
    assert read_record(config) is None
    config.bitnet_student = OLD
    record = read_record(config)
    assert record == Record("bitnet", "all", 1e-6, "none")
    write_record(config, record)
    assert not hasattr(config, "bitnet_student") and read_record(config) == record
    assert record_in(renewed({"bitnet_student": OLD, "hidden_size": 8})) == record
    assert renewed({"hidden_size": 8}) == {"hidden_size": 8}
    # The first exports did not name what they always did.
    without = {name: value for name, value in OLD.items() if name != "quantise_activations"}
    assert record_in({"bitnet_student": without}) == Record("bitnet", "all", 1e-6, "int8")


GOOD = {"version": 1, "quantiser": "bitnet", "sub_norm": "output", "eps": 1e-8, "activations": "int8"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2, this trainer reads 1"),
        ({"version": None}, "version None"),
        ({"sub_norm": "some"}, "sub_norm: got 'some', expected 'output', 'all' or 'none'"),
        ({"activations": "int3"}, "activations: got 'int3', expected 'none', 'int8' or 'int4'"),
        ({"eps": 0.0}, "eps: got 0.0, expected a number above 0"),
        ({"eps": "small"}, "eps: got small"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_with_the_folder(change: dict[str, Any], words: str) -> None:
    config = tiny_config("llama")
    config.student_quantisation = GOOD
    assert read_record(config) == Record("bitnet", "output", 1e-8, "int8")
    config.student_quantisation = GOOD | change
    with pytest.raises(ValueError, match="student_quantisation cannot be read") as caught:
        read_record(config, "/somewhere")
    assert words in str(caught.value) and "/somewhere" in str(caught.value)
