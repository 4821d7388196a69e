"""Writes a folder in Hugging Face's form with its model card, for the formats `hf`, `dense` and `packed`; `gguf` and
`sdar` use its atomic `fresh_folder`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from student_trainer.export.bits import bits_a_weight
from student_trainer.export.card import ModelCard, write_card
from student_trainer.export.expression import Expression, quantiser_in
from student_trainer.export.mask_token import with_mask_token
from student_trainer.students.adapters.low_rank import FOLDER, corrections, write_peft
from student_trainer.students.diffusion_record import read_diffusion
from student_trainer.students.quant_linear import quantisation_blend

LOAD_TRANSFORMERS = """```python
from transformers import {factory}

model = {factory}.from_pretrained(FOLDER)
```

Needs transformers >= 5.16 and accelerate, and nothing else."""
LOAD_ADAPTED = """```python
from peft import PeftModel
from transformers import {factory}

model = PeftModel.from_pretrained({factory}.from_pretrained(FOLDER), FOLDER + "/adapter")
```

Needs transformers >= 5.16, accelerate and peft, and nothing else."""
BESIDE = (
    "This student's adapter is in the folder adapter, in full precision and in peft's format: merged into the "
    "quantised weights it would change their codes. Without it the base is a different model."
)
BLOCKS = (
    "A block-diffusion student: the entry diffusion of its config holds its block size, its mask token and which row "
    "predicts a token. transformers alone runs its weights from left to right and does not decode blocks: use "
    "`stillhouse-train generate` to decode, and student.architecture=diffusion to continue training."
)


@dataclass(frozen=True)
class ExportReport:
    """What was written. `stands_alone`: third-party software computes the student's function from these files alone."""

    format: str
    folder: Path
    architecture: str
    stands_alone: bool
    num_bytes: int
    notes: tuple[str, ...] = ()


def check_finished(model: Any, form: str) -> None:
    """ValueError unless the format can hold this student's quantiser, and its warm-up has ended."""
    quantiser = quantiser_in(model)
    if form not in quantiser.exports:
        raise ValueError(
            f"format {form} can't hold this student (student.quantiser is {quantiser.name}): use --format "
            f"{' or '.join(sorted(quantiser.exports))}"
        )
    blend = quantisation_blend(model)
    if blend != 1.0:
        raise ValueError(f"the quantisation warm-up is at {blend:.3f}: export once it has reached 1")


def write_folder(
    model: Any, tokenizer: Any, folder: Path, card: ModelCard, expression: Expression, tensors: dict[str, Tensor], *,
    report: tuple[str, bool, tuple[str, ...]], what: str, loading: str, pattern: str = "model{suffix}.safetensors",
) -> ExportReport:  # fmt: skip
    """Write config, weights, tokenizer, adapter and card. `report`: format, whether it stands alone, notes."""
    from huggingface_hub import save_torch_state_dict

    kind, stands_alone, notes = report
    config = expression.config
    if (record := read_diffusion(config)) is not None:
        notes = (BLOCKS, *notes)
        if tokenizer is not None:
            tokenizer, why = with_mask_token(tokenizer, record.mask_token_id)
            notes = (*notes, f"Its tokenizer does not name the mask token: {why}.") if why else notes
    architecture = type(model).__name__ if config.model_type == model.config.model_type else "BitNetForCausalLM"
    config.architectures, config.dtype = [architecture], model.dtype
    with fresh_folder(folder) as unfinished:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_torch_state_dict(contiguous, unfinished, filename_pattern=pattern)
        config.save_pretrained(unfinished)
        if model.can_generate():
            model.generation_config.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        if expression.corrections:
            (unfinished / FOLDER).mkdir()
            write_peft(expression.corrections, unfinished / FOLDER)
            notes = (BESIDE, *notes)
        write_card(card, unfinished / "README.md", library="transformers", what=what, loading=loading, notes=notes,
                   quantiser=quantiser_in(model), bits=bits_a_weight(model))  # fmt: skip
    return ExportReport(kind, folder, architecture, stands_alone, size_of(folder), notes)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it at the end of the block, or removed if the block fails."""
    if folder.exists():
        raise ValueError(f"{folder} already exists, and an export never overwrites another: choose a new folder")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def loading(model: Any) -> str:
    """Instructions for loading what `write_folder` wrote with transformers, and with peft if there is an adapter."""
    return (LOAD_ADAPTED if corrections(model) else LOAD_TRANSFORMERS).format(factory=factory_of(model))


def factory_of(model: Any) -> str:
    """The Auto class of transformers that opens the model."""
    classes = type(model).__name__.endswith("ForSequenceClassification")
    return "AutoModelForSequenceClassification" if classes else "AutoModelForCausalLM"


def size_of(folder: Path) -> int:
    """The total size of all files in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
