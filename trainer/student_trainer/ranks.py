"""The ranks of a run, that is, its processes: which one this is, and the little that they exchange. Opened by `build`.

    torchrun --nproc-per-node 2 -m student_trainer.main SETTINGS

Each rank takes its own rows of every batch, requests their targets itself, and holds a shard of the student
(`students.sharding`). A signal or failure in one of them between two updates ends all of them: `sync_errors`.
A run that torchrun did not start has one rank, and nothing here does anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from student_trainer.device import choose_device, use_device
from student_trainer.settings import Settings
from teacher_proto.errors import TeacherUnavailableError
from teacher_proto.process.stopping import StopSignals

# On top of the time that a rank may wait for its teacher, during which the other ranks wait for it.
PATIENCE_S = 600.0
FINE, STOPPED, NO_TEACHER, FAILED = range(4)
# gloo's messages when the other side died, for which it has no class. NCCL's errors are `DistError`s.
_LOST = re.compile(r"[Cc]onnection (closed|reset) by peer|Broken pipe|Timed out waiting")


class RankError(ConnectionError):
    """Another rank failed, so this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """This process is rank `rank` of `world`, and the `local`-th on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once per run."""
        return self.rank == 0

    def sync_errors(self) -> SyncErrors:
        """A block that ends alike on all ranks: if one raises in it, all raise, once all have reached its end."""
        return SyncErrors(self)

    @contextmanager
    def noticing_the_gone(self) -> Iterator[None]:
        """A block in which a collective whose peer has died, including FSDP's, raises a RankError."""
        try:
            yield
        except RuntimeError as error:
            if self.alone or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
                raise
            raise _gone(error) from error

    def total(self, count: int) -> int:
        """The sum over the ranks."""
        return count if self.alone else int(self.add_up(torch.tensor(int(count))))

    def totals(self, values: Sequence[float]) -> list[float]:
        """Each of these numbers summed over the ranks."""
        return list(values) if self.alone else self.add_up(torch.tensor(values, dtype=torch.float64)).tolist()

    def largest(self, value: float) -> float:
        """The maximum over the ranks."""
        if self.alone:
            return value
        # By gloo on the CPU in float64, so that the result is not rounded.
        largest = torch.tensor(value, dtype=torch.float64)
        _exchange(largest, dist.ReduceOp.MAX)
        return float(largest)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place, in a fixed order."""
        if not self.alone:
            _exchange(tensor, dist.ReduceOp.SUM)
        return tensor

    def from_first(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.alone:
            return text
        texts = [text]
        with self.noticing_the_gone():
            dist.broadcast_object_list(texts, src=0, device=torch.device("cpu"))
        return texts[0]

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of all ranks, in rank order, on every rank; for small CPU tensors."""
        gathered = [dict(tensors)] * self.world
        if not self.alone:
            dist.all_gather_object(gathered, dict(tensors))
        return gathered


ALONE = Ranks()


@dataclass
class SyncErrors:
    """See `Ranks.sync_errors`."""

    ranks: Ranks

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ranks.alone:
            return
        # All learn the worst state, and those in a better one raise for it, so that none waits for one that left.
        mine = _state_of(error)
        worst = int(self.ranks.largest(mine))
        if worst == mine:
            return
        if worst == STOPPED:
            raise StopSignals.Stop("another rank was told to stop") from error
        if worst == NO_TEACHER:
            raise TeacherUnavailableError("another rank has no teacher, see its message") from error
        raise RankError("another rank failed, see its message; this rank stops too") from error


def _state_of(error: BaseException | None) -> int:
    if error is None:
        return FINE
    if isinstance(error, StopSignals.Stop):
        return STOPPED
    return NO_TEACHER if isinstance(error, TeacherUnavailableError) else FAILED


def _exchange(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:
        raise _gone(error) from None


def _gone(error: RuntimeError) -> RankError:
    return RankError(f"another rank is gone ({str(error).strip().splitlines()[0]}); this rank stops too")


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or if it is sharded, gathered from all ranks, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values`, which every rank has in full, on the device of `tensor` and sharded like it; nothing is sent."""
    values = values.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return values
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


def open_ranks(settings: Settings, stack: ExitStack) -> Ranks:
    """The ranks that torchrun started, or this process alone; `stack` closes their connection.

    ValueError for an environment that torchrun did not set up.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return ALONE
    if "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {world}, but RANK is not set: start several ranks with torchrun")
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(settings.run, local)
    use_device(device)
    dist.init_process_group(
        # Counts and flags go by gloo in both cases, so that no GPU waits for them.
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=settings.teacher.outage_timeout_s + PATIENCE_S),
    )
    stack.callback(dist.destroy_process_group)
    return Ranks(dist.get_rank(), world, local)
