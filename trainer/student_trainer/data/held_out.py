"""The fixed batches that a source is evaluated on, made of documents held out by their hash. Called by `loader`.

They depend on the source and on the batch shape, not on seed, weights or step, so that runs are comparable. Every
document contributes one piece, chosen by its hash, before any contributes a second, so that a few rows cover many
documents. A probe that is trained on is refused (`check_apart`): raw documents are compared, ignoring white space.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.data.documents import canonical, is_held_out
from student_trainer.data.order import key_of
from student_trainer.data.packing import OpenRows, Rows, cut
from student_trainer.data.source import Source
from student_trainer.data.tokenise import TokenDocument, Tokeniser
from student_trainer.settings.data import DataSettings
from teacher_proto.process.stages import stage


def held_out_batches(
    source: Source, tokeniser: Tokeniser, settings: DataSettings, pad_id: int, names: tuple[str, ...]
) -> list[Batch]:
    """Batches of `settings.rows` rows each, with at most `settings.held_out_rows` rows in total; the last batch is
    filled up with empty rows.

    ValueError if no document is held out.
    """
    documents = _collect(source, tokeniser, settings.held_out_rows * settings.seq_len, settings.seq_len)
    if not documents:
        fraction = source.settings.held_out_fraction
        raise ValueError(
            f"source {source.name!r} has no held-out document with tokens at held_out_fraction={fraction}; "
            "raise the fraction, or set it to 0 to leave the source out of the evaluation"
        )
    rows = _pack(_pieces(documents, names.index(source.name), source.name, settings.seq_len), settings)
    groups = [rows[start : start + settings.rows] for start in range(0, len(rows), settings.rows)]
    groups[-1] += [[] for _ in range(settings.rows - len(groups[-1]))]
    return [build_batch(i, group, settings.seq_len, pad_id, names) for i, group in enumerate(groups)]


def _collect(source: Source, tokeniser: Tokeniser, wanted: int, seq_len: int) -> list[TokenDocument]:
    fraction, tokens = source.settings.held_out_fraction, 0
    documents: list[TokenDocument] = []
    for block in source.scan():
        for document in tokeniser([d for d in block if is_held_out(d.content, fraction)]):
            if document is not None:
                documents.append(document)
                tokens += min(seq_len, len(document.ids_N))
        if tokens >= wanted:
            break
    return documents


def _pieces(documents: Sequence[TokenDocument], source: int, name: str, seq_len: int) -> Iterator[Placed]:
    """One piece of each document, then a second piece of those that have one, and so on."""
    turn = 0
    left = list(documents)
    while left:
        for document in left:
            step = seq_len - len(document.prefix)
            count = -(-len(document.ids_N) // step)
            piece = (key_of(document.ids_N[:seq_len].tobytes()) + turn) % count
            yield cut(source, name, document, piece * step, seq_len)
        turn += 1
        left = [d for d in left if len(d.ids_N) > turn * (seq_len - len(d.prefix))]


def _pack(pieces: Iterator[Placed], settings: DataSettings) -> Rows:
    rows: Rows = [[] for _ in range(settings.held_out_rows)]
    if settings.packing == "none":
        rows = [[piece] for piece, _ in zip(pieces, rows, strict=False)]
    else:
        open_rows = OpenRows(settings.held_out_rows, settings.seq_len)
        for piece in pieces:
            row = open_rows.place(len(piece.ids_N))
            if row is None:
                break
            rows[row].append(piece)
    return [row for row in rows if row]


def check_apart(sources: Sequence[Source], probe: Collection[str]) -> None:
    """Read all documents of the sources, and raise ValueError if a source trains on a document of the probe.

    Held-out documents of a source are not trained on there; copies within a source are either all held out or none.
    """
    with stage(
        "comparing the probe's documents with the training documents", len(sources), "sources", closing=False
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
                    f"source {source.name!r} trains on its document {document.index}, which is also in the probe (held "
                    f"out of {owner!r}): its influence would be that of memorising the probe. Remove the "
                    f"document, or give {source.name!r} the same held_out_fraction as {owner!r}"
                )


def _digest(content: Any) -> bytes:
    # Documents that differ only in white space count as copies.
    text = " ".join(canonical(content).split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
