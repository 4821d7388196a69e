"""The closed form of low-rank corrections: golden numbers, a dense optimum found by other means, and EoRA.

Golden layer: W_ij = ((7i + 5j + ij + 3) mod 11 - 5) / 4, 6x5; X_jt = ((3j + 7t + jt^2 + 2) mod 13 - 6) / 5
+ 0.013 (j + 1) + 3 [j = 2, t mod 4 = 1], 5x12; absmean ternary weights; activations per column on a grid of 127 or 7.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from student_trainer.students.adapters.reduced_rank import Inputs, Residuals, balanced, damped, error, solve
from student_trainer.students.quant_linear import QuantLinear
from student_trainer.students.quantisers.activations import int4_activations, int8_activations
from student_trainer.students.quantisers.bitnet import BITNET
from student_trainer.students.quantisers.rtn import RTN

CPU = torch.device("cpu")
W_OI = torch.tensor([[((7 * i + 5 * j + i * j + 3) % 11 - 5) / 4 for j in range(5)] for i in range(6)]).double()
X_IN = torch.tensor(
    [
        [((3 * j + 7 * t + j * t * t + 2) % 13 - 6) / 5 + 0.013 * (j + 1) + 3 * (j == 2 and t % 4 == 1)
         for t in range(12)] for j in range(5)
    ], dtype=torch.float64,
)  # fmt: skip


def ternary(weight_OI: Tensor) -> Tensor:
    scale = weight_OI.abs().mean()
    return (weight_OI / scale).round().clamp(-1, 1) * scale


def rounded(input_IN: Tensor, top: int) -> Tensor:
    inverse_N = top / input_IN.abs().amax(0, keepdim=True)
    return (input_IN * inverse_N).round().clamp(-top - 1, top) / inverse_N


def moments(weight_OI: Tensor, quantised_OI: Tensor, input_IN: Tensor, rounded_IN: Tensor) -> tuple[Residuals, Tensor]:
    """Of a layer, in three batches."""
    residuals, inputs = Residuals(*weight_OI.shape, CPU), Inputs(len(input_IN), CPU)
    lacking_ON = weight_OI @ input_IN - quantised_OI @ rounded_IN
    for r_ON, x_IN in zip(lacking_ON.tensor_split(3, 1), input_IN.tensor_split(3, 1), strict=True):
        inputs.add(x_IN.T)
        residuals.add(r_ON.T, x_IN.T)
    assert inputs.tokens == input_IN.shape[1]
    return residuals, inputs.moment_II


def golden(top: int) -> tuple[Residuals, Tensor]:
    return moments(W_OI, ternary(W_OI), X_IN, rounded(X_IN, top))


@pytest.mark.parametrize(
    ("top", "square", "errors"),
    [
        (127, 30.911627, {1: 5.989979, 2: 2.221680, 3: 0.641952, 5: 0.000283}),
        (7, 30.650346, {1: 5.823582, 2: 2.660723, 3: 0.615230, 5: 0.093842}),
    ],
)
def test_golden_errors_by_rank(top: int, square: float, errors: dict[int, float]) -> None:
    residuals, moment_II = golden(top)
    assert residuals.square.item() == pytest.approx(square, abs=1e-6)
    solution = solve(residuals.cross_OI, moment_II, 0.0)
    for rank, expected in errors.items():
        u_OR, vt_RI = solution.cut(rank)
        assert error(residuals, moment_II, u_OR, vt_RI).item() == pytest.approx(expected, abs=1e-6)
        left = residuals.square - solution.eigenvalues_K[:rank].sum()
        assert left.item() == pytest.approx(expected, abs=1e-6)


def test_golden_eigenvalues_and_damping() -> None:
    residuals, moment_II = golden(127)
    found = solve(residuals.cross_OI, moment_II, 0.0).eigenvalues_K.tolist()
    assert found == pytest.approx([24.921648, 3.768299, 1.579728, 0.596227, 0.045442], abs=1e-6)
    u_OR, vt_RI = solve(residuals.cross_OI, moment_II, 0.01).cut(2)
    assert error(residuals, moment_II, u_OR, vt_RI).item() == pytest.approx(2.226240, abs=1e-6)


def test_the_moments_equal_those_of_products_of_inputs() -> None:
    """C = W X X^T - What Y X^T and |R|^2 from X X^T, X Y^T and Y Y^T, which a residual needs none of."""
    y_IN, hat_OI = rounded(X_IN, 7), ternary(W_OI)
    residuals, moment_II = golden(7)
    torch.testing.assert_close(moment_II, X_IN @ X_IN.T)
    torch.testing.assert_close(residuals.cross_OI, W_OI @ (X_IN @ X_IN.T) - hat_OI @ (y_IN @ X_IN.T))
    cross = (W_OI * (hat_OI @ (y_IN @ X_IN.T))).sum()
    square = (W_OI * (W_OI @ X_IN @ X_IN.T)).sum() - 2 * cross + (hat_OI * (hat_OI @ y_IN @ y_IN.T)).sum()
    torch.testing.assert_close(residuals.square, square)


def eora(weight_OI: Tensor, quantised_OI: Tensor, moment_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """EoRA as published: the error projected on the inputs' eigenspace, cut there, and projected back."""
    values_I, vectors_II = torch.linalg.eigh(moment_II)
    projection_II = vectors_II * values_I.sqrt()
    u_OK, s_K, vt_KI = torch.linalg.svd((weight_OI - quantised_OI) @ projection_II, full_matrices=False)
    root_R = s_K[:rank].sqrt()
    return u_OK[:, :rank] * root_R, torch.linalg.solve(projection_II.T, (root_R[:, None] * vt_KI[:rank]).T).T


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_it_is_eora_where_activations_are_exact(rank: int) -> None:
    residuals, moment_II = moments(W_OI, ternary(W_OI), X_IN, X_IN)
    u_OR, vt_RI = solve(residuals.cross_OI, moment_II, 0.0).cut(rank)
    b_OR, a_RI = eora(W_OI, ternary(W_OI), moment_II, rank)
    torch.testing.assert_close(u_OR @ vt_RI, b_OR @ a_RI, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("top", "errors"),
    [(127, {1: 5.990819, 2: 2.223303, 3: 0.643466, 5: 0.001817}),
     (7, {1: 5.874425, 2: 2.817988, 3: 0.863456, 5: 0.349423})],
)  # fmt: skip
def test_eora_does_not_see_rounded_activations(top: int, errors: dict[int, float]) -> None:
    residuals, moment_II = golden(top)
    for rank, expected in errors.items():
        b_OR, a_RI = eora(W_OI, ternary(W_OI), moment_II, rank)
        found = error(residuals, moment_II, b_OR, a_RI).item()
        assert found == pytest.approx(expected, abs=1e-6)
        ours = error(residuals, moment_II, *solve(residuals.cross_OI, moment_II, 0.0).cut(rank)).item()
        assert ours < found


def test_it_equals_an_optimum_that_descent_finds() -> None:
    """Alternating least squares from five random starts end where the closed form is, and none below it."""
    generator = torch.Generator().manual_seed(0)
    x_IN = torch.randn(9, 200, generator=generator, dtype=torch.float64)
    x_IN = torch.randn(9, 9, generator=generator, dtype=torch.float64) @ x_IN
    r_ON = torch.randn(7, 9, generator=generator, dtype=torch.float64) @ rounded(x_IN, 7) + x_IN[:7] * 3
    residuals, inputs = Residuals(7, 9, CPU), Inputs(9, CPU)
    residuals.add(r_ON.T, x_IN.T)
    inputs.add(x_IN.T)
    best = error(residuals, inputs.moment_II, *solve(residuals.cross_OI, inputs.moment_II, 0.0).cut(3)).item()
    found = []
    for seed in range(5):
        vt_RI = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(3000):
            z_RN = vt_RI @ x_IN
            u_OR = torch.linalg.lstsq(z_RN.T, r_ON.T, driver="gelsd").solution.T
            vt_RI = torch.linalg.lstsq(x_IN.T, (torch.linalg.pinv(u_OR) @ r_ON).T, driver="gelsd").solution.T
        found.append((r_ON - u_OR @ vt_RI @ x_IN).pow(2).sum().item())
    assert min(found) == pytest.approx(best, rel=1e-6)
    assert all(each >= best * (1 - 1e-9) for each in found)


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (8, 8)])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_it_is_never_worse_than_none_and_better_with_every_rank(shape: tuple[int, int], damping: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weight_OI = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x_IN = torch.randn(shape[1], 50, generator=generator, dtype=torch.float64) * torch.rand(shape[1], 1) * 4
    residuals, moment_II = moments(weight_OI, ternary(weight_OI), x_IN, rounded(x_IN, 7))
    solution = solve(residuals.cross_OI, moment_II, damping)
    errors = [error(residuals, moment_II, *solution.cut(rank)).item() for rank in range(1, min(shape) + 1)]
    penalised = [
        each + damping * moment_II.diagonal().mean().item() * (u_OR @ vt_RI).pow(2).sum().item()
        for each, (u_OR, vt_RI) in zip(errors, (solution.cut(rank) for rank in range(1, min(shape) + 1)), strict=True)
    ]
    before = residuals.square.item()
    assert all(each <= before for each in errors)
    assert all(after <= earlier + 1e-9 for earlier, after in zip([before, *penalised], penalised, strict=False))
    if damping == 0.0:
        assert errors == pytest.approx(penalised)
        full_OI = torch.linalg.lstsq(moment_II, residuals.cross_OI.T).solution.T
        torch.testing.assert_close(solution.u_OK @ solution.vt_KI, full_OI)


def test_inputs_that_span_too_little_are_refused_without_damping() -> None:
    x_IN = X_IN[:, :3]
    residuals, moment_II = moments(W_OI, ternary(W_OI), x_IN, x_IN)
    with pytest.raises(ValueError, match="span fewer than their 5 dimensions: use more tokens, or a damping above 0"):
        solve(residuals.cross_OI, moment_II, 0.0)
    assert damped(moment_II, 0.01).diagonal().mean() == pytest.approx(moment_II.diagonal().mean().item() * 1.01)
    u_OR, vt_RI = solve(residuals.cross_OI, moment_II, 0.01).cut(5)
    assert error(residuals, moment_II, u_OR, vt_RI) < residuals.square


def test_factors_are_balanced_and_none_starts_with_both_at_zero() -> None:
    residuals, moment_II = golden(127)
    u_OR, vt_RI = solve(residuals.cross_OI, moment_II, 0.01).cut(3)
    b_OR, a_RI = balanced(u_OR, vt_RI)
    torch.testing.assert_close(b_OR @ a_RI, u_OR @ vt_RI)
    torch.testing.assert_close(b_OR.norm(dim=0), a_RI.norm(dim=1))
    for shape in ((6, 5), (5, 6)):
        lacking_nothing = solve(torch.zeros(shape, dtype=torch.float64), moments_of(shape[1]), 0.01)
        b_OR, a_RI = balanced(*lacking_nothing.cut(2))
        assert not a_RI.any() and b_OR.norm(dim=0).tolist() == pytest.approx([1.0, 1.0])


def moments_of(width: int) -> Tensor:
    x_IN = torch.randn(width, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x_IN @ x_IN.T


@pytest.mark.parametrize("rounds", [int8_activations, int4_activations])
def test_the_correction_reads_activations_that_are_not_rounded(rounds: object) -> None:
    """One channel is so large that rounding leaves nothing of the others. Their outputs come back all the same, which
    nothing could do that sees the rounded inputs.
    """
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(400, 12, generator=generator)
    x_NI[:, 5] = 1e4
    one = torch.ones(())
    y_NI = rounds(x_NI, one)  # type: ignore[operator]
    others = [column for column in range(12) if column != 5]
    assert not y_NI[:, others].any(), "their quantisation destroys them"
    layer = QuantLinear(12, 8, bias=False, weight_quantiser=RTN, activation_quantiser=rounds)  # type: ignore[arg-type]
    weight_OI = layer.weight.detach()
    inputs, residuals = Inputs(12, CPU), Residuals(8, 12, CPU)
    inputs.add(x_NI.double())
    lacking_NO = nn.functional.linear(x_NI, weight_OI) - layer(x_NI).detach()
    residuals.add(lacking_NO.double(), x_NI.double())
    u_OR, vt_RI = solve(residuals.cross_OI, inputs.moment_II, 1e-12).cut(8)
    layer.correction = nn.Linear(12, 8, bias=False)
    layer.correction.weight.data.copy_(u_OR @ vt_RI)
    gap = (layer(x_NI) - nn.functional.linear(x_NI, weight_OI)).detach()
    varying = weight_OI[:, others] @ x_NI[:, others].T
    assert gap.norm() < 0.05 * varying.norm()
    best_of_rounded_OI = torch.linalg.lstsq(y_NI.double(), lacking_NO.double(), driver="gelsd").solution.T
    left = lacking_NO.double() - y_NI.double() @ best_of_rounded_OI.T
    assert left.norm() > 0.9 * varying.norm()


def test_the_golden_rounding_is_the_quantisers_own() -> None:
    """The tables above are of the code that students run."""
    one = torch.ones(())
    for top, quantise in ((127, int8_activations), (7, int4_activations)):
        torch.testing.assert_close(quantise(X_IN.T.float(), one).T.double(), rounded(X_IN, top), rtol=1e-5, atol=1e-6)
    layer = nn.Linear(5, 6, bias=False)
    layer.weight.data.copy_(W_OI)
    torch.testing.assert_close(BITNET.weight(layer, one).double(), ternary(W_OI), rtol=1e-6, atol=1e-6)
