"""Muon over shards is torch's Muon on whole matrices, bit by bit: three ranks, shapes that do not divide by three."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from student_trainer.optim.muon_clip import ShardedMuon
from student_trainer.ranks import full_tensor, like
from tests.ranks_run import become
from tests.teacher_process import free_port
from tests.trainer_run import FORKS

WORLD, STEPS = 3, 3
SHAPES = [(7, 5), (2, 9), (16, 16), (40, 6)]  # out, in: more matrices than ranks, one with fewer rows than ranks
SETTINGS = [{"nesterov": True, "weight_decay": 0.1}, {"nesterov": False, "weight_decay": 0.0}]


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, height, bias=False) for height, width in SHAPES))


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def step_sharded(rank: int, port: int, settings: dict[str, float], out: str) -> None:
    become(rank, WORLD, port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = made()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    muon = ShardedMuon(model.parameters(), lr=0.02, momentum=0.9, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(STEPS):
        for parameter, gradient in zip(model.parameters(), gradients(step), strict=True):
            parameter.grad = like(parameter, gradient)
        muon.step()
    weights = [full_tensor(parameter.detach()).clone() for parameter in model.parameters()]
    momenta = [full_tensor(muon.state[parameter]["momentum_buffer"]).clone() for parameter in model.parameters()]
    if rank == 0:
        torch.save((weights, momenta), out)
    dist.destroy_process_group()


@pytest.mark.parametrize("settings", SETTINGS, ids=["nesterov", "plain"])
def test_the_update_is_that_of_the_whole_matrices_bit_for_bit(settings: dict[str, float], tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "weights"
    ranks = [FORKS.Process(target=step_sharded, args=(rank, port, settings, str(out))) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * WORLD
    weights, momenta = torch.load(out, weights_only=True)

    model = made()
    muon = torch.optim.Muon(model.parameters(), lr=0.02, momentum=0.9, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(STEPS):
        for parameter, gradient in zip(model.parameters(), gradients(step), strict=True):
            parameter.grad = gradient
        muon.step()
    for parameter, weight, momentum in zip(model.parameters(), weights, momenta, strict=True):
        assert torch.equal(parameter.detach(), weight)
        assert torch.equal(muon.state[parameter]["momentum_buffer"], momentum)
