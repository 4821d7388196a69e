"""Makes batch n from (settings, mixture state, n). Built by `build_components`; read through `stream.BatchStream`.

source = BatchSource(settings.data, tokenizer, seed)
state = source.initial_state()
batch, state = source.batch(state, 0)  # pure: the same bits every time and on any machine
"""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.data.documents import RawDocument
from student_trainer.data.feed import Feed, Rate
from student_trainer.data.held_out import check_apart, held_out_batches
from student_trainer.data.mixture import Mixer, MixtureState, SourceState, normalised
from student_trainer.data.packing import MODES, Draws, Start, cut, documents_in_use, fetch_in_use
from student_trainer.data.random_access import BLOCK_CHARACTERS, OPENERS, RandomAccessSource
from student_trainer.data.source import Source
from student_trainer.data.streamed import StreamedSource, open_shards
from student_trainer.data.tokenise import TokenDocument, Tokeniser, pad_id, plain_backend
from student_trainer.settings.data import DataSettings, SourceSettings
from student_trainer.settings.mixture import InfluenceMixture

CHARACTERS_A_TOKEN = 4


class BatchSource:
    """The data of a run. Everything random is a function of `seed` and of positions in the data."""

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        """Open every source. ValueError names the source and what is wrong with it.

        rank, world: each process makes the full batch and keeps its own rows/world rows of it.
        """
        if not settings.sources:
            raise ValueError("data.sources is empty; name at least one source")
        if settings.rows % world or not 0 <= rank < world:
            raise ValueError(
                f"data.rows is {settings.rows} on rank {rank} of {world}; the rows must divide evenly among the ranks"
            )
        self.settings, self.seed, self.rank, self.world = settings, seed, rank, world
        self.names = tuple(settings.sources)
        self.rate = Rate()
        self._pad_id = pad_id(tokenizer)
        self._weights = normalised({name: source.weight for name, source in settings.sources.items()})
        self._held_out: dict[str, list[Batch]] = {}
        self._lock = threading.Lock()
        self._at_hand: dict[Start, TokenDocument] = {}  # documents in use after the last batch; a cache
        self._pool = ThreadPoolExecutor(settings.workers, "tokenise")
        backend = plain_backend(tokenizer)
        self._feeds = [self._open(name, Tokeniser(name, tokenizer, backend, settings)) for name in self.names]

    def _open(self, name: str, tokeniser: Tokeniser) -> Feed:
        settings = self.settings
        source = open_source(name, settings.sources[name], self.seed, settings.cache_folder)
        characters_ahead = settings.batches_ahead * settings.rows * settings.seq_len * CHARACTERS_A_TOKEN
        ahead = settings.workers + 1 + characters_ahead // BLOCK_CHARACTERS
        return Feed(source, tokeniser, self._pool, self.rate, ahead)

    def initial_state(self) -> MixtureState:
        """The state before batch 0, with the settings' weights."""
        slots = (None,) * self.settings.interleave
        sources = [f.source for f in self._feeds]
        return MixtureState(
            0, tuple(SourceState(s.name, self._weights[s.name], s.fingerprint, slots=slots) for s in sources)
        )

    def contents(self) -> dict[str, dict[str, Any]]:
        """The content of each source, for a checkpoint, by which a resumed run can say what differs."""
        return {feed.source.name: feed.source.content.to_json() for feed in self._feeds}

    def resumed(self, state: MixtureState, contents: Mapping[str, Mapping[str, Any]]) -> MixtureState:
        """The checked state from a checkpoint; `contents` are those in the checkpoint. An older trainer's fingerprint
        covers only a sample of the documents; it is replaced by one that covers all.
        """
        self.check_state(state, contents)
        fingerprints = [feed.source.fingerprint for feed in self._feeds]
        sources = zip(state.sources, fingerprints, strict=True)
        return replace(state, sources=tuple(replace(source, fingerprint=now) for source, now in sources))

    def check_state(self, state: MixtureState, contents: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """ValueError if `state` belongs to other sources, or to other documents in one of them. With the `contents` at
        the time of `state`, the message says where they differ.
        """
        names = tuple(source.name for source in state.sources)
        if names != self.names:
            raise ValueError(f"the mixture state has the sources {names}, but the settings name {self.names}")
        for saved, feed in zip(state.sources, self._feeds, strict=True):
            if len(saved.slots) != self.settings.interleave:
                raise ValueError(
                    f"data.interleave was {len(saved.slots)} and is now {self.settings.interleave}; set it back"
                )
            ours = feed.source.fingerprint
            if saved.fingerprint not in (ours, ours.rpartition(":")[0]):
                known = (contents or {}).get(saved.name)
                where = f" ({feed.source.content.difference(known)})" if known else ""
                raise ValueError(
                    f"source {saved.name!r} has changed since the run began{where}: its fingerprint was "
                    f"{saved.fingerprint} and is now {ours}; restore the data, or start a new run"
                )

    def batch(self, state: MixtureState, number: int) -> tuple[Batch, MixtureState]:
        """Batch `number` and the state after it. Pure; `state` must be the one before that batch."""
        if number != state.number:
            raise ValueError(f"batch {number} was requested with the mixture state before batch {state.number}")
        self.check_state(state)
        with self._lock:
            mixer = Mixer(state)
            # Partly read and pending documents: cached after the previous batch, read again after a resume.
            documents = fetch_in_use(state, self._feeds, self._at_hand)
            rows, waiting = MODES[self.settings.packing](
                Draws(mixer, self._feeds, documents), state.pending, self.settings
            )
            after = mixer.freeze(number + 1, tuple(drawn.start for drawn in waiting))
            # Only a cache: the batch is the same with or without it.
            self._at_hand = {start: documents[start] for start in documents_in_use(after)}
        batch = build_batch(number, rows, self.settings.seq_len, self._pad_id, self.names)
        return self._mine(batch), after

    def held_out(self, name: str) -> list[Batch]:
        """The fixed batches that source `name` is evaluated on; empty if its held_out_fraction is 0.

        Rows left without documents hold only padding.
        """
        if name not in self.names:
            raise ValueError(f"there is no source {name!r}; the sources are {', '.join(self.names)}")
        feed = self._feeds[self.names.index(name)]
        if feed.source.settings.held_out_fraction == 0:
            return []
        if name not in self._held_out:
            # Every rank makes the full batches and keeps its rows, as with training batches.
            batches = held_out_batches(feed.source, feed.tokeniser, self.settings, self._pad_id, self.names)
            self._held_out[name] = [self._mine(batch) for batch in batches]
        return self._held_out[name]

    def raw_documents(self, name: str) -> Iterator[RawDocument]:
        """All documents of a source once, held out or not, in an order that does not depend on the seed."""
        for block in self._feeds[self.names.index(name)].source.scan():
            yield from block

    def documents(self, name: str) -> Iterator[tuple[RawDocument, Placed | None]]:
        """The same documents with their first `seq_len` tokens; None if these have no token to learn."""
        number = self.names.index(name)
        feed = self._feeds[number]
        for block in feed.source.scan():
            for raw, document in zip(block, feed.tokeniser(block), strict=True):
                placed = None if document is None else cut(number, name, document, 0, self.settings.seq_len)
                yield raw, placed if placed is not None and _teaches(placed) else None

    def check_probe(self) -> None:
        """ValueError if another source trains on held-out documents of the probe's sources, or if one of these holds
        out nothing. Does nothing for a mixture without a probe.
        """
        if not isinstance(self.settings.mixture, InfluenceMixture):
            return
        names = self.settings.probe
        if not names:
            raise ValueError("policy influence needs a probe, but no source has a held_out_fraction above 0")
        for name in names:
            if self.settings.sources[name].held_out_fraction == 0:
                raise ValueError(
                    f"source {name!r} is a probe, but its held_out_fraction is 0, so it has no held-out documents"
                )
        check_apart([feed.source for feed in self._feeds], names)

    @property
    def skipped(self) -> dict[str, int]:
        """The number of bad documents skipped so far, for each source that had any."""
        return {feed.source.name: feed.skipped for feed in self._feeds if feed.skipped}

    def _mine(self, batch: Batch) -> Batch:
        share = self.settings.rows // self.world
        return batch if self.world == 1 else batch.rows(self.rank * share, (self.rank + 1) * share)

    def close(self) -> None:
        """Stop the threads."""
        for feed in self._feeds:
            feed.close()
        self._pool.shutdown(cancel_futures=True)


def _teaches(placed: Placed) -> bool:
    """Whether any of its tokens is both predicted and counted."""
    return len(placed.ids_N) > 1 and (placed.counts_N is None or bool(placed.counts_N[1:].any()))


def open_source(name: str, settings: SourceSettings, seed: int, cache_folder: str | None) -> Source:
    """Open the source that the settings describe. ValueError if it is missing, empty or not as described."""
    if settings.streaming:
        shards, content = open_shards(name, settings, cache_folder)
        return StreamedSource(name, settings, shards, content, seed)
    return RandomAccessSource(name, settings, OPENERS[settings.kind](name, settings, cache_folder), seed, cache_folder)
