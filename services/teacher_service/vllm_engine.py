"""The engine that serves: vLLM's pooling runner with our own pooler, which returns target records for every position.

`run.py` builds it; nothing of vLLM is imported before `start`. vLLM keeps the model in a process of its own (or
several); this side validates nothing again, hands token ids over and reads the bytes that come back.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import fields
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from teacher_proto.errors import EngineDeadError, EngineError
from teacher_proto.identity import NumericIdentity, TeacherIdentity
from teacher_proto.model_files import ModelFolder, find_model, hash_files, identify
from teacher_proto.packed import layout_of
from teacher_proto.reduction import sample_key
from teacher_proto.requests import KINDS, Kind, Limits, TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_service.engine import Job
from teacher_service.head_file import HeadFile
from teacher_service.reading import read_rows
from teacher_service.vllm_identity import deciding_options, deciding_variables, length_option
from teacher_service.vllm_options import engine_arguments, prepare_environment

log = logging.getLogger("stillhouse.vllm")
HeadDtype = Literal["auto", "model", "float32"]

_PROBE_LENGTH = 16


class VllmEngine:
    """`Engine` over vLLM's AsyncLLM.

    `dtype`, `quantization`, `max_model_len`, `gpu_memory_utilization`, the parallel sizes and `vllm_args` are vLLM's
    own options and pass through, but `dtype` "auto" is the checkpoint's own where the hardware computes in it, else
    float32. `head_dtype` is that of the logits'
    product: "auto" is float32 on a GPU, where it costs nothing, and the model's on a CPU; a head that is itself
    quantised needs "model". `kv_cache_bytes` bounds the cache on a CPU (1 GiB if None). `kinds` is without `hidden`
    where the checkpoint's head can't stand for vLLM's.
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
        self._deciding: tuple[dict[str, str], dict[str, str]] = {}, {}
        self._llm: Any = None
        self._hidden_size = 0
        self._numbers = itertools.count()
        self._running: set[str] = set()
        self.tokens_computed = 0

    async def start(self) -> None:
        """Load the model. ValueError with the reason if vLLM can't serve it."""
        async with AsyncExitStack() as on_failure:
            on_failure.push_async_callback(self.close)
            folder = await asyncio.to_thread(lambda: find_model(**self._source))
            prepare_environment()
            hashing = asyncio.create_task(asyncio.to_thread(hash_files, folder.weight_files))
            await asyncio.to_thread(self._load, folder)
            # The last rank of a pipeline is the one that has the head.
            (*_, description) = await self._llm.collective_rpc("stillhouse_describe")
            self._introduce(folder, await hashing, description)
            await self._find_head(folder, description)
            on_failure.pop_all()

    def _introduce(self, folder: ModelFolder, weights: Mapping[str, str], description: Mapping[str, Any]) -> None:
        config = self._llm.model_config
        self._hidden_size = config.get_hidden_size()
        self.limits = Limits(
            vocab_size=config.get_vocab_size(),
            max_sequence_length=config.max_model_len,
            max_top_k=min(self._max_top_k, config.get_vocab_size()),
        )
        self.identity = identify(
            folder,
            weights,
            dtype=str(config.dtype).removeprefix("torch."),
            quantization=config.quantization,
            vocab_size=config.get_vocab_size(),
            numeric=self._numeric(description),
            options=self._deciding[0] | length_option(config.hf_text_config.to_dict(), config.max_model_len),
        )

    def _load(self, folder: ModelFolder) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(folder, self._options, self._vllm_args, self._head_dtype)
        defaults = {field.name: field.default for field in fields(AsyncEngineArgs)}
        self._deciding = deciding_options(self._vllm_args, defaults)
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"vLLM cannot serve {folder.name}: {_reason(error)}") from error

    def _numeric(self, description: Mapping[str, Any]) -> NumericIdentity:
        import vllm
        from vllm.platforms import current_platform

        config = self._llm.vllm_config
        parallel, model = config.parallel_config, config.model_config
        device = current_platform.get_device_name() or current_platform.device_type
        if model.head_dtype != model.dtype:
            device += f", head in {str(model.head_dtype).removeprefix('torch.')}"
        return NumericIdentity(
            engine="vllm",
            engine_version=vllm.__version__,
            device=device,
            parallel=f"tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size}",
            attention_backend=",".join(description["attention_backends"]) or "none",
            options=self._deciding[1] | deciding_variables(os.environ),
        )

    async def _find_head(self, folder: ModelFolder, description: Mapping[str, Any]) -> None:
        """Hold the checkpoint's head to what vLLM computes; without agreement `hidden` is not served."""
        from teacher_proto.head import HeadScaling
        from teacher_service.head import CheckpointHead

        tokens_T = np.arange(_PROBE_LENGTH) * 7919 % self.limits.vocab_size
        spec = TargetSpec(kinds=("top_k", "hidden"), top_k=1, hidden_dtype="float16")
        try:
            scaling = HeadScaling(description["soft_cap"], description["scale"])
            head = CheckpointHead(folder.weight_files, self.limits.vocab_size, scaling)
            targets = await self.score(Job(tokens_T, (0, _PROBE_LENGTH), spec, "head-probe"))
            await asyncio.to_thread(head.check, targets)
        except EngineError as error:
            raise ValueError(f"{folder.name} can't be served: {error}") from error
        except ValueError as error:
            self.kinds = tuple(kind for kind in KINDS if kind != "hidden")
            log.warning("kind hidden is not served: %s", error)
        else:
            self._head = head

    def head(self) -> HeadFile:
        """Read from the checkpoint. Only where `hidden` is among the kinds."""
        return self._head.file()

    async def score(self, job: Job) -> TokenTargets:
        """The targets of a job. EngineError for this job, EngineDeadError where no other can be answered either."""
        from vllm import PoolingParams
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError
        from vllm.v1.engine.exceptions import EngineGenerateError

        from teacher_service.vllm_adapter import TASK, ask

        if self._llm is None:
            raise EngineDeadError(self._last_words(), request_id=job.request_id)
        layout = layout_of(job, self.limits.vocab_size, self._hidden_size)
        key = sample_key(job.spec.seed, job.tokens_T) if "sampled" in job.spec.kinds else 0
        params = PoolingParams(task=TASK, extra_kwargs=ask(job.spec, job.rows, job.gather_ids_RG, key))
        number = f"{job.request_id}-{next(self._numbers)}"
        prompt, priority = tokens_input(job.tokens_T.tolist()), 0 if job.urgent else 1
        self._running.add(number)
        try:
            async with aclosing(self._llm.encode(prompt, params, number, priority=priority)) as outputs:
                output = await anext(outputs)  # a pooling request has one
        except VllmDeadError as error:
            raise EngineDeadError(self._last_words(), request_id=job.request_id) from error
        except (EngineGenerateError, ValueError) as error:
            reason = error.__cause__ or error
            raise EngineError(f"vLLM failed at this sequence: {reason}", request_id=job.request_id) from error
        finally:
            self._running.discard(number)
        if self._llm is None:
            raise EngineDeadError(self._last_words(), request_id=job.request_id)
        self.tokens_computed += job.num_tokens
        return read_rows(output.outputs.data.numpy(), job, layout)

    async def check(self) -> None:
        """Return if the engine processes live; EngineDeadError otherwise."""
        if self._llm is None or self._llm.errored:
            raise EngineDeadError(self._last_words())

    def _last_words(self) -> str:
        if self._llm is None:
            return "the vLLM engine is not running"
        return "a vLLM engine process is gone; what it wrote to stderr tells why"

    async def close(self) -> None:
        """End the engine processes; safe to call twice. Jobs still running end with EngineDeadError."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        if self._running and not llm.errored:
            await llm.abort(list(self._running))
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # or it reports the end of the processes as a failure
            await asyncio.wait([llm.output_handler])
        await asyncio.to_thread(llm.shutdown, timeout=5.0)
        del llm
        gc.collect()  # its finaliser fails when it is left to the interpreter's exit


def _reason(error: Exception) -> str:
    """What an error says, without pydantic's frame around it."""
    if isinstance(error, ValidationError):
        return "; ".join(one["msg"] for one in error.errors(include_url=False))
    return str(error)
