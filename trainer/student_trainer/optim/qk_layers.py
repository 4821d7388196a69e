"""Finds what determines the scale of a layer's attention logits, and scales it down. Called by `qk_clip`.

plain linears     rows of weight and bias, by head
quantised linears what their quantiser allows: for ternary ones the whole matrix, since scaling some rows would change
                  mean |W| and with it the codes of all others; if the whole matrix is scaled the codes stay the same,
                  up to rounding at their boundaries
before a QK-norm  the norms' gains, since a norm cancels the scale of the weights: by head if each head has its own
                  gains, else for the whole layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.ranks import full_tensor, like
from student_trainer.students.quant_linear import quantiser_of

# The names that architectures give to the norms of query and key.
QK_NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"), ("q_layernorm", "k_layernorm"))
PROBE_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Side:
    """The linear or norm that determines the scale of a layer's query, or of its key, by `weight + offset`."""

    module: nn.Module
    offset: float = 0.0

    @torch.no_grad()
    def scale(self, factors: Sequence[float]) -> None:
        """Multiply weight and bias by one factor, or by one for each head."""
        weight: Any = self.module.weight
        _multiply(weight, factors, self.offset)
        bias: Any = getattr(self.module, "bias", None)
        if bias is not None:
            _multiply(bias, factors)
        for name in quantiser_of(self.module).row_scales:
            _multiply(self.module.get_parameter(name), factors)


@dataclass(frozen=True, eq=False)
class Layer:
    """How one layer is clipped. `group`: query heads per key head, if heads are scaled separately; None: all alike."""

    query: Side
    key: Side
    group: int | None


def plan_layer(module: Any) -> Layer:
    """How the attention module is clipped. ValueError says why it can't be."""
    norms = _norms(module)
    query, key = norms or _linears(module)
    if not all(parameter.requires_grad for side in (query, key) for parameter in side.module.parameters(recurse=False)):
        raise ValueError("the parameters that scale their logits are frozen")
    if any(getattr(side.module, "correction", None) is not None for side in (query, key)):
        raise ValueError("their query or key has an adapter, which clipping would not scale")
    group = int(getattr(module, "num_key_value_groups", 1))
    rows = [side.module.weight.numel() if norms else side.module.out_features for side in (query, key)]
    # One gain vector for all heads: no head can be scaled on its own.
    if norms and rows == [module.head_dim, module.head_dim]:
        return Layer(query, key, None)
    if rows[0] != group * rows[1] or rows[1] % module.head_dim:
        raise ValueError(
            f"query and key have {rows[0]} and {rows[1]} rows, expected {group} to 1, in multiples of {module.head_dim}"
        )
    # A norm after the linears alone determines the scale, whatever quantises them.
    quantisers = [] if norms else [quantiser_of(side.module) for side in (query, key)]
    for quantiser in quantisers:
        if quantiser.qk_clip == "nothing":
            raise ValueError(f"their quantiser, {quantiser.name}, has no scale that could be clipped")
    by_head = all(quantiser.qk_clip == "rows" for quantiser in quantisers)
    return Layer(query, key, group if by_head else None)


def _norms(module: Any) -> tuple[Side, Side] | None:
    """The QK-norm, None if there is none. ValueError for one without gains."""
    if getattr(module, "qk_norm", None) is not None:
        raise ValueError("their QK-norm has no gains")
    for names in QK_NORMS:
        query, key = (getattr(module, name, None) for name in names)
        if query is not None and key is not None and not isinstance(query, nn.Identity):
            return Side(query, _offset(query)), Side(key, _offset(key))
    return None


def _offset(norm: nn.Module) -> float:
    """What the norm adds to its weight before multiplying: 0, or 1 in the Gemma family. Found out by a probe."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError("their QK-norm has no gains")
    with torch.no_grad():
        parameters = {name: full_tensor(parameter) for name, parameter in norm.named_parameters(recurse=False)}
        weight, bias = parameters["weight"], parameters.get("bias")
        # Input of mean 0 and mean square 1, which every kind of norm leaves as it is.
        signs = torch.ones_like(weight)
        signs.flatten()[::2] = -1.0
        output = torch.func.functional_call(norm, parameters, (signs[None],))[0]
        # Input of +1 and -1, so output / input = output x input are the gains.
        gains = signs * (output if bias is None else output - bias)
    for offset in (0.0, 1.0):
        if torch.allclose(gains, weight + offset, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE):
            return offset
    raise ValueError(f"their QK-norm, {type(norm).__name__}, is not a norm times gains")


def _linears(module: Any) -> tuple[Side, Side]:
    query, key = getattr(module, "q_proj", None), getattr(module, "k_proj", None)
    if not isinstance(query, nn.Linear) or not isinstance(key, nn.Linear):
        raise ValueError("their query and key do not come from linears named q_proj and k_proj")
    return Side(query), Side(key)


def _multiply(parameter: Tensor, factors: Sequence[float], offset: float = 0.0) -> None:
    """parameter = (parameter + offset) * factor - offset, with the factors spread evenly over its first dimension."""
    if offset:
        # Gains are weight + offset, and it is the gains that are scaled.
        parameter.add_(offset)
    if len(factors) == 1:
        parameter.mul_(factors[0])
    else:
        heads = torch.tensor(factors, dtype=torch.float32, device=parameter.device)
        # The rows of a head are contiguous: [f0, f0, ..., f1, f1, ...].
        rows = heads.repeat_interleave(parameter.shape[0] // len(factors))
        parameter.mul_(like(parameter, rows.view(-1, *[1] * (parameter.ndim - 1))))
    if offset:
        parameter.sub_(offset)
