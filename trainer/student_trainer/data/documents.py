"""A document as a source returns it, and which documents are held out. Used throughout this package."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RawDocument:
    """A document as a source returns it: text, {"messages", "tools"}, an example's fields, or token ids."""

    index: str  # its name within the source: "17", or "shard/17" in a stream
    content: Any


def canonical(content: Any) -> str:
    """A document as one string; equal documents give equal strings."""
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True)


def is_held_out(content: Any, fraction: float) -> bool:
    """Whether a document is held out from training. Decided by its hash, so copies are treated alike with any seed."""
    if fraction <= 0:
        return False
    data = canonical(content).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64
