"""Targets from a transformers model in this process, without a service, on a background thread. Opened by `open`.

The model, its identity and the reduction are those of the service's `hf` engine, so a run can switch between the two.
Batches are scored one after another. Within a batch, documents of similar length share a forward pass; the grouping
depends on this batch alone, so its targets are the same, bit for bit, whatever other batches are in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.targets.expected import expectation
from student_trainer.targets.protocol import Queries, TeacherCard
from student_trainer.targets.queries import by_document, spec_of, valid_queries
from teacher_proto.client.expectation import canary_request, read_canary
from teacher_proto.client.waiting import Waiting
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import KINDS, Query
from teacher_proto.targets import TokenTargets, check_targets
from teacher_proto.wire.packed import layout_of, unpack_rows

if TYPE_CHECKING:
    from student_trainer.settings.teacher import OneTeacher
    from teacher_proto.compute.hf_model import HfModel

MAX_TOP_K = 4096
SHORTEST = 0.75  # smallest length in a forward pass, relative to its longest document: it limits padding


@dataclass(eq=False)
class _Progress:
    """Progress of one batch; `began_at` is a time of the monotonic clock, None while the batch waits for its turn."""

    tokens: int
    tokens_done: int = 0
    began_at: float | None = None


class LocalTargets:
    """`settings` name the model; `saved` is the card of the teacher that the run began with.

    `open` raises ValueError if the model is missing or can't be loaded, WrongTeacherError if it isn't the expected one.
    """

    def __init__(self, settings: OneTeacher, saved: Mapping[str, Any] | None = None):
        self._settings = settings
        self._expected = expectation(settings.fingerprint, saved)
        self._dtype = _dtype_of(saved) if settings.dtype == "auto" else settings.dtype
        threads = torch.get_num_threads()
        # A new thread takes its number of intra-op threads from the environment, not from the thread that starts it.
        self._thread = ThreadPoolExecutor(1, "local-teacher", lambda: torch.set_num_threads(threads))
        self._model: HfModel | None = None
        self._info: TeacherInfo | None = None
        self._under_way: set[_Progress] = set()

    async def open(self) -> TeacherCard:
        self._info = await self._run(self._load)
        return TeacherCard.of(self._info, self._expected.canary)

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        assert self._info is not None, "open() comes before fetch()"
        asked = valid_queries(batch, queries, self._info.limits.vocab_size)
        progress = _Progress(sum(query.num_tokens for query in asked))
        self._under_way.add(progress)
        try:
            # One thread, so batches are scored one after another without blocking the event loop.
            given = await self._run(self._score, asked, progress)
        finally:
            self._under_way.discard(progress)
        return BatchTargets(by_document(queries, given), spec_of(queries), self._info.fingerprint)

    async def head(self) -> bytes:
        return await self._run(self._head)

    def outage(self) -> str:
        return ""

    def waiting(self) -> Waiting | None:
        under_way = list(self._under_way)
        if not under_way:
            return None
        computing = [progress for progress in under_way if progress.began_at is not None]
        began_at = min((progress.began_at for progress in computing if progress.began_at is not None), default=0.0)
        done = sum(progress.tokens_done for progress in under_way)
        return Waiting(
            "the local teacher",
            tokens_done=done,
            tokens=sum(progress.tokens for progress in under_way),
            tokens_per_second=done / (time.monotonic() - began_at) if done else 0.0,
        )

    async def close(self) -> None:
        """Wait for the forward pass in progress, then free the model's memory."""
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        self._model = None

    async def _run(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _load(self) -> TeacherInfo:
        from teacher_proto.compute.hf_model import HfModel
        from teacher_proto.model_files import find_model

        settings = self._settings
        if not settings.model:
            raise ValueError(
                "teacher.model must be given: a folder or hub name of a Hugging Face causal language model"
            )
        folder = find_model(settings.model, revision=settings.revision)
        self._model = HfModel(folder, dtype=self._dtype, device=settings.device)
        identity = self._model.identity()
        info = TeacherInfo(
            identity=identity, fingerprint=identity.fingerprint, limits=self._model.limits(None, MAX_TOP_K), kinds=KINDS
        )
        self._expected.check_identity(info, "the local teacher")
        if (request := canary_request(info)) is not None:
            self._expected.check_canary(read_canary(self._score(request.queries())), info, "the local teacher")
        return info

    def _score(self, asked: list[Query], progress: _Progress | None = None) -> list[TokenTargets]:
        """The targets in order. InvalidTargetsError if one cannot be a distribution because the model overflowed."""
        assert self._model is not None
        progress = progress or _Progress(0)
        progress.began_at = time.monotonic()
        model = self._model
        given: dict[int, TokenTargets] = {}
        for group in alike(asked, self._settings.max_batch_tokens):
            # Similar lengths together, so that there is little padding; no row attends to it.
            packed = model.score([asked[index] for index in group])
            for index, packed_RB in zip(group, packed, strict=True):
                layout = layout_of(asked[index], model.vocab_size, model.hidden_size)
                given[index] = unpack_rows(packed_RB, asked[index].rows[0], layout)
                check_targets(given[index], asked[index], model.vocab_size)
                progress.tokens_done += len(asked[index].tokens_T)
        return [given[index] for index in range(len(asked))]

    def _head(self) -> bytes:
        from safetensors.torch import save

        from teacher_proto.compute.head import head_contents

        assert self._model is not None
        return save(head_contents(self._model.head(), self._model.scaling))


def _dtype_of(saved: Mapping[str, Any] | None) -> str:
    """The dtype that the resumed run's teacher had, so that other hardware does not make it a different teacher."""
    identity = (saved or {}).get("identity")
    return str(identity["semantic"]["dtype"]) if identity else "auto"


def alike(asked: list[Query], max_tokens: int) -> list[list[int]]:
    """Groups of indices of documents that share a forward pass: longest first, of similar length, each group at most
    `max_tokens` including padding.
    """
    groups: list[list[int]] = []
    lengths = [query.num_tokens for query in asked]
    for index in sorted(range(len(asked)), key=lambda index: (-lengths[index], index)):
        longest = lengths[groups[-1][0]] if groups else 0
        # Every row of a group is padded to its longest document, which came first.
        fits = bool(groups) and longest * (len(groups[-1]) + 1) <= max_tokens
        if fits and lengths[index] >= SHORTEST * longest:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
