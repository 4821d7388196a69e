"""Makes a student of any Hugging Face causal language model. Named by `load`.

The decoder runs on packed rows, with attention and positions that stop at document boundaries; the head is passed to
`head_loss` as a weight, so that the logits of a whole batch never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from student_trainer.batch.batch import Batch
from student_trainer.batch.tensors import own_tensor
from student_trainer.batch.view import Attention, CausalDocuments, Reader, View, ViewSeed
from student_trainer.settings import StudentSettings
from student_trainer.students.attention_mask import BLOCK, block_mask, dense_mask
from student_trainer.students.compute import compute_dtype
from student_trainer.students.student import Student

# Layers that carry a state along the row, which would leak from one document into the next.
LEAKING = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid")
HEAD_TOLERANCE = 1e-3


@dataclass(eq=False)
class DecoderBody:
    """The decoder of a Hugging Face model as a function of packed rows.

    `kernel`: "flex" or "sdpa". `window`: how many tokens back attention sees, None for all; by kind of layer if the
    model has several.
    """

    decoder: nn.Module
    kernel: str
    window: dict[str, int | None] | int | None

    def __call__(self, input_ids_BT: Tensor, position_ids_BT: Tensor, attention: Attention) -> Tensor:
        # Rows shorter than a block have no block to skip, and are not worth a compilation.
        flexible = self.kernel == "flex" and input_ids_BT.shape[1] >= BLOCK
        make = block_mask if flexible else dense_mask
        mask: Any
        if isinstance(self.window, dict):
            mask = {kind: make(attention, window) for kind, window in self.window.items()}
        else:
            mask = make(attention, self.window)
        out = self.decoder(input_ids=input_ids_BT, attention_mask=mask, position_ids=position_ids_BT, use_cache=False)
        return out.last_hidden_state

    def extend(self, input_ids_BQ: Tensor, position_ids_BQ: Tensor, sees_BQK: Tensor, cache: Any) -> Tensor:
        """Hidden states [B, Q, D] of the last Q of K places, following those whose keys and values are in `cache`, a
        transformers cache or None, which is extended. Distances in columns are distances in places, in all rows.
        """
        # How many columns a key is behind a query, which a window limits.
        places_K = torch.arange(sees_BQK.shape[2], device=sees_BQK.device)
        back_QK = places_K[-sees_BQK.shape[1] :, None] - places_K[None, :]

        def masked(window: int | None) -> Tensor:
            return (sees_BQK if window is None else sees_BQK & (back_QK < window))[:, None]

        windows = self.window
        mask: Any = {k: masked(w) for k, w in windows.items()} if isinstance(windows, dict) else masked(windows)
        out = self.decoder(
            input_ids=input_ids_BQ, attention_mask=mask, position_ids=position_ids_BQ, past_key_values=cache,
            use_cache=cache is not None,
        )  # fmt: skip
        return out.last_hidden_state


@dataclass(frozen=True)
class CausalReader:
    """Reads text from left to right: row t predicts token t+1, and learns from the teacher's row t."""

    autoregressive: bool = True

    def views(self, batch: Batch, seed: ViewSeed) -> tuple[View, ...]:
        """The batch as it is; nothing is random."""
        row_N, column_N = batch.counted()
        return (
            View(
                input_ids_BT=own_tensor(batch.tokens_BT, torch.int64),
                position_ids_BT=own_tensor(batch.position_ids_BT, torch.int64),
                attention=CausalDocuments(own_tensor(batch.document_ids_BT, torch.int32)),
                rows_N=own_tensor(row_N * batch.tokens_BT.shape[1] + column_N, torch.int64),
                labels_N=own_tensor(batch.tokens_BT[row_N, column_N + 1], torch.int64),
                counted_N=torch.arange(len(row_N)),
            ),
        )


def attention_for(settings: StudentSettings, device: torch.device) -> str:
    """ "flex" or "sdpa": what `settings.attention` means on this device."""
    if settings.attention != "auto":
        return settings.attention
    return "flex" if device.type == "cuda" else "sdpa"


def wrap_causal(model: Any, attention: str, settings: StudentSettings) -> Student:
    """A loaded model as a student that reads from left to right."""
    return wrap_decoder(model, attention, settings, CausalReader())


def wrap_decoder(model: Any, attention: str, settings: StudentSettings, reader: Reader) -> Student:
    """A loaded model as a student with this `reader`. ValueError for layers that leak, or if the logits are not
    head(hidden states).
    """
    _refuse_leaking(model.config)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student = Student(
        model=model,
        body=DecoderBody(model.get_decoder(), attention, _window(model.config)),
        reader=reader,
        head_module=model.get_output_embeddings(),
        head_constants=_head_constants(model.config),
        compute=compute_dtype(settings.compute, model.device),
    )
    model.train()
    check_head(student)
    if settings.compile:
        for layer in decoder_layers(model):
            layer.compile()
    return student


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a decoder, which all have the same base class in transformers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check_head(student: Student) -> None:
    """Compare head(hidden) with the model's own logits on four tokens. ValueError if the architecture does more."""
    device = student.device
    tokens_BT = torch.arange(4, device=device)[None] % student.vocab_size
    attention = CausalDocuments(torch.zeros(1, 4, dtype=torch.int32, device=device))
    positions_BT = torch.arange(4, device=device)[None]
    with student.resting():
        hidden_BTD = student.body(tokens_BT, positions_BT, attention)
        # The model's own logits, whatever it does to hidden states.
        theirs_BTV = student.model(input_ids=tokens_BT, use_cache=False).logits.float()
        ours_BTV = student.head.logits(hidden_BTD)
    gap = float((ours_BTV - theirs_BTV).abs().max() / theirs_BTV.abs().max().clamp_min(1e-6))
    if not gap <= HEAD_TOLERANCE:
        raise ValueError(
            f"{type(student.model).__name__} does more between hidden states and logits than a head, a cap and a "
            f"scale: its logits differ from ours by {gap:.2g} of the largest; this architecture can't be a student"
        )


def _window(config: Any) -> dict[str, int | None] | int | None:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return window
    if kinds == {"full_attention"}:
        return None
    windows = {"full_attention": None, "sliding_attention": window}
    if strange := sorted(kinds - windows.keys()):
        raise ValueError(f"the student has layers of kind {strange[0]}, for which there is no mask for packed rows")
    return {kind: windows[kind] for kind in sorted(kinds)}


def _refuse_leaking(config: Any) -> None:
    kinds = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
    kinds.append(str(getattr(config, "model_type", "")))
    for kind in kinds:
        if any(word in kind for word in LEAKING):
            raise ValueError(f"the student has layers of kind {kind}: they carry a state from one document to the next")


def _head_constants(config: Any) -> dict[str, float | None]:
    """Cap and scale of the logits, by the names that they have in transformers' configs."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    return {"softcap": getattr(config, "final_logit_softcapping", None), "scale": scale}
