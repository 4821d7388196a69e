"""A student in third-party terms, as a config and weights by name, and the error if it can't be expressed. Used by
every format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from student_trainer.students.adapters.low_rank import Correction, corrections
from student_trainer.students.quant_linear import BLEND, quant_linears, quantiser_of
from student_trainer.students.quantisers.none import NONE
from student_trainer.students.quantisers.quantiser import Quantiser
from student_trainer.students.quantisers.record import Record, read_record


@dataclass(frozen=True)
class Expression:
    """A student as transformers would hold it: config, latent weights by name, and the names of quantised weights.
    `corrections`: those of adapters, by the layer's name. `codes`: computes a quantised weight's codes and scale.
    """

    config: Any
    weights: dict[str, Tensor]
    ternary_names: tuple[str, ...]
    corrections: dict[str, Correction]
    codes: Callable[[Tensor], tuple[Tensor, Tensor]]


class CannotExpressError(ValueError):
    """The target software has no model that computes this; `reasons` names each part that it lacks."""

    def __init__(self, target: str, reasons: list[str]) -> None:
        super().__init__(f"{target} cannot express this student: {'; '.join(reasons)}")
        self.target, self.reasons = target, reasons


def latent_weights(model: Any) -> dict[str, Tensor]:
    """The state dict without what only training needs, without adapters, and without copies of tied tensors."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if not name.endswith(f".{BLEND}")
        and ".correction." not in name
        and not (model.config.tie_word_embeddings and name in tied)
    }


def record_of(model: Any) -> Record:
    """The record of how a quantised model is quantised."""
    record = read_record(model.config)
    assert record is not None, "a quantised model has its record"
    return record


def express(model: Any, config: Any, weights: dict[str, Tensor], added: dict[str, Correction]) -> Expression:
    """The model's layers with the given config, weights and corrections."""
    layers = dict(quant_linears(model))
    quantiser = quantiser_of(next(iter(layers.values()))) if layers else NONE
    return Expression(config, weights, tuple(f"{name}.weight" for name in layers), added, quantiser.codes)


def express_original(model: Any) -> Expression:
    """The model's latent weights under its own architecture."""
    config = type(model.config).from_dict(model.config.to_dict())
    return express(model, config, latent_weights(model), corrections(model))


def quantiser_in(model: Any) -> Quantiser:
    """The quantiser of a model's decoder, which all its layers share."""
    return next((quantiser_of(layer) for _, layer in quant_linears(model)), NONE)
