"""Refuses a probe that is trained on: a held-out document of one source that is a training document of another.

Called by `loader`. Documents are compared as they lie in the sources, but for white space, by a hash of 64 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

from student_trainer.data.documents import canonical, is_held_out
from student_trainer.data.source import Source
from teacher_proto.process.stages import stage


def check_apart(sources: Sequence[Source], probe: Collection[str]) -> None:
    """Read all documents of the sources, and raise a ValueError for one that the probe has and a source trains on.

    Documents that the hash keeps back in a source are not trained on there; copies within a source fall on one side.
    """
    with stage(
        "comparing the probe's documents with those trained on", len(sources), "sources", closing=False
    ) as doing:
        held: dict[bytes, str] = {}
        for source in sources:
            if source.name in probe:
                fraction = source.settings.held_out_fraction
                for block in source.scan():
                    held |= {_digest(d.content): source.name for d in block if is_held_out(d.content, fraction)}
        for source in sources:
            if source.settings.weight > 0:
                _check(source, held)
            doing.done += 1


def _check(source: Source, held: dict[bytes, str]) -> None:
    fraction = source.settings.held_out_fraction
    for block in source.scan():
        for document in block:
            owner = held.get(_digest(document.content))
            if owner is not None and not is_held_out(document.content, fraction):
                raise ValueError(
                    f"source {source.name!r} trains on its document {document.index}, which the probe has too (held "
                    f"out of {owner!r}): its influence would be that of learning the probe by heart. Take the document "
                    f"out, or give {source.name!r} the same held_out_fraction as {owner!r}"
                )


def _digest(content: Any) -> bytes:
    # Copies that differ in white space alone are copies.
    text = " ".join(canonical(content).split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
