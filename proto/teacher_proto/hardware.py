"""What a device can do: decides the dtype of teacher, attention service and student, and which kernels run.

Used by the services' engines, the trainer's local teacher and its student. Importing this does not import torch, and
torch looks for CUDA devices only when a function is asked about one.

CUDA devices of compute capability 8.0 or later, x86 CPUs with AMX or AVX512-BF16 and ARM CPUs with BF16 have bfloat16
arithmetic; any other CPU emulates it, many times slower than float32. `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA`
restrict torch's kernels to the instructions of a lesser CPU, and this CPU then counts as one.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The values of ONEDNN_MAX_CPU_ISA that exclude the instructions for bfloat16 or float16.
_ISA_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_ISA_WITHOUT_FP16 = (*_ISA_WITHOUT_BF16, "AVX512_CORE_BF16", "AVX512_CORE_AMX")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# The timed matrix product: [rows, width] by [width, width]. Takes a tenth of a millisecond or less in float32.
_ROWS, _WIDTH = 64, 256
_REPEATS = 5


def computes_bfloat16(device: str | torch.device) -> bool:
    """Whether `device` has bfloat16 arithmetic."""
    import torch

    return _computes(torch.bfloat16, torch.device(device))


def auto_dtype(device: str | torch.device, own: torch.dtype | None = None) -> torch.dtype:
    """The dtype to compute in on `device`: bfloat16 if the hardware computes in it, else float32.

    With `own`, a checkpoint's dtype: that one if the hardware computes in it, else float32.
    """
    import torch

    wanted = torch.bfloat16 if own is None else own
    return wanted if _computes(wanted, torch.device(device)) else torch.float32


def runs_triton(device: str | torch.device) -> bool:
    """Whether `device` can run our Triton kernels: an NVIDIA GPU of compute capability 8.0 or later, with Triton
    installed, as it is with torch's CUDA builds."""
    import torch

    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    return bool(torch.cuda.get_device_properties(device).major >= 8)


def pick_device(name: str) -> str:
    """The device of that name; "auto" is "cuda" if there is a CUDA device, else "cpu"."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str | torch.device) -> str:
    """The name of `device` in an identity: a GPU's product name, "cpu" for any CPU."""
    import torch

    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def sums_in_float32(device_type: str) -> bool:
    """Whether `mm` and `addmm` can return products of bfloat16 matrices in float32 (`out_dtype`): on GPUs with a recent
    torch, on no CPU. Determined by trying, once. Where it is False, callers convert the operands.
    """
    import torch

    low = torch.ones((16, 16), dtype=torch.bfloat16, device=device_type)
    try:
        product = torch.mm(low, low, out_dtype=torch.float32)
        torch.addmm(product, low, low, out_dtype=torch.float32)
    # A torch or device without them. torch 2.9's addmm expects the summand in bfloat16, and raises a RuntimeError.
    except (TypeError, RuntimeError):
        return False
    return True


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, None for "auto". ValueError for any other name."""
    import torch

    if name == "auto":
        return None
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, float32, bfloat16, float16")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_dtype(name: str, device: str | torch.device, own: str) -> torch.dtype:
    """The dtype to compute a checkpoint of dtype `own` in: `name`, or for "auto" the choice of `auto_dtype`.

    ValueError for an unknown `name`. An `own` that nothing computes in, such as float8, is no error.
    """
    return parse_dtype(name) or auto_dtype(device, parse_dtype(own if own in _DTYPES else "auto"))


def emulation_warning(dtype: torch.dtype, device: str | torch.device) -> str | None:
    """A warning if `device` only emulates `dtype`; None if it computes in it.

    The factor in the text is measured on the spot with a small matrix product, in some ten milliseconds.
    """
    import torch

    device = torch.device(device)
    if _computes(dtype, device):
        return None
    name = str(dtype).removeprefix("torch.")
    slower = _seconds(dtype, device) / _seconds(torch.float32, device)
    lack = {torch.bfloat16: "neither AMX nor AVX512-BF16", torch.float16: "no AMX-FP16 or AVX512-FP16"}.get(dtype)
    why = f", which has {lack}," if lack and device.type == "cpu" and _is_x86() else ""
    return (
        f"{name} is emulated on this {_kind(device)}{why} and slow: a matrix product took {slower:.3g} times as long "
        "as in float32; leave the dtype at auto, or choose float32"
    )


def cpu_name() -> str:
    """The processor's name and the instruction set that torch's kernels use, such as "AMD EPYC, AVX512, bfloat16"."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join([_model_name(), capability, *(["bfloat16"] if computes_bfloat16("cpu") else [])])


def _computes(dtype: torch.dtype, device: torch.device) -> bool:
    import torch

    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if device.type == "cuda":
        # float16 is older than every CUDA device that torch still supports.
        return dtype == torch.float16 or _cuda_computes_bfloat16(device)
    if device.type != "cpu":
        return False
    if _is_x86():
        return _x86_computes(dtype)
    # torch asks cpuinfo here, and returns False without oneDNN, which has the kernels.
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _cuda_computes_bfloat16(device: torch.device) -> bool:
    import torch

    if torch.version.hip:
        return True
    return bool(torch.cuda.get_device_properties(device).major >= 8)


def _x86_computes(dtype: torch.dtype) -> bool:
    """Whether the CPU has the instructions, and torch and oneDNN are allowed to use them."""
    import torch

    has, isa = _cpu_features(), _allowed_isa()
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if dtype == torch.bfloat16:
        return bool(has.get("amx_bf16") or has.get("avx512_bf16")) and isa not in _ISA_WITHOUT_BF16
    return bool(has.get("amx_fp16") or has.get("avx512_fp16")) and isa not in _ISA_WITHOUT_FP16


def _cpu_features() -> Mapping[str, Any]:
    """The CPU's features, whether or not torch may use them; before torch 2.11, only two of them."""
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return dict(ask())
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def _allowed_isa() -> str:
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The time of one matrix product in `dtype`, on one thread: the shortest of several."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = torch.ones((_ROWS, _WIDTH), dtype=dtype, device=device)
        weight = torch.ones((_WIDTH, _WIDTH), dtype=dtype, device=device)
        times = []
        for _ in range(_REPEATS + 1):  # the first is the warm-up
            start = time.perf_counter()
            # `item` synchronises with the device.
            torch.nn.functional.linear(rows, weight)[0, 0].item()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times[1:])


def _kind(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else f"{device.type} device"


def _model_name() -> str:
    """The name in /proc/cpuinfo, or else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
