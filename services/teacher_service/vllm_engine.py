"""The engine that serves: vLLM's pooling runner with our own pooler, which returns target records for every position.

`main.py` builds it; nothing of vLLM is imported before `start`. vLLM keeps the model in a process of its own (or
several); this side validates nothing again, hands token ids over and views the bytes that come back.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Literal

from teacher_proto.errors import EngineDeadError, EngineError
from teacher_proto.identity import NumericIdentity, TeacherIdentity
from teacher_proto.reduction import sample_key
from teacher_proto.requests import Kind, Limits
from teacher_proto.targets import TokenTargets
from teacher_service.engine import Job
from teacher_service.identify import ModelFolder, find_model, identify
from teacher_service.reading import layout_of, read_rows

HeadDtype = Literal["auto", "model", "float32"]

_CPU_KV_CACHE_BYTES = 2**30


def prepare_environment() -> None:
    """Settings that vLLM reads from the environment when it is imported; what the user has set stays.

    On a CPU: one engine process beside this one instead of two, threads left to the operating system (binding them
    gives one core of two away), and memory that the engine frees kept for its next step.
    """
    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if not _has_accelerator():
        settings |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "MALLOC_TRIM_THRESHOLD_": str(2**30),
            "MALLOC_MMAP_THRESHOLD_": str(2**25),
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


class VllmEngine:
    """`Engine` over vLLM's AsyncLLM.

    `dtype` "auto" is the checkpoint's own. `dtype`, `quantization`, `max_model_len`, `gpu_memory_utilization`, the parallel sizes and `vllm_args` are vLLM's
    own options and pass through. `head_dtype` is that of the logits' product: "auto" is float32 on a GPU, where it
    costs nothing, and the model's on a CPU. `kv_cache_bytes` bounds the cache on a CPU (1 GiB if None).
    """

    kinds: tuple[Kind, ...] = ("top_k", "score", "gather", "sampled")
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
        gpu_memory_utilization: float = 0.9,
        kv_cache_bytes: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        vllm_args: Mapping[str, Any] | None = None,
    ):
        self._model = (model, revision, name)
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
        self._llm: Any = None
        self._hidden_size = 0
        self._numbers = itertools.count()
        self._running: set[str] = set()

    async def start(self) -> None:
        """Load the model. ValueError with the reason if vLLM can't serve it."""
        folder = await asyncio.to_thread(find_model, self._model[0], revision=self._model[1], name=self._model[2])
        prepare_environment()
        await asyncio.to_thread(self._load, folder)
        config = self._llm.model_config
        (description, *_) = await self._llm.collective_rpc("stillhouse_describe")
        self._hidden_size = config.get_hidden_size()
        self.limits = Limits(
            vocab_size=config.get_vocab_size(),
            max_sequence_length=config.max_model_len,
            max_top_k=min(self._max_top_k, config.get_vocab_size()),
        )
        self.identity = await asyncio.to_thread(
            identify,
            folder,
            dtype=str(config.dtype).removeprefix("torch."),
            quantization=config.quantization,
            vocab_size=config.get_vocab_size(),
            numeric=self._numeric(description),
        )

    def _load(self, folder: ModelFolder) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments(folder)))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"vLLM cannot serve {folder.name}: {error}") from error

    def _arguments(self, folder: ModelFolder) -> dict[str, Any]:
        """AsyncEngineArgs: ours first, then defaults for scoring, then what the user set, then what must be."""
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        defaults: dict[str, Any] = {
            "max_num_batched_tokens": 2048 if on_cpu else 8192,
            "max_num_seqs": 64 if on_cpu else 256,
            "enforce_eager": on_cpu,
            # Scoring reads no prefix cache: it needs the hidden state of every position.
            "enable_prefix_caching": False,
            "enable_chunked_prefill": True,
            "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES if on_cpu else None,
            "dtype": _own_dtype(folder),
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        set_options = {name: value for name, value in self._options.items() if value not in (None, "auto")}
        overrides = dict(self._vllm_args.get("hf_overrides", {}))
        if self._head_dtype == "auto":
            self._head_dtype = "model" if on_cpu else "float32"
        fixed = {
            "model": str(folder.path),
            "runner": "pooling",
            "trust_remote_code": False,
            "skip_tokenizer_init": True,
            "hf_overrides": overrides | {"head_dtype": self._head_dtype},
            "model_class_overrides": _adapted_class(folder),
            "worker_extension_cls": "teacher_service.vllm_worker.TargetsWorker",
        }
        return defaults | set_options | self._vllm_args | fixed

    def _numeric(self, description: Mapping[str, Any]) -> NumericIdentity:
        import vllm
        from vllm.platforms import current_platform

        parallel = self._llm.vllm_config.parallel_config
        return NumericIdentity(
            engine="vllm",
            engine_version=vllm.__version__,
            device=current_platform.get_device_name() or current_platform.device_type,
            parallel=f"tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size}",
            attention_backend=",".join(description["attention_backends"]) or "none",
        )

    async def score(self, job: Job) -> TokenTargets:
        """The targets of a job. EngineError for this job, EngineDeadError where no other can be answered either."""
        from vllm import PoolingParams
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDead
        from vllm.v1.engine.exceptions import EngineGenerateError

        from teacher_service.vllm_adapter import TASK, ask

        layout = layout_of(job, self.limits.vocab_size, self._hidden_size)
        key = sample_key(job.spec.seed, job.tokens_T) if "sampled" in job.spec.kinds else 0
        params = PoolingParams(task=TASK, extra_kwargs=ask(job.spec, job.rows, job.gather_ids_RG, key))
        number = f"{job.request_id}-{next(self._numbers)}"
        if self._llm is None:
            raise EngineDeadError(self._last_words(), request_id=job.request_id)
        self._running.add(number)
        output = None
        try:
            async with aclosing(self._llm.encode(tokens_input(job.tokens_T.tolist()), params, number)) as outputs:
                async for output in outputs:
                    pass
        except VllmDead as error:
            raise EngineDeadError(self._last_words(), request_id=job.request_id) from error
        except (EngineGenerateError, ValueError) as error:
            reason = error.__cause__ or error
            raise EngineError(f"vLLM failed at this sequence: {reason}", request_id=job.request_id) from error
        finally:
            self._running.discard(number)
        if self._llm is None:
            raise EngineDeadError(self._last_words(), request_id=job.request_id)
        assert output is not None, "vLLM ends a request with an output or an exception"
        return read_rows(output.outputs.data.numpy(), job, layout)

    async def check(self) -> None:
        """Return if the engine processes live; EngineDeadError otherwise."""
        if self._llm is None or self._llm.errored:
            raise EngineDeadError(self._last_words())

    def _last_words(self) -> str:
        if self._llm is None:
            return "the vLLM engine is not running"
        return "a vLLM engine process is gone; its own output above this line tells why"

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


def _own_dtype(folder: ModelFolder) -> str:
    """The dtype that the weights were saved in; vLLM by itself would serve float32 weights as float16."""
    text = folder.config.get("text_config") or folder.config
    return str(text.get("dtype") or text.get("torch_dtype") or folder.config.get("dtype") or "auto")


def _adapted_class(folder: ModelFolder) -> dict[str, str]:
    """vLLM's `model_class_overrides` for this model: its architecture, as `vllm_adapter` adapts it."""
    from vllm.model_executor.models import ModelRegistry

    architectures = folder.config.get("architectures") or []
    if not architectures:
        raise ValueError(f"{folder.name}: config.json names no architecture; vLLM can't tell what to load")
    known = [name for name in architectures if name in ModelRegistry.models]
    if not known:
        return {architectures[0]: f"{_ADAPTER}:vllm.model_executor.models.transformers.TransformersForCausalLM"}
    entry = ModelRegistry.models[known[0]]
    module, name = getattr(entry, "module_name", ""), getattr(entry, "class_name", "")
    if not module:
        module, name = entry.model_cls.__module__, entry.model_cls.__qualname__
    return {known[0]: f"{_ADAPTER}:{name if module == _ADAPTER else f'{module}.{name}'}"}


_ADAPTER = "teacher_service.vllm_adapter"
