"""What makes a causal checkpoint a block-diffusion model: an entry in its config, and a mask token. Called by
`diffusion`, by `load`, which recognises such a checkpoint by the entry, and by `export`, which keeps it.

The entry `diffusion` says how the model is to be read, by whoever trains it further or decodes with it. How it is
trained (masks, loss weights) is not part of it.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from student_trainer.settings.student import DiffusionSettings

Family = Literal["in_place", "token_shift"]
CleanHalf = Literal["block_causal", "causal"]

ENTRY = "diffusion"
VERSION = 1
LARGEST_BLOCK = 64
NEW_MODEL: dict[str, Any] = {"block_size": 16, "family": "in_place", "clean_half": "block_causal"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DiffusionRecord:
    """`mask_token_id`: the row of the embeddings that stands for a masked token. `family`: token t is predicted by row
    t (in_place) or by row t - 1 (token_shift). `clean_half`: whether a clean token sees its whole block, or only up to
    itself. ValueError for invalid values.
    """

    block_size: int
    mask_token_id: int
    family: Family
    clean_half: CleanHalf

    def __post_init__(self) -> None:
        for name, least, most in (("block_size", 1, LARGEST_BLOCK), ("mask_token_id", 0, None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value > most):
                limits = f"from {least} to {most}" if most else f"of at least {least}"
                raise ValueError(f"{name}: got {value!r}, expected a whole number {limits}")
        for name, known in (("family", get_args(Family)), ("clean_half", get_args(CleanHalf))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {' or '.join(map(repr, known))}")


def read_diffusion(config: Any, path: str = "") -> DiffusionRecord | None:
    """The record in a model's config, None if it is not a diffusion model. ValueError for one that can't be read."""
    entry = getattr(config, ENTRY, None)
    if entry is None:
        return None
    where = f"{path}: its config's entry {ENTRY}" if path else f"the config's entry {ENTRY}"
    try:
        fields = dict(entry)
        if (version := fields.pop("version", None)) != VERSION:
            raise ValueError(f"got version {version}, this trainer reads {VERSION}: use the trainer that wrote it")
        return DiffusionRecord(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from None


def write_diffusion(config: Any, record: DiffusionRecord) -> None:
    """Write it into the config, in place of an earlier entry."""
    setattr(config, ENTRY, {"version": VERSION, **asdict(record)})


def text_rows(config: Any, rows: int) -> int:
    """How many of a head's `rows` may be tokens of a text: all but a mask token that was added after them."""
    record = read_diffusion(config)
    # A mask token that was added is the last row.
    return rows - 1 if record is not None and record.mask_token_id == rows - 1 else rows


def convert(model: Any, wanted: DiffusionSettings) -> DiffusionRecord:
    """Make the model a block-diffusion model or, if it is one, check it against the settings. Sets its config's entry.

    A new mask token comes right after the vocabulary, whose ids and rows stay as they are; its embedding, and its row
    of an untied head, are the mean of all other rows. ValueError for a mask token that leaves a gap, and for a family
    or mask token other than the checkpoint was trained with.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    named = {name: getattr(wanted, name) for name in ("block_size", "family", "clean_half", "mask_token_id")}
    given = {name: value for name, value in named.items() if value is not None}
    record = read_diffusion(model.config)
    if record is not None:
        record = _gone_on_with(record, given, rows)
    else:
        record = DiffusionRecord(**{**NEW_MODEL, "mask_token_id": rows, **given})
        _make_mask_token(model, record.mask_token_id, rows, keep=wanted.mask_embedding == "keep")
    write_diffusion(model.config, record)
    return record


def _gone_on_with(record: DiffusionRecord, given: dict[str, Any], rows: int) -> DiffusionRecord:
    """The record of a checkpoint that is a diffusion model: block size and clean half may change, what its rows mean
    may not.
    """
    for name in ("family", "mask_token_id"):
        if name in given and given[name] != getattr(record, name):
            raise ValueError(
                f"student.diffusion.{name} is {given[name]}, but the checkpoint was trained with "
                f"{getattr(record, name)}: leave it out"
            )
    if record.mask_token_id >= rows:
        raise ValueError(
            f"the checkpoint's mask token is {record.mask_token_id}, but it has embeddings of {rows} tokens only: "
            "its config and weights are from different models"
        )
    for name in ("block_size", "clean_half"):
        if name in given and given[name] != getattr(record, name):
            log.warning("the checkpoint was trained with %s %s, now using %s", name, getattr(record, name), given[name])
    return replace(record, **given)


@torch.no_grad()
def _make_mask_token(model: Any, mask: int, rows: int, keep: bool) -> None:
    if mask > rows:
        raise ValueError(
            f"student.diffusion.mask_token_id is {mask}, but the model has embeddings of {rows} tokens, 0 to "
            f"{rows - 1}: leave it out to add token {rows}, or choose a row that no text uses"
        )
    if mask == rows:
        if keep:
            raise ValueError(
                f"student.diffusion.mask_embedding is keep, but the mask token {mask} has no embedding yet: leave it "
                "out"
            )
        trained = [module.weight.requires_grad for module in _embeddings(model)]
        # Not with transformers' `mean_resizing`, which draws at random around the mean.
        model.resize_token_embeddings(rows + 1, mean_resizing=False)
        for module, requires in zip(_embeddings(model), trained, strict=True):
            module.weight.requires_grad_(requires)
    if not keep:
        for module in _embeddings(model):
            _fill_with_mean(module.weight, mask)
            if getattr(module, "bias", None) is not None:
                _fill_with_mean(module.bias, mask)


def _embeddings(model: Any) -> list[Any]:
    """The embeddings, and the head if it is untied."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return [inputs] if outputs is None or outputs.weight is inputs.weight else [inputs, outputs]


def _fill_with_mean(rows_V: Tensor, mask: int) -> None:
    """The mean of all other rows, summed in float64: a random row would be an outlier to quantised activations."""
    others = rows_V.double().sum(0) - rows_V[mask].double()
    rows_V[mask] = (others / (len(rows_V) - 1)).to(rows_V.dtype)
