"""Classification results for the report page: confusion matrices, and examples with every model's choice. Called by
`report`; reads the lines of `classes.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Lines = Sequence[Mapping[str, Any]]


def class_pictures(runs: Sequence[tuple[str, Lines]]) -> list[dict[str, Any]]:
    """For each source, from every run's last evaluation (`runs`: name and lines): confusion matrices of the teacher, if
    there is one, and of each student; and the examples with the choices of all of them.
    """
    sources = {str(line["source"]): None for _, lines in runs for line in lines}
    return [_picture(source, [(name, _of(lines, source)) for name, lines in runs]) for source in sources]


def _of(lines: Lines, source: str) -> Lines:
    return [line for line in lines if line["source"] == source]


def _picture(source: str, runs: Sequence[tuple[str, Lines]]) -> dict[str, Any]:
    matrices: list[dict[str, Any]] = []
    examples: dict[str, dict[str, Any]] = {}
    words: Sequence[str] = ()
    for name, lines in runs:
        if not lines:
            continue
        last, words = lines[-1], lines[-1]["words"]
        if last["teacher"] and not any(matrix["who"] == "teacher" for matrix in matrices):
            matrices.insert(0, _matrix("teacher", words, last["teacher"]))
        matrices.append(_matrix(name, words, last["student"]))
        for example in last["examples"]:
            _say(examples, example, name, words)
    who = [matrix["who"] for matrix in matrices]
    return {
        "source": source, "words": list(words), "matrices": matrices, "who": who, "examples": list(examples.values()),
    }  # fmt: skip


def _matrix(who: str, words: Sequence[str], counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A row per right class, with cells of (count, fraction of the row)."""
    total = sum(map(sum, counts))
    right = sum(row[place] for place, row in enumerate(counts))
    rows = [
        {"right": words[place].strip(), "cells": [(count, count / max(sum(row), 1)) for count in row]}
        for place, row in enumerate(counts)
    ]
    return {"who": who, "rows": rows, "accuracy": right / max(total, 1), "total": total}


def _say(examples: dict[str, dict[str, Any]], example: Mapping[str, Any], run: str, words: Sequence[str]) -> None:
    """Add the teacher's and this run's choices to the example."""
    shown = examples.setdefault(
        example["document"],
        {
            "document": example["document"],
            "prompt": example["prompt"],
            "right": words[example["right"]].strip(),
            "by": {},
        },
    )
    if example["teacher"] is not None:
        shown["by"].setdefault("teacher", _said(example, "teacher", words))
    shown["by"][run] = _said(example, "student", words)


def _said(example: Mapping[str, Any], whose: str, words: Sequence[str]) -> dict[str, Any]:
    return {
        "word": words[example[whose]].strip(),
        "probability": example[f"{whose}_probability"], "correct": example[whose] == example["right"],
    }  # fmt: skip
