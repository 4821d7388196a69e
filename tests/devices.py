"""Finds in the source every function that asks what a device or a CPU can do. Used by `test_device_branches.py`.

Asking is: comparing a device's type, or looking something up by it; anything of `torch.cuda`, `torch.accelerator`,
`torch.version` and vLLM's platform that answers a question; what `hardware.py` says; what a CPU or its C library is;
whether torch, or a package that computes, has something or is there; and the environment variables that hold kernels to
a lesser CPU, or to an interpreter.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("proto/teacher_proto", "services", "trainer/student_trainer")
DEVICES = {"cpu", "cuda", "mps", "meta", "xpu"}
# Questions by the end of their dotted name.
QUESTIONS = {
    "is_cuda", "is_cpu", "is_available", "device_count", "get_device_properties", "get_device_capability",
    "is_bf16_supported", "is_initialized", "get_cpu_capability", "get_capabilities", "hip", "device_of", "set_device",
    "get_rng_state", "set_rng_state", "current_device", "_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported",
    "_is_avx512_bf16_supported", "_is_amx_tile_supported", "is_pinned", "pin_memory", "current_accelerator",
}  # fmt: skip
TORCH = {"cuda", "accelerator", "cpu", "mkldnn", "version", "mps"}
# Our own functions that answer, called by their name: all public ones of these files, and these.
ANSWERING = ("proto/teacher_proto/hardware.py", "trainer/student_trainer/device.py")
ANSWERS = {
    *(node.name for file in ANSWERING for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
      if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")),
    "compute_dtype", "attention_for", "kernels_serve", "multiplies_into_float32", "adds_into_float32",
    "libc_ver", "machine", "built_for_cpu",
}  # fmt: skip
# Whoever calls these branches on nothing: they name a device, or do what it needs.
ANSWERS -= {"parse_dtype", "pick_device", "device_name", "cpu_name", "choose_device", "use_device", "keep_freed_memory"}
VARIABLES = {"TRITON_INTERPRET", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "VLLM_TARGET_DEVICE"}
VLLM = {"current_platform.is_cpu", "current_platform.is_cuda", "current_platform.supported_dtypes",
        "current_platform.device_type"}  # fmt: skip
COMPUTING = {"torch", "triton", "vllm", "xformers", "flash_attn", "liger_kernel"}


def branches() -> dict[str, list[str]]:
    """`path::function` -> what it asks, in order; of all packages."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for name, question in asked(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault(f"{path.relative_to(ROOT)}::{name}", []).append(question)
    return found


def asked(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, str]]:
    """(function, question) in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        here = inside
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            here = f"{inside}.{node.name}" if inside else node.name
        if (question := _question(node)) is not None:
            yield here or "module", question
        yield from asked(node, here)


def _question(node: ast.AST) -> str | None:
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        named = any(_names_device(side) for side in sides)
        return ast.unparse(node) if named and any(_is_type(side) for side in sides) else None
    if isinstance(node, ast.Subscript):
        return ast.unparse(node) if _is_type(node.slice) else None
    if isinstance(node, ast.Call):
        return _call(node)
    if isinstance(node, ast.Attribute) and (
        node.attr in ("is_cuda", "hip") or ast.unparse(node) in (*VLLM, "torch.__version__")
    ):
        return ast.unparse(node)
    return None


def _call(node: ast.Call) -> str | None:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    if last in ANSWERS or (last in QUESTIONS and TORCH & set(name.split(".")[:-1])):
        return f"{name}()"
    if last in ("pin_memory", "is_pinned"):
        return f"{name}()"
    if last == "startswith" and node.args and _names_device(node.args[0]):
        return ast.unparse(node)
    arguments = [argument for argument in node.args if isinstance(argument, ast.Constant)]
    values = {argument.value for argument in arguments if isinstance(argument.value, str)}
    if values & VARIABLES or (last == "find_spec" and values & COMPUTING):
        return ast.unparse(node)
    of_torch = bool(node.args) and ast.unparse(node.args[0]).split(".")[0] in COMPUTING
    if (last == "hasattr" and of_torch) or (last == "getattr" and of_torch and len(node.args) == 3):
        return ast.unparse(node)
    return ast.unparse(node) if last == "get" and any(_is_type(argument) for argument in node.args) else None


def _is_type(node: ast.AST) -> bool:
    """`device.type` and the like, and a plain `device`, which may be a device's name."""
    return (isinstance(node, ast.Attribute) and node.attr == "type") or (
        isinstance(node, ast.Name) and node.id in ("device", "device_type")
    )


def _names_device(node: ast.AST) -> bool:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(_names_device(element) for element in node.elts)
    return isinstance(node, ast.Constant) and node.value in DEVICES
