"""The best low-rank correction of a quantised layer, in closed form: reduced-rank regression (LRC, arXiv 2412.07902).

With X [I, N] a layer's exact inputs and R [O, N] what its quantised output lacks, the U V^T of rank r that minimises
|R - U V^T X|^2 has the leading eigenvectors of C S^-1 C^T as U, and V^T = U^T C S^-1, with S = X X^T and C = R X^T; the
error is |R|^2 minus the r eigenvalues. Called by `calibration`, which streams the two moments.

R is computed token by token before C is summed: C = W X X^T - What Y X^T (What the quantised weight, Y the rounded
inputs) would need two more products of inputs, and lose precision to cancellation for no gain. Everything is float64,
and S, damped, is factorised and never inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to the longest row of V^T: shorter rows are rounding errors.
NEGLIGIBLE = 1e-13


class Inputs:
    """S = X X^T of the layers that share an input, summed batch by batch, and the number of tokens in it."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.moment_II = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, input_NI: Tensor) -> None:
        self.moment_II.addmm_(input_NI.T, input_NI)
        self.tokens += len(input_NI)


class Residuals:
    """C = R X^T and |R|^2 of one layer, summed batch by batch."""

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        made = {"dtype": torch.float64, "device": device}
        self.cross_OI = torch.zeros(out_features, in_features, **made)
        self.square = torch.zeros((), **made)

    def add(self, residual_NO: Tensor, input_NI: Tensor) -> None:
        self.cross_OI.addmm_(residual_NO.T, input_NI)
        self.square += residual_NO.pow(2).sum()


@dataclass(frozen=True, eq=False)
class Solution:
    """The corrections of every rank at once. `u_OK`: eigenvectors by descending eigenvalue; `vt_KI`: U^T C S^-1."""

    u_OK: Tensor
    vt_KI: Tensor
    eigenvalues_K: Tensor

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """U [O, r] and V^T [r, I] of the best correction of that rank."""
        # Eckart-Young: cutting the best correction of full rank gives the best of each lower one.
        return self.u_OK[:, :rank], self.vt_KI[:rank]


def damped(moment_II: Tensor, damping: float) -> Tensor:
    """S with `damping` times the mean of its diagonal added to the diagonal."""
    # Relative to the inputs, so that one value works for layers whose activations differ by orders of magnitude.
    return moment_II + damping * moment_II.diagonal().mean() * torch.eye(len(moment_II)).to(moment_II)


def solve(cross_OI: Tensor, moment_II: Tensor, damping: float) -> Solution:
    """The corrections that minimise |R - U V^T X|^2 + d |U V^T|^2, d from `damping`. ValueError for a singular S.

    With S = L L^T the eigenvectors of C S^-1 C^T are the left singular vectors of C L^-T: they are computed from the
    smaller of its two Gram matrices.
    """
    factor_II, failed = torch.linalg.cholesky_ex(damped(moment_II, damping))
    if failed:
        raise ValueError(
            f"the calibration inputs span fewer than their {len(moment_II)} dimensions: use more tokens, or a damping "
            "above 0"
        )
    # L^-1 C^T = (C L^-T)^T: its right singular vectors are wanted.
    whitened_IO = torch.linalg.solve_triangular(factor_II, cross_OI.T, upper=False)
    # Of A = L^-1 C^T, I by O, the smaller Gram matrix: A^T A has the eigenvectors U itself; A A^T has those of the
    # other side, and A^T maps them to U up to length.
    if whitened_IO.shape[1] <= whitened_IO.shape[0]:
        values_K, u_OK = torch.linalg.eigh(whitened_IO.T @ whitened_IO)
        values_K, u_OK = values_K.flip(0), u_OK.flip(1)
    else:
        values_K, right_IK = torch.linalg.eigh(whitened_IO @ whitened_IO.T)
        values_K, right_IK = values_K.flip(0), right_IK.flip(1)
        # Orthogonal already, except for directions of eigenvalue 0, which are rounding errors: QR replaces these.
        u_OK = torch.linalg.qr(whitened_IO.T @ right_IK).Q
    # V^T = U^T C S^-1, by two triangular solves with L.
    vt_KI = torch.cholesky_solve(cross_OI.T @ u_OK, factor_II).T
    return Solution(u_OK, vt_KI, values_K.clamp_min(0.0))


def error(residuals: Residuals, moment_II: Tensor, u_OR: Tensor, vt_RI: Tensor) -> Tensor:
    """|R - U V^T X|^2, for any U and V."""
    # |R - UV^T X|^2 = |R|^2 - 2 tr(U^T C V) + tr(U^T U V^T S V), with C = R X^T and S = X X^T.
    explained = (u_OR * (residuals.cross_OI @ vt_RI.T)).sum()
    return residuals.square - 2.0 * explained + ((u_OR.T @ u_OR) * (vt_RI @ moment_II @ vt_RI.T)).sum()


def balanced(u_OR: Tensor, vt_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of U as long as rows of V^T, so that both learn at the same rate. A direction that
    corrects nothing keeps a unit column with a zero row: with both zero neither would ever have a gradient.
    """
    # U's columns have length 1: moving the square root of V's length to U makes both that long.
    length_R = vt_RI.norm(dim=1)
    gain_R = torch.where(length_R > NEGLIGIBLE * length_R.max(), length_R.sqrt(), 1.0)
    return u_OR * gain_R, vt_RI / gain_R[:, None]
