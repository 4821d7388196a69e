"""LoRA (arXiv 2106.09685): trains low-rank additions to a frozen student. One of `load.ADAPTERS`.

Plain linears are wrapped by peft, in place, so the model stays the same, with more parameters. In a quantised linear
the addition is its correction, computed in full precision from the unrounded input: as in QLoRA, with the base
quantised and frozen.
"""

from __future__ import annotations

from typing import Any

import torch

from student_trainer.settings import LoRASettings, StudentSettings
from student_trainer.students.adapters.adapter import Adapter
from student_trainer.students.adapters.low_rank import LowRank, chosen_linears, corrections, train_corrections_alone
from student_trainer.students.quant_linear import quant_linears, quantiser_of

SEED = 0  # of the adapters' initial weights: a run's start must not depend on what was drawn before


class LoRA(Adapter):
    def add(self, model: Any, settings: StudentSettings) -> None:
        """ValueError if no module has a name that `settings.lora.targets` gives."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            if any(True for _ in quant_linears(model)):
                _add_to_quantised(model, settings.lora)
            else:
                add_lora(model, settings.lora)

    def merge(self, model: Any) -> Any:
        """ValueError for a quantised model: another latent weight would have other codes."""
        return merge_lora(model)


def add_lora(model: Any, settings: LoRASettings) -> None:
    """Freeze a model of plain linears and insert peft's adapters, which change nothing until they are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    assert settings.rank is not None
    targets = "all-linear" if settings.targets == ("all-linear",) else list(settings.targets)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, bias="none")
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"student.lora.targets: {str(error).strip().splitlines()[0]}") from None


def _add_to_quantised(model: Any, settings: LoRASettings) -> None:
    assert settings.rank is not None
    chosen = chosen_linears(model, settings.targets, "student.lora.targets")
    for layer in chosen.values():
        layer.correction = LowRank(layer.in_features, layer.out_features, settings.rank, settings.alpha, layer.weight)
    train_corrections_alone(model)


def merge_lora(model: Any) -> Any:
    """The model with the adapters merged into its weights, in place; one without adapters as it is."""
    from peft.tuners.lora import LoraLayer

    if found := corrections(model):
        name = next(iter(found))
        raise ValueError(
            f"LoRA on {name} can't be merged into a weight that is quantised with "
            f"{quantiser_of(model.get_submodule(name)).name}: its codes would change. It is exported beside the base"
        )
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        module.merge(safe_merge=True)
        model.set_submodule(name, module.get_base_layer())
    return model.requires_grad_(True) if adapted else model


LORA = LoRA()
