"""What a device computes in, asked of the hardware: both sides of every branch, on whatever machine this is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from teacher_proto import hardware

LESSER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ASK = """
import sys
from teacher_proto import hardware
assert "torch" not in sys.modules
import torch
low = torch.bfloat16
print(hardware.computes_bfloat16("cpu"), hardware.auto_dtype("cpu"), hardware.auto_dtype("cpu", torch.float32),
      hardware.auto_dtype("cpu", low), torch.cuda.is_initialized(), sep="|")
print(hardware.emulation_warning(low, "cpu"))
print(hardware.emulation_warning(torch.float32, "cpu"))
"""
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86 CPUs")


def ask(**environment: str) -> list[str]:
    names = (*LESSER, "DNNL_MAX_CPU_ISA")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch):
    """An x86 CPU with these features, as torch would tell of it."""

    def make(capability: str = "AVX512", isa: str | None = None, **features: bool) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        if isa is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)

    return make


@x86_only
def test_a_cpu_held_to_avx2_is_told_float32_and_warned_with_a_factor_that_it_measured():
    answer, warning, nothing = ask(**LESSER)
    assert answer == "False|torch.float32|torch.float32|torch.float32|False"
    assert "bfloat16 is emulated on this CPU" in warning and "neither AMX nor AVX512-BF16" in warning
    factor = float(warning.partition("took ")[2].split()[0])
    assert factor > 2
    assert nothing == "None"


@x86_only
def test_this_very_cpu_is_told_what_its_flags_say():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    able = "amx_bf16" in flags or "avx512_bf16" in flags
    answer, warning, _ = ask()
    dtype = "torch.bfloat16" if able else "torch.float32"
    assert answer == f"{able}|{dtype}|torch.float32|{dtype}|False"
    assert (warning == "None") == able


@pytest.mark.parametrize(
    ("features", "capability", "isa", "bfloat16", "float16"),
    [
        ({"avx512_bf16": True}, "AVX512", None, True, False),
        ({"amx_bf16": True}, "AVX512", None, True, False),
        ({"amx_bf16": True, "amx_fp16": True}, "AVX512", None, True, True),
        ({"avx512_bf16": True, "avx512_fp16": True}, "AVX512", "ALL", True, True),
        ({"avx512_bf16": True, "avx512_fp16": True}, "AVX512", "AVX512_CORE_BF16", True, False),
        ({"avx512_f": True}, "AVX512", None, False, False),
        ({}, "AVX2", None, False, False),
        ({"avx512_bf16": True, "avx512_fp16": True}, "AVX2", None, False, False),
        ({"avx512_bf16": True, "avx512_fp16": True}, "AVX512", "AVX2", False, False),
        ({"avx512_bf16": True, "avx512_fp16": True}, "AVX512", "avx512_core_vnni", False, False),
    ],
)
def test_an_x86_cpu_computes_in_what_it_has_and_is_allowed(x86, features, capability, isa, bfloat16, float16):
    x86(capability, isa, **features)
    assert hardware.computes_bfloat16("cpu") is bfloat16
    assert hardware.auto_dtype("cpu") == (torch.bfloat16 if bfloat16 else torch.float32)
    assert hardware.auto_dtype("cpu", torch.float16) == (torch.float16 if float16 else torch.float32)
    assert hardware.auto_dtype("cpu", torch.float32) == torch.float32


def test_a_torch_that_lists_no_features_is_asked_for_each(x86, monkeypatch):
    x86()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert hardware.computes_bfloat16("cpu") is able


@pytest.mark.parametrize("able", [True, False])
def test_an_arm_cpu_is_asked_of_onednn(monkeypatch, able):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able, raising=False)
    assert hardware.computes_bfloat16("cpu") is able


@pytest.mark.parametrize(
    ("major", "hip", "able"), [(7, None, False), (8, None, True), (9, None, True), (7, "6.1", True)]
)
def test_a_cuda_device_is_asked_itself(monkeypatch, major, hip, able):
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(major=major)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert hardware.computes_bfloat16("cuda:1") is able
    assert asked == ([] if hip else [torch.device("cuda:1")])
    assert hardware.auto_dtype("cuda:1", torch.float16) == torch.float16


def test_other_devices_get_float32():
    assert hardware.auto_dtype("mps") == hardware.auto_dtype("mps", torch.float16) == torch.float32


def test_a_warning_leaves_the_number_of_threads_alone(x86):
    x86("AVX2")
    threads = torch.get_num_threads()
    assert hardware.emulation_warning(torch.bfloat16, "cpu") is not None
    assert torch.get_num_threads() == threads
    assert "AVX2" in hardware.cpu_name() and "bfloat16" not in hardware.cpu_name()


@pytest.mark.parametrize(
    ("device", "major", "hip", "installed", "runs"),
    [
        ("cpu", 9, None, True, False),
        ("cuda", 9, None, True, True),
        ("cuda", 8, None, True, True),
        ("cuda", 7, None, True, False),
        ("cuda", 9, "6.4", True, False),
        ("cuda", 9, None, False, False),
    ],
)
def test_triton_s_kernels_run_on_nvidia_s_gpus_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, device: str, major: int, hip: str | None, installed: bool, runs: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: name if installed else None)
    assert hardware.runs_triton(device) is runs


def test_this_cpu_gives_no_product_of_bfloat16_in_float32() -> None:
    hardware.sums_in_float32.cache_clear()
    assert hardware.sums_in_float32("cpu") is False


@pytest.mark.parametrize(
    ("error", "sums"), [(None, True), (TypeError, False), (NotImplementedError, False), (RuntimeError, False)]
)
@pytest.mark.parametrize("lacking", ["mm", "addmm"])
def test_products_in_float32_are_found_by_trying(
    monkeypatch: pytest.MonkeyPatch, lacking: str, error: type[Exception] | None, sums: bool
) -> None:
    """A torch that has them on this device; one before 2.8, whose functions know no `out_dtype`; one that has not."""

    def product(*matrices: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return matrices[-1].to(out_dtype)

    def lacks(*matrices: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        raise error("no such product") if error else AssertionError

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, lacks if error and name == lacking else product)
    hardware.sums_in_float32.cache_clear()
    assert hardware.sums_in_float32("cpu") is sums
    hardware.sums_in_float32.cache_clear()


@pytest.mark.parametrize(("there", "auto"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool, auto: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device.index}")
    assert hardware.pick_device("auto") == auto and hardware.pick_device("cuda:1") == "cuda:1"
    assert hardware.device_name("cuda:1") == "a GPU, 1" and hardware.device_name("cpu") == "cpu"


def test_a_gpu_that_emulates_is_named_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=7))
    monkeypatch.setattr(hardware, "_seconds", lambda dtype, device: 3.0 if dtype == torch.bfloat16 else 2.0)
    warning = hardware.emulation_warning(torch.bfloat16, "cuda")
    assert warning is not None and "bfloat16 is emulated on this cuda device and slow" in warning and "1.5" in warning


def test_a_cpu_without_a_name_is_called_by_its_architecture(x86, monkeypatch: pytest.MonkeyPatch) -> None:
    x86(avx512_bf16=True)
    assert hardware.cpu_name().endswith(", AVX512, bfloat16")

    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert hardware.cpu_name() == "x86_64, AVX512, bfloat16"


def test_either_of_onednn_s_variables_holds_a_cpu_back(x86, monkeypatch: pytest.MonkeyPatch) -> None:
    x86(avx512_bf16=True)
    assert hardware.computes_bfloat16("cpu")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert not hardware.computes_bfloat16("cpu")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    assert hardware.computes_bfloat16("cpu")
