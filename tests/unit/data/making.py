"""Small data for the tests of this folder: documents, settings around them, and sources that are closed afterwards."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from student_trainer.batch.batch import Batch
from student_trainer.data.loader import BatchSource
from student_trainer.data.mixture import MixtureState
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.models import tiny_tokenizer

WORDS = ["the", "still", "takes", "a", "wash", "and", "gives", "spirit", "def", "return", "yield", "oak", "0", "[x]"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tests' byte-level BPE tokenizer: <s> is 0, </s> is 1, no pad token."""
    return tiny_tokenizer()


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 1 to `longest` words, each different from the others."""
    rng = random.Random(seed)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for i in range(count)]


def inline(documents: Iterable[str], **settings: Any) -> SourceSettings:
    """A source of texts, nothing held out unless asked for."""
    return SourceSettings(kind="documents", documents=tuple(documents), **{"held_out_fraction": 0.0, **settings})


@contextmanager
def opened(settings: DataSettings, seed: int = 0, **where: int) -> Iterator[BatchSource]:
    """A `BatchSource` that is closed at the end."""
    source = BatchSource(settings, tokenizer(), seed, **where)
    try:
        yield source
    finally:
        source.close()


def run(source: BatchSource, count: int, state: MixtureState | None = None) -> tuple[list[Batch], list[MixtureState]]:
    """`count` batches from `state` on, and the states before each and after the last."""
    states = [state or source.initial_state()]
    batches = []
    for _ in range(count):
        batch, after = source.batch(states[-1], states[-1].number)
        batches.append(batch)
        states.append(after)
    return batches, states


def same(a: Batch, b: Batch) -> bool:
    """Equal in every bit."""
    arrays = ("tokens_BT", "position_ids_BT", "document_ids_BT", "loss_mask_BT", "source_ids_BT")
    return (
        a.number == b.number
        and a.documents == b.documents
        and a.source_names == b.source_names
        and all(
            getattr(a, name).dtype == getattr(b, name).dtype and np.array_equal(getattr(a, name), getattr(b, name))
            for name in arrays
        )
    )


def pieces(batches: Iterable[Batch]) -> dict[str, dict[int, list[list[int]]]]:
    """Every token of the batches: document ("source:index") to offset to the sequences seen there."""
    found: dict[str, dict[int, list[list[int]]]] = defaultdict(lambda: defaultdict(list))
    for batch in batches:
        for document in batch.documents:
            source, index, *offset = document.key.split(":")
            tokens = batch.tokens_BT[document.row, document.start : document.stop].tolist()
            found[f"{source}:{index}"][int(offset[0]) if offset else 0].append(tokens)
    return found


def counts_by_source(batches: Iterable[Batch]) -> Counter[str]:
    """Tokens by source."""
    total: Counter[str] = Counter()
    for batch in batches:
        for i, name in enumerate(batch.source_names):
            total[name] += int((batch.source_ids_BT == i).sum())
    return total
