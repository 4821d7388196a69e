"""The production engine: vLLM's pooling runner with our own pooler, which returns target records for every position.

`run.py` builds it; vLLM is imported only in a separate process. This side does not validate requests again: it sends
token ids and reads the bytes that come back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Literal

import numpy as np

from serving.engine import Job
from serving.logs import stage
from teacher_proto.compute.sampling import sample_key
from teacher_proto.errors import EngineDeadError, EngineError
from teacher_proto.identity import NumericIdentity, TeacherIdentity
from teacher_proto.model_files import ModelFolder, find_model, hash_files, identify
from teacher_proto.requests import KINDS, Kind, Limits, Query, TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.packed import layout_of
from teacher_service.engines.protocol import read_rows
from teacher_service.engines.vllm_identity import deciding_variables
from teacher_service.engines.vllm_link import EngineGone, EngineProcess, JobFailed
from teacher_service.engines.vllm_messages import arguments
from teacher_service.engines.vllm_process import Order
from teacher_service.head_file import HeadFile

log = logging.getLogger("stillhouse.vllm")
HeadDtype = Literal["auto", "model", "float32"]

_PROBE_LENGTH = 16


class VllmEngine:
    """`Engine` over vLLM's LLMEngine, in a separate process.

    `dtype`, `quantization`, `max_model_len`, `gpu_memory_utilization`, the parallel sizes and `vllm_args` are vLLM's
    own options and pass through, except that `dtype` "auto" is the checkpoint's own if the hardware computes in it,
    else float32. `head_dtype` is the dtype in which logits are computed: "auto" is float32 on a GPU, where it costs
    nothing, and the model's on a CPU or if the head is quantised. `kv_cache_bytes` bounds the cache on a CPU (1 GiB
    if None). `kinds` lacks `hidden` if the checkpoint's head does not reproduce vLLM's logits.
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
        quantization: str | None = None,
        max_model_len: int | None = None,
        max_top_k: int = 256,
        head_dtype: HeadDtype = "auto",
        gpu_memory_utilization: float | None = None,
        kv_cache_bytes: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        vllm_args: Mapping[str, Any] | None = None,
    ):
        self._source: dict[str, Any] = {"model": model, "revision": revision, "name": name}
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "quantization": quantization,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_memory_bytes": kv_cache_bytes,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
        }
        self._max_top_k = max_top_k
        self._head_dtype: HeadDtype = head_dtype
        self._vllm_args = dict(vllm_args or {})
        self._process = EngineProcess()
        self._hidden_size = 0
        self._numbers = itertools.count()
        self.tokens_computed = 0

    async def start(self) -> None:
        """Load the model. ValueError with the reason if vLLM can't serve it."""
        async with AsyncExitStack() as on_failure:
            on_failure.push_async_callback(self.close)
            with stage("model found"):
                folder = await asyncio.to_thread(lambda: find_model(**self._source))
            # Hashes and imports take seconds, and there is a core for them while the other process loads.
            reading = asyncio.create_task(asyncio.to_thread(_read_beside, folder))
            facts = await self._load(folder)
            _tell_of_ranks(facts)
            self._introduce(folder, await reading, facts)
            with stage("first pass"):
                await self._find_head(folder, facts)
            on_failure.pop_all()

    async def _load(self, folder: ModelFolder) -> dict[str, Any]:
        order = Order(folder, self._options, self._vllm_args, self._head_dtype)
        try:
            return await self._process.start(order)
        except ValueError as error:
            raise ValueError(f"vLLM cannot serve {folder.name}: {error}") from None

    def _introduce(self, folder: ModelFolder, weights: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        self._hidden_size = facts["hidden_size"]
        self.limits = Limits(
            vocab_size=facts["vocab_size"],
            max_sequence_length=facts["max_model_len"],
            max_top_k=min(self._max_top_k, facts["vocab_size"]),
        )
        self.identity = identify(
            folder,
            weights,
            dtype=facts["dtype"],
            quantization=facts["quantization"],
            vocab_size=facts["vocab_size"],
            numeric=_numeric(facts),
            options=facts["semantic_options"],
        )

    async def _find_head(self, folder: ModelFolder, description: Mapping[str, Any]) -> None:
        """Compare the checkpoint's head with what vLLM computes; if they disagree, `hidden` is not served."""
        from teacher_proto.compute.head import HeadScaling
        from teacher_service.head import CheckpointHead

        tokens_T = np.arange(_PROBE_LENGTH) * 7919 % self.limits.vocab_size
        spec = TargetSpec(kinds=("top_k", "hidden"), top_k=1, hidden_dtype="float16")
        try:
            scaling = HeadScaling(description["soft_cap"], description["scale"])
            head = CheckpointHead(folder.weight_files, self.limits.vocab_size, scaling)
            targets = await self.score(Job(Query(tokens_T, (0, _PROBE_LENGTH), spec), "head-probe"))
            await asyncio.to_thread(head.check, targets)
        except EngineError as error:
            raise ValueError(f"{folder.name} can't be served: {error}") from error
        except ValueError as error:
            self.kinds = tuple(kind for kind in KINDS if kind != "hidden")
            log.warning("kind hidden is not served: %s", error)
        else:
            self._head = head

    def head(self) -> HeadFile:
        """The head as read from the checkpoint. Only if `hidden` is among the kinds."""
        return self._head.file()

    async def score(self, job: Job[Query]) -> TokenTargets:
        """The targets of a job. EngineError if this job failed, EngineDeadError if no other can be computed either."""
        query = job.query
        layout = layout_of(query, self.limits.vocab_size, self._hidden_size)
        key = sample_key(query.spec.seed, query.tokens_T) if "sampled" in query.spec.kinds else 0
        try:
            packed_RB, computed = await self._process.ask(
                next(self._numbers), query.tokens_T, arguments(query, key), priority=0 if job.urgent else 1,
                # Tokens before the first row need no hidden states, and rollouts share prompts.
                reads_cache=query.rows[0] > 0 and not job.fresh,
            )  # fmt: skip
        except EngineGone as error:
            raise EngineDeadError(str(error), request_id=job.request_id) from None
        except JobFailed as error:
            raise EngineError(f"vLLM failed on this sequence: {error}", request_id=job.request_id) from None
        self.tokens_computed += computed
        return read_rows(packed_RB, job, layout)

    async def check(self) -> None:
        """Return if the engine process is alive; EngineDeadError otherwise."""
        try:
            self._process.check()
        except EngineGone as error:
            raise EngineDeadError(str(error)) from None

    async def close(self) -> None:
        """End the engine process; safe to call twice. Jobs still running end with EngineDeadError."""
        await self._process.close()


def _tell_of_ranks(facts: Mapping[str, Any]) -> None:
    if facts["shares_rows"]:
        log.info("the ranks share the output head's rows: %s", facts["parallel"])
    elif not facts["parallel"].startswith("tp=1 "):
        log.warning("%s, but each rank reduces all logits: ranks cannot share the rows of this model's head",
                    facts["parallel"])  # fmt: skip


def _read_beside(folder: ModelFolder) -> dict[str, str]:
    """The weights' hashes by file. Also imports what tokenizer and head need."""
    with stage("weights hashed"):
        hashes = hash_files(folder.weight_files)
    with stage("tokenizer and head imported"):
        import transformers  # noqa: F401

        import teacher_service.head  # noqa: F401
    return hashes


def _numeric(facts: Mapping[str, Any]) -> NumericIdentity:
    device = facts["device"]
    if facts["head_dtype"] != facts["dtype"]:
        device += f", head in {facts['head_dtype']}"
    return NumericIdentity(
        engine="vllm",
        engine_version=facts["version"],
        device=device,
        parallel=facts["parallel"],
        attention_backend=",".join(facts["attention_backends"]) or "none",
        options=facts["numeric_options"] | deciding_variables(os.environ),
    )
