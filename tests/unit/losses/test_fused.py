"""The GPU's kernels on a machine without one: by Triton's interpreter, and compiled for a GPU that isn't there.

Also the choice between kernels and torch's operations, and the walk over chunks of several blocks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student_trainer.losses import Head, TokenTerm, chunks, head_loss, token_term
from tests.unit.losses import dense

HERE = Path(__file__).parent
ROWS, BLOCK_ROWS, WIDTH, DEPTH = 60, 22, 131, 16


def interpreted(*files: str) -> None:
    """pytest on these files in a process whose kernels Triton interprets; its words are ours where it fails."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.timeout(900)  # a quarter of a minute, where nothing else runs
def test_kernels_agree_with_the_reference() -> None:
    interpreted("fused_cases.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_holds_of_the_reference_holds_of_the_kernels() -> None:
    interpreted("test_head_loss.py", "test_divergences.py", "test_rows_and_vocabularies.py")


class HopperThatIsNotThere:
    """What Triton asks of the driver when it binds a launch's arguments and compiles for them."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Compiles:
    """Stands where a kernel stands: what it would be launched with is bound and compiled, down to machine code."""

    def __init__(self, kernel: Any):
        self.kernel, self.made = kernel, set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            assert compiled.asm["cubin"]
            self.made.add(id(compiled))

        return launch


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Compiles]]:
    """The kernels of a GPU, in blocks as large as there."""
    pytest.importorskip("triton")
    from triton.backends import backends
    from triton.runtime import driver

    from student_trainer.losses.fused import launch

    if "nvidia" not in backends:
        pytest.skip("this Triton has no compiler for NVIDIA's GPUs")
    monkeypatch.setattr(chunks, "kernels_serve", lambda device: True)
    kernels = {name: Compiles(getattr(launch, name)) for name in ("normalise", "compare", "gradient")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(launch, name, kernel)
    monkeypatch.setattr(driver, "_active", HopperThatIsNotThere())
    yield kernels
    for kernel in kernels.values():
        kernel.kernel.device_caches.clear()


def launch_all(rows: int, terms: list[TokenTerm], **options: Any) -> None:
    """Every launch of a loss in bf16, of two chunks."""
    vocab = 64
    teacher = dense.rows_of(torch.randn(rows, vocab), 7, (2.0,))
    teacher = replace(
        teacher, gather_ids_NG=torch.arange(5).expand(rows, -1),
        gather_logprobs_NG=torch.randn(rows, 5).log_softmax(-1), teacher_hidden_NE=torch.randn(rows, 3),
        teacher_head=Head(torch.randn(vocab, 3), torch.randn(vocab), 9.0),
    )  # fmt: skip
    hidden_ND, weight_VD = (torch.randn(n, 3, dtype=torch.bfloat16, requires_grad=True) for n in (rows, vocab))
    labels_N = torch.zeros(rows, dtype=torch.long)
    head_loss(hidden_ND, weight_VD, labels_N, teacher, terms, chunk_rows=rows - 5, **options)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_kernels_compile_for_a_gpu_whatever_the_number_of_rows(compiling: dict[str, Compiles]) -> None:
    """Chunks and calls of other sizes, whose tables lie at other places, want no other kernel."""
    terms = [token_term("ce", "cross_entropy", 0.5), token_term("kd", "top_k_kl", 1.0)]
    for rows in (16, 21, 23):
        launch_all(rows, terms)
    assert {name: len(kernel.made) for name, kernel in compiling.items()} == {
        "normalise": 1, "compare": 0, "gradient": 1,
    }  # fmt: skip


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_kernels_of_every_feature_compile_for_a_gpu(compiling: dict[str, Compiles]) -> None:
    terms = [token_term("ce", "cross_entropy", 0.5), token_term("kd", "top_k_kl", 1.0),
             token_term("j", "jsd", 1.0, temperature=2.0, tail="renormalise"),
             token_term("r", "reverse_kl", 1.0, support="gather"),
             token_term("f", "skewed_kl", 1.0, temperature=2.0, support="full")]  # fmt: skip
    launch_all(16, terms, logit_softcap=30.0, head_bias_V=torch.randn(64), want_top1=True, shared_vocab=63)
    # One for each support.
    assert {name: len(kernel.made) for name, kernel in compiling.items()} == {
        "normalise": 2, "compare": 1, "gradient": 1,
    }  # fmt: skip


def test_kernels_serve_where_the_hardware_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_hardware.py` has which hardware that is."""
    monkeypatch.setattr(chunks, "runs_triton", lambda device: device.type == "cuda")
    assert chunks.kernels_serve(torch.device("cuda")) and not chunks.kernels_serve(torch.device("cpu"))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("vocab", [32_000, 128_256, 151_936])
def test_a_chunk_of_logits_takes_half_a_gibibyte_of_a_gpu(vocab: int, heads: int) -> None:
    rows = chunks.default_chunk_rows(vocab, torch.device("cuda"), heads)
    assert 0.95 * 2**29 < rows * heads * vocab * 4 <= 2**29
    assert chunks.default_chunk_rows(vocab, torch.device("cpu"), heads) == max(256, 2**24 // vocab)


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
