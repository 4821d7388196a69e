"""Where targets come from: one protocol, and the records that pass it. Made by remote, local, cached and mixed.

`prefetch` calls `fetch` for batches ahead of the step, `evaluator` for the held-out ones; `align` turns what comes into
rows beside the student's hidden rows.
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

# What is asked about a batch, by document: None of one about which nothing is asked; all of one spec.
Queries = Sequence[Query | None]


@dataclass(frozen=True)
class Admits:
    """A service's limits for one request: ids a row of kind `gather`, tokens, bytes of a body, cost in tokens x
    (numbers answered a token + 1), None where it doesn't say; numbers of a hidden state."""

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
    """Who answers: what a run keeps of its teacher in checkpoints and compares on resume.

    `identity` is the plain form of `TeacherIdentity`; several teachers that answer together have none, but a card each
    in `members`. `canary` are the logprobs of the client's fixed sequences, which catch a teacher that is not who it
    says. `admits` is what a service takes at a time, None where the answers come from elsewhere.
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
        """The card of one teacher, out of what it publishes."""
        semantic, limits = info.identity.semantic, info.limits
        return cls(
            name=semantic.model, fingerprint=info.fingerprint, vocab_size=limits.vocab_size,
            max_sequence_length=limits.max_sequence_length, tokenizer_sha256=semantic.tokenizer_sha256,
            max_top_k=limits.max_top_k, kinds=info.kinds, identity=info.identity.model_dump(mode="json"),
            canary=canary.logprobs if canary is not None else None,
        )  # fmt: skip

    def info(self) -> TeacherInfo:
        """What a target store keeps of one teacher."""
        assert self.identity is not None
        limits = Limits(
            vocab_size=self.vocab_size, max_sequence_length=self.max_sequence_length, max_top_k=self.max_top_k
        )
        identity = TeacherIdentity.model_validate(self.identity)
        return TeacherInfo(identity=identity, fingerprint=self.fingerprint, limits=limits, kinds=self.kinds)


class Targets(Protocol):
    """A source of targets. All methods run on the prefetch thread's event loop."""

    async def open(self) -> TeacherCard:
        """Reach the teacher. A `StillhouseError` that says what to do if it can't be reached or is the wrong one."""
        ...

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        """The answers to the queries about a batch's documents (`queries.queries_of`). They depend on what is given and
        the teacher alone."""
        ...

    async def head(self) -> bytes:
        """The teacher's output head, the file of `GET /v1/head`. NotFoundError where there is none."""
        ...

    def outage(self) -> str:
        """What is known of an outage that `fetch` is trying to outlast; empty while there is none. From any thread."""
        ...

    def waiting(self) -> Waiting | None:
        """How far everything is that is being fetched, all together; None where nothing is. From any thread."""
        ...

    async def close(self) -> None: ...


def spec_for(terms: Iterable[Term], top_k: int, distillation: DistillationSettings) -> TargetSpec | None:
    """What these losses need of a teacher ahead of the step: None where none reads targets, else top K at least, which
    the sanity check and the figures want. `gather` is not among it: its ids are known when the step begins
    (`student_support`), its `log_z` is top K's.

    ValueError for losses on samples at several temperatures: the teacher draws at one.
    """
    needs = Needs.of(terms)
    if not needs.kinds:
        return None
    kinds, drawn = needs.ahead | {"top_k"}, sorted(needs.sampled_at)
    if len(drawn) > 1:
        raise ValueError(f"there are losses on samples at the temperatures {drawn}; give them all the same")
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
    """What is asked about held-out rows, whatever the losses are."""
    top_k = settings.evaluation.top_k or settings.teacher.top_k
    if settings.evaluation.kl == "full":
        return TargetSpec(("top_k", "hidden"), top_k, hidden_dtype="float16")
    return TargetSpec(("top_k",), top_k)
