"""Targets from a target store or dataset, written by a service or by `stillhouse-teacher fill`. Opened by `open`.

A document that is missing stops the run, or is requested from the teacher behind the store and written to the store,
where the next epoch finds it. Targets are read back bit for bit as they were written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.targets.expected import expectation
from student_trainer.targets.protocol import Queries, Targets, TeacherCard
from student_trainer.targets.queries import by_document, spec_of, valid_queries
from teacher_proto.client.waiting import Waiting
from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.errors import NotFoundError, WrongTeacherError
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.store.target_store import TargetStore
from teacher_proto.store.writer import StoreWriter
from teacher_proto.targets import TokenTargets

logger = logging.getLogger(__name__)
READERS = 4


class MissingTargetsError(ValueError):
    """Documents are missing from the store, and there is no teacher behind it."""


class CachedTargets:
    """`fingerprint`: which teacher to read if the store holds several. `behind`: the source that misses are requested
    from; if None, a miss is an error. `saved`: the card of the teacher that the run began with. `hits` and `misses`
    count documents.

    `open` raises ValueError if the store has no such teacher.
    """

    def __init__(
        self, store: TargetStore | TargetDataset, fingerprint: str | None, behind: Targets | None = None,
        saved: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self._store, self._fingerprint, self._behind = store, fingerprint, behind
        self._expected = expectation(fingerprint, saved)
        self._writer = StoreWriter(store) if behind is not None else None
        self._readers = ThreadPoolExecutor(READERS, "store-reader")
        self._behind_card: TeacherCard | None = None
        self._opening = asyncio.Lock()
        self._info: TeacherInfo | None = None
        self.hits = self.misses = 0

    @property
    def dataset(self) -> TargetDataset | None:
        """The store if it is a dataset, else None."""
        return self._store if isinstance(self._store, TargetDataset) else None

    @property
    def writes_through(self) -> bool:
        return self._behind is not None

    async def open(self) -> TeacherCard:
        info = await self._run(self._remembered)
        if info is None:
            # The store is empty, so the identity comes from the teacher behind it.
            await self._open_behind()
            assert self._behind_card is not None
            info = self._behind_card.info()
            await self._run(self._store.remember, info)
        self._expected.check_identity(info, f"the target store at {self._store.path}")
        self._info = info
        card = TeacherCard.of(info, self._expected.canary)
        # When the store was filled, the student's own ids were unknown; and a store has no output head.
        beyond = ("gather", "hidden") if self._behind is None else ()
        return replace(card, kinds=tuple(kind for kind in card.kinds if kind not in beyond))

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        assert self._info is not None, "open() comes before fetch()"
        fingerprint = self._info.fingerprint
        asked = valid_queries(batch, queries, self._info.limits.vocab_size)
        # On other threads: an LMDB read may wait for the disk.
        found = by_document(queries, await self._run(self._read, fingerprint, asked))
        # Only misses are requested from the teacher behind the store.
        missing = [None if answer is not None else query for query, answer in zip(queries, found, strict=True)]
        misses = sum(query is not None for query in missing)
        self.hits += len(asked) - misses
        self.misses += misses
        if misses:
            if self._behind is None:
                raise MissingTargetsError(self._explain(batch, missing, len(asked)))
            given = await self._fetch_behind(batch, missing)
            found = tuple(theirs if ours is None else ours for ours, theirs in zip(found, given, strict=True))
        return BatchTargets(found, spec_of(queries), fingerprint)

    async def head(self) -> bytes:
        if self._behind is None:
            raise NotFoundError("a target store has no output head, which support `full` needs", field="path")
        await self._open_behind()
        return await self._behind.head()

    def outage(self) -> str:
        return self._behind.outage() if self._behind is not None else ""

    def waiting(self) -> Waiting | None:
        return self._behind.waiting() if self._behind is not None else None

    async def close(self) -> None:
        """Write all pending targets, then close."""
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close)
        if self._behind is not None:
            await self._behind.close()
        await asyncio.to_thread(self._readers.shutdown)
        if self.misses:
            logger.info("target store %s: found %d documents, %d were missing", self._store.path, self.hits,
                        self.misses)  # fmt: skip

    async def _run(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *arguments)

    def _remembered(self) -> TeacherInfo | None:
        """The teacher to read: the one that the settings or the checkpoint name, or else the store's only one.

        None for an empty store with a teacher behind it; ValueError if none fits.
        """
        known = {info.fingerprint: info for info in self._store.teachers()}
        wanted = self._expected.fingerprint
        if wanted is not None and wanted in known:
            return known[wanted]
        if len(known) == 1 and (wanted is None or self._fingerprint is None):
            return next(iter(known.values()))
        if not known and self._behind is not None:
            return None
        listed = "; ".join(f"{fp} ({info.identity.semantic.model})" for fp, info in known.items()) or "no teacher"
        raise ValueError(
            f"the target store at {self._store.path} holds targets of {listed}: "
            + (f"teacher {wanted} is not among them" if wanted else "choose one with teacher.fingerprint=FINGERPRINT")
        )

    def _read(self, fingerprint: str, asked: list[Query]) -> list[TokenTargets | None]:
        return [self._store.get(fingerprint, query) for query in asked]

    async def _open_behind(self) -> None:
        """Connect to the teacher behind the store on first use. WrongTeacherError if it isn't the store's teacher."""
        assert self._behind is not None
        async with self._opening:
            if self._behind_card is None:
                self._behind_card = await self._behind.open()
                logger.info("targets missing from the store are requested from %s", self._behind_card.name)
        if self._info is not None and self._behind_card.fingerprint != self._info.fingerprint:
            raise WrongTeacherError(
                f"the target store holds targets of teacher {self._info.fingerprint}, but the teacher behind it is "
                f"{self._behind_card.fingerprint}: the two would be mixed. Use another store for this teacher",
                field="fingerprint", got=self._behind_card.fingerprint, limit=self._info.fingerprint,
            )  # fmt: skip

    async def _fetch_behind(self, batch: Batch, missing: Queries) -> tuple[TokenTargets | None, ...]:
        """Fetch misses from the teacher behind the store, and queue them for writing."""
        assert self._behind is not None and self._writer is not None and self._info is not None
        await self._open_behind()
        given = (await self._behind.fetch(batch, missing)).documents
        for query, answer in zip(missing, given, strict=True):
            if query is not None and answer is not None:
                # Written on a background thread, so that the step doesn't wait for the disk.
                self._writer.add(self._info.fingerprint, query, answer)
        return given

    def _explain(self, batch: Batch, missing: Queries, asked: int) -> str:
        assert self._info is not None
        path, model, spec = self._store.path, self._info.identity.semantic.model, spec_of(missing)
        lacking = [document.key for document, query in zip(batch.documents, missing, strict=True) if query is not None]
        return (
            f"the target store at {path} lacks {len(lacking)} of the {asked} documents of batch {batch.number} "
            f"(first {', '.join(lacking[:3])}), with {', '.join(spec.kinds)} by {model}, and {self.misses} documents "
            "so far. Write the run's documents with `stillhouse-train sequences FILE.jsonl SETTINGS...` and score "
            f"them with `stillhouse-teacher fill MODEL FILE.jsonl --{'store' if self.dataset is None else 'output'} "
            f"{path}{fill_options(spec)}`, or request them from a teacher with teacher.on_miss=remote"
        )


def fill_options(spec: TargetSpec) -> str:
    """The options of `stillhouse-teacher fill` that produce `spec`, each preceded by a space."""
    options = [f"--kinds {','.join(spec.kinds)}"]
    options += [f"--top-k {spec.top_k}"] if spec.top_k else []
    options += [f"--temperatures {','.join(f'{t:g}' for t in spec.temperatures)}"] if spec.temperatures else []
    if "sampled" in spec.kinds:
        options += [f"--num-samples {spec.num_samples}", f"--sample-temperature {spec.sample_temperature:g}"]
        options += [f"--seed {spec.seed}"]
    options += [f"--hidden-dtype {spec.hidden_dtype}"] if spec.hidden_dtype else []
    return "".join(f" {option}" for option in options)
