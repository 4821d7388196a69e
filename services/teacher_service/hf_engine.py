"""The engine for any machine and any model: transformers, one forward pass at a time in a thread of its own.

`run.py` builds it for `--engine hf`; tests take it, in float32, as what the truth is. torch and transformers are
imported when it starts.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_proto.errors import EngineDeadError, EngineError, EngineMemoryError
from teacher_proto.identity import TeacherIdentity
from teacher_proto.model_files import find_model
from teacher_proto.packed import layout_of
from teacher_proto.requests import KINDS, Kind, Limits
from teacher_proto.targets import TokenTargets
from teacher_service.engine import Job
from teacher_service.reading import read_rows

if TYPE_CHECKING:
    from teacher_proto.hf_model import HfModel

# A batch takes sequences at least this long in parts of its longest, so that little of it is padding.
_LEAST_LENGTH = 0.75


@dataclass(eq=False)
class _Waiting:
    job: Job
    answer: asyncio.Future[np.ndarray]


class HfEngine:
    """`Engine` over transformers.

    `dtype` "auto" is float32 on a CPU and the checkpoint's own elsewhere; `device` "auto" a GPU where there is one.
    `max_batch_tokens` bounds the tokens of a forward pass, padding included; a longer sequence goes alone.
    """

    kinds: tuple[Kind, ...] = KINDS
    identity: TeacherIdentity
    limits: Limits

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        name: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_top_k: int = 256,
        max_batch_tokens: int = 4096,
    ):
        self._source: dict[str, Any] = {"model": model, "revision": revision, "name": name}
        self._dtype, self._device = dtype, device
        self._max_model_len, self._max_top_k, self._max_batch_tokens = max_model_len, max_top_k, max_batch_tokens
        self._model: HfModel | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf-engine")
        self._waiting: list[_Waiting] = []
        self._open: set[_Waiting] = set()
        self._pump: asyncio.Task[None] | None = None
        self._death: str | None = "it has not been started"

    async def start(self) -> None:
        """Load the model. ValueError if transformers can't load it, or its head is not one that we know."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        self._death = None

    def _load(self) -> None:
        from teacher_proto.hf_model import HfModel

        model = HfModel(find_model(**self._source), dtype=self._dtype, device=self._device)
        self.limits = model.limits(self._max_model_len, self._max_top_k)
        self.identity = model.identity()
        self._model = model

    async def score(self, job: Job) -> TokenTargets:
        """The targets of a job. A job that is cancelled while it waits is never computed."""
        await self.check()
        assert self._model is not None
        waiting = _Waiting(job, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
            self._pump.add_done_callback(self._on_pump_end)
        layout = layout_of(job, self._model.vocab_size, self._model.hidden_size)
        self._open.add(waiting)
        try:
            return read_rows(await waiting.answer, job, layout)
        finally:
            self._open.discard(waiting)

    async def check(self) -> None:
        if self._death is not None:
            raise EngineDeadError(f"the transformers engine is dead: {self._death}")

    async def write_head(self, path: Path) -> None:
        """Write the output head as safetensors (`head.py` says how)."""
        from teacher_proto.head import save_head

        assert self._model is not None
        await asyncio.to_thread(save_head, path, self._model.head(), self._model.scaling)

    async def close(self) -> None:
        """Wait for the forward pass that runs, drop what waits, give the memory back."""
        self._die("it was closed")
        await asyncio.to_thread(self._thread.shutdown)
        self._model = None

    async def _run(self) -> None:
        while batch := self._next_batch():
            await self._compute(batch)

    def _next_batch(self) -> list[_Waiting]:
        """The job that waits longest, and others of like length up to the batch's tokens, oldest first."""
        self._waiting = [waiting for waiting in self._waiting if not waiting.answer.done()]
        batch: list[_Waiting] = []
        left: list[_Waiting] = []
        for waiting in self._waiting:
            lengths = [len(other.job.tokens_T) for other in (*batch, waiting)]
            alike = min(lengths) >= _LEAST_LENGTH * max(lengths)
            fits = max(lengths) * len(lengths) <= self._max_batch_tokens
            (batch if not batch or (alike and fits) else left).append(waiting)
        self._waiting = left
        return batch

    async def _compute(self, batch: list[_Waiting]) -> None:
        """Answer a batch; where it fails, each of it alone, so that one bad job fails only itself."""
        assert self._model is not None
        import torch

        jobs = [waiting.job for waiting in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._model.score, jobs)
        except (RuntimeError, IndexError, ValueError) as error:
            if len(batch) > 1:
                for waiting in batch:
                    await self._compute([waiting])
                return
            kind = EngineMemoryError if isinstance(error, torch.OutOfMemoryError) else EngineError
            failure = kind(f"the forward pass failed: {error}", request_id=jobs[0].request_id)
            if not batch[0].answer.done():
                batch[0].answer.set_exception(failure)
            return
        for waiting, packed in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(packed)

    def _on_pump_end(self, pump: asyncio.Task[None]) -> None:
        if not pump.cancelled() and (error := pump.exception()) is not None:
            self._die(repr(error))

    def _die(self, reason: str) -> None:
        """Nothing is answered any more, to those who wait no more than to those who come."""
        self._death = self._death or reason
        for waiting in self._open:
            if not waiting.answer.done():
                waiting.answer.set_exception(EngineDeadError(f"the transformers engine is dead: {self._death}"))
