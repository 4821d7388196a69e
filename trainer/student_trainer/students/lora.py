"""LoRA (arXiv 2106.09685) through peft: a student of which low-rank additions alone are trained. Called by `causal`,
and by those who want plain weights again: `load` and `cli.export`.

The adapters are put into the model in place, so it stays the model that it was, with more parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from student_trainer.settings import LoRASettings

SEED = 0  # of the adapters' first weights: a run's start must not depend on what was drawn before


def add_lora(model: Any, settings: LoRASettings) -> None:
    """Freeze the model and put adapters into it, which change nothing until they are trained.

    ValueError where no module has a name that `settings.targets` gives.
    """
    from peft import LoraConfig, inject_adapter_in_model

    assert settings.rank is not None
    targets = "all-linear" if settings.targets == ("all-linear",) else list(settings.targets)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, bias="none")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ValueError(f"student.lora.targets: {str(error).strip().splitlines()[0]}") from None


def merge_lora(model: Any) -> Any:
    """The model with the adapters added into its weights, in place; one without adapters as it is."""
    from peft.tuners.lora import LoraLayer

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        module.merge(safe_merge=True)
        model.set_submodule(name, module.get_base_layer())
    return model.requires_grad_(True) if adapted else model
