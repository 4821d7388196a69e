"""A quantised student as a plain model in full precision, with its dequantised weights. A format of `export`.

It saves no memory, but software without support for the codes computes the student's own outputs. An adapter is merged
into the weights, or written beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from student_trainer.export.card import ModelCard
from student_trainer.export.expression import CannotExpressError, express, latent_weights, record_of
from student_trainer.export.folder import (
    LOAD_ADAPTED,
    LOAD_TRANSFORMERS,
    ExportReport,
    check_finished,
    factory_of,
    write_folder,
)
from student_trainer.students.adapters.low_rank import corrections
from student_trainer.students.quant_linear import quant_linears, quantiser_of
from student_trainer.students.quantisers.record import ENTRY

Placed = Literal["merged", "beside"]  # where the adapter goes


def export_dense(
    model: Any, tokenizer: Any, folder: Path, card: ModelCard, *, adapter: Placed = "merged"
) -> ExportReport:
    """Write the dequantised weights in full precision, for anything that loads the original model; adapters are merged,
    or written "beside" it for peft.

    CannotExpressError names what a plain model lacks: SubLN, rounded activations.
    """
    check_finished(model, "dense")
    config, weights = dense_weights(model, merged=adapter == "merged")
    added = {} if adapter == "merged" else corrections(model)
    what = "The values of the quantised weights, in full precision: the student's outputs, at a plain model's size."
    loading = (LOAD_ADAPTED if added else LOAD_TRANSFORMERS).format(factory=factory_of(model))
    return write_folder(model, tokenizer, folder, card, express(model, config, weights, added), weights,
                        report=("dense", True, ()), what=what, loading=loading)  # fmt: skip


@torch.no_grad()
def dense_weights(model: Any, merged: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """The original architecture's config, and its weights by name. CannotExpressError if the student has what a plain
    model lacks: SubLN, or rounded inputs. `merged`: with adapters merged into the weights.
    """
    record = record_of(model)
    reasons = [] if record.sub_norm == "none" else [f"the student has SubLN (sub_norm '{record.sub_norm}')"]
    if record.activations != "none":
        reasons.append(f"its activations are rounded to {record.activations}, a plain model's are not")
    if model.config.model_type == "bitnet":
        reasons.append("transformers' BitNet architecture has SubLN built in")
    if reasons:
        raise CannotExpressError("a plain model", [*reasons, "use --format hf"])
    config, weights, added = (
        type(model.config).from_dict(model.config.to_dict()),
        latent_weights(model),
        corrections(model) if merged else {},
    )
    if hasattr(config, ENTRY):
        delattr(config, ENTRY)
    for name, layer in quant_linears(model):
        for learnt in quantiser_of(layer).row_scales:
            del weights[f"{name}.{learnt}"]
        weight_OI = quantiser_of(layer).weight(layer, torch.ones((), device=layer.weight.device)).detach()
        if (correction := added.get(name)) is not None:
            scale = correction.alpha / len(correction.a_RI)
            # W + (alpha / r) B A: base and correction as one matrix.
            weight_OI = weight_OI + scale * correction.b_OR @ correction.a_RI
        weights[f"{name}.weight"] = weight_OI
    return config, weights
