"""Coefficients from gradient shares: what is set is each term's share of the gradient, not what its value is multiplied
by.

Made from the settings and called by the loop: every `every` steps `term_gradient_norms` measures one micro batch,
`GradientBalance.update` takes in the norms, and `coefficients` apply until the next measurement. A coefficient means
nothing without the reduction that it goes with (the same attention loss is published with 1e5 and with 60); a share
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from student_trainer.losses.terms import Term
from student_trainer.losses.values import HeadLoss

# A term's gradient may vanish; its coefficient must not overflow.
LARGEST = 1e6


@dataclass(frozen=True)
class GradientBalance:
    """Gradient shares, and running means of the terms' gradient norms.

    `shares`: by term, above 0, relative to one another. The coefficient of `reference` is 1; that of another term is
    share / reference's share * |reference's gradient| / |own gradient|, with running means of the norms, at most 1e6.
    `ema`: the weight of the old mean in an update. `every`: steps between measurements, the first at step 0.
    `means` and `weights` are the state: the ema-weighted sum of the norms, and the sum of those weights.
    """

    shares: Mapping[str, float]
    reference: str
    ema: float = 0.9
    every: int = 50
    means: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reference not in self.shares:
            raise ValueError(f"balance: got reference '{self.reference}', expected one of {sorted(self.shares)}")
        if wrong := [name for name, share in self.shares.items() if not (math.isfinite(share) and share > 0)]:
            raise ValueError(f"balance: got share {self.shares[wrong[0]]} of '{wrong[0]}', expected a number above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"balance: got ema {self.ema}, expected a number from 0 to below 1")
        if self.every < 1:
            raise ValueError(f"balance: got every {self.every}, expected 1 or more steps")

    def due(self, step: int) -> bool:
        """Whether to measure before update `step`, counted from 0: also at every step until there is a measurement."""
        return step % self.every == 0 or not self.means

    def update(self, norms: Mapping[str, float]) -> GradientBalance:
        """A copy with a measurement taken in: the norm of each term's gradient at coefficient 1, over the same rows.

        A norm of 0 (the micro batch has no rows of the term, or nothing is left to learn) leaves the mean unchanged.
        ValueError unless the norms are of exactly the balanced terms, finite and not negative.
        """
        if norms.keys() != self.shares.keys():
            raise ValueError(f"balance: got norms of {sorted(norms)}, expected those of {sorted(self.shares)}")
        if wrong := [name for name, norm in norms.items() if not math.isfinite(norm) or norm < 0]:
            raise ValueError(f"balance: the gradient of '{wrong[0]}' has norm {norms[wrong[0]]}")
        means, weights = dict(self.means), dict(self.weights)
        for name, norm in norms.items():
            if norm > 0:
                # m <- ema m + (1 - ema) norm, w the sum of the weights: m / w is a mean from the first norm on.
                means[name] = self.ema * means.get(name, 0.0) + (1.0 - self.ema) * norm
                weights[name] = self.ema * weights.get(name, 0.0) + (1.0 - self.ema)
        return replace(self, means=means, weights=weights)

    def coefficients(self) -> dict[str, float]:
        """By term, what its value is multiplied by. An unmeasured term is taken to have the reference's norm."""
        mean = {name: self.means[name] / self.weights[name] for name in self.means if self.reference in self.means}
        # c = share / reference's share x reference's |g| / own |g|, so that the |c g| are in proportion to the shares.
        pull = mean.get(self.reference, 1.0)
        return {
            name: min(LARGEST, share / self.shares[self.reference] * pull / mean.get(name, pull))
            for name, share in self.shares.items()
        }

    def state(self) -> dict[str, dict[str, float]]:
        """Plain numbers, for a checkpoint."""
        return {"means": dict(self.means), "weights": dict(self.weights)}

    def restored(self, state: Mapping[str, Mapping[str, float]]) -> GradientBalance:
        """A copy with a saved state; terms that are no longer balanced are dropped."""
        means, weights = (
            {name: float(value) for name, value in state[part].items() if name in self.shares}
            for part in ("means", "weights")
        )
        return replace(self, means=means, weights=weights)


def term_gradient_norms(
    loss: Callable[[Tensor, tuple[Term, ...]], HeadLoss], hidden_ND: Tensor, terms: Iterable[Term]
) -> dict[str, float]:
    """The norm of each term's gradient, at coefficient 1, with respect to the student's final hidden states.

    `loss(hidden_ND, terms)` is `head_loss` on a micro batch, with a head that needs no gradient: a term then costs two
    matrix products of the head, and nothing below the hidden states is differentiated.
    """
    norms = {}
    for term in terms:
        # A leaf, so that the graph below the hidden states is not traversed again for every term.
        leaf_ND = hidden_ND.detach().requires_grad_()
        with torch.enable_grad():
            total = loss(leaf_ND, (replace(term, coefficient=1.0),)).total
        (gradient_ND,) = torch.autograd.grad(total, leaf_ND)
        norms[term.name] = torch.linalg.vector_norm(gradient_ND, dtype=torch.float32)
    return _numbers(norms)


def gradient_norms(roots: Mapping[str, tuple[Tensor, Tensor | None]], parameters: Sequence[Tensor]) -> dict[str, float]:
    """The norm of each term's gradient with respect to chosen parameters: for terms that don't all pass through the
    hidden states.

    `roots`: by term, what to differentiate and the gradient to start from, None for a scalar. The graph is kept.
    A parameter that a term does not reach adds nothing.
    """
    norms = {}
    for name, (root, gradient) in roots.items():
        parts = torch.autograd.grad(root, parameters, gradient, retain_graph=True, allow_unused=True)
        squares = [part.float().square().sum() for part in parts if part is not None]
        norms[name] = torch.stack(squares).sum().sqrt() if squares else parameters[0].new_zeros((), dtype=torch.float32)
    return _numbers(norms)


def _numbers(norms: Mapping[str, Tensor]) -> dict[str, float]:
    """All in one transfer, so that a GPU is waited for only once."""
    if not norms:
        return {}
    return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))
