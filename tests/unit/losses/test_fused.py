"""The GPU's kernels on a machine without one: by Triton's interpreter, and compiled for a GPU that isn't there.

Also the choice between kernels and torch's operations, and the walk over chunks of several blocks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student_trainer.losses import TeacherHead, TeacherRows, TokenTerm, chunks, head_loss, token_term
from tests.unit.losses import dense

HERE = Path(__file__).parent
DTYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
ROWS, BLOCK_ROWS, WIDTH, DEPTH = 60, 22, 131, 16


def interpreted(*files: str) -> None:
    """pytest on these files in a process whose kernels Triton interprets; its words are ours where it fails."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_kernels_agree_with_the_reference() -> None:
    interpreted("fused_cases.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_holds_of_the_reference_holds_of_the_kernels() -> None:
    interpreted("test_head_loss.py", "test_divergences.py", "test_sampled.py", "test_rows_and_vocabularies.py")


class Recorder:
    """Stands where a kernel stands, and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            named = dict(zip(self.kernel.arg_names, args, strict=False))
            self.launches.append((self.kernel, named | kwargs))

        return launch


def launches_of(
    monkeypatch: pytest.MonkeyPatch, terms: list[TokenTerm], **options: Any
) -> list[tuple[Any, dict[str, Any]]]:
    """Every launch of one chunk of a loss, at a size at which kernels read as many logits at a time as on a GPU."""
    from student_trainer.losses.fused import launch

    found: list[tuple[Any, dict[str, Any]]] = []
    for name in ("normalise", "compare", "gradient"):
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), found))
    monkeypatch.setattr(chunks, "kernels_serve", lambda device: True)
    vocab = 64
    teacher = dense.rows_of(torch.randn(4, vocab), 7, (2.0,))
    ids_NG = torch.arange(5).expand(4, -1)
    teacher = TeacherRows(
        **{name: value for name, value in vars(teacher).items() if value is not None}
        | {"gather_ids_NG": ids_NG, "gather_logprobs_NG": torch.randn(4, 5).log_softmax(-1),
           "teacher_hidden_NE": torch.randn(4, 3),
           "teacher_head": TeacherHead(torch.randn(vocab, 3), torch.randn(vocab), 9.0)}
    )  # fmt: skip
    hidden_ND, weight_VD = (torch.randn(n, 3, dtype=torch.bfloat16, requires_grad=True) for n in (4, vocab))
    head_loss(hidden_ND, weight_VD, torch.zeros(4, dtype=torch.long), teacher, terms, **options)
    return found


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("case", ["usual", "everything"])
def test_kernels_compile_for_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to the machine code of a Hopper GPU, from what the launches hand over."""
    triton = pytest.importorskip("triton")
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    if "nvidia" not in backends:
        pytest.skip("this Triton has no compiler for NVIDIA's GPUs")
    terms = [token_term("ce", "cross_entropy", 0.5), token_term("kd", "top_k_kl", 1.0)]
    options: dict[str, Any] = {}
    if case == "everything":
        terms += [token_term("j", "jsd", 1.0, temperature=2.0, tail="renormalise"),
                  token_term("r", "reverse_kl", 1.0, support="gather"),
                  token_term("f", "skewed_kl", 1.0, temperature=2.0, support="full")]  # fmt: skip
        options = {"logit_softcap": 30.0, "head_bias_V": torch.randn(64), "want_top1": True, "shared_vocab": 63}
    launches = launches_of(monkeypatch, terms, **options)
    assert {kernel.__name__ for kernel, _ in launches} >= {"normalise", "gradient"}
    for kernel, given in launches:
        settings = {"num_warps": given.pop("num_warps")}
        constants = {p.name: given.pop(p.name) for p in kernel.params if p.is_constexpr}
        types = {
            name: f"*{DTYPES[value.dtype]}" if isinstance(value, Tensor) else "i32" for name, value in given.items()
        }
        signature = {p.name: "constexpr" if p.is_constexpr else types[p.name] for p in kernel.params}
        source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=settings)
        assert compiled.asm["cubin"]


def test_kernels_serve_where_the_hardware_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_hardware.py` has which hardware that is."""
    monkeypatch.setattr(chunks, "runs_triton", lambda device: device.type == "cuda")
    assert chunks.kernels_serve(torch.device("cuda")) and not chunks.kernels_serve(torch.device("cpu"))


def gradients(terms: list[TokenTerm], softcap: float | None) -> list[Tensor]:
    """Values of a loss and its gradients by hidden states and weight, from fixed inputs."""
    make = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(ROWS, DEPTH, generator=make).requires_grad_()
    weight_VD = torch.randn(WIDTH, DEPTH, generator=make).requires_grad_()
    teacher = dense.rows_of(torch.randn(ROWS, WIDTH, generator=make) * 3, 7, (3.0,))
    labels_N = torch.randint(WIDTH, (ROWS,), generator=make)
    loss = head_loss(hidden_ND, weight_VD, labels_N, teacher, terms, logit_softcap=softcap)
    loss.total.backward()
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    return [loss.total.detach(), hidden_ND.grad, weight_VD.grad]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("several", [False, True])
def test_gradients_of_a_chunk_of_several_blocks(
    softcap: float | None, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the gradient is written over the logits (one pass, no cap) or beside them, every block's is right."""
    terms = [token_term("ce", "cross_entropy", 0.5), token_term("kl", "top_k_kl", 1.0)]
    if several:
        terms.append(token_term("jsd", "jsd", 1.0, temperature=3.0))
    whole = gradients(terms, softcap)
    monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", BLOCK_ROWS * WIDTH)
    for one, other in zip(gradients(terms, softcap), whole, strict=True):
        torch.testing.assert_close(one, other)
