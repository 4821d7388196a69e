"""Raw documents to token ids, with BOS and EOS by the settings, and the split into train and held-out by hash.

Called by `feed` on worker threads: `tokenizers` works outside the GIL, so threads are enough.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from student_trainer.data.settings import DataSettings, SourceSettings
from student_trainer.data.sources import RawDocument


@dataclass(frozen=True)
class TokenDocument:
    """A document's tokens. `prefix` (BOS or nothing) opens every sequence that is cut from it."""

    index: str
    ids_N: np.ndarray  # int32, without the prefix
    counts_N: np.ndarray | None  # bool: which tokens are learnt; None: all
    prefix: tuple[int, ...]


def is_held_out(content: Any, fraction: float) -> bool:
    """Whether a document is kept from training: its hash, so copies fall on the same side, whatever the seed."""
    if fraction <= 0:
        return False
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


class Tokeniser:
    """Turns a source's documents into `TokenDocument`s; None for a document without tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSettings, source: SourceSettings) -> None:
        # Threads of ours share the work out; the library's own threads would fight with the training step's.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = tokenizer
        self._backend = _plain_backend(tokenizer)
        self._vocab_size = len(tokenizer)
        self._format = source.format
        self._source = source
        self._prefix = bos_prefix(tokenizer, data.add_bos)
        self._suffix = _eos_suffix(tokenizer) if data.add_eos else ()

    def __call__(self, documents: list[RawDocument]) -> list[TokenDocument | None]:
        if self._format == "tokens":
            return [self._from_ids(document) for document in documents]
        return self._from_texts(documents)

    def _from_texts(self, documents: list[RawDocument]) -> list[TokenDocument | None]:
        made = []
        for document, ids in zip(documents, self._encode([d.content for d in documents]), strict=True):
            ids_N = np.array([*ids, *self._suffix], np.int32)
            made.append(TokenDocument(document.index, ids_N, None, self._prefix) if ids else None)
        return made

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _from_ids(self, document: RawDocument) -> TokenDocument | None:
        """Ids made beforehand are taken as they are: no BOS, no EOS, all within the vocabulary."""
        ids_N = np.asarray(document.content, np.int32)
        if len(ids_N) == 0:
            return None
        low, high = int(ids_N.min()), int(ids_N.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(
                f"document {document.index} has token ids from {low} to {high}, the tokenizer has {self._vocab_size} "
                "tokens; were the ids made with another tokenizer?"
            )
        return TokenDocument(document.index, ids_N, None, ())


def bos_prefix(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> tuple[int, ...]:
    """(bos id,) or (): by the setting, or where that is None, as the tokenizer does by itself."""
    bos = tokenizer.bos_token_id
    if add_bos is None:
        ids = tokenizer("a")["input_ids"]
        add_bos = bos is not None and len(ids) > 0 and ids[0] == bos
    if add_bos and bos is None:
        raise ValueError("add_bos is true, but the tokenizer has no BOS token; set data.add_bos=null or false")
    return (bos,) if add_bos else ()


def _eos_suffix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if tokenizer.eos_token_id is None:
        raise ValueError("add_eos is true, but the tokenizer has no EOS token; set data.add_eos=false")
    return (tokenizer.eos_token_id,)


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """A copy of the Rust tokenizer without the truncation and padding its file may ask for; None if there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What padding is written with; it never enters a loss, so any valid id will do where there is no pad token."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
