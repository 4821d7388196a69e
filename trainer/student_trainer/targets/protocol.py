"""The protocol for sources of targets, and its records. Implemented by `remote`, `local`, `cached` and `mixed`.

`prefetch` calls `fetch` for batches ahead of the step, `evaluator` for held-out ones; `align` turns the targets into
rows that match the student's hidden rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.losses.terms import Needs, Term
from teacher_proto.client.expectation import Canary
from teacher_proto.client.waiting import Waiting
from teacher_proto.identity import TeacherIdentity
from teacher_proto.info import HIDDEN_WIDTH, TeacherInfo
from teacher_proto.requests import KINDS, Kind, Limits, Query, TargetSpec

if TYPE_CHECKING:
    from student_trainer.settings import DistillationSettings, Settings

# One query for each document of a batch, all with the same spec; None where nothing is requested.
Queries = Sequence[Query | None]


@dataclass(frozen=True)
class Admits:
    """A service's limits for one request: ids per row of kind `gather`, tokens, bytes of a body, and cost in tokens x
    (numbers returned per token + 1), None if the service gives none. `hidden_width`: numbers per hidden state."""

    max_gather: int
    max_request_tokens: int
    max_body_bytes: int
    max_cost: int | None
    hidden_width: int

    @classmethod
    def of(cls, info: TeacherInfo) -> Admits:
        limits = info.limits
        return cls(
            max_gather=limits.max_gather, max_request_tokens=limits.max_request_tokens,
            max_body_bytes=limits.max_body_bytes, max_cost=limits.max_cost,
            hidden_width=info.hidden_width or HIDDEN_WIDTH,
        )  # fmt: skip


@dataclass(frozen=True)
class TeacherCard:
    """Describes a teacher: checkpoints keep it, and it is compared on resume.

    `identity` is the plain form of `TeacherIdentity`; several combined teachers have none, but a card each in
    `members`. `canary`: the logprobs of fixed sequences, which expose a teacher with a false identity. `admits`: a
    service's limits for one request; None for targets from elsewhere.
    """

    name: str
    fingerprint: str
    vocab_size: int
    max_sequence_length: int
    tokenizer_sha256: str
    max_top_k: int
    kinds: tuple[Kind, ...]
    identity: dict[str, Any] | None = None
    canary: tuple[float, ...] | None = None
    members: dict[str, TeacherCard] | None = None
    admits: Admits | None = None

    @classmethod
    def of(cls, info: TeacherInfo, canary: Canary | None) -> TeacherCard:
        """The card of one teacher, from what it publishes."""
        semantic, limits = info.identity.semantic, info.limits
        return cls(
            name=semantic.model, fingerprint=info.fingerprint, vocab_size=limits.vocab_size,
            max_sequence_length=limits.max_sequence_length, tokenizer_sha256=semantic.tokenizer_sha256,
            max_top_k=limits.max_top_k, kinds=info.kinds, identity=info.identity.model_dump(mode="json"),
            canary=canary.logprobs if canary is not None else None,
        )  # fmt: skip

    def info(self) -> TeacherInfo:
        """The teacher's entry in a target store."""
        assert self.identity is not None
        limits = Limits(
            vocab_size=self.vocab_size, max_sequence_length=self.max_sequence_length, max_top_k=self.max_top_k
        )
        identity = TeacherIdentity.model_validate(self.identity)
        return TeacherInfo(identity=identity, fingerprint=self.fingerprint, limits=limits, kinds=self.kinds)


class Targets(Protocol):
    """A source of targets. All methods run on the prefetch thread's event loop."""

    async def open(self) -> TeacherCard:
        """Connect to the teacher. A `StillhouseError` says what to do if it can't be reached or is the wrong one."""
        ...

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        """The targets for the queries about a batch's documents (`queries.queries_of`). They depend only on the
        arguments and the teacher."""
        ...

    async def head(self) -> bytes:
        """The teacher's output head, the file of `GET /v1/head`. NotFoundError if there is none."""
        ...

    def outage(self) -> str:
        """The reason for an outage that `fetch` is waiting out; empty if there is none. May be called by any thread."""
        ...

    def waiting(self) -> Waiting | None:
        """The combined progress of everything being fetched; None if nothing is. May be called by any thread."""
        ...

    async def close(self) -> None: ...


def spec_for(terms: Iterable[Term], top_k: int, distillation: DistillationSettings) -> TargetSpec | None:
    """What these losses need from a teacher ahead of the step. None if no loss reads targets; otherwise at least top K,
    which the sanity check and the metrics need. `gather` is not included: its ids are known only when the step begins
    (`student_support`), and it uses the `log_z` of top K.

    ValueError for losses on samples at several temperatures: the teacher draws at only one.
    """
    needs = Needs.of(terms)
    if not needs.kinds:
        return None
    kinds, drawn = needs.ahead | {"top_k"}, sorted(needs.sampled_at)
    if len(drawn) > 1:
        raise ValueError(f"the losses on samples have the temperatures {drawn}; give them all the same one")
    return TargetSpec(
        kinds=tuple(kind for kind in KINDS if kind in kinds),
        top_k=top_k,
        temperatures=tuple(sorted(needs.temperatures)),
        num_samples=distillation.samples if drawn else 0,
        sample_temperature=drawn[0] if drawn else 1.0,
        seed=distillation.sample_seed if drawn else 0,
        hidden_dtype=distillation.hidden_dtype if "hidden" in kinds else None,
    )


def held_out_spec(settings: Settings) -> TargetSpec:
    """What is requested for held-out rows, whatever the losses are."""
    top_k = settings.evaluation.top_k or settings.teacher.top_k
    if settings.evaluation.kl == "full":
        return TargetSpec(("top_k", "hidden"), top_k, hidden_dtype="float16")
    return TargetSpec(("top_k",), top_k)
