"""Several teachers as one source of targets: an ensemble, or one teacher for each data source. Opened by `open`.

All of them share a tokenizer. `ensemble.py` defines the ensemble's targets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.targets.background import gather
from student_trainer.targets.ensemble import mix, share_draws
from student_trainer.targets.protocol import Queries, Targets, TeacherCard
from student_trainer.targets.queries import spec_of
from teacher_proto.client.waiting import Waiting
from teacher_proto.errors import NotFoundError
from teacher_proto.identity import digest
from teacher_proto.requests import KINDS, Kind
from teacher_proto.targets import TokenTargets


@dataclass(frozen=True, eq=False)
class Member:
    """One of several teachers: `weight` is relative to the others', `sources` are the data sources that it serves."""

    name: str
    targets: Targets
    weight: float
    sources: tuple[str, ...] = ()


class _Several:
    """Common to both ways to mix: the members' combined identity, opening and closing them."""

    def __init__(self, members: Sequence[Member]):
        assert members
        self._members = tuple(members)
        self._fingerprint = ""

    async def open(self) -> TeacherCard:
        opened = await gather(member.targets.open() for member in self._members)
        cards = {member.name: card for member, card in zip(self._members, opened, strict=True)}
        card = as_one(cards, self._kinds(cards), self._description())
        self._fingerprint = card.fingerprint
        return card

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        raise NotImplementedError

    async def head(self) -> bytes:
        raise NotFoundError(
            "a mixture of teachers has no output head, which losses with support `full` need", field="path"
        )

    def outage(self) -> str:
        return "; ".join(f"{m.name}: {reason}" for m in self._members if (reason := m.targets.outage()))

    def waiting(self) -> Waiting | None:
        return Waiting.sum_of(member.targets.waiting() for member in self._members)

    async def close(self) -> None:
        for member in self._members:
            await member.targets.close()

    def _kinds(self, cards: Mapping[str, TeacherCard]) -> tuple[Kind, ...]:
        return tuple(kind for kind in KINDS if kind != "hidden" and all(kind in card.kinds for card in cards.values()))

    def _description(self) -> list[Any]:
        """What determines the targets besides the members themselves; part of the fingerprint."""
        raise NotImplementedError


class Ensemble(_Several):
    """Every teacher scores every document, and their probabilities are mixed by weight."""

    def __init__(self, members: Sequence[Member]):
        super().__init__(members)
        total = sum(member.weight for member in members)
        self._weights = [member.weight / total for member in members]

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        given = await gather(
            # Each teacher gets its share of the draws; everything else is requested from all alike.
            member.targets.fetch(batch, [None if query is None else replace(query, spec=spec) for query in queries])
            for member, spec in zip(self._members, share_draws(spec_of(queries), self._weights), strict=True)
        )
        # Off the event loop: sorting and summing thousands of rows takes a while.
        documents = await asyncio.to_thread(_mix_all, queries, given, self._weights)
        return BatchTargets(documents, spec_of(queries), self._fingerprint)

    def _description(self) -> list[Any]:
        return ["ensemble", self._weights]


class BySource(_Several):
    """Each document is scored by the teacher that serves its data source."""

    def __init__(self, members: Sequence[Member]):
        super().__init__(members)
        self._of = {source: index for index, member in enumerate(members) for source in member.sources}

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        teachers = [
            None if query is None else self._index(document.source)
            for document, query in zip(batch.documents, queries, strict=True)
        ]
        asked = sorted({teacher for teacher in teachers if teacher is not None})
        given = await gather(
            self._members[index].targets.fetch(batch, _only(queries, [teacher == index for teacher in teachers]))
            for index in asked
        )
        of_teacher = dict(zip(asked, given, strict=True))
        documents = tuple(
            None if teacher is None else of_teacher[teacher].documents[place] for place, teacher in enumerate(teachers)
        )
        return BatchTargets(documents, spec_of(queries), self._fingerprint)

    def _index(self, source: str) -> int:
        if source not in self._of:
            raise ValueError(
                f"no teacher scores the source {source}: add it to the `sources` of one of teacher.members, "
                f"which score {', '.join(self._of)}"
            )
        return self._of[source]

    def _description(self) -> list[Any]:
        return ["by_source", [sorted(member.sources) for member in self._members]]


def _only(queries: Queries, chosen: Sequence[bool]) -> Queries:
    return [query if is_chosen else None for query, is_chosen in zip(queries, chosen, strict=True)]


def _mix_all(
    queries: Queries, given: Sequence[BatchTargets], weights: Sequence[float]
) -> tuple[TokenTargets | None, ...]:
    documents: list[TokenTargets | None] = []
    for place, query in enumerate(queries):
        answers = [answer for targets in given if (answer := targets.documents[place]) is not None]
        documents.append(None if query is None else mix(answers, weights, query))
    return tuple(documents)


def as_one(cards: Mapping[str, TeacherCard], kinds: tuple[Kind, ...], description: list[Any]) -> TeacherCard:
    """The combined card of several teachers. ValueError if their tokenizers differ, or if no kind is served by all."""
    tokenizers = {card.tokenizer_sha256: name for name, card in cards.items()}
    if len(tokenizers) > 1:
        raise ValueError(
            f"the teachers {' and '.join(tokenizers.values())} have different tokenizers: the same id "
            "would mean different tokens to them"
        )
    if not kinds:
        served = "; ".join(f"{name} serves {', '.join(card.kinds)}" for name, card in cards.items())
        raise ValueError(f"the teachers have no kind of targets in common that can be mixed: {served}")
    # The semantic and the numeric half of the fingerprint, each a digest of the members' halves.
    meaning, rounding = zip(*(card.fingerprint.split(".") for card in cards.values()), strict=True)
    return TeacherCard(
        name=" + ".join(card.name for card in cards.values()),
        fingerprint=f"{digest([*description, meaning])[:32]}.{digest(rounding)[:16]}",
        vocab_size=min(card.vocab_size for card in cards.values()),
        max_sequence_length=min(card.max_sequence_length for card in cards.values()),
        tokenizer_sha256=next(iter(tokenizers)),
        max_top_k=min(card.max_top_k for card in cards.values()),
        kinds=kinds,
        members=dict(cards),
    )
