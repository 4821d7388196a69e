"""The optimizer of a run: one or several of torch's, with rates set from the step, and optionally QK-clip.

Built by `build`, stepped by `loop`, saved by `checkpoints`, with its state by parameter name. The rate is a pure
function of the step, and QK-clip, after each update, is done with its step, so neither has state. A rate is a share of
its group's own peak: 1 at the peak, the group's floor at the end, and never above 1, so that no group's floor can raise
its rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from student_trainer.optim.adamw import build_adamw
from student_trainer.optim.groups import ParameterGroup, parameter_groups
from student_trainer.optim.muon_clip import build_muon_clip
from student_trainer.optim.qk_clip import ClipReport, QKClip
from student_trainer.ranks import like
from student_trainer.settings import OptimSettings


@dataclass(frozen=True, eq=False)
class Member:
    """A group in a torch optimizer: `slot` is its entry in `param_groups`, `rate` the peak, `floor` a share of that."""

    group: ParameterGroup
    slot: dict[str, object]
    rate: float
    floor: float


class Optimizer:
    """`step(number)` sets every group's rate for that update and applies it. `clipped`: what QK-clip did in the last
    update, None without it.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], members: Sequence[Member], settings: OptimSettings,
                 steps: int, clip: QKClip | None = None):  # fmt: skip
        self._optimizers = tuple(optimizers)
        self._members = tuple(members)
        self._settings = settings
        self._steps = steps
        self._clip = clip
        # The monitor sees only this rank's rows; its maxima are taken over the ranks of the parameters' mesh.
        sharded = next((parameter for parameter in self.parameters if isinstance(parameter, DTensor)), None)
        self._group = None if sharded is None else sharded.device_mesh.get_group()
        self.clipped: ClipReport | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for member in self._members for parameter in member.group.parameters.values()]

    def rates(self, number: int) -> dict[str, float]:
        """The learning rate of each group at update `number`."""
        schedule = self._settings.schedule
        return {
            member.group.name: member.rate
            * rate_factor(
                schedule.kind, number, steps=self._steps, warmup_steps=schedule.warmup_steps,
                decay_steps=schedule.decay_steps, floor=member.floor,
            )
            for member in self._members
        }  # fmt: skip

    def watching(self, valid_BT: Tensor) -> AbstractContextManager[object]:
        """A context for each forward pass of the update, in which QK-clip observes the attention logits.

        `valid_BT`: False at padding.
        """
        return nullcontext() if self._clip is None else self._clip.monitor.watch(valid_BT)

    def step(self, number: int) -> dict[str, float]:
        """Apply update `number` and return the rates that it used."""
        rates = self.rates(number)
        for member in self._members:
            member.slot["lr"] = rates[member.group.name]
        for optimizer in self._optimizers:
            optimizer.step()
        if self._clip is not None:
            # After the update, so that it scales the weights that the next step starts from.
            self.clipped = self._clip.apply(self._group)
        return rates

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, as `parameter name//entry`. Views, not copies."""
        tensors = {}
        for optimizer, name, parameter in self._named():
            for entry, value in optimizer.state.get(parameter, {}).items():
                assert isinstance(value, Tensor), f"{type(optimizer).__name__} keeps {entry} as {type(value).__name__}"
                tensors[f"{name}//{entry}"] = value
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state` returned. ValueError if it names other parameters."""
        by_name: dict[str, list[str]] = {}
        for key in tensors:
            name, _, entry = key.rpartition("//")
            by_name.setdefault(name, []).append(entry)
        known = {name for _, name, _ in self._named()}
        if strange := sorted(by_name.keys() - known):
            raise ValueError(f"the optimizer's state names {strange[0]}, which the student does not have")
        for optimizer, name, parameter in self._named():
            state = {}
            for entry in by_name.get(name, ()):
                value = tensors[f"{name}//{entry}"]  # one at a time: each may be assembled from pieces
                # A step counter is one number, never sharded, on its parameter's device, where a fused step reads it.
                if entry == "step":
                    state[entry] = value.clone().to(parameter.device)
                else:
                    state[entry] = torch.empty_like(parameter, dtype=value.dtype).copy_(like(parameter, value))
            optimizer.state[parameter] = state

    def _named(self) -> list[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
        owner = {id(slot): optimizer for optimizer in self._optimizers for slot in optimizer.param_groups}
        return [
            (owner[id(member.slot)], name, parameter)
            for member in self._members
            for name, parameter in member.group.parameters.items()
        ]


def build_optimizer(settings: OptimSettings, model: nn.Module, head: nn.Module | None, steps: int) -> Optimizer:
    """The optimizer that `settings.kind` names, over all trainable parameters of `model`."""
    built = BUILDERS[settings.kind](settings, parameter_groups(model, head))
    members = [
        Member(group, slot, slot["lr"], _floor(settings, group))
        for optimizer, groups in built
        for group, slot in zip(groups, optimizer.param_groups, strict=True)
    ]
    tau, alpha = settings.qk_clip.tau, settings.qk_clip.alpha
    clip = None if tau is None else QKClip(model, tau, alpha)
    return Optimizer([optimizer for optimizer, _ in built], members, settings, steps, clip)


def _floor(settings: OptimSettings, group: ParameterGroup) -> float:
    own = getattr(settings, group.name).floor
    return settings.schedule.floor if own is None else own


BUILDERS = {"adamw": build_adamw, "muon_clip": build_muon_clip}


Kind = Literal["cosine", "wsd", "linear", "constant"]


def rate_factor(
    kind: Kind, step: int, *, steps: int, warmup_steps: int = 0, decay_steps: int | None = None, floor: float = 0.0
) -> float:
    """The factor of update `step` (from 0) out of `steps`.

    Warm-up: (step + 1) / warmup_steps, so that the first update already has a rate above 0. Then the factor decays from
    1 to `floor` at the last update: `cosine` and `linear` from the end of the warm-up, `wsd` linearly over the last
    `decay_steps` (by default a tenth of the run), `constant` never.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    start = warmup_steps
    if kind == "wsd":
        start = max(warmup_steps, steps - (decay_steps if decay_steps is not None else max(1, steps // 10)))
    # The share of the decay that is done after this update: 1 at the last one.
    done = 0.0 if step < start else min(1.0, (step - start + 1) / max(1, steps - start))
    fall = 0.5 * (1.0 - math.cos(math.pi * done)) if kind == "cosine" else done
    return 1.0 - (1.0 - floor) * fall
