"""Tokens as text, for the compatible routes and offline data: encodes prompts, decodes tokens. Made by `service.py`
when first needed, and by `fill`.

Reads `tokenizer.json` of the model's folder with the `tokenizers` library alone: no torch, no code from a checkpoint.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from teacher_proto.errors import OutOfRangeError

T = TypeVar("T")

_WORD_START = "\u2581"  # SentencePiece's marker of a space, which is lost in decoding a token by itself


class Text:
    """A tokenizer; without one (or with `folder` None), ids are written as `token_id:5`."""

    def __init__(self, folder: Path | None, vocab_size: int):
        self.vocab_size = vocab_size
        self._tokenizer = None
        path = folder / "tokenizer.json" if folder is not None else None
        if path is not None and path.is_file():
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(path))
            # The file may ask for both, which only batches for training need: a prompt would silently be another one.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self._strings: list[str] | None = None

    @property
    def available(self) -> bool:
        return self._tokenizer is not None

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of prompts. A long one takes seconds, during which other threads run. OutOfRangeError if the model
        has no tokenizer."""
        if self._tokenizer is None:
            raise OutOfRangeError(
                "prompt: this teacher has no tokenizer.json, so it takes token ids only", field="prompt", got="text",
                limit="token ids",
            )  # fmt: skip
        # `encode` holds the GIL until it is done, `encode_batch_fast` does not.
        return [
            encoding.ids
            for text in texts
            for encoding in self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ]

    def decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def strings(self) -> list[str]:
        """Every token of the vocabulary by itself, including a leading space."""
        if self._strings is None:
            self._strings = [self._string(i) for i in range(self.vocab_size)]
        return self._strings

    def _string(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        decoded = self._tokenizer.decode([token], skip_special_tokens=False)
        raw = self._tokenizer.id_to_token(token) or ""
        marked = len(raw) - len(raw.lstrip(_WORD_START))
        return " " * (marked - (len(decoded) - len(decoded.lstrip(" ")))) + decoded


class Turns:
    """Runs work in threads: one piece at a time per client, two in total."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(2)
        self._each: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def run(self, client: str, work: Callable[[], T]) -> T:
        async with self._each[client], self._all:
            return await asyncio.to_thread(work)


class JsonPieces:
    """Pieces of JSON by token id and by fp16 bits, so that a response is a join of existing pieces and no number is
    formatted twice. Arrays of bytes objects: those of `entries` [V] begin with a comma and end where a logprob follows;
    `half` [65536] are these logprobs."""

    def __init__(self, text: Text):
        self._text = text
        quoted = self._quoted()
        self.entries = _objects(f',"{i}":{{"decoded_token":{quoted[i]},"logprob":' for i in range(text.vocab_size))
        with np.errstate(all="ignore"):
            halves = np.arange(65_536, dtype=np.uint16).view(np.float16).astype(np.float64)
        # Five digits distinguish all fp16 numbers. vLLM writes -9999 for minus infinity, which JSON lacks.
        self.half = _objects(
            f"{max(value, -9999.0):.5g}" if np.isfinite(value) else "-9999" for value in halves.tolist()
        )

    def _quoted(self) -> list[str]:
        text = self._text
        return [json.dumps(string) for string in text.strings()] if text.available else ["null"] * text.vocab_size

    @cached_property
    def plain_ends(self) -> np.ndarray:
        """What follows the logprob in [logprob, id, text], [V]: the id, and null for its text."""
        return _objects(f",{i},null]" for i in range(self._text.vocab_size))

    @cached_property
    def named_ends(self) -> np.ndarray:
        """What follows the logprob in [logprob, id, text], [V]: the id and its text."""
        return _objects(f",{i},{string}]" for i, string in enumerate(self._quoted()))

    def ranks(self, top_k: int) -> np.ndarray:
        """What follows each of K logprobs: its rank."""
        return _objects(f',"rank":{k + 1}}}' for k in range(top_k))


def _objects(strings: object) -> np.ndarray:
    items = [string.encode() for string in strings]  # type: ignore[attr-defined]
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array
