"""A student out of any Hugging Face causal language model. Named in
`architectures`.

The decoder runs on packed rows with attention and positions that stop at document edges; the head is handed to
`head_loss` as a weight, so that no logits of a whole batch exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from student_trainer.settings import StudentSettings
from student_trainer.students.attention_mask import block_mask, dense_mask
from student_trainer.students.compute import compute_dtype
from student_trainer.students.student import Student

# Layers that carry a state along the row: a document would leak into the next one.
LEAKING = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid")
HEAD_TOLERANCE = 1e-3


@dataclass(eq=False)
class CausalBody:
    """The decoder of a Hugging Face model as a function of packed rows.

    `reach`: how many tokens back attention sees, None for all; by kind of layer where the model tells them apart.
    """

    decoder: nn.Module
    attention: str
    reach: dict[str, int | None] | int | None

    def __call__(self, tokens_BT: Tensor, position_ids_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        make = block_mask if self.attention == "flex" else dense_mask
        mask: Any
        if isinstance(self.reach, dict):
            mask = {kind: make(document_ids_BT, reach) for kind, reach in self.reach.items()}
        else:
            mask = make(document_ids_BT, self.reach)
        out = self.decoder(input_ids=tokens_BT, attention_mask=mask, position_ids=position_ids_BT, use_cache=False)
        return out.last_hidden_state


def attention_for(settings: StudentSettings, device: torch.device) -> str:
    """ "flex" or "sdpa": what `settings.attention` means on this device."""
    if settings.attention != "auto":
        return settings.attention
    return "flex" if device.type == "cuda" else "sdpa"


def wrap_causal(model: Any, attention: str, settings: StudentSettings) -> Student:
    """A loaded model as a student; refuses one whose logits are not head(hidden states)."""
    _refuse_leaking(model.config)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student = Student(
        model=model,
        body=CausalBody(model.get_decoder(), attention, _reach(model.config)),
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
    """The layers that a decoder repeats, by the class that transformers gives them all."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check_head(student: Student) -> None:
    """Hold head(hidden) against the model's own logits on four tokens. ValueError where an architecture does more."""
    device = student.device
    tokens_BT = torch.arange(4, device=device)[None] % student.vocab_size
    zeros_BT = torch.zeros(1, 4, dtype=torch.int32, device=device)
    positions_BT = torch.arange(4, device=device)[None]
    was_training = student.model.training
    student.model.eval()
    with torch.no_grad():
        hidden_BTD = student.body(tokens_BT, positions_BT, zeros_BT)
        theirs_BTV = student.model(input_ids=tokens_BT, use_cache=False).logits.float()
        head = student.head
        ours_BTV = nn.functional.linear(hidden_BTD, head.weight_VD, head.bias_V).float() * head.scale
    student.model.train(was_training)
    if head.softcap is not None:
        ours_BTV = head.softcap * torch.tanh(ours_BTV / head.softcap)
    gap = float((ours_BTV - theirs_BTV).abs().max() / theirs_BTV.abs().max().clamp_min(1e-6))
    if not gap <= HEAD_TOLERANCE:
        raise ValueError(
            f"{type(student.model).__name__} does more between hidden states and logits than a head, a cap and a "
            f"scale: its logits differ from ours by {gap:.2g} of the largest; this architecture can't be a student"
        )


def _reach(config: Any) -> dict[str, int | None] | int | None:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return window
    if kinds == {"full_attention"}:
        return None
    reaches = {"full_attention": None, "sliding_attention": window}
    if strange := sorted(kinds - reaches.keys()):
        raise ValueError(f"the student has layers of kind {strange[0]}, whose mask for packed rows is not known here")
    return {kind: reaches[kind] for kind in sorted(kinds)}


def _refuse_leaking(config: Any) -> None:
    kinds = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
    kinds.append(str(getattr(config, "model_type", "")))
    for kind in kinds:
        if any(word in kind for word in LEAKING):
            raise ValueError(f"the student has layers of kind {kind}: they carry a state from one document to the next")


def _head_constants(config: Any) -> dict[str, float | None]:
    """Cap and scale of the logits under the names that transformers' configs give them."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    return {"softcap": getattr(config, "final_logit_softcapping", None), "scale": scale}
