"""Which of vLLM's options determine its results: the part of a teacher's identity that is in no file of the model.

Called by `vllm_process.py` once the engine has loaded, and by `vllm_engine.py`. An option that is not named here counts
as relevant: one too many makes another fingerprint, one too few mixes targets of two teachers in a store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# Placement, scheduling, speed, logging, and what scoring never does: results don't change, or only as they do from
# batch to batch.
NEUTRAL = frozenset([
    "aggregate_engine_logging", "allowed_local_media_path", "allowed_media_domains", "async_scheduling",
    "code_revision", "collect_detailed_traces", "cpu_distributed_timeout_seconds", "cpu_offload_gb",
    "cpu_offload_params", "cudagraph_capture_sizes", "cudagraph_metrics", "custom_histogram_buckets",
    "data_parallel_address", "data_parallel_backend", "data_parallel_external_lb", "data_parallel_hybrid_lb",
    "data_parallel_multi_port_external_lb", "data_parallel_rank", "data_parallel_rpc_port",
    "data_parallel_start_rank", "device_ids", "disable_log_stats", "distributed_executor_backend",
    "distributed_timeout_seconds", "download_dir", "dtype", "enable_chunked_prefill",
    "enable_layerwise_nvtx_tracing", "enable_log_requests", "enable_logging_iteration_details",
    "enable_mfu_metrics", "enable_mm_processor_stats", "enable_prefix_caching", "fail_on_environ_validation",
    "generation_config", "gpu_memory_utilization", "hf_token", "jit_monitor_mode",
    "jit_monitor_verbose", "kv_cache_memory_bytes", "kv_cache_metrics", "kv_cache_metrics_sample",
    "kv_events_config", "log_config_file", "log_level", "logging_config", "long_prefill_token_threshold",
    "long_prefill_token_threshold_adaptive", "master_addr", "master_port", "max_cudagraph_capture_size",
    "max_logprobs", "max_model_len", "max_num_active_seqs", "max_num_batched_tokens", "max_num_queued_reqs",
    "max_num_queued_tokens", "max_num_scheduled_tokens", "max_num_seqs", "max_parallel_loading_workers", "model",
    "model_class_overrides", "nnodes", "node_rank", "num_gpu_blocks_override", "numa_bind",
    "numa_bind_cpus", "numa_bind_nodes", "offload_backend", "offload_group_size", "offload_num_in_group",
    "offload_params", "offload_prefetch_step", "otlp_traces_endpoint", "override_generation_config",
    "pipeline_parallel_size", "prefill_schedule_interval", "prefix_cache_retention_interval",
    "prefix_caching_hash_algo", "profiler_config", "pt_load_map_location", "quantization", "ray_workers_use_nsight",
    "revision", "runner", "safetensors_load_strategy", "safetensors_prefetch_block_size",
    "safetensors_prefetch_num_threads", "scheduler_reserve_full_isl", "scheduling_policy", "seed",
    "served_model_name", "show_hidden_metrics_for_version", "shutdown_timeout", "skip_tokenizer_init",
    "stream_interval", "tensor_parallel_size", "tokenizer", "tokenizer_mode", "tokenizer_revision",
    "trust_remote_code", "use_tqdm_on_load", "watermark", "worker_extension_cls",
])  # fmt: skip
# The same numbers, but summed in another order or by another kernel.
NUMERIC = frozenset([
    "all2all_backend", "attention_backend", "attention_config", "block_size", "compilation_config",
    "data_parallel_size", "data_parallel_size_local", "decode_context_parallel_size", "disable_cascade_attn",
    "disable_custom_all_reduce", "enable_expert_parallel", "enable_flashinfer_autotune", "enforce_eager",
    "ir_op_priority", "kernel_config", "linear_backend", "moe_backend", "optimization_level", "performance_mode",
    "prefill_context_parallel_size",
])  # fmt: skip
# Load formats that give the weights as they are in the hashed files.
_SAME_WEIGHTS = ("auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
# RoPE scalings that don't depend on the maximum sequence length that is served.
_FIXED_ROPE = {"default", "linear", "yarn", "llama3", "mrope", "proportional"}
_NEUTRAL_VARIABLE = re.compile(
    r"_(CACHE|LOGGING|LOG|CONFIG|PATH|ROOT|DIR|PORT|HOST|IP|TIMEOUT|STATS|SERVER|KEY|PROFILER|TRACE|DEBUG|USAGE|METRICS)"
    r"|MULTIPROC|OMP_THREADS|KVCACHE_SPACE|ATTENTION_BACKEND|TARGET_DEVICE|MODELSCOPE|PLUGINS"
)


def deciding_options(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Of the options that the user gave, those that change results and differ from vLLM's defaults: (semantic, numeric)
    options, that is, what targets mean and how they are rounded, each value as JSON."""
    semantic: dict[str, str] = {}
    numeric: dict[str, str] = {}
    for name, value in given.items():
        if name == "hf_overrides" and isinstance(value, Mapping):
            # The head's dtype is already in the identity, next to the device.
            value = {field: item for field, item in value.items() if field != "head_dtype"} or None
        if name in NEUTRAL or value is None or value == defaults.get(name):
            continue
        if name == "load_format" and value in _SAME_WEIGHTS:
            continue
        (numeric if name in NUMERIC else semantic)[name] = json.dumps(value, sort_keys=True, default=str)
    return semantic, numeric


def length_option(text_config: Mapping[str, Any], max_model_len: int) -> dict[str, str]:
    """`max_model_len` if the model's RoPE scaling depends on it, as in Phi-3: it chooses between two sets of factors.
    Nothing for other models."""
    scaling = text_config.get("rope_parameters") or text_config.get("rope_scaling") or {}
    # One for all layers, or one for each kind of layer.
    each = [scaling, *(part for part in scaling.values() if isinstance(part, Mapping))]
    kinds = {str(kind) for part in each if (kind := part.get("rope_type") or part.get("type"))}
    return {} if kinds <= _FIXED_ROPE else {"max_model_len": str(max_model_len)}


def deciding_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of vLLM's environment variables that may choose kernels."""
    return {
        name: value for name, value in environment.items()
        if name.startswith("VLLM_") and not _NEUTRAL_VARIABLE.search(name)
    }  # fmt: skip
