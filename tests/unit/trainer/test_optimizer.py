"""AdamW by groups: the rates and decays of the settings, torch's own arithmetic, a state that has names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from student_trainer.optim.groups import parameter_groups
from student_trainer.optim.optimizer import build_optimizer
from student_trainer.settings import OptimSettings, ScheduleSettings, UndecayedGroupSettings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.inner(self.embedding(ids))))


def step(net: Net, optimizer: object, number: int, seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(0, 7, (5,))
    nn.functional.cross_entropy(net(ids), ids).backward()
    optimizer.step(number)  # type: ignore[attr-defined]
    optimizer.zero_grad()  # type: ignore[attr-defined]


def test_every_trainable_parameter_is_in_one_group() -> None:
    net = Net()
    groups = {group.name: set(group.parameters) for group in parameter_groups(net, net.head)}
    assert groups == {
        "matrices": {"inner.weight"},
        "embeddings": {"embedding.weight", "head.weight"},
        "vectors": {"inner.bias", "norm.weight", "norm.bias"},
    }


def test_updates_are_torchs_own_with_each_groups_rate_and_decay() -> None:
    settings = OptimSettings(
        learning_rate=1e-2, weight_decay=0.3, embeddings=UndecayedGroupSettings(learning_rate=5e-2, weight_decay=0.1),
        schedule=ScheduleSettings(kind="linear", floor=0.0),
    )  # fmt: skip
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(settings, ours, ours.head, 10)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.inner.weight], "lr": 1e-2, "weight_decay": 0.3},
            {"params": [theirs.embedding.weight, theirs.head.weight], "lr": 5e-2, "weight_decay": 0.1},
            {"params": [theirs.inner.bias, *theirs.norm.parameters()], "lr": 1e-2, "weight_decay": 0.0},
        ],
        betas=settings.betas, eps=settings.eps,
    )  # fmt: skip
    peaks = [group["lr"] for group in reference.param_groups]

    class Scheduled:
        def step(self, number: int) -> None:
            for group, peak in zip(reference.param_groups, peaks, strict=True):
                group["lr"] = peak * (1 - (number + 1) / 10)
            reference.step()

        def zero_grad(self) -> None:
            reference.zero_grad()

    for number in range(6):
        step(ours, optimizer, number, seed=number)
        step(theirs, Scheduled(), number, seed=number)
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter, theirs.get_parameter(name), atol=1e-6), name


def test_each_group_has_its_own_floor() -> None:
    settings = OptimSettings(
        learning_rate=1.0, embeddings=UndecayedGroupSettings(floor=0.5), schedule=ScheduleSettings(floor=0.1)
    )
    net = Net()
    rates = build_optimizer(settings, net, net.head, 10).rates(9)
    assert rates == pytest.approx({"matrices": 0.1, "embeddings": 0.5, "vectors": 0.1})


def test_its_state_goes_over_to_a_fresh_one_bit_for_bit() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = build_optimizer(OptimSettings(), net, net.head, 10)
    for number in range(3):
        step(net, optimizer, number, seed=number)
    other = Net()
    other.load_state_dict(net.state_dict())
    fresh = build_optimizer(OptimSettings(), other, other.head, 10)
    fresh.load({name: tensor.clone() for name, tensor in optimizer.state().items()})
    for number in range(3, 6):
        step(net, optimizer, number, seed=number)
        step(other, fresh, number, seed=number)
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in net.named_parameters())


def test_a_state_of_other_parameters_is_refused() -> None:
    net = Net()
    with pytest.raises(ValueError, match="nowhere"):
        build_optimizer(OptimSettings(), net, net.head, 10).load({"nowhere//exp_avg": torch.zeros(1)})
