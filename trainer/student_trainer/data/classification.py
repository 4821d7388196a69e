"""Converts labelled examples to prompts that end in the class's word, which alone is learnt. Called by `tokenise` for
format classification, by `evaluation.open` for accuracy, and by `targets.late` for losses at the class words.

A causal model's logits of the class words at the prompt's last token are a classifier, so the usual token losses
compare student and teacher there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from student_trainer.settings.data import DataSettings, SourceSettings


class LabelWords:
    """`words(content)` gives (ids_N, counts_N) of a prompt with its class word; counts_N is True only for the word.

    ValueError if a word is more than one token, or if two classes have the same token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: SourceSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self.ids = {label: self._id_of(word) for label, word in settings.labels.items()}
        if len(set(self.ids.values())) < len(self.ids):
            raise ValueError(f"labels {settings.labels}: two classes have the same token; give them different words")

    def __call__(self, content: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """ValueError for an example of an unknown class."""
        label = str(content[self._settings.column_name])
        if label not in self.ids:
            raise ValueError(
                f"{self._settings.column_name!r} is {label!r}, expected one of {', '.join(map(repr, self.ids))}; add "
                "its word to `labels`, or set bad_documents: skip"
            )
        prompt = self._settings.template.format_map(content)
        ids_N = np.array([*self._encode(prompt), self.ids[label]], np.int32)
        counts_N = np.zeros(len(ids_N), bool)
        counts_N[-1] = True
        return ids_N, counts_N

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _id_of(self, word: str) -> int:
        ids = self._encode(word)
        if len(ids) != 1:
            shown = self._tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"labels: {word!r} is split into the tokens {shown}, expected one; choose another word for the class"
            )
        return ids[0]


def class_words(data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    """The ids of the class words, for each source of this format."""
    sources = {name: source for name, source in data.sources.items() if source.format == "classification"}
    return {name: tuple(LabelWords(tokenizer, source).ids.values()) for name, source in sources.items()}


def one_set_of_words(data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of the class words, which must be the same for all sources. ValueError otherwise."""
    words = class_words(data, tokenizer)
    if len(words) < len(data.sources) or len(set(words.values())) != 1:
        raise ValueError(
            f"distillation.gather_at is labels, which needs sources of format classification with the same words; "
            f"got {', '.join(f'{name}: {source.format} {source.labels}' for name, source in data.sources.items())}"
        )
    return next(iter(words.values()))
