"""What vLLM is told for scoring, on a CPU and on a GPU: a platform of a few lines stands in for vLLM's own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from teacher_proto import hardware
from teacher_proto.model_files import ModelFolder
from teacher_service.engines.vllm_options import engine_arguments
from teacher_service.engines.vllm_wrappers import TextConfig

AMPERE, TURING = [torch.bfloat16, torch.float16, torch.float32], [torch.float16, torch.float32]


class Registry:
    models = {"LlamaForCausalLM": SimpleNamespace(module_name="vllm.models.llama", class_name="Llama")}

    def __init__(self) -> None:
        self.registered: dict[str, Any] = {}

    def register_model(self, architecture: str, model: Any) -> None:
        self.registered[architecture] = model


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch):
    """Puts a vLLM in place that computes on a CPU, or on a GPU with these dtypes; what is registered with it."""

    def make(gpu: list[torch.dtype] | None = None, bfloat16: bool = True) -> Registry:
        platforms, models, registry = ModuleType("vllm.platforms"), ModuleType("vllm.model_executor.models"), Registry()
        platform = SimpleNamespace(is_cpu=lambda: gpu is None, supported_dtypes=gpu)
        vars(platforms)["current_platform"] = platform
        vars(models)["ModelRegistry"] = registry
        adapter = ModuleType("teacher_service.engines.vllm_adapter")
        setattr(adapter, "vllm.models.llama.Llama", "the adapted class")
        for module in (platforms, models, adapter, ModuleType("vllm"), ModuleType("vllm.model_executor")):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr("teacher_service.engines.vllm_adapter", adapter, raising=False)
        monkeypatch.setattr(hardware, "_computes", lambda dtype, device: dtype == torch.float32 or bfloat16)
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        return registry

    return make


def arguments(own: str = "bfloat16", vllm_args: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    quantised, path = options.pop("quantised", False), options.pop("path", Path("/model"))
    head_dtype = options.pop("head_dtype", "auto")
    config = {"architectures": ["LlamaForCausalLM"], "dtype": own}
    config |= {"quantization_config": {"quant_method": "awq"}} if quantised else {}
    folder = ModelFolder(path, "a model", "local", config)
    return engine_arguments(folder, {"dtype": "auto", **options}, vllm_args or {}, head_dtype)


@pytest.mark.parametrize(
    ("own", "gpu", "bfloat16", "dtype"),
    [
        ("bfloat16", None, True, "bfloat16"),
        ("bfloat16", None, False, "float32"),
        ("float32", None, True, "float32"),
        ("bfloat16", AMPERE, True, "bfloat16"),
        ("bfloat16", TURING, True, "float32"),
        ("float16", TURING, True, "float16"),
        ("float32", AMPERE, True, "float32"),
    ],
)
def test_auto_is_the_checkpoint_s_own_dtype_where_the_hardware_computes_in_it(vllm, own, gpu, bfloat16, dtype) -> None:
    vllm(gpu, bfloat16)
    assert arguments(own)["dtype"] == dtype


def test_quantised_weights_keep_the_dtype_that_their_kernels_are_made_for(vllm, caplog) -> None:
    vllm(bfloat16=False)
    assert arguments("bfloat16", quantised=True)["dtype"] == "bfloat16"
    assert "is emulated" in caplog.text


@pytest.mark.parametrize(("given", "warns"), [("auto", False), ("bfloat16", True), ("half", True), ("float32", False)])
def test_a_dtype_that_is_emulated_is_warned_of_with_its_factor(vllm, caplog, given: str, warns: bool) -> None:
    vllm(bfloat16=False)
    with caplog.at_level(logging.WARNING):
        told = arguments(dtype=given)["dtype"]
    assert told == ("float32" if given == "auto" else given)
    assert ("times as long as in float32" in caplog.text) == warns


def test_a_gpu_is_never_asked_of_torch(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(*_: Any, **__: Any) -> None:
        raise AssertionError("torch was asked for a device")

    for owner, question in ((torch.cuda, "is_available"), (torch.cuda, "get_device_properties"),
                            (torch.accelerator, "is_available")):  # fmt: skip
        monkeypatch.setattr(owner, question, asks)
    vllm(AMPERE)
    given = arguments(dtype="bfloat16")
    assert given["max_num_batched_tokens"] == 8192 and given["hf_overrides"] == {"head_dtype": "float32"}


def test_where_the_model_is_loaded_here_vllm_is_given_the_class_itself(vllm) -> None:
    registry = vllm()
    assert "model_class_overrides" not in arguments()
    assert registry.registered == {"LlamaForCausalLM": "the adapted class"}


@pytest.mark.parametrize("how", ["two GPUs", "two stages", "a process more"])
def test_where_it_is_loaded_elsewhere_vllm_is_given_its_name(vllm, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    registry = vllm()
    sizes = {"two GPUs": {"tensor_parallel_size": 2}, "two stages": {"pipeline_parallel_size": 2}}.get(how, {})
    if how == "a process more":
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    named = {"LlamaForCausalLM": "teacher_service.engines.vllm_adapter:vllm.models.llama.Llama"}
    assert arguments(**sizes)["model_class_overrides"] == named and not registry.registered


@pytest.mark.parametrize(
    ("head", "auto"),
    [
        ({"weight": torch.ones(4, 2, dtype=torch.bfloat16)}, "float32"),
        ({"weight": torch.ones(4, 2, dtype=torch.bfloat16), "bias": torch.ones(4)}, "float32"),
        ({"weight": torch.ones(4, 2).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}, "model"),
        ({"qweight": torch.ones(4, 2, dtype=torch.int32), "scales": torch.ones(1)}, "model"),
        ({"weight": torch.ones(4, 2, dtype=torch.uint8)}, "model"),
    ],
)
def test_a_quantised_head_is_multiplied_in_the_model_s_dtype(vllm, tmp_path: Path, head, auto: str) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(4, 2), "model.layers.0.q_proj.qweight": torch.ones(2).int()}
    save_file(tensors | {f"lm_head.{name}": tensor for name, tensor in head.items()}, tmp_path / "model.safetensors")
    vllm(AMPERE)
    assert arguments(path=tmp_path)["hf_overrides"] == {"head_dtype": auto}
    assert arguments(path=tmp_path, head_dtype="model")["hf_overrides"] == {"head_dtype": "model"}
    if auto == "float32":
        assert arguments(path=tmp_path, head_dtype="float32")["hf_overrides"] == {"head_dtype": "float32"}
    else:
        with pytest.raises(ValueError, match=r"needs an unquantised output head, but a model has lm_head\..*at auto"):
            arguments(path=tmp_path, head_dtype="float32")
    vllm()
    assert arguments(path=tmp_path)["hf_overrides"] == {"head_dtype": "model"}


def test_of_a_wrapper_the_language_model_is_loaded(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm()
    assert arguments()["language_model_only"] is True
    registry = vllm()
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "vision_config": {"model_type": "pixtral"}}
    config |= {"text_config": {"model_type": "mistral", "dtype": "bfloat16"}}
    monkeypatch.setitem(Registry.models, "MistralForCausalLM", Registry.models["LlamaForCausalLM"])
    folder = ModelFolder(Path("/model"), "a wrapper", "local", config)
    given = engine_arguments(folder, {}, {"hf_overrides": {"rope_theta": 5.0}}, "auto")
    assert registry.registered == {"MistralForCausalLM": "the adapted class"}
    assert given["hf_overrides"] == TextConfig("MistralForCausalLM", {"head_dtype": "model", "rope_theta": 5.0})


@pytest.mark.parametrize("gpu", [None, AMPERE])
def test_no_graphs_are_captured_unless_the_user_wants_them(vllm, gpu) -> None:
    vllm(gpu)
    assert arguments()["compilation_config"] == {"cudagraph_mode": "NONE"}
    given = arguments(vllm_args={"compilation_config": {"mode": 0}})["compilation_config"]
    assert given == {"cudagraph_mode": "NONE", "mode": 0}
    wanted = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}
    assert arguments(vllm_args=wanted)["compilation_config"] == {"cudagraph_mode": "PIECEWISE"}


def test_vllm_knows_the_options_that_turn_graphs_off_and_leave_the_prefix_cache_to_it(vllm) -> None:
    config = pytest.importorskip("vllm.config.compilation")
    assert config.CompilationConfig(cudagraph_mode="NONE").cudagraph_mode == config.CUDAGraphMode.NONE
    vllm()
    assert "enable_prefix_caching" not in arguments()
    assert arguments(vllm_args={"enable_prefix_caching": False})["enable_prefix_caching"] is False


@pytest.mark.parametrize("name", ["runner", "language_model_only", "model_class_overrides", "data_parallel_size"])
def test_what_only_the_service_can_set_is_refused(vllm, name: str) -> None:
    vllm()
    with pytest.raises(ValueError, match=f"vLLM's {name} can't be set"):
        arguments(vllm_args={name: 2})
