"""Low-rank corrections of a quantised student (LRC, arXiv 2412.07902): y = quantised(W) a(x) + U V^T x. They are added
to the chosen linears, with x the unrounded input. One of `load.ADAPTERS`.

The rank of each is a share of its weight's smaller side. They start like LoRA's and correct nothing; with
`student.lrc.start=closed_form` a run starts with `calibration`, which computes U and V from data. Then they are
trained, with everything else frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from student_trainer.settings import StudentSettings
from student_trainer.students.adapters.adapter import Adapter
from student_trainer.students.adapters.low_rank import LowRank, chosen_linears, corrections, train_corrections_alone
from student_trainer.students.quant_linear import QuantLinear, is_quantised, quant_linears, quantiser_of

SEED = 0  # of the initial weights: a run's start must not depend on what was drawn before


class LRC(Adapter):
    def add(self, model: Any, settings: StudentSettings) -> None:
        """ValueError if nothing is quantised, if `settings.lrc.targets` names no linear, or for a closed form if the
        model isn't the full-precision one with rounded weights.
        """
        if not is_quantised(model):
            raise ValueError(
                "student.adapter is lrc, which corrects the error of quantised layers, but student.quantiser is none: "
                "choose a quantiser, or student.adapter=lora"
            )
        chosen = chosen_linears(model, settings.lrc.targets, "student.lrc.targets")
        if settings.lrc.start == "closed_form":
            _check_reference(chosen, settings)
        # Drawn separately: the run's other random numbers are those of a run without corrections.
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            for layer in chosen.values():
                rank = rank_of(layer, settings.lrc.rank)
                # alpha = rank, so that the scale alpha / r is 1 and the closed form is put in as it is.
                layer.correction = LowRank(layer.in_features, layer.out_features, rank, rank, layer.weight)
        train_corrections_alone(model)

    def merge(self, model: Any) -> Any:
        """ValueError: another latent weight would have other codes."""
        if found := corrections(model):
            name = next(iter(found))
            raise ValueError(
                f"the correction of {name} can't be merged into a weight that is quantised with "
                f"{quantiser_of(model.get_submodule(name)).name}: its codes would change. It is exported beside the "
                "base"
            )
        return super().merge(model)


def rank_of(layer: nn.Linear, share: float) -> int:
    """The rank that is `share` of the weight's smaller side, at least 1."""
    return max(1, round(share * min(layer.in_features, layer.out_features)))


def _check_reference(chosen: dict[str, QuantLinear], settings: StudentSettings) -> None:
    """The closed form fits outputs to those of the latent weights, so these must be a full-precision model's."""
    normed = next((name for name, layer in chosen.items() if layer.rms_norm is not None), None)
    if normed is not None:
        raise ValueError(
            f"student.lrc.start=closed_form fits {normed} to the full-precision model, which has no SubLN: set "
            "student.quantisation.sub_norm=none, or student.lrc.start=random"
        )
    if settings.quantisation.warmup_steps:
        raise ValueError(
            "student.lrc.start=closed_form corrects fully quantised weights: leave out "
            "student.quantisation.warmup_steps, or set student.lrc.start=random"
        )


def uncalibrated(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers whose correction is as it was added, with B zero, in the order of the model."""
    return {
        name: layer
        for name, layer in quant_linears(model)
        if isinstance(layer.correction, LowRank) and not layer.correction.lora_B.weight.any()
    }


LRC_ADAPTER = LRC()
