"""Trainers that are the ranks of one run, as torchrun would start them: a process each, on the loopback."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.teacher_process import free_port
from tests.trainer_run import TrainerProcess

Prelude = Callable[[int], None]  # run in each rank before its trainer, with its number


@contextmanager
def ranks(
    world: int, arguments: list[str], output: Path, prelude: Prelude | None = None
) -> Iterator[list[TrainerProcess]]:
    """What rank i prints goes to `output` with `-i` at its end."""
    port = free_port()
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                TrainerProcess(arguments, Path(f"{output}-{rank}"), partial(_begin, rank, world, port, prelude))
            )
            for rank in range(world)
        ]


def train_ranks(
    world: int, arguments: list[str], output: Path, prelude: Prelude | None = None, timeout_s: float = 120.0
) -> list[int]:
    """Run `world` ranks to their end and return their exit codes."""
    with ranks(world, arguments, output, prelude) as trainers:
        return [trainer.wait(timeout_s) for trainer in trainers]


def become(rank: int, world: int, port: int) -> None:
    """Set what torchrun sets."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def _begin(rank: int, world: int, port: int, prelude: Prelude | None) -> None:
    become(rank, world, port)
    if prelude is not None:
        prelude(rank)
