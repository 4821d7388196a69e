"""The kernels of `reduction_triton` on a machine without a GPU: run by Triton's interpreter, compiled for an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton", reason="Triton is not installed")
from teacher_proto.compute import reduction_kernels as kernels  # noqa: E402
from teacher_proto.compute import reduction_triton  # noqa: E402

# Of one multiprocessor of compute capability 9.0: registers, shared memory and blocks of one of our kernels' programs.
REGISTERS, MOST_PROGRAMS = 65_536, 32
FP32, INT32 = "*fp32", "*i32"


def test_the_interpreted_kernels_satisfy_what_the_passes_in_torch_do() -> None:
    """Every test of `test_reduction.py` but those of draws, which are torch's, and the kernels' own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = inherited | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib",
         "tests/unit/test_reduction.py", "tests/unit/reduction_triton_cases.py",
         "-k", "not draws_follow and not draws_of_other and not by_blocks and not noise"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int) -> Any:
    """A kernel's binary for compute capability 9.0. Arguments that are neither are 32-bit integers, and all may be
    divided by 16, as at V = 151,936."""
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "nvidia" not in backends:
        pytest.skip("this Triton has no NVIDIA backend")
    names = kernel.arg_names
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name] != "constexpr"
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(binary: Any, tmp_path: Path) -> dict[str, int]:
    """REG, STACK, SHARED, ... of the compiled kernel, from NVIDIA's own tool, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton has no cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
    out = subprocess.run([tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True,
                         check=True).stdout  # fmt: skip
    line = next(line for line in out.splitlines() if "REG:" in line)
    return {name: int(value) for name, _, value in (word.partition(":") for word in line.split()) if value.isdigit()}


@pytest.mark.parametrize("logits", ["*fp32", "*bf16"])
@pytest.mark.parametrize("lanes", [2, 3, 5])
def test_the_stream_fills_a_multiprocessor(tmp_path: Path, logits: str, lanes: int) -> None:
    """32 programs of one warp at a time, no register spilt, 16 bytes a load: 128 kB are on their way."""
    pointers = {"logits": logits, "coefficients": FP32, "best_NS": FP32, "sums_NSL": FP32, "maxima_Nb": FP32}
    constants = {"LANES": lanes, "WIDTH": 1 << (lanes - 1).bit_length(), "TILES": reduction_triton.SEGMENT_TILES,
                 "ROWS": reduction_triton.TILE_BLOCKS, "COLUMNS": 64, "MAXIMA": True}  # fmt: skip
    binary = compiled(kernels.stream, pointers, constants, warps=1)
    used = resources(binary, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] * 32 * MOST_PROGRAMS <= REGISTERS * (1 if logits == FP32 else 1.5)
    assert used["SHARED"] * MOST_PROGRAMS <= 228 * 1024
    assert "ld.global.v4.b32" in binary.asm["ptx"]
    # 32 logits of each thread, all at hand: one exponential of the hardware's for each sum but the one of squares.
    assert binary.asm["ptx"].count("ex2.approx") >= 32 * (lanes - 1)


@pytest.mark.parametrize("vocab_size", [512, 49_152, 151_936, 262_144])
def test_what_comes_after_the_stream_compiles(tmp_path: Path, vocab_size: int) -> None:
    blocks_up = 1 << (-(-vocab_size // 64) - 1).bit_length()
    segments_up = 1 << (-(-vocab_size // reduction_triton.SEGMENT) - 1).bit_length()
    names = ("logits", "best_NS", "sums_NSL", "maxima_Nb", "coefficients", "temperatures", "best_N", "log_sum_N",
             "lse_N", "next_logprob_N", "log_z_NT")  # fmt: skip
    pointers = dict.fromkeys(names, FP32) | {"next_ids": "*i64", "places": INT32, "chosen_NC": INT32}
    constants = {"SEGMENTS_UP": segments_up, "WIDTH": 4, "BLOCKS_UP": blocks_up,
                 "PIECE": min(blocks_up, reduction_triton.PIECE), "NEXT": True, "CHOOSE": True}  # fmt: skip
    used = resources(compiled(kernels.combine, pointers, constants, reduction_triton.warps_for(blocks_up)), tmp_path)
    assert used["LOCAL"] == used["STACK"] == 0


@pytest.mark.parametrize("k", [1, 16, 64, 256])
def test_picking_and_placing_compile(tmp_path: Path, k: int) -> None:
    assert k <= reduction_triton.PICK_MOST
    pointers = {"logits": FP32, "chosen_NC": INT32, "values_NK": FP32, "ids_NK": INT32}
    constants = {"COLUMNS": 64, "CANDIDATES": k * 64, "PIECE": min(k * 64, reduction_triton.PIECE)}
    picked = compiled(kernels.pick, pointers, constants, reduction_triton.warps_for(k * 64))
    pointers = {"values_NK": FP32, "ids_NK": INT32, "best_N": FP32, "log_sum_N": FP32, "placed_NK": INT32,
                "logprobs_NK": "*fp16"}  # fmt: skip
    ranks = max(16, k)
    placed = compiled(kernels.place, pointers, {"RANKS": ranks, "STEP": 16}, reduction_triton.warps_for(ranks * 16))
    for binary, elements in ((picked, k * 64), (placed, ranks * 16)):
        used = resources(binary, tmp_path)
        assert used["LOCAL"] == used["STACK"] == 0
        assert used["REG"] * 32 * reduction_triton.warps_for(elements) * 2 <= REGISTERS


def test_the_interpreter_is_not_what_was_compiled() -> None:
    assert type(kernels.stream).__name__ == "JITFunction" and not torch.cuda.is_initialized()
