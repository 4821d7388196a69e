"""Writes the documents of a run as token ids, to be scored in advance: `stillhouse-train sequences FILE.jsonl
SETTINGS...`. Called by `main`.

Targets belong to exact sequences, and the run's settings decide where a document is cut and what a tokenizer or
template adds to it. `stillhouse-teacher fill MODEL FILE.jsonl --store FOLDER` (or `--output URL`) reads the file;
`teacher=cached` trains on the targets that it wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from student_trainer.build_components import load_tokenizer
from student_trainer.cli.compose import compose_arguments
from student_trainer.data.ahead import distinct, documents_ahead
from student_trainer.data.loader import BatchSource
from student_trainer.data.policies.decisions import PolicyState
from student_trainer.settings import Settings
from teacher_proto.process.stages import stage


def main(arguments: Sequence[str]) -> int:
    """Write the file. ValueError for settings that could not be trained with either."""
    if not arguments or "=" in arguments[0]:
        raise ValueError("no output file given: stillhouse-train sequences FILE.jsonl SETTINGS...")
    settings = compose_arguments(arguments[1:])
    count = tokens = 0
    partial = Path(arguments[0]).with_suffix(".partial")
    try:
        with partial.open("w") as file:
            for _, ids in distinct(documents(settings)):
                count, tokens = count + 1, tokens + len(ids)
                file.write(json.dumps({"input_ids": ids}) + "\n")
        partial.replace(arguments[0])
    finally:
        partial.unlink(missing_ok=True)
    print(f"{count} sequences with {tokens} tokens: those of {settings.run.steps} batches and the held-out documents")
    return 0


def documents(settings: Settings) -> Iterator[tuple[str, list[int]]]:
    """Name and token ids of every document that a run with these settings needs targets for, in order, with repeats.

    ValueError for a run whose mixture policy decides during training how much it draws from each source.
    """
    if PolicyState.of(settings.data).policy.varies:
        raise ValueError(
            f"data.mixture.policy={settings.data.mixture.policy} chooses what to draw by the losses of a run, so its "
            "documents are not known in advance: train with a teacher service instead"
        )
    with stage("opening the data"):
        source = BatchSource(settings.data, load_tokenizer(settings), settings.run.seed)
    try:
        state, evaluates = source.initial_state(), bool(settings.evaluation.every)
        yield from documents_ahead(source, state, settings.run.steps, evaluates)
    finally:
        source.close()
