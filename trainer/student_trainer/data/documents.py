"""A document as it lies in a source, and which documents are kept from training. Used all over this package."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RawDocument:
    """A document as it lies in the source: text, {"messages", "tools"}, or token ids."""

    index: str  # names it within the source: "17", or in a stream "shard/17"
    content: Any


def canonical(content: Any) -> str:
    """A document as one string, equal for equal documents."""
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True)


def is_held_out(content: Any, fraction: float) -> bool:
    """Whether a document is kept from training: by its hash, so copies fall on the same side, whatever the seed."""
    if fraction <= 0:
        return False
    data = canonical(content).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64
