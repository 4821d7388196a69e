"""Low-rank corrections of quantised layers: y = quantised(W) a(x) + scale B A x, with x the unrounded input. Used by
`lora`, `lrc`, `calibration` and `export`.

They are exported as a folder that peft loads on the exported base: `export` writes it, `pretrained` reads it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from student_trainer.students.quant_linear import QuantLinear, quant_linears

FOLDER = "adapter"  # of an export, beside the base's files
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class LowRank(nn.Module):
    """scale * B A x, with peft's names and initial values: A as in any linear, B zero."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: int, like: Tensor) -> None:
        super().__init__()
        made = {"device": like.device, "dtype": like.dtype}
        self.lora_A = nn.Linear(in_features, rank, bias=False, **made)
        self.lora_B = nn.Linear(rank, out_features, bias=False, **made)
        # B = 0, so the correction starts at zero; A is random, or neither would have a gradient.
        nn.init.zeros_(self.lora_B.weight)
        self.rank, self.alpha = rank, alpha

    def forward(self, input: Tensor) -> Tensor:
        # (alpha / r) B A x, in two thin products: B A itself is never computed.
        return self.lora_B(self.lora_A(input)) * (self.alpha / self.rank)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


@dataclass(frozen=True, eq=False)
class Correction:
    """A layer's correction as it is saved: A [r, I], B [O, r] and alpha, with scale = alpha / r."""

    a_RI: Tensor
    b_OR: Tensor
    alpha: int

    def scaled(self, gain: float) -> Correction:
        """The correction for a layer whose outputs are larger by the factor `gain`."""
        return Correction(self.a_RI, self.b_OR * gain, self.alpha)


def corrections(model: nn.Module) -> dict[str, Correction]:
    """The low-rank corrections of the model's quantised layers, by the layer's name."""
    return {
        name: Correction(layer.correction.lora_A.weight, layer.correction.lora_B.weight, layer.correction.alpha)
        for name, layer in quant_linears(model)
        if isinstance(layer.correction, LowRank)
    }


def chosen_linears(model: nn.Module, targets: Sequence[str], setting: str) -> dict[str, QuantLinear]:
    """Quantised linears that `targets` name, all for "all-linear". ValueError naming `setting` if there is none."""
    everywhere = tuple(targets) == ("all-linear",)
    chosen = {
        name: layer
        for name, layer in quant_linears(model)
        if everywhere or any(f".{name}".endswith(f".{target}") for target in targets)
    }
    if not chosen:
        raise ValueError(f"{setting}: no quantised linear is named {' or '.join(targets)}")
    return chosen


@torch.no_grad()
def put_corrections(model: Any, found: Mapping[str, Correction]) -> None:
    """Give the named layers these corrections. ValueError if a layer does not exist, or has another shape."""
    layers = dict(quant_linears(model))
    for name, correction in found.items():
        layer = layers.get(name)
        shapes = (correction.a_RI.shape[1], correction.b_OR.shape[0])
        if layer is None or shapes != (layer.in_features, layer.out_features):
            raise ValueError(f"the adapter's {name} is not a layer of this student")
        made = LowRank(*shapes, len(correction.a_RI), correction.alpha, layer.weight)
        made.lora_A.weight.copy_(correction.a_RI)
        made.lora_B.weight.copy_(correction.b_OR)
        layer.correction = made


def check_start(model: nn.Module) -> None:
    """ValueError if A and B are both zero: the gradient of each is a product with the other, and stays zero."""
    for name, found in corrections(model).items():
        if not found.a_RI.any() and not found.b_OR.any():
            raise ValueError(
                f"both factors of the correction of {name} are zero: neither would ever get a gradient. Give one of "
                "them other initial values"
            )


def train_corrections_alone(model: nn.Module) -> None:
    """Freeze everything but the corrections."""
    model.requires_grad_(False)
    for _, layer in quant_linears(model):
        if layer.correction is not None:
            layer.correction.requires_grad_(True)


def write_peft(found: Mapping[str, Correction], folder: Path) -> None:
    """Write them as peft's LoRA for a causal language model, each with its own rank and alpha."""
    from peft import LoraConfig

    # The most common pair as peft's default, the others by patterns of names.
    (rank, alpha), _ = Counter((len(each.a_RI), each.alpha) for each in found.values()).most_common(1)[0]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=sorted(found), bias="none", task_type="CAUSAL_LM",
        rank_pattern={_pattern(name): len(each.a_RI) for name, each in found.items() if len(each.a_RI) != rank},
        alpha_pattern={_pattern(name): each.alpha for name, each in found.items() if each.alpha != alpha},
        inference_mode=True,
    )  # fmt: skip
    tensors = {}
    for name, correction in found.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = correction.a_RI.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = correction.b_OR.detach().contiguous()
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _pattern(name: str) -> str:
    """peft takes the keys of its patterns as regular expressions, matched against the end of a module's name."""
    return re.escape(name)


def read_peft(folder: Path) -> dict[str, Correction]:
    """What `write_peft` wrote, by the layer's name. Empty if there is no such folder."""
    if not (folder / CONFIG).is_file():
        return {}
    config = json.loads((folder / CONFIG).read_text())
    patterns = config.get("alpha_pattern") or {}
    pairs = _pairs(load_file(folder / WEIGHTS))
    return {
        name: Correction(a_RI, b_OR, patterns.get(_pattern(name), config["lora_alpha"])) for name, a_RI, b_OR in pairs
    }


def _pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for key, a_RI in tensors.items():
        stem, found, _ = key.partition(".lora_A.")
        if found:
            yield stem.removeprefix("base_model.model."), a_RI, tensors[f"{stem}.lora_B.weight"]
