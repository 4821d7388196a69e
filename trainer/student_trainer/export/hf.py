"""A student for transformers: latent weights, or ternary ones in its packed BitNet layout. Two formats of `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from student_trainer.export.bitnet import in_transformers, packed, quantisation_config
from student_trainer.export.card import ModelCard
from student_trainer.export.expression import (
    CannotExpressError,
    express_original,
    latent_weights,
    quantiser_in,
    record_of,
)
from student_trainer.export.folder import ExportReport, check_finished, loading, write_folder
from student_trainer.students.quant_linear import is_quantised

Architecture = Literal["auto", "original"]

_LOAD_HERE = """```python
from student_trainer.students.pretrained import load_quantised

model = load_quantised(FOLDER)
```"""
_COMPILES = (
    "On its first forward pass transformers compiles two small functions of its BitNet layers. On a CPU that needs a "
    "C++ compiler; without one, set `TORCHDYNAMO_DISABLE=1`."
)


def export_hf(
    model: Any, tokenizer: Any, folder: Path, card: ModelCard, *, architecture: Architecture = "auto"
) -> ExportReport:
    """Write the latent weights.

    "auto" writes a model that transformers quantises while it runs, if there is one that computes the same. Otherwise,
    and with "original", the weights have the names of the original architecture, with SubLN beside them. transformers
    loads these too, but as the unquantised model without SubLN, which is a different function: report and card say so.
    `tokenizer` may be None. ValueError if the warm-up has not ended or the folder exists.
    """
    if not is_quantised(model):
        return write_folder(model, tokenizer, folder, card, express_original(model), latent_weights(model),
                            report=("hf", True, ()), what="Weights in full precision.",
                            loading=loading(model))  # fmt: skip
    check_finished(model, "hf")
    notes: tuple[str, ...] = ()
    try:
        if "bitnet" not in quantiser_in(model).exports:
            raise CannotExpressError("transformers", [f"it has no quantiser {quantiser_in(model).name}"])
        if architecture == "original":
            raise CannotExpressError("the original architecture", ["it has no quantisers (--architecture original)"])
        expression, stands_alone = in_transformers(model), True
        expression.config.quantization_config = quantisation_config(model.config, mode="online")
    except CannotExpressError as error:
        expression, stands_alone = express_original(model), False
        notes = (_not_the_same(model, error),)
    how = loading(model) if stands_alone else _LOAD_HERE
    what = "Latent weights in full precision; the quantised ones are computed from them in each forward pass."
    notes = (*notes, _COMPILES) if stands_alone else notes
    return write_folder(model, tokenizer, folder, card, expression, expression.weights,
                        report=("hf", stands_alone, notes), what=what, loading=how)  # fmt: skip


def export_bitnet(model: Any, tokenizer: Any, folder: Path, card: ModelCard) -> ExportReport:
    """Write packed ternary weights, four per byte, which transformers loads and runs directly to the same logits.

    CannotExpressError (a ValueError) names what transformers' BitNet lacks: with SubLN before the outputs, QK-norm,
    biases or other head widths; in any case biases, output widths that 4 does not divide, unquantised activations.
    """
    check_finished(model, "bitnet")
    try:
        expression = in_transformers(model)
        tensors = packed(expression)
    except CannotExpressError as error:
        raise CannotExpressError(error.target, [*error.reasons, "use --format hf"]) from None
    expression.config.quantization_config = quantisation_config(model.config, mode="offline")
    what = (
        "Ternary weights in transformers' packed BitNet layout: four to a byte and one scale per tensor. Not trainable."
    )
    return write_folder(model, tokenizer, folder, card, expression, tensors,
                        report=("bitnet", True, (_COMPILES,)), what=what, loading=loading(model))  # fmt: skip


def _not_the_same(model: Any, error: CannotExpressError) -> str:
    record = record_of(model)
    return (
        f"transformers alone loads these latent weights as a plain {model.config.model_type} model in full precision "
        f"and leaves out its quantisation (sub_norm '{record.sub_norm}', quantisers): its outputs are not this "
        f"model's. Load it as above. Reason: {error}."
    )
