"""Groups of parameters that are treated alike: matrices, embeddings (with the head), vectors. Called by `optimizer`,
and by `adamw` and `muon_clip`, which build torch's optimizers for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from student_trainer.settings import OptimSettings

GroupName = Literal["matrices", "embeddings", "vectors"]
GROUPS: tuple[GroupName, ...] = ("matrices", "embeddings", "vectors")


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters by their full name in the model, in the order of `named_parameters`."""

    name: GroupName
    parameters: dict[str, nn.Parameter]


def parameter_groups(model: nn.Module, head: nn.Module | None = None) -> tuple[ParameterGroup, ...]:
    """Every trainable parameter once, in the group that fits it; a group without parameters is left out.

    `embeddings`: the weights of embedding modules and of `head`. `vectors`: anything with fewer than two dimensions.
    """
    embeddings = {
        id(parameter) for module in _embeddings(model, head) for parameter in module.parameters(recurse=False)
    }
    members: dict[GroupName, dict[str, nn.Parameter]] = {name: {} for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(parameter, embeddings)][name] = parameter
    return tuple(ParameterGroup(name, members[name]) for name in GROUPS if members[name])


def slots(settings: OptimSettings, groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """The groups in the form that torch's optimizers take, each with its peak rate and its decay."""
    made = []
    for group in groups:
        own = getattr(settings, group.name)
        made.append(
            {
                "params": list(group.parameters.values()),
                "lr": settings.learning_rate if own.learning_rate is None else own.learning_rate,
                "weight_decay": settings.weight_decay if own.weight_decay is None else own.weight_decay,
            }
        )
    return made


def _group_of(parameter: nn.Parameter, embeddings: set[int]) -> GroupName:
    if parameter.ndim < 2:
        return "vectors"
    return "embeddings" if id(parameter) in embeddings else "matrices"


def _embeddings(model: nn.Module, head: nn.Module | None) -> Iterable[nn.Module]:
    yield from (module for module in model.modules() if isinstance(module, nn.Embedding))
    if head is not None:
        yield head
