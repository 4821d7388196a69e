"""Attention relations computed from states. Shared by the attention service and the trainer's relation loss.

A relation is softmax(A A^T) over the positions of one document, for A in {Q, K, V} of one layer (MiniLMv2, arXiv
2012.15828): post-RoPE queries and keys, raw values. The heads of a position are concatenated and split again into R
relation heads of width d_r, so that models of different widths and head counts can be compared. There are three forms:

- official: rows of A divided by their L2 norm, temperature 1, no mask, probabilities of at least 1e-8 (the released
  BitDistill code);
- paper: A A^T / sqrt(d_r), no mask (BitDistill, arXiv 2510.13998, equation 12);
- minilm: as paper, but with a causal mask.

Needs torch, which is imported only within the functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class QKV(NamedTuple):
    """States of one layer: query [..., T, H, dh], key and value [..., T, H_kv, dh]."""

    query: Tensor
    key: Tensor
    value: Tensor


PARTS = QKV._fields


@dataclass(frozen=True)
class RelationForm:
    """How states are turned into relations.

    `cosine`: cosine similarity instead of a dot product divided by sqrt(d_r). `causal`: mask later positions.
    `floor`: the lowest probability, 0 for none. `per_head`: whether the loss is divided by R once more.
    """

    name: str
    cosine: bool
    causal: bool = False
    floor: float = 0.0
    per_head: bool = False


FORMS = {
    form.name: form
    for form in (
        RelationForm("official", cosine=True, floor=1e-8, per_head=True),
        RelationForm("paper", cosine=False),
        RelationForm("minilm", cosine=False, causal=True),
    )
}

# late_middle is where relations help most: an ablation over Qwen3-0.6B's 28 layers peaked at the eighth from the top.
LAYER_NAMES = {"first": 0.0, "middle": 0.5, "late_middle": 5 / 7, "last": 1.0}


def relation_form(form: str | RelationForm) -> RelationForm:
    """The form of that name; a form is returned as is. ValueError for an unknown name."""
    if isinstance(form, RelationForm):
        return form
    if form not in FORMS:
        raise ValueError(f"relation form: got '{form}', expected one of {sorted(FORMS)}")
    return FORMS[form]


def layer_index(layer: int | float | str = "late_middle", *, num_layers: int) -> int:
    """A layer counted from 0, from an index (negative: from the top), a fraction of the depth, or a name.

    A fraction or a name suits teacher and student of different depths. 0.0 is the first layer, 1.0 the last.
    Raises ValueError for a name not in LAYER_NAMES, a fraction outside [0, 1] or an index outside the model.
    """
    if isinstance(layer, str):
        if layer not in LAYER_NAMES:
            raise ValueError(
                f"attention layer: got '{layer}', expected one of {list(LAYER_NAMES)}, a fraction or an index"
            )
        layer = LAYER_NAMES[layer]
    if isinstance(layer, bool) or not isinstance(layer, int | float):
        raise ValueError(f"attention layer: got {layer!r}, expected a name, a fraction or an index")
    if isinstance(layer, float):
        if not 0.0 <= layer <= 1.0:
            raise ValueError(
                f"attention layer: got {layer}, expected a fraction of the depth in [0, 1] or an integer index"
            )
        # + 1e-6: rounding must not make a fraction such as 5/7 of the depth one layer too low.
        return min(num_layers - 1, math.floor(layer * num_layers + 1e-6))
    if not -num_layers <= layer < num_layers:
        raise ValueError(
            f"attention layer: got {layer}, the model has layers 0 to {num_layers - 1} (or -{num_layers} to -1)"
        )
    return layer % num_layers


def relation_heads_of(states_THd: Tensor, relation_heads: int) -> Tensor:
    """[..., T, H, dh] -> [..., R, T, d_r], d_r = H * dh / R. ValueError if R does not divide the width H * dh."""
    heads, head_width = states_THd.shape[-2:]
    width = heads * head_width
    if relation_heads < 1 or width % relation_heads:
        raise ValueError(
            f"relation heads: {relation_heads} do not divide the width {width} ({heads} heads of {head_width}); "
            f"give a divisor of {width}"
        )
    split = (*states_THd.shape[:-2], relation_heads, width // relation_heads)
    # Concatenate heads, [T, H dh], and split into R: teacher and student with different H get the same R.
    return states_THd.flatten(-2).reshape(split).transpose(-3, -2)


def similarity_factor(states_THd: Tensor, *, form: RelationForm, relation_heads: int) -> Tensor:
    """The A of A A^T, scaled as the form requires: float32 [..., R, T, d_r]. The loss multiplies it block by block."""
    import torch.nn.functional as F

    factor_RTd = relation_heads_of(states_THd, relation_heads).float()
    if form.cosine:
        return F.normalize(factor_RTd, dim=-1)
    # d^-1/4 on each of the two factors gives their product the 1 / sqrt(d).
    return factor_RTd * factor_RTd.shape[-1] ** -0.25


def similarity_rows(factor_RTd: Tensor, rows_r: Tensor, form: RelationForm) -> Tensor:
    """The softmax's input for the positions `rows_r` over all T: [..., R, r, T]; masked entries are -inf."""
    import torch

    similarity_RrT = factor_RTd.index_select(-2, rows_r) @ factor_RTd.transpose(-2, -1)
    if form.causal:
        positions_T = torch.arange(similarity_RrT.shape[-1], device=rows_r.device)
        similarity_RrT = similarity_RrT.masked_fill(positions_T > rows_r[:, None], -math.inf)
    return similarity_RrT


def log_relation_rows(factor_RTd: Tensor, rows_r: Tensor, form: RelationForm) -> Tensor:
    """Log-probabilities of the positions `rows_r` over all T: [..., R, r, T]; masked entries are -inf."""
    log_relation_RrT = similarity_rows(factor_RTd, rows_r, form).log_softmax(dim=-1)
    # Clamping the logarithm sets the lowest probability.
    return log_relation_RrT.clamp(min=math.log(form.floor)) if form.floor else log_relation_RrT


def relations(
    states_THd: Tensor, *, form: str | RelationForm, relation_heads: int, rows_r: Tensor | None = None
) -> Tensor:
    """Relation probabilities of one of Q, K, V: float32 [..., R, T, T], or [..., R, r, T] for positions `rows_r`.

    `states_THd`: [..., T, H, dh], one document along T. The official form's floor may raise a row's sum by T * 1e-8.
    """
    import torch

    chosen = relation_form(form)
    factor_RTd = similarity_factor(states_THd, form=chosen, relation_heads=relation_heads)
    if rows_r is None:
        rows_r = torch.arange(factor_RTd.shape[-2], device=factor_RTd.device)
    return log_relation_rows(factor_RTd, rows_r, chosen).exp()
