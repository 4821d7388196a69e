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

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from student_trainer.export.bitnet import (
    CannotExpressError,
    Expression,
    express,
    in_transformers,
    latent_weights,
    packed,
    quantisation_config,
    record_of,
)
from student_trainer.export.bits import bits_a_weight
from student_trainer.export.card import ModelCard, write_card
from student_trainer.export.dense import dense_weights
from student_trainer.export.gguf import TernaryType, write_gguf
from student_trainer.export.mask_token import with_mask_token
from student_trainer.export.packed import FILE_PATTERN, packed_weights
from student_trainer.export.packed_reader import PACKING
from student_trainer.export.sdar import SAMPLER_FILE, check_sdar, write_sdar
from student_trainer.students.adapters.low_rank import FOLDER, corrections, write_peft
from student_trainer.students.diffusion_record import read_diffusion
from student_trainer.students.quant_linear import is_quantised, quant_linears, quantisation_blend, quantiser_of
from student_trainer.students.quantisers.none import NONE
from student_trainer.students.quantisers.quantiser import Quantiser

Architecture = Literal["auto", "original"]
Placed = Literal["merged", "beside"]  # where a dense model has what an adapter adds


@dataclass(frozen=True)
class ExportReport:
    """What was written. `stands_alone`: others' software computes the student's function from these files alone."""

    format: str
    folder: Path
    architecture: str
    stands_alone: bool
    num_bytes: int
    notes: tuple[str, ...] = ()


_LOAD_HERE = """```python
from student_trainer.students.pretrained import load_quantised

model = load_quantised(FOLDER)
```"""
_LOAD_PACKED = """```python
from student_trainer.export.packed import load_packed

model = load_packed(FOLDER)
```

`student_trainer.export.packed_reader.read_packed(FOLDER)` gives the weights with numpy alone."""
_LOAD_TRANSFORMERS = """```python
from transformers import {factory}

model = {factory}.from_pretrained(FOLDER)
```

Needs transformers >= 5.16 and accelerate, and nothing else."""
_LOAD_ADAPTED = """```python
from peft import PeftModel
from transformers import {factory}

model = PeftModel.from_pretrained({factory}.from_pretrained(FOLDER), FOLDER + "/adapter")
```

Needs transformers >= 5.16, accelerate and peft, and nothing else."""
_BESIDE = (
    "What an adapter adds to this student is in the folder adapter, in full precision and in peft's format: added into "
    "the quantised weights it would change their codes. Without it the base is another model."
)
_BLOCKS = (
    "A block-diffusion student: the entry diffusion of its config says its blocks, its mask token and which row "
    "predicts a token. transformers alone computes its weights from left to right and fills in no blocks: "
    "`stillhouse-train generate` decodes with it, student.architecture=diffusion trains it on."
)
_SERVE_SDAR = """```sh
python -m sglang.launch_server --model-path FOLDER --trust-remote-code --dllm-algorithm LowConfidence \\
    --dllm-algorithm-config FOLDER/{file} --max-running-requests 16
```

`--trust-remote-code` is for `configuration_sdar.py` of this folder. One GPU: no pipeline parallelism, no LoRA. Without
`--max-running-requests` it serves one request at a time, and whatever temperature is asked for, it is greedy."""
_SDAR_NOTE = (
    "The files are held to SDAR's form as SGLang 0.5.23 reads it; they have not been served by SGLang here. In "
    "transformers, `trust_remote_code` takes `modeling_sdar.py`: passes over whole texts, without generation."
)
_COMPILES = (
    "On its first forward pass transformers compiles two small functions of its BitNet layers. On a CPU that takes a "
    "C++ compiler; without one, set `TORCHDYNAMO_DISABLE=1`."
)


def export_hf(
    model: Any, tokenizer: Any, folder: Path, card: ModelCard, *, architecture: Architecture = "auto"
) -> ExportReport:
    """Write the latent weights.

    "auto" writes them as a model that transformers quantises while it runs, where it has one that computes the same;
    else, and with "original", under the names of the original architecture with SubLN beside them. Then transformers
    loads them too, but as the unquantised model without SubLN, which is another function: report and card say so.
    `tokenizer` may be None. Raises ValueError if the warm-up has not ended or the folder exists.
    """
    if not is_quantised(model):
        return _write_folder(model, tokenizer, folder, card, _original(model), latent_weights(model),
                             report=("hf", True, ()), what="Weights in full precision.",
                             loading=_loading(model))  # fmt: skip
    _check_finished(model, "hf")
    notes: tuple[str, ...] = ()
    try:
        if "bitnet" not in quantiser_in(model).exports:
            raise CannotExpressError("transformers", [f"it has no quantiser {quantiser_in(model).name}"])
        if architecture == "original":
            raise CannotExpressError("the original architecture", ["it was asked for"])
        expression, stands_alone = in_transformers(model), True
        expression.config.quantization_config = quantisation_config(model.config, mode="online")
    except CannotExpressError as error:
        expression, stands_alone = _original(model), False
        notes = (_not_the_same(model, error),)
    loading = _loading(model) if stands_alone else _LOAD_HERE
    what = "Latent weights in full precision; the quantised ones are computed from them in each forward pass."
    notes = (*notes, _COMPILES) if stands_alone else notes
    return _write_folder(model, tokenizer, folder, card, expression, expression.weights,
                         report=("hf", stands_alone, notes), what=what, loading=loading)  # fmt: skip


def export_bitnet(model: Any, tokenizer: Any, folder: Path, card: ModelCard) -> ExportReport:
    """Write packed ternary weights, four a byte, that transformers loads as they are and runs to the same logits.

    Raises CannotExpressError (a ValueError) naming what transformers' BitNet has no place for: QK-norm, biases or
    head widths with SubLN before the outputs, any bias or odd output width, unquantised activations.
    """
    _check_finished(model, "bitnet")
    try:
        expression = in_transformers(model)
        tensors = packed(expression)
    except CannotExpressError as error:
        raise CannotExpressError(error.target, [*error.reasons, "use --format hf"]) from None
    expression.config.quantization_config = quantisation_config(model.config, mode="offline")
    what = (
        "Ternary weights in transformers' packed BitNet layout: four to a byte and one scale a tensor. Not trainable."
    )
    return _write_folder(model, tokenizer, folder, card, expression, tensors,
                         report=("bitnet", True, (_COMPILES,)), what=what, loading=_loading(model))  # fmt: skip


def export_gguf(
    model: Any, tokenizer: Any, folder: Path, card: ModelCard, *, ternary_type: TernaryType = "TQ2_0"
) -> ExportReport:
    """Write `<card name>.gguf` of llama.cpp's bitnet architecture, read back and compared tensor by tensor.

    `tokenizer` None writes no vocabulary: such a file takes and gives token ids alone. Raises CannotExpressError for
    what the architecture has no place for, and ValueError for a tokenizer that GGUF has no name for.
    """
    _check_finished(model, "gguf")
    if read_diffusion(model.config) is not None:
        raise CannotExpressError("llama.cpp's bitnet architecture", ["it reads from left to right, not by blocks"])
    file_name = f"{card.name.replace('/', '--')}.gguf"
    with _fresh_folder(folder) as unfinished:
        types = write_gguf(model, tokenizer, unfinished / file_name, card.name, ternary_type=ternary_type)
        notes = _gguf_notes(types)
        what = "One GGUF file: ternary matrices, full-precision norms, 16-bit embeddings. Tensor types: " + ", ".join(
            f"{count} {kind}" for kind, count in sorted(types.items())
        )
        loading = f"```\nllama-cli -m {file_name} -p 'Once upon a time'\n```"
        write_card(card, unfinished / "README.md", library="gguf", what=what + ".", loading=loading, notes=notes,
                   quantiser=quantiser_in(model), bits=bits_a_weight(model))  # fmt: skip
    return ExportReport("gguf", folder, "bitnet", True, _size(folder), notes)


def export_sdar(model: Any, tokenizer: Any, folder: Path, card: ModelCard) -> ExportReport:
    """Write a block-diffusion student in SDAR's form. Raises CannotExpressError with every reason why it can't be."""
    record = check_sdar(model, tokenizer)
    with _fresh_folder(folder) as unfinished:
        write_sdar(model, tokenizer, unfinished, record)
        what = "A block-diffusion model in SDAR's form: Qwen3's weights, which fill in masked tokens block by block."
        write_card(card, unfinished / "README.md", library="transformers", what=what,
                   loading=_SERVE_SDAR.format(file=SAMPLER_FILE), notes=(_SDAR_NOTE,), quantiser=NONE,
                   bits=None)  # fmt: skip
    return ExportReport("sdar", folder, "SDARForCausalLM", True, _size(folder), (_SDAR_NOTE,))


def export_packed(model: Any, tokenizer: Any, folder: Path, card: ModelCard) -> ExportReport:
    """Write codes of two bits and their scales, four codes a byte along the input; `load_packed` opens them."""
    _check_finished(model, "packed")
    expression = _original(model)
    tensors, entry = packed_weights(model, expression.weights)
    setattr(expression.config, PACKING, entry)
    what = "Codes of two bits, four a byte, and what they are worth; all else in full precision. Not trainable."
    note = (
        "transformers alone finds no weights here: a reader must know the codes, as student_trainer.export.packed does."
    )
    return _write_folder(model, tokenizer, folder, card, expression, tensors, report=("packed", False, (note,)),
                         what=what, loading=_LOAD_PACKED, pattern=FILE_PATTERN)  # fmt: skip


def export_dense(
    model: Any, tokenizer: Any, folder: Path, card: ModelCard, *, adapter: Placed = "merged"
) -> ExportReport:
    """Write what the codes are worth in full precision, for whatever loads the original model; adapters are added in,
    or written "beside" it for peft.

    Raises CannotExpressError naming what a plain model lacks: SubLN, rounded activations.
    """
    _check_finished(model, "dense")
    config, weights = dense_weights(model, merged=adapter == "merged")
    added = {} if adapter == "merged" else corrections(model)
    what = "What the quantised weights are worth, in full precision: the student's answers, at a plain model's size."
    loading = (_LOAD_ADAPTED if added else _LOAD_TRANSFORMERS).format(factory=_factory(model))
    return _write_folder(model, tokenizer, folder, card, express(model, config, weights, added), weights,
                         report=("dense", True, ()), what=what, loading=loading)  # fmt: skip


EXPORTS: Mapping[str, Callable[..., ExportReport]] = {
    "hf": export_hf, "bitnet": export_bitnet, "gguf": export_gguf, "sdar": export_sdar,
    "packed": export_packed, "dense": export_dense,
}  # fmt: skip


def quantiser_in(model: Any) -> Quantiser:
    """The quantiser of a model's decoder: one for all its layers."""
    return next((quantiser_of(layer) for _, layer in quant_linears(model)), NONE)


def _check_finished(model: Any, form: str) -> None:
    quantiser = quantiser_in(model)
    if form not in quantiser.exports:
        raise ValueError(
            f"format {form} can't hold this student (student.quantiser is {quantiser.name}): use --format "
            f"{' or '.join(sorted(quantiser.exports))}"
        )
    blend = quantisation_blend(model)
    if blend != 1.0:
        raise ValueError(f"the quantisation warm-up stands at {blend:.3f}: export after it has reached 1")


def _loading(model: Any) -> str:
    return (_LOAD_ADAPTED if corrections(model) else _LOAD_TRANSFORMERS).format(factory=_factory(model))


def _factory(model: Any) -> str:
    classes = type(model).__name__.endswith("ForSequenceClassification")
    return "AutoModelForSequenceClassification" if classes else "AutoModelForCausalLM"


def _original(model: Any) -> Expression:
    config = type(model.config).from_dict(model.config.to_dict())
    return express(model, config, latent_weights(model), corrections(model))


def _not_the_same(model: Any, error: CannotExpressError) -> str:
    record = record_of(model)
    return (
        f"transformers alone loads these latent weights as a plain {model.config.model_type} model in full precision "
        f"and leaves out what made it a student (sub_norm '{record.sub_norm}', quantisers): its answers are not "
        f"this model's. Load it as above. Why: {error}."
    )


def _gguf_notes(types: Mapping[str, int]) -> tuple[str, ...]:
    notes = ["llama.cpp rounds activations in blocks, the student per token: logits agree to that rounding."]
    if types.get("Q4_0"):
        notes.append(
            f"{types['Q4_0']} matrices have an input width that TQ blocks of 256 do not divide; they are Q4_0 blocks "
            "that hold the same three values exactly, at 4.5 bits."
        )
    return tuple(notes)


def _write_folder(
    model: Any, tokenizer: Any, folder: Path, card: ModelCard, expression: Expression, tensors: dict[str, Tensor], *,
    report: tuple[str, bool, tuple[str, ...]], what: str, loading: str, pattern: str = "model{suffix}.safetensors",
) -> ExportReport:  # fmt: skip
    from huggingface_hub import save_torch_state_dict

    kind, stands_alone, notes = report
    config = expression.config
    if (record := read_diffusion(config)) is not None:
        notes = (_BLOCKS, *notes)
        if tokenizer is not None:
            tokenizer, why = with_mask_token(tokenizer, record.mask_token_id)
            notes = (*notes, f"Its tokenizer does not name the mask token: {why}.") if why else notes
    architecture = type(model).__name__ if config.model_type == model.config.model_type else "BitNetForCausalLM"
    config.architectures, config.dtype = [architecture], model.dtype
    with _fresh_folder(folder) as unfinished:
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
            notes = (_BESIDE, *notes)
        write_card(card, unfinished / "README.md", library="transformers", what=what, loading=loading, notes=notes,
                   quantiser=quantiser_in(model), bits=bits_a_weight(model))  # fmt: skip
    return ExportReport(kind, folder, architecture, stands_alone, _size(folder), notes)


@contextmanager
def _fresh_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name once the block has written everything, and is gone if it fails."""
    if folder.exists():
        raise ValueError(f"{folder} exists already: give a folder that does not, an export never writes over another")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
