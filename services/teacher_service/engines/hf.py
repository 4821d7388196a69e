"""The engine for any machine and any causal model: transformers, one forward pass at a time in a thread.

`run.py` builds it for `--engine hf`; tests use it, in float32, as the reference. torch and transformers are imported
when it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.engine import Job
from serving.logs import stage
from serving.scheduling.batches import Batches
from teacher_proto.identity import TeacherIdentity
from teacher_proto.model_files import find_model
from teacher_proto.requests import KINDS, Kind, Limits, Query
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.packed import layout_of
from teacher_service.engines.protocol import read_rows
from teacher_service.head_file import HeadFile

if TYPE_CHECKING:
    from teacher_proto.compute.hf_model import HfModel


class HfEngine:
    """`Engine` over transformers.

    `dtype` "auto" is the checkpoint's own if the device computes in it, else float32; `device` "auto" is a GPU if there
    is one. `max_batch_tokens` bounds the tokens of a forward pass, padding included; a longer sequence goes alone.
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
        self._max_model_len, self._max_top_k = max_model_len, max_top_k
        self._model: HfModel | None = None
        self._batches: Batches[Query, np.ndarray] = Batches("transformers engine", self._compute, max_batch_tokens)

    async def start(self) -> None:
        """Load the model. ValueError if transformers can't load it, or its head is of an unknown form."""
        await self._batches.start(self._load)

    @property
    def tokens_computed(self) -> int:
        return self._batches.tokens_computed

    def _load(self) -> None:
        with stage("model found"):  # before the import below, so that a mistyped name is reported at once
            folder = find_model(**self._source)
        with stage("torch and transformers imported"):
            from teacher_proto.compute.hf_model import HfModel
        with stage("weights loaded, first pass"):
            model = HfModel(folder, dtype=self._dtype, device=self._device)
        self.limits = model.limits(self._max_model_len, self._max_top_k)
        with stage("weights hashed"):
            self.identity = model.identity()
        self._model = model

    def _compute(self, queries: Sequence[Query]) -> list[np.ndarray]:
        assert self._model is not None
        return self._model.score(queries)

    async def score(self, job: Job[Query]) -> TokenTargets:
        """The targets of a job. A job that is cancelled while it waits is never computed."""
        await self.check()
        assert self._model is not None
        layout = layout_of(job.query, self._model.vocab_size, self._model.hidden_size)
        return read_rows(await self._batches.answer(job), job, layout)

    async def check(self) -> None:
        self._batches.check()

    def head(self) -> HeadFile:
        from teacher_service.head import head_tensor

        assert self._model is not None
        tensors = {name: head_tensor(tensor) for name, tensor in self._model.head().items()}
        return HeadFile(tensors, self._model.scaling)

    async def close(self) -> None:
        """Wait for the running forward pass, fail the jobs that wait, release the memory."""
        await self._batches.close()
        self._model = None
