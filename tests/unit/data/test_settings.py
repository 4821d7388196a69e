"""Settings: misspelt ones stop, those without effect warn, secrets are kept out."""

import warnings
from typing import Any

import pytest
from pydantic import ValidationError

from student_trainer.settings.data import DataSettings, SourceSettings


@pytest.mark.parametrize("settings", [{"seqlen": 3}, {"sources": {"a": {"kind": "jsonl", "path": "x", "wieght": 1}}}])
def test_a_misspelt_setting_stops(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        DataSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "jsonl"}, "needs `path`"),
        ({"kind": "hub"}, "needs `name`"),
        ({"kind": "documents"}, "needs `documents`"),
        ({"kind": "text", "path": "x", "format": "chat"}, "holds plain text"),
        ({"kind": "jsonl", "path": "x", "held_out_fraction": 1}, "evaluation-only source has weight 0"),
        ({"kind": "jsonl", "path": "x", "weight": float("inf")}, "finite"),
        ({"kind": "jsonl", "path": "x", "weight": -1}, "greater than or equal to 0"),
        ({"kind": "jsonl", "path": "x", "storage_options": {"key": "AKIA", "secret": "s"}}, "in the environment"),
        (
            {"kind": "jsonl", "path": "x", "storage_options": {"a": {"aws_secret_access_key": "s"}}},
            "secret",
        ),
        ({"kind": "jsonl", "path": "s3://me:password@bucket/x"}, "credentials"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SourceSettings(**settings)


@pytest.mark.parametrize(
    "without_effect",
    [
        {"kind": "jsonl", "path": "x", "subset": "en"},
        {"kind": "jsonl", "path": "x", "loss_on": "all"},
        {"kind": "jsonl", "path": "x", "shuffle_window": 7},
        {"kind": "jsonl", "path": "x", "document": "line"},
        {"kind": "text", "path": "x", "column": "body"},
        {"kind": "parquet", "path": "x", "encoding_errors": "replace"},
        {"kind": "arrow", "path": "x", "streaming": True},
        {"kind": "documents", "documents": ["x"], "storage_options": {"anon": True}},
    ],
)
def test_a_setting_without_effect_warns(without_effect: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="has no effect"):
        SourceSettings(**without_effect)


def test_settings_with_effect_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SourceSettings(kind="jsonl", path="x.jsonl", weight=2, encoding_errors="replace", column="body")
        SourceSettings(
            kind="hub", name="x", subset="en", streaming=True, shuffle_window=9, format="chat", loss_on="all"
        )
        SourceSettings(kind="text", path=["a", "b"], document="line", storage_options={"anon": True})


def test_settings_survive_json() -> None:
    settings = DataSettings(sources={"a": SourceSettings(kind="jsonl", path="x", weight=0.3)}, seq_len=512)
    assert DataSettings.model_validate_json(settings.model_dump_json()) == settings
