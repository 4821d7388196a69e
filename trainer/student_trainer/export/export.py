"""Writes a trained student for others to load. Called by `cli.export`, and by scripts: `EXPORTS[format](...)`.

- hf: latent weights, to be trained on or quantised while running; the weights as they are of a student that is not
  quantised, for which this is the only format;
- bitnet: ternary weights, two bits each, which transformers loads with nothing of ours installed;
- gguf: ternary weights, one file for llama.cpp;
- sdar: a block-diffusion student in the form that SGLang serves;
- packed: codes of two bits, four a byte, and their scales, for readers like `packed_reader`;
- dense: what the codes are worth, in full precision, as a model that transformers knows nothing special of.

A quantiser says which of them hold it. An adapter of a quantised student is written beside it, in peft's format.

Each writes a folder that must not exist yet, with a model card, and says in its report whether the files alone give
the student's function. What a format cannot hold is refused by name.
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
