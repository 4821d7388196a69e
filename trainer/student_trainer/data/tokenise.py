"""Converts raw documents to token ids, with BOS and EOS as the settings say.

Called by `feed` on worker threads: `tokenizers` releases the GIL, so threads are enough.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from student_trainer.data.chat import ChatTemplate
from student_trainer.data.classification import LabelWords
from student_trainer.data.documents import RawDocument
from student_trainer.settings.data import DataSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenDocument:
    """A document's tokens. Every sequence that is cut from it begins with `prefix` (BOS or nothing)."""

    index: str
    ids_N: np.ndarray  # int32, without the prefix
    counts_N: np.ndarray | None  # bool: which tokens are learnt; None: all
    prefix: tuple[int, ...]


class Tokeniser:
    """Converts the documents of one source to `TokenDocument`s; None for those without tokens."""

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer | None, data: DataSettings
    ) -> None:
        """backend: `plain_backend(tokenizer)`, shared by all sources."""
        self.name = name
        self.skipped = 0
        self._tokenizer = tokenizer
        self._settings = data.sources[name]
        self._add_bos = data.add_bos
        self._prefix = bos_prefix(tokenizer, data.add_bos)
        self._suffix = eos_suffix(tokenizer) if data.add_eos and self._settings.format == "text" else ()
        self._backend = backend
        self._chat = ChatTemplate(tokenizer, self._settings) if self._settings.format == "chat" else None
        self._words = LabelWords(tokenizer, self._settings) if self._settings.format == "classification" else None

    def __call__(self, documents: list[RawDocument]) -> list[TokenDocument | None]:
        if self._settings.format == "text":
            return self._from_texts(documents)
        make = {"tokens": self._from_ids, "chat": self._from_chat, "classification": self._from_example}[
            self._settings.format
        ]
        return [self._guarded(make, document) for document in documents]

    def _guarded(
        self, make: Callable[[RawDocument], TokenDocument | None], document: RawDocument
    ) -> TokenDocument | None:
        try:
            return make(document)
        except ValueError as error:
            message = f"source {self.name!r}, document {document.index}: {error}"
            if self._settings.bad_documents == "stop":
                raise ValueError(message) from error
            if self.skipped == 0:
                logger.warning(
                    "%s. Skipping it; later ones are skipped without a warning, and counted in the log", message
                )
            self.skipped += 1
            return None

    def _from_texts(self, documents: list[RawDocument]) -> list[TokenDocument | None]:
        made: list[TokenDocument | None] = []
        for document, ids in zip(documents, self._encode([d.content for d in documents]), strict=True):
            ids_N = np.array([*ids, *self._suffix], np.int32)
            made.append(TokenDocument(document.index, ids_N, None, self._prefix) if ids else None)
        return made

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _from_chat(self, document: RawDocument) -> TokenDocument | None:
        """The template writes its own BOS and end-of-turn tokens; a BOS of its becomes the prefix of later pieces too.

        ValueError if the conversation has no token to learn.
        """
        assert self._chat is not None
        ids_N, counts_N = self._chat(document.content)
        if not counts_N.any():
            raise ValueError("the conversation has no tokens to learn: the assistant says nothing in it")
        bos = self._tokenizer.bos_token_id
        opens = bos is not None and int(ids_N[0]) == bos
        if opens and self._add_bos is not False:
            return TokenDocument(document.index, ids_N[1:], counts_N[1:], (bos,))
        return TokenDocument(document.index, ids_N, counts_N, self._prefix if self._add_bos else ())

    def _from_example(self, document: RawDocument) -> TokenDocument | None:
        assert self._words is not None
        ids_N, counts_N = self._words(document.content)
        return TokenDocument(document.index, ids_N, counts_N, self._prefix)

    def _from_ids(self, document: RawDocument) -> TokenDocument | None:
        """Ready-made ids are used as they are, without BOS or EOS. ValueError if one is outside the vocabulary."""
        ids_N = np.asarray(document.content, np.int32)
        if len(ids_N) == 0:
            return None
        low, high = int(ids_N.min()), int(ids_N.max())
        if low < 0 or high >= len(self._tokenizer):
            raise ValueError(
                f"token ids from {low} to {high}, but the tokenizer has {len(self._tokenizer)} tokens; "
                "were the ids made with another tokenizer?"
            )
        return TokenDocument(document.index, ids_N, None, ())


def bos_prefix(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> tuple[int, ...]:
    """(bos id,) or (): by the setting, or if that is None, as the tokenizer does by itself. ValueError if there is no
    BOS token to add.
    """
    bos = tokenizer.bos_token_id
    if add_bos is None:
        ids = tokenizer("a")["input_ids"]
        add_bos = bos is not None and len(ids) > 0 and ids[0] == bos
    if add_bos and bos is None:
        raise ValueError("add_bos is true, but the tokenizer has no BOS token; set data.add_bos=null or false")
    return (bos,) if add_bos else ()


def eos_suffix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """(eos id,). ValueError if there is no EOS token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("add_eos is true, but the tokenizer has no EOS token; set data.add_eos=false")
    return (tokenizer.eos_token_id,)


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """A copy of the Rust tokenizer without the truncation and padding its file may set; None if there is none."""
    # Our threads share the work; the library's own threads would compete with the training step's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id used for padding. It never enters a loss, so any valid id will do if there is no pad token."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
