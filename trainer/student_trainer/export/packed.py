"""Codes of two bits, four per byte, with their scales: writing and loading this format of `export`.

    packed.safetensors    NAME.codes   uint8 [..., ceil(I / 4)], code j of a row in bits 2 (j mod 4) of byte j // 4
                          NAME.scales  float32, the scales of the codes
    config.json           `student_quantisation` names the quantiser; `student_packing` the width of each NAME's codes

Tensors that are not quantised are stored unchanged. seq2 stores codes [O, I] and a scale per row: (code - 1.5) scale.
fairy2i stores codes k of i^k, [stages, 2, O/2, I/2] for U and W, and scales [stages, 2, 2] of their real and imaginary
parts. `packed_reader` reads the files with only numpy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student_trainer.export.card import ModelCard
from student_trainer.export.expression import express_original
from student_trainer.export.folder import ExportReport, check_finished, write_folder
from student_trainer.export.packed_reader import CODES, PACKING, SCALES, STEM, VERSION, files_of
from student_trainer.students.adapters.low_rank import FOLDER, put_corrections, read_peft
from student_trainer.students.quant_linear import quant_linears, quantise_as, quantiser_of
from student_trainer.students.quantisers import QUANTISERS
from student_trainer.students.quantisers.record import read_record

FILE_PATTERN = STEM + "{suffix}.safetensors"
_LOAD_PACKED = """```python
from student_trainer.export.packed import load_packed

model = load_packed(FOLDER)
```

`student_trainer.export.packed_reader.read_packed(FOLDER)` reads the weights with numpy alone."""


def export_packed(model: Any, tokenizer: Any, folder: Path, card: ModelCard) -> ExportReport:
    """Write codes of two bits and their scales, four codes per byte along the input; `load_packed` opens them."""
    check_finished(model, "packed")
    expression = express_original(model)
    tensors, entry = packed_weights(model, expression.weights)
    setattr(expression.config, PACKING, entry)
    what = "Two-bit codes, four to a byte, and their scales; everything else in full precision. Not trainable."
    note = (
        "transformers alone finds no weights here: reading them takes code that knows the format, such as "
        "student_trainer.export.packed."
    )
    return write_folder(model, tokenizer, folder, card, expression, tensors, report=("packed", False, (note,)),
                        what=what, loading=_LOAD_PACKED, pattern=FILE_PATTERN)  # fmt: skip


def pack(codes: Tensor) -> Tensor:
    """Pack codes 0 to 3 [..., I], four per byte, into [..., ceil(I / 4)]; zeros fill the last byte."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4))
    # Four codes of two bits at bits 0, 2, 4 and 6 do not overlap, so their sum is their bitwise or.
    return (padded << _shifts(codes)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack`: codes [..., width]."""
    return ((packed[..., None] >> _shifts(packed)) & 3).flatten(-2)[..., :width]


def _shifts(like: Tensor) -> Tensor:
    return torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=like.device)


@torch.no_grad()
def packed_weights(model: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`weights`, the model's state, with codes and scales in place of the quantised weights; and the config's entry."""
    tensors, widths = dict(weights), {}
    for name, layer in quant_linears(model):
        quantiser = quantiser_of(layer)
        codes, scales = quantiser.encode(layer)
        for learnt in ("weight", *quantiser.row_scales):
            del tensors[f"{name}.{learnt}"]
        tensors[f"{name}.weight{CODES}"], tensors[f"{name}.weight{SCALES}"] = pack(codes), scales.contiguous()
        widths[f"{name}.weight"] = codes.shape[-1]
    # `packed_reader` uses numpy, which has no bfloat16.
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    return wide, {"version": VERSION, "widths": widths}


def load_packed(folder: Path | str) -> Any:
    """The model of a packed export, in float32, with the dequantised weights. Not trainable, since the latent weights
    are gone. ValueError if the folder holds no packed export.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    packing, record = getattr(config, PACKING, None), read_record(config, str(folder))
    if packing is None or record is None or packing["version"] != VERSION:
        raise ValueError(f"{folder} holds no packed student of version {VERSION}: its config has no such {PACKING}")
    delattr(config, PACKING)
    quantiser = QUANTISERS[record.quantiser].of(record)
    weights: dict[str, Tensor] = {}
    for file in files_of(folder):
        weights |= load_file(file)
    for name, width in packing["widths"].items():
        codes = unpack(weights.pop(name + CODES), width)
        weights[name] = quantiser.decode(codes, weights.pop(name + SCALES))
    classes = config.architectures[0].endswith("ForSequenceClassification")
    factory = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    # SubLN and activation rounding stay as recorded; the weights are already quantised.
    quantise_as(model, replace(record, quantiser="none", stages=None))
    outcome = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [name for name in outcome.missing_keys if not name.endswith("quantisation_blend") and name not in tied]
    if missing or outcome.unexpected_keys:
        raise ValueError(f"{folder}: {(missing or outcome.unexpected_keys)[0]} does not fit the model")
    put_corrections(model, read_peft(folder / FOLDER))
    return model.requires_grad_(False).eval()
