"""Every option of vLLM that changes answers changes the fingerprint, and a plain teacher keeps the one it had."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from teacher_proto.identity import NumericIdentity, SemanticIdentity, TeacherIdentity, compare_fingerprints
from teacher_service.engines.vllm_identity import NEUTRAL, NUMERIC, deciding_options, deciding_variables, length_option


def identity(semantic: dict[str, str] | None = None, numeric: dict[str, str] | None = None) -> TeacherIdentity:
    return TeacherIdentity(
        semantic=SemanticIdentity(
            model="m", revision="r", config_sha256="c", tokenizer_sha256="t", weights={"a": "b"}, dtype="bfloat16",
            quantization=None, vocab_size=7, options=semantic or {},
        ),
        numeric=NumericIdentity(
            engine="vllm", engine_version="1", device="cpu", parallel="tp=1 pp=1", attention_backend="X",
            options=numeric or {},
        ),
    )  # fmt: skip


def change_of(given: dict[str, Any], defaults: dict[str, Any] | None = None) -> str:
    return compare_fingerprints(identity().fingerprint, identity(*deciding_options(given, defaults or {})).fingerprint)


def test_a_teacher_without_such_options_is_who_it_was() -> None:
    """Stores and runs of earlier editions stay valid: the hash is of the same JSON."""
    assert identity().fingerprint == "fcb6e5f7f418d4d8d967370165f4e063.88b963e37d9d679f"
    assert "options" not in identity().model_dump_json()
    there = identity({"kv_cache_dtype": '"fp8"'}, {"VLLM_BATCH_INVARIANT": "1"})
    assert TeacherIdentity.model_validate_json(there.model_dump_json()) == there
    assert identity().difference(there) == [
        "numeric.options.VLLM_BATCH_INVARIANT: expected absent, got 1",
        'semantic.options.kv_cache_dtype: expected absent, got "fp8"',
    ]


@pytest.mark.parametrize(
    ("given", "change"),
    [
        ({"hf_overrides": {"rope_parameters": {"rope_theta": 5e5}}}, "semantic"),
        ({"hf_overrides": {"head_dtype": "float32"}}, "same"),
        ({"kv_cache_dtype": "fp8"}, "semantic"),
        ({"kv_cache_dtype": "auto"}, "same"),
        ({"load_format": "dummy"}, "semantic"),
        ({"load_format": "bitsandbytes"}, "semantic"),
        ({"load_format": "runai_streamer"}, "same"),
        ({"an_option_of_tomorrow": True}, "semantic"),
        ({"enforce_eager": True}, "numeric"),
        ({"gpu_memory_utilization": 0.5, "max_num_seqs": 8, "max_model_len": 8192, "hf_token": "secret"}, "same"),
        ({}, "same"),
    ],
)
def test_an_option_changes_what_it_should(given: dict[str, Any], change: str) -> None:
    assert change_of(given, {"kv_cache_dtype": "auto", "load_format": "auto", "hf_overrides": {}}) == change


def test_the_longest_sequence_counts_where_rope_is_scaled_by_it() -> None:
    plain: list[dict[str, Any]] = [
        {}, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, {"rope_scaling": None},
        {"rope_parameters": {"full": {"rope_type": "default"}, "sliding": {"rope_type": "linear"}}},
    ]  # fmt: skip
    scaled: list[dict[str, Any]] = [
        {"rope_parameters": {"rope_type": "longrope"}}, {"rope_scaling": {"type": "su"}},
        {"rope_parameters": {"rope_type": "dynamic"}},
        {"rope_parameters": {"full": {"rope_type": "default"}, "sliding": {"rope_type": "longrope"}}},
    ]  # fmt: skip
    assert all(length_option(config, 4096) == {} for config in plain)
    for config in scaled:
        short, long = identity(length_option(config, 4096)), identity(length_option(config, 131_072))
        assert compare_fingerprints(short.fingerprint, long.fingerprint) == "semantic"


def test_variables_that_choose_kernels_are_noted_and_others_not() -> None:
    environment = {
        "VLLM_BATCH_INVARIANT": "1", "VLLM_USE_DEEP_GEMM": "0", "VLLM_CACHE_ROOT": "/cache/vllm", "PATH": "/bin",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_API_KEY": "secret", "VLLM_HOST_IP": "10.0.0.1",
    }  # fmt: skip
    assert deciding_variables(environment) == {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_DEEP_GEMM": "0"}


def test_every_option_that_vllm_has_is_one_or_the_other() -> None:
    """None of the installed version's can be set to another value without a change, but for those named as neutral."""
    arguments = pytest.importorskip("vllm.engine.arg_utils").AsyncEngineArgs
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    assert len(defaults) > 100 and len((NEUTRAL | NUMERIC) - defaults.keys()) < 20
    for name in defaults:
        change = change_of({name: "another value"}, defaults)
        assert change == ("same" if name in NEUTRAL else "numeric" if name in NUMERIC else "semantic"), name
        assert change_of({name: defaults[name]}, defaults) == "same"
