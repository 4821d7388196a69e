"""A ternary student out of any Llama-like Hugging Face model (BitDistill, arXiv 2510.13998). Used by `bitnet_student`.

`convert_to_bitnet` swaps every linear of the decoder for a `BitLinear`; head and embeddings stay in full precision.
The latent weights are the original parameters under their original names, so checkpoints and optimizers see the same
model as before, plus the SubLN norms (`...o_proj.rms_norm.weight`) and one blend scalar a layer.

SubLN changes what the model computes, whatever its weights start from: a converted model has to be trained back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student_trainer.students.quantisers import int8_activations, ternary, ternary_weight

SubNorm = Literal["output", "all", "none"]

# What `sub_norm="output"` puts a norm before: the two linears that write into the residual stream.
OUTPUT_LINEARS = ("o_proj", "down_proj")
# Where `convert_to_bitnet` records what it did: an entry of the model's config, so that it travels with checkpoints.
CONFIG_ENTRY = "bitnet_student"
DEFAULT_EPS = 1e-8

log = logging.getLogger(__name__)


class BitLinear(nn.Linear):
    """A linear with ternary weights and int8 activations; `weight` is the latent weight and takes the gradient.

    `rms_norm`: SubLN, an RMSNorm of the input ahead of its quantiser, or None.
    `quantisation_blend`: a float32 scalar buffer, 0 for full precision, 1 for fully quantised. It is saved with the
    model: a run that is resumed in its warm-up goes on where it was.
    """

    rms_norm: nn.Module | None
    quantisation_blend: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, sub_norm_eps: float | None = None,
        quantise_activations: bool = True, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._complete(sub_norm_eps, quantise_activations)

    def _complete(self, sub_norm_eps: float | None, quantise_activations: bool) -> None:
        self.quantise_activations = quantise_activations
        self.rms_norm = None if sub_norm_eps is None else _rms_norm(self.in_features, sub_norm_eps, self.weight)
        self.register_buffer("quantisation_blend", torch.ones((), dtype=torch.float32, device=self.weight.device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, sub_norm_eps: float | None, quantise_activations: bool) -> BitLinear:
        """Takes over the parameters themselves: nothing is copied, and ties and optimizers stay valid."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.weight, new.bias = linear.weight, linear.bias
        new._complete(sub_norm_eps, quantise_activations)
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        if self.quantise_activations:
            input = int8_activations(input, self.quantisation_blend)
        return F.linear(input, ternary_weight(self.weight, self.quantisation_blend), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantise_activations={self.quantise_activations}"


def _rms_norm(width: int, eps: float, like: Tensor) -> nn.Module:
    """transformers' own RMSNorm under the name that its BitNet integration uses, so exports load there as they are."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(width, eps=eps).to(device=like.device, dtype=like.dtype)


def convert_to_bitnet(
    model: Any, *, sub_norm: SubNorm = "output", quantise_activations: bool = True, eps: float | None = None
) -> Any:
    """Make every linear of the decoder ternary, in place, and return the model.

    `sub_norm`: "output" puts a norm before o_proj and down_proj (the paper), "all" before every linear (the released
    launcher), "none" adds none. `eps` is the norms', 1e-8 by default as released. transformers' BitNet architecture
    brings the two output norms itself: only "output" fits it, and its own eps stays.
    Raises ValueError for a model without the linears that this needs, or one that is ternary already.
    """
    if sub_norm not in ("output", "all", "none"):
        raise ValueError(f"sub_norm: got '{sub_norm}', expected 'output', 'all' or 'none'")
    if eps is not None and not eps > 0.0:
        raise ValueError(f"eps: got {eps}, expected a number above 0")
    if is_ternary(model):
        raise ValueError("this model is ternary already: convert the full-precision model, once")
    linears = decoder_linears(model)
    own_norms = model.config.model_type == "bitnet"
    if own_norms and sub_norm != "output":
        raise ValueError(
            f"transformers' BitNet architecture has SubLN built in: got sub_norm '{sub_norm}', expected 'output'"
        )
    _check_linears(model, linears, sub_norm)
    if eps is not None and (own_norms or sub_norm == "none"):
        log.warning(
            "eps=%g has no effect: %s",
            eps,
            "no norm is added" if sub_norm == "none" else "the model's norms keep theirs",
        )
    eps = DEFAULT_EPS if eps is None else eps
    for name, linear in linears.items():
        normed = not own_norms and (sub_norm == "all" or (sub_norm == "output" and name.endswith(OUTPUT_LINEARS)))
        replacement = BitLinear.from_linear(
            linear, sub_norm_eps=eps if normed else None, quantise_activations=quantise_activations
        )
        model.set_submodule(name, replacement)
    record = {
        "sub_norm": sub_norm,
        "eps": model.config.rms_norm_eps if own_norms else eps,
        "quantise_activations": quantise_activations,
    }
    setattr(model.config, CONFIG_ENTRY, record)
    return model


def decoder_linears(model: Any) -> dict[str, nn.Linear]:
    """Every linear of the base model by its full name: heads, of language or of classes, lie outside of it."""
    inside = {id(module) for module in model.base_model.modules()}
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    }


def _check_linears(model: Any, linears: dict[str, nn.Linear], sub_norm: str) -> None:
    layers = model.config.num_hidden_layers
    kind = type(model).__name__
    if not linears:
        raise ValueError(f"{kind} has no nn.Linear in its decoder: only models built of nn.Linear can be made ternary")
    quantised = sorted({type(linear).__name__ for linear in linears.values() if type(linear) is not nn.Linear})
    if quantised:
        raise ValueError(f"{kind} holds {', '.join(quantised)}: load it unquantised, with plain nn.Linear layers")
    for last in OUTPUT_LINEARS if sub_norm == "output" else ():
        found = sum(name.endswith(f".{last}") for name in linears)
        if found != layers:
            raise ValueError(
                f"{kind}: sub_norm 'output' needs one {last} in each of {layers} layers, found {found}; "
                "use a Llama-like model, or sub_norm 'all' or 'none'"
            )


def bit_linears(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """The model's ternary linears with their full names, in the order of `named_modules`."""
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            yield name, module


def is_ternary(model: nn.Module) -> bool:
    return any(True for _ in bit_linears(model))


def set_quantisation_blend(model: nn.Module, blend: float) -> None:
    """Set how much of the quantisation acts: operand = (1 - blend) * exact + blend * quantised, in every BitLinear."""
    if not 0.0 <= blend <= 1.0:
        raise ValueError(f"quantisation blend: got {blend}, expected a number in [0, 1]")
    layers = [layer for _, layer in bit_linears(model)]
    if not layers:
        raise ValueError("quantisation blend: this model has no ternary linears; call convert_to_bitnet first")
    for layer in layers:
        layer.quantisation_blend.fill_(blend)


def quantisation_blend(model: nn.Module) -> float:
    """The blend that the model holds. ValueError where its layers disagree or it has no ternary linears."""
    blends = {layer.quantisation_blend.item() for _, layer in bit_linears(model)}
    if len(blends) != 1:
        raise ValueError(f"quantisation blend: expected one value over the ternary linears, got {sorted(blends)}")
    return blends.pop()


def warmup_blend(step: int, warmup_steps: int) -> float:
    """The blend for `step` (from 0): rises in a straight line and is 1 from step `warmup_steps` on, or at once if 0."""
    return 1.0 if step >= warmup_steps else step / warmup_steps


def ternary_codes(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """int8 codes [O, I] of a linear's latent weight, and the float32 scalar scale: the weight it multiplies by."""
    return ternary(linear.weight)
