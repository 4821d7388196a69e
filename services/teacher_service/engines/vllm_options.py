"""How vLLM is set up for scoring: its environment and its arguments. Used by `vllm_process.py`.

Importing this module does not import vLLM.
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
# CUDA graphs are for steps of up to 512 tokens, as in decoding, and cost memory and minutes at the start; a scoring
# step has thousands.
_COMPILATION = {"cudagraph_mode": "NONE"}


def prepare_environment() -> None:
    """Set the environment variables that vLLM reads when it is imported; those that the user has set stay.

    No device is queried: querying torch before vLLM is imported initialises CUDA, and then no process that vLLM starts
    can use it. Nothing is imported either: the number of OpenMP threads is read when torch is imported.

    The engine runs in the calling process, which exists for nothing else. Workers of several GPUs are spawned, since a
    fork of a process with threads copies their locks. On a CPU, threads are left to the operating system (binding them
    gives away one core of two).
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
    """Whether the installed vLLM computes on CPUs, by vLLM's own rule."""
    if os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu" or sys.platform == "darwin":
        return True
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # the distribution `vllm-cpu`


def engine_arguments(
    folder: ModelFolder, options: Mapping[str, Any], vllm_args: Mapping[str, Any], head_dtype: str
) -> dict[str, Any]:
    """EngineArgs: defaults for scoring, overridden by those of `options` that are set, then by the user's `vllm_args`.

    ValueError if the user sets what only the service may.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    head_dtype = _head_dtype(folder, head_dtype, on_cpu)
    fixed = {
        "model": str(folder.path),
        "runner": "pooling",
        "trust_remote_code": False,
        # Token ids come from the client, and `check_request` has checked them against the vocabulary.
        "skip_tokenizer_init": True,
        # Only text is scored. Without this the vision tower is loaded, and its processor requires a tokenizer.
        "language_model_only": True,
        "worker_extension_cls": "teacher_service.engines.vllm_worker.TargetsWorker",
    }
    if taken := {*fixed, "model_class_overrides", "data_parallel_size"} & vllm_args.keys():
        raise ValueError(f"vLLM's {', '.join(sorted(taken))} can't be set: the teacher service sets them itself")
    defaults = {
        "dtype": _auto_dtype(folder, on_cpu),
        # For vLLM: the longest that the model and the memory allow.
        "max_model_len": -1,
        "max_num_batched_tokens": 2048 if on_cpu else 8192,
        "max_num_seqs": 64 if on_cpu else 256,
        "enforce_eager": on_cpu,
        "enable_chunked_prefill": True,
        # Control traffic is in the next step, whatever else waits.
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
    """vLLM's `head_dtype`. On a GPU float32 costs nothing, but vLLM does not support it for a quantised head."""
    from teacher_service.head import quantised_head

    quantised = None if asked == "model" else quantised_head(folder.weight_files)
    if asked == "float32" and quantised:
        raise ValueError(
            f"head_dtype float32 needs an unquantised output head, but {folder.name} has {quantised}: leave head_dtype "
            "at auto"
        )
    if asked != "auto":
        return asked
    return "model" if on_cpu or quantised else "float32"


def _auto_dtype(folder: ModelFolder, on_cpu: bool) -> str:
    """The checkpoint's dtype if the hardware computes in it, else float32. vLLM by itself would serve float32 weights
    as float16, and bfloat16 on any CPU.
    """
    if folder.config.get("quantization_config"):
        return folder.dtype  # the kernels for quantised weights are made for it
    if on_cpu:
        return str(choose_dtype("auto", "cpu", folder.dtype)).removeprefix("torch.")
    from vllm.platforms import current_platform

    # The platform queries the driver, not torch.
    supported = {str(dtype).removeprefix("torch.") for dtype in current_platform.supported_dtypes}
    return folder.dtype if folder.dtype in supported else "float32"


def _warn_of_emulation(folder: ModelFolder, dtype: str) -> None:
    import torch

    low = {"bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16}.get(dtype)
    if low is not None and (warning := emulation_warning(low, "cpu")):
        log.warning("%s: %s", folder.name, warning)


def in_one_process(arguments: Mapping[str, Any]) -> bool:
    """Whether vLLM computes in the calling process, without workers."""
    ranks = [arguments.get(f"{kind}_parallel_size") or 1 for kind in ("tensor", "pipeline")]
    return ranks == [1, 1] and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def _adapt(folder: ModelFolder, alone: bool) -> dict[str, Any]:
    """Have vLLM use the adapted class: directly if the model is loaded in this process, or by its name in every worker.

    If given by name, vLLM inspects the class in one more process, which imports all of vLLM, unless that is cached.
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
    """vLLM's `model_class_overrides` for this model: its architecture, adapted by the module `adapter`."""
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
