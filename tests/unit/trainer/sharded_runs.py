"""Ranks over gloo that save and load a small ternary student in shards, for the tests of sharded checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from student_trainer.checkpoint.checkpoints import Checkpoints
from student_trainer.data.mixture import Cursor, MixtureState, SourceState
from student_trainer.optim.optimizer import Optimizer, build_optimizer
from student_trainer.ranks import ALONE, Ranks, full_tensor, like
from student_trainer.settings import CheckpointSettings, OptimSettings, StudentSettings
from student_trainer.state import TrainState
from student_trainer.students.load import quantised_student
from student_trainer.students.sharding import shard
from student_trainer.students.student import Student
from tests.ranks_run import become
from tests.teacher_process import free_port
from tests.trainer_run import FORKS
from tests.unit.students.tiny import tiny_model

MIXTURE = MixtureState(3, (SourceState("a", 0.3, "f", Cursor(1, 2, 3, 4), credit=1 / 3),), ((0, Cursor()),))
CONSTANT: dict[str, Any] = {"settings": {}, "teacher": None}


@contextmanager
def joined(rank: int, world: int, port: int) -> Iterator[Ranks]:
    """This process as one of `world` ranks."""
    torch.set_num_threads(1)
    if world == 1:
        yield ALONE
        return
    become(rank, world, port)
    dist.init_process_group("gloo")
    yield Ranks(rank, world, rank)
    dist.destroy_process_group()


def on_ranks(world: int, call: Callable[..., None], *arguments: Any, timeout_s: float = 120.0) -> list[int | None]:
    """`call(rank, world, port, *arguments)` in a process for each rank; their exit codes."""
    port = free_port()
    processes = [FORKS.Process(target=call, args=(rank, world, port, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def made(seed: int, kind: str, ranks: Ranks) -> tuple[Student, Optimizer]:
    """97 rows of embeddings, which no number of ranks divides, and keys of 2 rows, fewer than four ranks."""
    model = tiny_model("llama", seed, num_attention_heads=2, num_key_value_heads=1, head_dim=2)
    student = quantised_student(model, StudentSettings(quantiser="bitnet", checkpoint_path="none"))
    shard(student, ranks)
    return student, build_optimizer(OptimSettings(kind=kind), student.model, student.head_module, 100)  # type: ignore[arg-type]


def learn(student: Student, optimizer: Optimizer, steps: int) -> None:
    """Updates from gradients that do not depend on how the parameters are spread."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in optimizer.parameters:
            parameter.grad = like(parameter, torch.randn(parameter.shape, generator=generator))
        optimizer.step(step)
    for name, buffer in student.model.named_buffers():
        if "blend" in name:
            buffer.fill_(0.3)


def state_of(student: Student, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Whole, by name; all ranks must call."""
    return {
        name: full_tensor(tensor.detach()).clone()
        for name, tensor in {**student.tensors(), **optimizer.state()}.items()
    }


def save(root: Path, step: int, student: Student, optimizer: Optimizer, ranks: Ranks, **settings: Any) -> Checkpoints:
    keeper = Checkpoints(root, CheckpointSettings(**settings), CONSTANT, ranks)
    keeper.save(TrainState(step, 7 * step, MIXTURE), student, optimizer)
    keeper.finish(last=True)
    return keeper


def at_call(number: int, act: Callable[[], None]) -> pytest.MonkeyPatch:
    """Let `act` happen in place of the `number`-th call that forces, names or writes a file."""
    count, patched = [0], pytest.MonkeyPatch()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                act()
            return real(*arguments, **named)

        return call

    patched.setattr(os, "fsync", counted(os.fsync))
    for name in ("mkdir", "rename", "replace", "write_text"):
        patched.setattr(Path, name, counted(getattr(Path, name)))
    patched.setattr(safetensors.torch, "save_file", counted(safetensors.torch.save_file))
    return patched
