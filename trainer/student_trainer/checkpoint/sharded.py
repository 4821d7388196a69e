"""Saves with several ranks: each writes its own shard, by torch.distributed.checkpoint (DCP). Called by `checkpoints`.

Rank 0 plans. Once all shards are on disk, it writes the rest of the checkpoint and the manifest of all files, and
renames the folder. DCP communicates over a gloo group that nothing else uses, so that a thread can save while training
goes on. `pieces` describes the shards' format and reads them.
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

# Long, because the ranks wait for the slowest disk; a rank whose process ends is noticed at once regardless.
WRITTEN_WITHIN = timedelta(hours=6)


class ShardedWriter:
    """Writes checkpoints of several `ranks`. Creating it and calling its methods are collectives."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # A separate group: a background save must not interleave with the training step's collectives.
        self._group = dist.new_group(backend="gloo", timeout=WRITTEN_WITHIN)
        self._mesh = DeviceMesh.from_group(self._group, "cpu")

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CPU copies of what this rank holds, without communication."""
        return {name: self._copied(tensor.detach()) for name, tensor in tensors.items()}

    def write(self, root: Path, snapshot: Snapshot, shards: Mapping[str, Tensor]) -> Path:
        """Write all ranks' `shards` and rank 0's `snapshot` as one checkpoint, and return its folder.

        OSError on all ranks if one could not write, RankError if one is gone; neither leaves a checkpoint.
        """
        # DCP calls `writer` back: plans are gathered on rank 0, then each rank writes the pieces assigned to it.
        writer = _Writer(root, snapshot, self._ranks.rank)
        try:
            with self._ranks.noticing_the_gone():
                dcp.save(dict(shards), storage_writer=writer, process_group=self._group)
        except dcp.CheckpointException as error:
            # DCP gathers all ranks' failures and raises them on each, so no rank goes on with half a checkpoint.
            errors = {rank: failure for rank, (failure, _) in error.failures.items()}
            if not all(isinstance(failure, OSError) for failure in errors.values()):
                raise RuntimeError(f"saving the shards failed: {error}") from error
            raise OSError("; ".join(f"rank {rank}: {failure}" for rank, failure in errors.items())) from error
        finally:
            if self._ranks.first:
                # Only there if the save failed; otherwise it was renamed.
                shutil.rmtree(files.unfinished(root, snapshot.step), ignore_errors=True)
        return root / files.folder_name(snapshot.step)

    def _copied(self, tensor: Tensor) -> Tensor:
        # This rank's rows of a sharded parameter, copied because training goes on while the thread writes.
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        copy = local.to("cpu", copy=True).contiguous()
        if not isinstance(tensor, DTensor):
            return copy
        # Wrapped again, on the CPU mesh of the separate group, so that DCP knows the rows' offsets in the full tensor.
        return DTensor.from_local(
            copy, self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )


class _Writer(dcp.StorageWriter):
    """DCP's callbacks for one save: rank 0 makes the folder, every rank writes its file, rank 0 commits."""

    def __init__(self, root: Path, snapshot: Snapshot, rank: int) -> None:
        self._root, self._snapshot, self._rank = root, snapshot, rank
        self._folder = files.unfinished(root, snapshot.step)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to reset: each save has its own writer."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the rank was given to `__init__`."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes."""
        files.begin(self._root, self._snapshot.step)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file. DCP has planned one writer for each replicated tensor. Of a tensor with fewer rows
        than ranks, some ranks hold none.
        """
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), f"{item.index.fqn} is not a tensor"
            if tensor.numel():
                # The piece has the parameter's name; its offset in the full tensor goes into the file's header.
                tensors[item.index.fqn] = tensor
                offsets[item.index.fqn] = {OFFSETS: list(item.index.offset or ())}
        name = f"{SHARD}{self._rank:05d}.safetensors"
        files.save_tensors(tensors, self._folder / name, {SHARDING_INFO: json.dumps(offsets), "format": "pt"})
        # Size and digest go to rank 0 as DCP's result; `finish` puts them into the manifest.
        sealed = files.seal(self._folder / name)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(name), sealed["bytes"], sealed)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, once all shards are on disk."""
        sealed = {result.index.fqn: result.storage_data for written in results for result in written}
        files.commit(self._root, self._snapshot, files.SHARDED_VERSION, sealed)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
