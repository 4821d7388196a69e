"""The state of the mixture and its rule: which source the next sequence comes from. Used by `loader`, kept in
checkpoints.

The rule: each source has a credit in tokens. A sequence of n tokens from source s adds weight_i x n to every credit i
and takes n from credit s; the next sequence comes from the source with the largest credit. The share of each source
therefore stays within (sources x seq_len) tokens of its weight at every moment, with no randomness at all, and a change
of weights acts from there on without making up for the past.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

VERSION = 1


@dataclass(frozen=True, order=True)
class Cursor:
    """Where a source stands: the next document in the order of (epoch, shard), and the next token in it."""

    epoch: int = 0
    shard: int = 0
    document: int = 0
    offset: int = 0


@dataclass(frozen=True)
class SourceState:
    """One source: its weight, credit and cursor, and what has been drawn from it.

    Long documents are read side by side, one piece of each in turn, so that a batch is not made of one of them: `slots`
    holds the documents that are being read (None: the slot is free and takes the next document), the next turn first.
    No document of an epoch begins before all of the epoch before are read to their ends.
    """

    name: str
    weight: float
    fingerprint: str
    cursor: Cursor = Cursor()  # the next document that no slot has had
    slots: tuple[Cursor | None, ...] = (None,)
    credit: float = 0.0
    tokens: int = 0
    documents: int = 0


@dataclass(frozen=True)
class MixtureState:
    """All that batch `number` depends on beside the settings. JSON by `to_json`, exactly."""

    number: int
    sources: tuple[SourceState, ...]
    pending: tuple[tuple[int, Cursor], ...] = ()  # drawn, and waiting for a row they fit in: (source, start)

    @property
    def weights(self) -> dict[str, float]:
        """Weight by source; they sum to 1."""
        return {source.name: source.weight for source in self.sources}

    def with_weights(self, weights: Mapping[str, float]) -> Self:
        """The same place in the data with other weights from here on. They need not sum to 1."""
        names = {source.name for source in self.sources}
        if set(weights) != names:
            raise ValueError(f"weights are given for {sorted(weights)}, the sources are {sorted(names)}; give each one")
        shares = normalised(weights)
        return replace(self, sources=tuple(replace(s, weight=shares[s.name]) for s in self.sources))

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts only; floats survive JSON bit for bit."""
        return {
            "version": VERSION,
            "number": self.number,
            "sources": {
                s.name: {
                    "weight": s.weight,
                    "credit": s.credit,
                    "cursor": _numbers(s.cursor),
                    "slots": [slot and _numbers(slot) for slot in s.slots],
                    "tokens": s.tokens,
                    "documents": s.documents,
                    "fingerprint": s.fingerprint,
                }
                for s in self.sources
            },
            "pending": [[self.sources[source].name, *_numbers(cursor)] for source, cursor in self.pending],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. ValueError for what is no mixture state of this version."""
        if data.get("version") != VERSION:
            raise ValueError(f"the mixture state has version {data.get('version')!r}, this trainer reads {VERSION}")
        try:
            sources = tuple(_source_from_json(name, fields) for name, fields in data["sources"].items())
            order = {source.name: i for i, source in enumerate(sources)}
            pending = tuple((order[name], Cursor(*cursor)) for name, *cursor in data["pending"])
            return cls(int(data["number"]), sources, pending)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the mixture state cannot be read ({error!r}); is it from a checkpoint?") from error


def _numbers(cursor: Cursor) -> list[int]:
    return [cursor.epoch, cursor.shard, cursor.document, cursor.offset]


def _source_from_json(name: str, fields: Mapping[str, Any]) -> SourceState:
    slots = tuple(Cursor(*slot) if slot else None for slot in fields["slots"])
    return SourceState(**{**fields, "name": name, "cursor": Cursor(*fields["cursor"]), "slots": slots})


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights that sum to 1. ValueError if one is negative or not finite, or none is positive."""
    total = sum(weights.values())
    if not weights or not all(w >= 0 for w in weights.values()) or not 0 < total < float("inf"):
        raise ValueError(f"mixture weights are {dict(weights)}; expected numbers of 0 or more, at least one above 0")
    return {name: weight / total for name, weight in weights.items()}


class Mixer:
    """The mutable side of a `MixtureState` while one batch is made."""

    def __init__(self, state: MixtureState) -> None:
        self._states = list(state.sources)
        self._credits = [source.credit for source in state.sources]
        self._weights = [source.weight for source in state.sources]

    def next_source(self) -> int:
        """The source most behind its weight; of equals the heavier, of those the first."""
        # Of weight 0 none is drawn, however much credit it has left from a time when it had one.
        candidates = [i for i, weight in enumerate(self._weights) if weight > 0]
        return max(candidates, key=lambda i: (self._credits[i], self._weights[i], -i))

    def turn(self, source: int) -> Cursor | None:
        """Where the document goes on whose turn it is; None: the next document begins."""
        return self._states[source].slots[0]

    def unfinished(self, source: int, epoch: int) -> Cursor | None:
        """A document of an epoch before `epoch` that still has something left."""
        return next((slot for slot in self._states[source].slots if slot and slot.epoch < epoch), None)

    def cursor(self, source: int) -> Cursor:
        """The next document of a source."""
        return self._states[source].cursor

    def drawn(self, source: int, tokens: int, cursor: Cursor, slot: Cursor | None, rest: Cursor | None) -> None:
        """Book a sequence of `tokens` tokens.

        cursor: the next document from now on. slot: what the slot it came from held; rest: what it holds now.
        """
        for i, weight in enumerate(self._weights):
            # Weights sum to 1, so what all credits gain is what the one of the source loses: their sum stays 0.
            self._credits[i] += weight * tokens
        self._credits[source] -= tokens
        state = self._states[source]
        turn = state.slots.index(slot)
        self._states[source] = replace(
            state,
            cursor=cursor,
            # The slot goes to the back with what is left of its document, so that the next one has its turn.
            slots=(*state.slots[turn + 1 :], *state.slots[:turn], rest),
            tokens=state.tokens + tokens,
            documents=state.documents + (rest is None),
        )

    def freeze(self, number: int, pending: tuple[tuple[int, Cursor], ...]) -> MixtureState:
        """The state after the batch."""
        sources = tuple(replace(s, credit=c) for s, c in zip(self._states, self._credits, strict=True))
        return MixtureState(number, sources, pending)
