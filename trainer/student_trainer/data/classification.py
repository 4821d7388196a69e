"""Examples with a class to prompts that end in the word of the class, which alone is learnt. Called by `tokenise` for
sources of format classification, and by `build` for what evaluation calls accuracy.

The head of a causal model at the prompt's last token, read at the words of the classes, is a classifier: student and
teacher are compared there by the losses that compare any token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from student_trainer.settings.data import DataSettings, SourceSettings


class LabelWords:
    """`words(content)` gives (ids_N, counts_N) of a prompt and its word; counts_N is True on the word alone.

    ValueError where a word is more than one token, or two classes have the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: SourceSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self.ids = {label: self._id_of(word) for label, word in settings.labels.items()}
        if len(set(self.ids.values())) < len(self.ids):
            raise ValueError(f"labels {settings.labels}: two classes have the same token; give them different words")

    def __call__(self, content: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """ValueError for an example of no known class."""
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
            raise ValueError(f"labels: {word!r} is the tokens {shown}, expected one; choose another word for the class")
        return ids[0]


def class_words(data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    """The ids of the classes' words of each source of this format."""
    sources = {name: source for name, source in data.sources.items() if source.format == "classification"}
    return {name: tuple(LabelWords(tokenizer, source).ids.values()) for name, source in sources.items()}


def one_set_of_words(data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of the words that all sources have in common. ValueError where they have not."""
    words = class_words(data, tokenizer)
    if len(words) < len(data.sources) or len(set(words.values())) != 1:
        raise ValueError(
            f"distillation.gather_at is labels, which needs sources of format classification with the same words; "
            f"got {', '.join(f'{name}: {source.format} {source.labels}' for name, source in data.sources.items())}"
        )
    return next(iter(words.values()))
