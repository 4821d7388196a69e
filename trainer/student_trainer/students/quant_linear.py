"""Linears that multiply by a quantised weight, with an optional norm of their input (SubLN), and decoders made of them.
Used by `load` and `pretrained`.

`quantise` replaces every linear of the decoder of a Llama-like Hugging Face model by a `QuantLinear`; head and
embeddings stay in full precision. The latent weights are the original parameters under their original names, so
checkpoints and optimizers see the same model as before, plus the SubLN norms (`...o_proj.rms_norm.weight`, as in
BitDistill, arXiv 2510.13998), one blend scalar per layer, and what a quantiser learns besides.

SubLN changes what the model computes, whatever its gains start from: a converted model has to be trained to recover.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student_trainer.students.quantisers import QUANTISERS
from student_trainer.students.quantisers.activations import ACTIVATIONS, ActivationQuantiser
from student_trainer.students.quantisers.none import NONE
from student_trainer.students.quantisers.quantiser import Quantiser
from student_trainer.students.quantisers.record import Record, SubNorm, write_record

# The linears that `sub_norm="output"` puts a norm before: the two that write into the residual stream.
OUTPUT_LINEARS = ("o_proj", "down_proj")
DEFAULT_EPS = 1e-8
# A buffer that a layer needs for training only: once it is fully quantised, its outputs do not depend on it.
BLEND = "quantisation_blend"

log = logging.getLogger(__name__)


class QuantLinear(nn.Linear):
    """y = quantised(W) a(x) + b + correction(x), where x is the input after `rms_norm` and `a` rounds activations.

    `weight` is the latent weight W and takes the gradient.
    `rms_norm`: SubLN, an RMSNorm of the input before its quantiser, or None.
    `correction`: what an adapter adds, computed from the unrounded input ([..., I] to [..., O]), or None.
    `quantisation_blend`: a float32 scalar buffer, 0 for full precision, 1 for fully quantised. It is saved with the
    model: a run that is resumed in its warm-up continues where it was.
    """

    rms_norm: nn.Module | None
    correction: nn.Module | None
    quantisation_blend: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, weight_quantiser: Quantiser,
        activation_quantiser: ActivationQuantiser | None = None, sub_norm_eps: float | None = None,
        correction: nn.Module | None = None, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._complete(weight_quantiser, activation_quantiser, sub_norm_eps)
        self.correction = correction

    def _complete(
        self, weight_quantiser: Quantiser, activation_quantiser: ActivationQuantiser | None, sub_norm_eps: float | None
    ) -> None:
        self.weight_quantiser = weight_quantiser
        self.activation_quantiser = activation_quantiser
        self.rms_norm = None if sub_norm_eps is None else _rms_norm(self.in_features, sub_norm_eps, self.weight)
        self.correction = None
        self.register_buffer(BLEND, torch.ones((), dtype=torch.float32, device=self.weight.device))
        for name, values in weight_quantiser.learnt(self).items():
            self.register_parameter(name, nn.Parameter(values))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, weight_quantiser: Quantiser, activation_quantiser: ActivationQuantiser | None,
        sub_norm_eps: float | None,
    ) -> QuantLinear:  # fmt: skip
        """Takes over the parameters themselves: nothing is copied, and ties and optimizers stay valid."""
        # Not __init__, which would allocate and draw a weight only for it to be replaced.
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.weight, new.bias = linear.weight, linear.bias
        new._complete(weight_quantiser, activation_quantiser, sub_norm_eps)
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        # The correction sees the exact input: it is there to compensate for rounding.
        rounded = input
        if self.activation_quantiser is not None:
            rounded = self.activation_quantiser(input, self.quantisation_blend)
        output = F.linear(rounded, self.weight_quantiser.weight(self, self.quantisation_blend), self.bias)
        return output if self.correction is None else output + self.correction(input)

    def extra_repr(self) -> str:
        rounding = getattr(self.activation_quantiser, "__name__", "exact activations")
        return f"{super().extra_repr()}, {self.weight_quantiser.name}, {rounding}"


def _rms_norm(width: int, eps: float, like: Tensor) -> nn.Module:
    """transformers' own RMSNorm under the name that its BitNet integration uses, so exports load there as they are."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(width, eps=eps).to(device=like.device, dtype=like.dtype)


def quantise(
    model: Any, quantiser: str, *, sub_norm: SubNorm | None = None, quantise_activations: bool | None = None,
    activation_bits: int | None = None, eps: float | None = None, bits: int | None = None,
    group_size: int | None = None, stages: int | None = None,
) -> Any:  # fmt: skip
    """Quantise every linear of the decoder, in place, and return the model.

    `quantiser`: a name in QUANTISERS, which also has the defaults for what is None here. `sub_norm`: "output" puts a
    norm before o_proj and down_proj (BitDistill's paper), "all" before every linear (its released launcher), "none"
    adds none. `eps`: that of the norms, by default 1e-8 as in BitDistill's release. transformers' BitNet architecture
    has the two output norms already: only "output" fits it, and it keeps its own eps. `bits`, `group_size` and
    `stages`: for quantisers that have them.
    Raises ValueError for a model without the linears that this needs, or one that is quantised already.
    """
    chosen = QUANTISERS[quantiser]
    sub_norm = chosen.sub_norm if sub_norm is None else sub_norm
    activations = "none" if quantise_activations is False else chosen.activations
    if quantise_activations and activations == "none":
        activations = "int8"
    if activations != "none" and activation_bits is not None:
        activations = f"int{activation_bits}"
    if stages is not None and chosen.stages is None:
        log.warning("stages=%d has no effect: quantiser %s has none", stages, quantiser)
    if stages is None or chosen.stages is None:
        stages = chosen.stages
    if not chosen.grouped and (bits, group_size) != (None, None):
        raise ValueError(
            f"student.quantisation.bits and group_size are for rtn, but the quantiser is {quantiser}: leave them out"
        )
    eps_of_norms = DEFAULT_EPS if eps is None else eps
    record = Record(quantiser, sub_norm, eps_of_norms, activations, stages=stages, bits=bits, group_size=group_size)
    return _convert(model, record, eps)


def quantise_as(model: Any, record: Record) -> Any:
    """Quantise the decoder as a checkpoint's record says, in place, and return the model."""
    keeps = _has_own_norms(model) or record.sub_norm == "none"
    return _convert(model, record, None if keeps else record.eps)


def _convert(model: Any, record: Record, eps: float | None) -> Any:
    """`eps`: the requested one, None if none was."""
    quantiser = QUANTISERS[record.quantiser].of(record)
    if is_quantised(model):
        raise ValueError("this model is already quantised: quantise the full-precision model, once")
    linears, own_norms, sub_norm = decoder_linears(model), _has_own_norms(model), record.sub_norm
    if own_norms and sub_norm != "output":
        raise ValueError(
            f"transformers' BitNet architecture has SubLN built in: got sub_norm '{sub_norm}', expected 'output'"
        )
    _check_linears(model, linears, sub_norm)
    _check_sizes(linears, quantiser)
    if eps is not None and (own_norms or sub_norm == "none"):
        log.warning(
            "eps=%g has no effect: %s",
            eps,
            "no norm is added" if sub_norm == "none" else "the model's own norms keep their eps",
        )
    for name, linear in linears.items():
        normed = not own_norms and (sub_norm == "all" or (sub_norm == "output" and name.endswith(OUTPUT_LINEARS)))
        replacement = QuantLinear.from_linear(
            linear, weight_quantiser=quantiser, activation_quantiser=ACTIVATIONS[record.activations],
            sub_norm_eps=record.eps if normed else None,
        )  # fmt: skip
        model.set_submodule(name, replacement)
    write_record(model.config, replace(record, eps=model.config.rms_norm_eps) if own_norms else record)
    return model


def _has_own_norms(model: Any) -> bool:
    """Whether the architecture has SubLN built in, as transformers' BitNet does."""
    return bool(model.config.model_type == "bitnet")


def decoder_linears(model: Any) -> dict[str, nn.Linear]:
    """Every linear of the base model by its full name; heads, for language or for classes, are outside of it."""
    inside = {id(module) for module in model.base_model.modules()}
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    }


def _check_linears(model: Any, linears: dict[str, nn.Linear], sub_norm: str) -> None:
    layers = model.config.num_hidden_layers
    kind = type(model).__name__
    if not linears:
        raise ValueError(f"{kind} has no nn.Linear in its decoder: only models built of nn.Linear can be quantised")
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


def _check_sizes(linears: Mapping[str, nn.Linear], quantiser: Quantiser) -> None:
    """ValueError, naming a layer, if there is one that the quantiser can't take."""
    refused = {name: why for name, linear in linears.items() if (why := quantiser.check(linear))}
    if refused:
        name, why = next(iter(refused.items()))
        more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise ValueError(f"student.quantiser {quantiser.name} can't take {name}{more}: it is {why}")


def quant_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """The model's quantised linears with their full names, in the order of `named_modules`."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def is_quantised(model: nn.Module) -> bool:
    return any(True for _ in quant_linears(model))


def quantiser_of(linear: nn.Module) -> Quantiser:
    """The quantiser of the module's weight; `none` for a module that is not quantised."""
    return linear.weight_quantiser if isinstance(linear, QuantLinear) else NONE


def set_quantisation_blend(model: nn.Module, blend: float) -> None:
    """Set how much quantisation acts in every QuantLinear: operand = (1 - blend) * exact + blend * quantised."""
    if not 0.0 <= blend <= 1.0:
        raise ValueError(f"quantisation blend: got {blend}, expected a number in [0, 1]")
    layers = [layer for _, layer in quant_linears(model)]
    if not layers:
        raise ValueError("quantisation blend: this model has no quantised linears; call quantise first")
    for layer in layers:
        layer.quantisation_blend.fill_(blend)


def quantisation_blend(model: nn.Module) -> float:
    """The blend that the model holds. ValueError if its layers disagree or it has no quantised linears."""
    blends = {layer.quantisation_blend.item() for _, layer in quant_linears(model)}
    if len(blends) != 1:
        raise ValueError(f"quantisation blend: expected one value over the quantised linears, got {sorted(blends)}")
    return blends.pop()


def warmup_blend(step: int, warmup_steps: int) -> float:
    """The blend for `step` (from 0): rises linearly and is 1 from step `warmup_steps` on, or at once if that is 0."""
    return 1.0 if step >= warmup_steps else step / warmup_steps
