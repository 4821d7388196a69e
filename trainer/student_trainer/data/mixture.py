"""The mixture's state, and the rule for which source the next sequence comes from. Used by `loader`; saved in
checkpoints.

The rule: each source has a credit in tokens. A sequence of n tokens from source s adds weight_i x n to every credit i
and subtracts n from credit s; the next sequence comes from the source with the largest credit. So each source's number
of tokens is always within (sources x seq_len) tokens of its weight's share, without any randomness, and new weights
apply from then on without compensating for the past.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

VERSION = 1


@dataclass(frozen=True, order=True)
class Cursor:
    """A position in a source: epoch, shard, document in the shard's order of that epoch, and token in the document."""

    epoch: int = 0
    shard: int = 0
    document: int = 0
    offset: int = 0


@dataclass(frozen=True)
class SourceState:
    """One source: its weight, credit and cursor, and how much has been drawn from it.

    Long documents are interleaved, one piece of each in turn, so that a batch is not filled by a single one: `slots`
    holds the documents that are being read, the next turn first (None: the slot is free and takes the next document).
    No document of an epoch begins before all documents of the previous epoch are finished.
    """

    name: str
    weight: float
    fingerprint: str
    cursor: Cursor = Cursor()  # the next document that has not been in a slot
    slots: tuple[Cursor | None, ...] = (None,)
    credit: float = 0.0
    tokens: int = 0
    documents: int = 0


@dataclass(frozen=True)
class MixtureState:
    """Everything that batch `number` depends on besides the settings. `to_json` is exact."""

    number: int
    sources: tuple[SourceState, ...]
    pending: tuple[tuple[int, Cursor], ...] = ()  # drawn, but waiting for a row that they fit into: (source, start)

    @property
    def weights(self) -> dict[str, float]:
        """Weight by source; they sum to 1."""
        return {source.name: source.weight for source in self.sources}

    def with_weights(self, weights: Mapping[str, float]) -> Self:
        """The same position in the data with other weights from here on. They need not sum to 1."""
        names = {source.name for source in self.sources}
        if set(weights) != names:
            raise ValueError(f"got weights for {sorted(weights)}, expected one for each of the sources {sorted(names)}")
        shares = normalised(weights)
        return replace(self, sources=tuple(replace(s, weight=shares[s.name]) for s in self.sources))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; floats survive JSON bit for bit."""
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
        """The inverse of `to_json`. ValueError if `data` is not a mixture state of this version."""
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
    """Weights scaled to sum to 1. ValueError if one is negative or not finite, or if none is positive."""
    total = sum(weights.values())
    if not weights or not all(w >= 0 for w in weights.values()) or not 0 < total < float("inf"):
        raise ValueError(f"mixture weights are {dict(weights)}; expected numbers of 0 or more, at least one above 0")
    return {name: weight / total for name, weight in weights.items()}


class Mixer:
    """A mutable `MixtureState`, used while one batch is made."""

    def __init__(self, state: MixtureState) -> None:
        self._states = list(state.sources)
        self._credits = [source.credit for source in state.sources]
        self._weights = [source.weight for source in state.sources]

    def next_source(self) -> int:
        """The source with the largest credit; ties go to the larger weight, then to the first."""
        # A source of weight 0 is never drawn, however much credit it has left from an earlier weight.
        candidates = [i for i, weight in enumerate(self._weights) if weight > 0]
        return max(candidates, key=lambda i: (self._credits[i], self._weights[i], -i))

    def turn(self, source: int) -> Cursor | None:
        """Where to continue the document whose turn it is; None: the next document begins."""
        return self._states[source].slots[0]

    def unfinished(self, source: int, epoch: int) -> Cursor | None:
        """The position in an unfinished document of an epoch before `epoch`, if there is one."""
        return next((slot for slot in self._states[source].slots if slot and slot.epoch < epoch), None)

    def cursor(self, source: int) -> Cursor:
        """The position of a source's next document."""
        return self._states[source].cursor

    def drawn(self, source: int, tokens: int, cursor: Cursor, slot: Cursor | None, rest: Cursor | None) -> None:
        """Record that a sequence of `tokens` tokens was drawn.

        cursor: the new next document. slot: what its slot held before; rest: what it holds now.
        """
        for i, weight in enumerate(self._weights):
            # Weights sum to 1, so the credits gain in total what the source's credit loses: their sum stays 0.
            self._credits[i] += weight * tokens
        self._credits[source] -= tokens
        state = self._states[source]
        turn = state.slots.index(slot)
        self._states[source] = replace(
            state,
            cursor=cursor,
            # The slot moves to the back with the rest of its document; the next slot has its turn.
            slots=(*state.slots[turn + 1 :], *state.slots[:turn], rest),
            tokens=state.tokens + tokens,
            documents=state.documents + (rest is None),
        )

    def freeze(self, number: int, pending: tuple[tuple[int, Cursor], ...]) -> MixtureState:
        """The state after the batch."""
        sources = tuple(replace(s, credit=c) for s, c in zip(self._states, self._credits, strict=True))
        return MixtureState(number, sources, pending)
