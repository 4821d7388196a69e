"""How vLLM is set up for scoring: its environment and its arguments. Used by `vllm_process.py`.

Importing this imports nothing of vLLM.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from teacher_proto.hardware import choose_dtype, emulation_warning
from teacher_proto.model_files import ModelFolder
from teacher_service.engines.vllm_wrappers import TextConfig, text_architecture

log = logging.getLogger("stillhouse.vllm")
_ADAPTER = "teacher_service.engines.vllm_adapter"
_TRANSFORMERS_MODEL = "vllm.model_executor.models.transformers.TransformersForCausalLM"
_CPU_KV_CACHE_BYTES = 2**30
# CUDA graphs are of steps of up to 512 tokens, as decoding makes them, and take memory and minutes at the start; a step
# that scores has thousands.
_COMPILATION = {"cudagraph_mode": "NONE"}


def prepare_environment() -> None:
    """Settings that vLLM reads from the environment when it is imported; what the user has set stays.

    No device is asked for: whoever asks torch before vLLM is imported initialises CUDA, and no process that vLLM
    starts can use it then. Nothing is imported either: the number of OpenMP's threads is read when torch is.

    The engine runs in the process that asks for it, which is there for nothing else. Workers of several GPUs are
    spawned, since a fork of a process that has threads takes along their locks. On a CPU threads are left to the
    operating system (binding them gives one core of two away).
    """
    settings = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if built_for_cpu():
        settings |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def built_for_cpu() -> bool:
    """Whether the vLLM that is installed computes on CPUs: by the rule by which it tells itself."""
    if os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu" or sys.platform == "darwin":
        return True
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # the distribution `vllm-cpu`


def engine_arguments(
    folder: ModelFolder, options: Mapping[str, Any], vllm_args: Mapping[str, Any], head_dtype: str
) -> dict[str, Any]:
    """EngineArgs: defaults for scoring, over them `options` that are set, then the user's `vllm_args`.

    ValueError where the user sets what only the service can.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    head_dtype = _head_dtype(folder, head_dtype, on_cpu)
    fixed = {
        "model": str(folder.path),
        "runner": "pooling",
        "trust_remote_code": False,
        # Token ids come from the client, and `check_request` has held them to the vocabulary.
        "skip_tokenizer_init": True,
        # Nothing but text is scored. Without this the tower is loaded, and its processor asks for a tokenizer.
        "language_model_only": True,
        "worker_extension_cls": "teacher_service.engines.vllm_worker.TargetsWorker",
    }
    if taken := {*fixed, "model_class_overrides", "data_parallel_size"} & vllm_args.keys():
        raise ValueError(f"vLLM's {', '.join(sorted(taken))} can't be set: the teacher service decides on them")
    defaults = {
        "dtype": _auto_dtype(folder, on_cpu),
        # vLLM's word for the longest that the model and the memory allow.
        "max_model_len": -1,
        "max_num_batched_tokens": 2048 if on_cpu else 8192,
        "max_num_seqs": 64 if on_cpu else 256,
        "enforce_eager": on_cpu,
        "enable_chunked_prefill": True,
        # Control traffic is in the next step, whatever waits.
        "scheduling_policy": "priority",
        "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES if on_cpu else None,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    chosen = {name: value for name, value in options.items() if value not in (None, "auto")}
    overrides = {"head_dtype": head_dtype, **vllm_args.get("hf_overrides", {})}
    inner = text_architecture(folder)
    told = {"hf_overrides": overrides if inner is None else TextConfig(inner, overrides)}
    arguments = defaults | chosen | dict(vllm_args) | told | fixed
    arguments["compilation_config"] = _COMPILATION | vllm_args.get("compilation_config", {})
    arguments |= _adapt(folder, alone=in_one_process(arguments))
    if on_cpu:
        _warn_of_emulation(folder, arguments["dtype"])
    return arguments


def _head_dtype(folder: ModelFolder, asked: str, on_cpu: bool) -> str:
    """vLLM's `head_dtype`. On a GPU a product in float32 costs nothing, but vLLM has none for a quantised head."""
    from teacher_service.head import quantised_head

    quantised = None if asked == "model" else quantised_head(folder.weight_files)
    if asked == "float32" and quantised:
        raise ValueError(
            f"head_dtype float32 needs a plain output head, and {folder.name} has {quantised}: leave head_dtype at auto"
        )
    if asked != "auto":
        return asked
    return "model" if on_cpu or quantised else "float32"


def _auto_dtype(folder: ModelFolder, on_cpu: bool) -> str:
    """The dtype that the weights were saved in where the hardware computes in it, else float32. vLLM by itself would
    serve float32 weights as float16, and bfloat16 on any CPU.
    """
    if folder.config.get("quantization_config"):
        return folder.dtype  # the kernels for quantised weights are made for it
    if on_cpu:
        return str(choose_dtype("auto", "cpu", folder.dtype)).removeprefix("torch.")
    from vllm.platforms import current_platform

    # The platform asks the driver, not torch.
    supported = {str(dtype).removeprefix("torch.") for dtype in current_platform.supported_dtypes}
    return folder.dtype if folder.dtype in supported else "float32"


def _warn_of_emulation(folder: ModelFolder, dtype: str) -> None:
    import torch

    low = {"bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16}.get(dtype)
    if low is not None and (warning := emulation_warning(low, "cpu")):
        log.warning("%s: %s", folder.name, warning)


def in_one_process(arguments: Mapping[str, Any]) -> bool:
    """Whether vLLM computes in this very process, and has no workers."""
    ranks = [arguments.get(f"{kind}_parallel_size") or 1 for kind in ("tensor", "pipeline")]
    return ranks == [1, 1] and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def _adapt(folder: ModelFolder, alone: bool) -> dict[str, Any]:
    """Have vLLM use the adapted class: by itself where the model is loaded here, or by its name in every worker.

    By its name vLLM looks at it in one more process, which imports all of vLLM, where it has not kept what it saw.
    """
    named = adapted_class(folder)
    if not alone:
        return {"model_class_overrides": named}
    from vllm.model_executor.models import ModelRegistry

    from teacher_service.engines import vllm_adapter

    ((architecture, path),) = named.items()
    ModelRegistry.register_model(architecture, getattr(vllm_adapter, path.partition(":")[2]))
    return {}


def adapted_class(folder: ModelFolder, adapter: str = _ADAPTER) -> dict[str, str]:
    """vLLM's `model_class_overrides` for this model: its architecture, as module `adapter` adapts it."""
    from vllm.model_executor.models import ModelRegistry

    inner = text_architecture(folder)
    architectures = [inner] if inner else folder.config.get("architectures") or []
    if not architectures:
        raise ValueError(f"{folder.name}: config.json names no architecture; vLLM can't tell what to load")
    known = [name for name in architectures if name in ModelRegistry.models]
    if not known:
        return {architectures[0]: f"{adapter}:{_TRANSFORMERS_MODEL}"}
    entry = ModelRegistry.models[known[0]]
    module, name = getattr(entry, "module_name", ""), getattr(entry, "class_name", "")
    if not module:
        module, name = entry.model_cls.__module__, entry.model_cls.__qualname__
    return {known[0]: f"{adapter}:{module}.{name}"}
