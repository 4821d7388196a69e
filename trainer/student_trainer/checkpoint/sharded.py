"""Saves of several ranks: each writes its own shard, by torch.distributed.checkpoint (DCP). Called by `checkpoints`.

Rank 0 plans, and when all shards are on the disk it writes what else the checkpoint holds, the manifest over all files,
and renames the folder. What the ranks tell each other meanwhile is DCP's own, over a group of gloo's that nothing else
uses, so that a thread may do it beside training. `pieces` says what a shard looks like, and reads it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.futures import Future

from student_trainer.checkpoint import files
from student_trainer.checkpoint.files import Snapshot
from student_trainer.checkpoint.pieces import OFFSETS, SHARD, SHARDING_INFO
from student_trainer.ranks import Ranks

# A rank whose process ends is noticed at once. This is for the slowest disk: the ranks wait for it.
WRITTEN_WITHIN = timedelta(hours=6)


class ShardedWriter:
    """Writes the checkpoints of `ranks`, which all call the same methods; made at the same place by all of them."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # A group of its own: a save in the background must not interleave with the training step's collectives.
        self._group = dist.new_group(backend="gloo", timeout=WRITTEN_WITHIN)
        self._mesh = DeviceMesh.from_group(self._group, "cpu")

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU of what this rank holds; nothing is sent."""
        return {name: self._copied(tensor.detach()) for name, tensor in tensors.items()}

    def write(self, root: Path, snapshot: Snapshot, shards: Mapping[str, Tensor]) -> Path:
        """Write `shards` of all ranks, and rank 0's `snapshot` beside them, as one checkpoint; its folder.

        OSError on all ranks if one could not write, RankError if one is gone; neither leaves a checkpoint.
        """
        # DCP calls `writer` back: plans are gathered on rank 0, then each rank writes the pieces that fell to it.
        writer = _Writer(root, snapshot, self._ranks.rank)
        try:
            with self._ranks.noticing_the_gone():
                dcp.save(dict(shards), storage_writer=writer, process_group=self._group)
        except dcp.CheckpointException as error:
            # DCP gathers all ranks' failures and raises them on each: none goes on with a checkpoint half there.
            errors = {rank: failure for rank, (failure, _) in error.failures.items()}
            if not all(isinstance(failure, OSError) for failure in errors.values()):
                raise RuntimeError(f"saving the shards failed: {error}") from error
            raise OSError("; ".join(f"rank {rank}: {failure}" for rank, failure in errors.items())) from error
        finally:
            if self._ranks.first:
                # Renamed, unless the save failed.
                shutil.rmtree(files.unfinished(root, snapshot.step), ignore_errors=True)
        return root / files.folder_name(snapshot.step)

    def _copied(self, tensor: Tensor) -> Tensor:
        # Of a sharded parameter this rank has some rows. A copy, since training goes on while the thread writes.
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        copy = local.to("cpu", copy=True).contiguous()
        if not isinstance(tensor, DTensor):
            return copy
        # Wrapped again on a CPU mesh over a group of its own, so that DCP knows where in the whole the rows belong.
        return DTensor.from_local(
            copy, self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )


class _Writer(dcp.StorageWriter):
    """What DCP calls in one save: rank 0 makes the folder, every rank writes its file, rank 0 makes it a checkpoint."""

    def __init__(self, root: Path, snapshot: Snapshot, rank: int) -> None:
        self._root, self._snapshot, self._rank = root, snapshot, rank
        self._folder = files.unfinished(root, snapshot.step)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The rank is known from the start."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes."""
        files.begin(self._root, self._snapshot.step)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Of a tensor that all ranks hold alike, DCP has planned one writer. Where rows are fewer than ranks, some hold
        none of them.
        """
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), f"{item.index.fqn} is no tensor"
            if tensor.numel():
                # The piece under the parameter's name; where it begins in the whole stands in the file's header.
                tensors[item.index.fqn] = tensor
                offsets[item.index.fqn] = {OFFSETS: list(item.index.offset or ())}
        name = f"{SHARD}{self._rank:05d}.safetensors"
        files.save_tensors(tensors, self._folder / name, {SHARDING_INFO: json.dumps(offsets), "format": "pt"})
        # Size and digest travel to rank 0 as DCP's result, which puts them into the manifest.
        sealed = files.seal(self._folder / name)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(name), sealed["bytes"], sealed)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all shards are on the disk."""
        sealed = {result.index.fqn: result.storage_data for written in results for result in written}
        files.commit(self._root, self._snapshot, files.SHARDED_VERSION, sealed)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
