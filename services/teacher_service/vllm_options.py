"""How vLLM is set up for scoring: its environment and its arguments. Used by `vllm_engine.py`.

Importing this imports nothing of vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from teacher_proto.model_files import ModelFolder

_ADAPTER = "teacher_service.vllm_adapter"
_TRANSFORMERS_MODEL = "vllm.model_executor.models.transformers.TransformersForCausalLM"
_CPU_KV_CACHE_BYTES = 2**30


def prepare_environment() -> None:
    """Settings that vLLM reads from the environment when it is imported; what the user has set stays.

    On a CPU: one engine process beside this one instead of two, and threads left to the operating system (binding them
    gives one core of two away).
    """
    import torch

    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if not torch.accelerator.is_available():
        settings |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def engine_arguments(
    folder: ModelFolder, options: Mapping[str, Any], vllm_args: Mapping[str, Any], head_dtype: str
) -> dict[str, Any]:
    """AsyncEngineArgs: defaults for scoring, over them `options` that are set, then the user's `vllm_args`.

    ValueError where the user sets what only the service can.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if head_dtype == "auto":
        head_dtype = "model" if on_cpu else "float32"
    fixed = {
        "model": str(folder.path),
        "runner": "pooling",
        "trust_remote_code": False,
        # Token ids come from the client, and `check_request` has held them to the vocabulary.
        "skip_tokenizer_init": True,
        # Scoring needs the hidden state of every position, so it reads no prefix cache.
        "enable_prefix_caching": False,
        "model_class_overrides": adapted_class(folder),
        "worker_extension_cls": "teacher_service.vllm_worker.TargetsWorker",
    }
    if taken := fixed.keys() & vllm_args.keys():
        raise ValueError(f"vLLM's {', '.join(sorted(taken))} can't be set: the teacher service decides on them")
    defaults = {
        "dtype": _own_dtype(folder),
        # vLLM's word for the longest that the model and the memory allow.
        "max_model_len": -1,
        "max_num_batched_tokens": 2048 if on_cpu else 8192,
        "max_num_seqs": 64 if on_cpu else 256,
        "enforce_eager": on_cpu,
        "enable_chunked_prefill": True,
        "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES if on_cpu else None,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    chosen = {name: value for name, value in options.items() if value not in (None, "auto")}
    overrides = {"hf_overrides": {"head_dtype": head_dtype, **vllm_args.get("hf_overrides", {})}}
    return defaults | chosen | dict(vllm_args) | overrides | fixed


def _own_dtype(folder: ModelFolder) -> str:
    """The dtype that the weights were saved in; vLLM by itself would serve float32 weights as float16."""
    config = folder.config
    text = config.get("text_config") or config
    return str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "auto")


def adapted_class(folder: ModelFolder, adapter: str = _ADAPTER) -> dict[str, str]:
    """vLLM's `model_class_overrides` for this model: its architecture, as module `adapter` adapts it."""
    from vllm.model_executor.models import ModelRegistry

    architectures = folder.config.get("architectures") or []
    if not architectures:
        raise ValueError(f"{folder.name}: config.json names no architecture; vLLM can't tell what to load")
    known = [name for name in architectures if name in ModelRegistry.models]
    if not known:
        return {architectures[0]: f"{adapter}:{_TRANSFORMERS_MODEL}"}
    entry = ModelRegistry.models[known[0]]
    module, name = getattr(entry, "module_name", ""), getattr(entry, "class_name", "")
    if not module:
        module, name = entry.model_cls.__module__, entry.model_cls.__qualname__
    # A second engine in this process finds its architecture adapted already.
    return {known[0]: f"{adapter}:{name if module == adapter else f'{module}.{name}'}"}
