"""Writes a trained student in one of several formats. Called by `cli.export`, and by scripts: `EXPORTS[format](...)`.

- hf: latent weights, to train further or to quantise while running; for a student that is not quantised, its weights;
- bitnet: ternary weights, two bits each, which transformers loads without any of our packages;
- gguf: ternary weights, one file for llama.cpp;
- sdar: a block-diffusion student in the form that SGLang serves;
- packed: codes of two bits, four per byte, with their scales, for readers like `packed_reader`;
- dense: dequantised weights in full precision, as a model that needs no special support in transformers.

A quantiser lists the formats that can hold it. An adapter of a quantised student is written beside it, in peft's
format.

Each writes a new folder with a model card, and reports whether the files alone reproduce the student's function. What
a format cannot hold is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from student_trainer.export.dense import export_dense
from student_trainer.export.folder import ExportReport
from student_trainer.export.gguf import export_gguf
from student_trainer.export.hf import export_bitnet, export_hf
from student_trainer.export.packed import export_packed
from student_trainer.export.sdar import export_sdar

EXPORTS: Mapping[str, Callable[..., ExportReport]] = {
    "hf": export_hf, "bitnet": export_bitnet, "gguf": export_gguf, "sdar": export_sdar,
    "packed": export_packed, "dense": export_dense,
}  # fmt: skip
