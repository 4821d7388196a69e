"""Checkpoints in shards: what some ranks saved, any number of ranks loads bit for bit, and a single process too."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from student_trainer.checkpoint import checkpoints as checkpoint
from student_trainer.checkpoint.checkpoints import Checkpoints
from student_trainer.checkpoint.remote import RemoteCheckpoints
from student_trainer.optim.optimizer import Optimizer, build_optimizer
from student_trainer.ranks import Ranks
from student_trainer.settings import CheckpointSettings, OptimSettings
from student_trainer.state import TrainState
from student_trainer.students.sharding import shard
from student_trainer.students.student import Student
from tests.unit.students.tiny import tiny_model
from tests.unit.trainer.sharded_runs import (
    CONSTANT,
    MIXTURE,
    at_call,
    joined,
    learn,
    made,
    on_ranks,
    save,
    state_of,
)

WORLDS = (1, 2, 4)


def save_on(rank: int, world: int, port: int, kind: str, root: Path) -> None:
    with joined(rank, world, port) as ranks:
        student, optimizer = made(0, kind, ranks)
        learn(student, optimizer, 2)
        save(root / "checkpoints", 2, student, optimizer, ranks).close()
        state = state_of(student, optimizer)
        if ranks.first:
            torch.save(state, root / "state.pt")


def load_on(rank: int, world: int, port: int, kind: str, roots: list[Path], out: Path) -> None:
    """What comes of each checkpoint, and of one more update after it."""
    with joined(rank, world, port) as ranks:
        states = []
        for root in roots:
            student, optimizer = made(1, kind, ranks)
            snapshot = checkpoint.newest(root / "checkpoints")
            assert snapshot is not None
            assert checkpoint.restore(snapshot, student, optimizer) == TrainState(2, 14, MIXTURE)
            loaded = state_of(student, optimizer)
            learn(student, optimizer, 1)
            states.append((loaded, state_of(student, optimizer)))
        if ranks.first:
            torch.save(states, out)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module", params=["adamw", "muon_clip"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """The same student saved on one, two and four ranks."""
    roots = [tmp_path_factory.mktemp(f"on-{world}") for world in WORLDS]
    for world, root in zip(WORLDS, roots, strict=True):
        assert on_ranks(world, save_on, request.param, root) == [0] * world
    return request.param, roots


def test_saved_on_one_two_and_four_ranks_loads_on_each_bit_for_bit(
    saved: tuple[str, list[Path]], tmp_path: Path
) -> None:
    kind, roots = saved
    expected = torch.load(roots[0] / "state.pt")
    assert any("blend" in name for name in expected) and any("//" in name for name in expected)
    for world in WORLDS:
        assert on_ranks(world, load_on, kind, roots, tmp_path / f"{world}.pt") == [0] * world
        after = torch.load(tmp_path / f"{world}.pt")
        for state, next_state in after:
            assert_same(state, expected)
            assert_same(next_state, torch.load(tmp_path / "1.pt")[0][1])


def test_a_shard_is_plain_safetensors_with_a_rank_s_rows_and_the_manifest_names_all(
    saved: tuple[str, list[Path]],
) -> None:
    _, roots = saved
    for world, root in list(zip(WORLDS, roots, strict=True))[1:]:
        folder = root / "checkpoints" / "step-00000002"
        shards = [f"shard-{rank:05d}.safetensors" for rank in range(world)]
        assert {path.name for path in folder.iterdir()} == {
            *shards,
            "random.safetensors",
            "state.json",
            "manifest.json",
        }
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["version"] == 2 and set(manifest["files"]) == {*shards, "random.safetensors", "state.json"}
        sizes = [(folder / name).stat().st_size for name in shards]
        assert max(sizes) < 1.2 * sum(sizes) / world
    alone = json.loads((roots[0] / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert alone["version"] == 1 and "model.safetensors" in alone["files"]


def test_a_damaged_shard_is_seen(saved: tuple[str, list[Path]], tmp_path: Path) -> None:
    _, roots = saved
    root = tmp_path / "checkpoints"
    shutil.copytree(roots[1] / "checkpoints", root)
    shard = root / "step-00000002" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoint.newest(root)
    shard.unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoint.newest(root)


def test_a_copy_elsewhere_is_whole(saved: tuple[str, list[Path]], tmp_path: Path) -> None:
    kind, roots = saved
    settings = CheckpointSettings(url=str(tmp_path / "store"))
    remote = RemoteCheckpoints(settings, "run")
    remote.upload(roots[2] / "checkpoints" / "step-00000002")
    remote.close()
    (tmp_path / "fresh").mkdir()
    RemoteCheckpoints(settings, "run").pull(tmp_path / "fresh" / "checkpoints", -1, "0")
    assert on_ranks(1, load_on, kind, [tmp_path / "fresh"], tmp_path / "out") == [0]
    ((loaded, _),) = torch.load(tmp_path / "out")
    assert_same(loaded, torch.load(roots[0] / "state.pt"))


def refuse(code: int) -> None:
    raise OSError(code, os.strerror(code))


def save_with_every_call_refused(rank: int, world: int, port: int, faulty: int, code: int, root: Path) -> None:
    """One save after the other; the first, second, ... call of rank `faulty` is refused until there is none left."""
    with joined(rank, world, port) as ranks:
        student, optimizer = made(0, "adamw", ranks)
        keeper = save(root, 1, student, optimizer, ranks, keep=50)
        at, reached = 0, []
        while True:
            at += 1
            step = at + 1
            patched = at_call(at if ranks.rank == faulty else 0, lambda: refuse(code))
            failed = False
            keeper.save(TrainState(step, step, MIXTURE), student, optimizer)
            try:
                keeper.finish(last=True)
            except OSError as error:
                failed = True
                assert os.strerror(code) in str(error)
            patched.undo()
            # Committed or not, all ranks are told; what rank 0 does by itself after that, it alone is told of.
            told = ranks.total(int(failed))
            assert told in (0, world) or (faulty == 0 and (root / f"step-{step:08d}").exists()), told
            if ranks.first:
                kept = checkpoint.newest(root)
                assert kept is not None and kept.step in (step - 1, step)
                assert kept.step == step or failed
                reached.append(kept.step)
                assert not list(root.glob(".unfinished-*"))
            # What the failed save left behind is not in the way of the next.
            keeper.save(TrainState(step, step, MIXTURE), student, optimizer)
            keeper.finish(last=True)
            assert not ranks.first or checkpoint.newest_step(root) == step
            if not ranks.total(int(failed)):
                break
        keeper.close()
        # Mkdir, two writes and the shard's seal at least on rank 0; a write and a seal on the other.
        assert at > (12 if faulty == 0 else 2)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("faulty", [0, 1])
def test_a_save_refused_at_any_call_on_any_rank_fails_on_all_and_leaves_the_one_before(
    faulty: int, code: int, tmp_path: Path
) -> None:
    assert on_ranks(2, save_with_every_call_refused, faulty, code, tmp_path / "checkpoints") == [0, 0]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(rank: int, world: int, port: int, victim: int, at: int, root: Path) -> None:
    with joined(rank, world, port) as ranks:
        student, optimizer = made(0, "adamw", ranks)
        save(root, 1, student, optimizer, ranks).close()
        learn(student, optimizer, 1)
        keeper = Checkpoints(root, CheckpointSettings(), CONSTANT, ranks)
        at_call(at if ranks.rank == victim else 0, die)
        keeper.save(TrainState(2, 2, MIXTURE), student, optimizer)
        with pytest.raises(ConnectionError, match="another rank is gone"):
            keeper.finish(last=True)
        keeper.close()
        os._exit(0)  # the group's other side is gone: nothing is left to take leave of


# Rank 0 goes through some sixteen calls; these are its shard's write, its seal, the state's write, the manifest's, the
# last before the rename. Of the other rank the write and the seal are all.
@pytest.mark.parametrize(("victim", "at"), [(0, 2), (0, 3), (0, 5), (0, 9), (0, 11), (1, 1), (1, 2)])
def test_a_rank_killed_in_the_midst_of_a_save_leaves_the_checkpoint_before(
    victim: int, at: int, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    codes = on_ranks(2, save_and_die, victim, at, root)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 0
    kept = checkpoint.newest(root)
    assert kept is not None and kept.step == 1
    # What the killed save left behind is not in the way of the next.
    assert on_ranks(2, save_again, root) == [0, 0]
    assert checkpoint.newest_step(root) == 2


def save_again(rank: int, world: int, port: int, root: Path) -> None:
    with joined(rank, world, port) as ranks:
        student, optimizer = made(0, "adamw", ranks)
        save(root, 2, student, optimizer, ranks).close()


def memory(name: str) -> int:
    """Bytes: a line of /proc/self/status."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def large(ranks: Ranks) -> tuple[Student, Optimizer]:
    """29M parameters."""
    model = tiny_model("llama", hidden_size=1024, intermediate_size=2048, vocab_size=8192, head_dim=256)
    student = Student(model, None, None, model.lm_head)  # type: ignore[arg-type]
    shard(student, ranks)
    return student, build_optimizer(OptimSettings(), model, model.lm_head, 100)


def save_measured(rank: int, world: int, port: int, root: Path) -> None:
    with joined(rank, world, port) as ranks:
        student, optimizer = large(ranks)
        learn(student, optimizer, 1)
        optimizer.zero_grad()
        own = sum(
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes
            for tensor in (*student.tensors().values(), *optimizer.state().values())
        )
        assert own > 100e6
        save(root, 1, student, optimizer, ranks).close()  # whatever is loaded once; its thread has let the copies go
        keeper = Checkpoints(root, CheckpointSettings(), CONSTANT, ranks)
        ranks.total(0)
        ctypes.CDLL(None).malloc_trim(0)  # else the copies lie where the gradients were
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        keeper.save(TrainState(2, 2, MIXTURE), student, optimizer)
        keeper.finish(last=True)
        peak = memory("VmHWM") - before
        assert 0.9 * own < peak < 1.2 * own, f"{peak / own:.2f} of the own shard"
        (root / f"peak-{rank}").write_text(f"{peak / own:.3f}")
        keeper.close()


def test_a_save_takes_no_more_memory_than_its_own_shard(tmp_path: Path) -> None:
    """The resident memory at its peak, against that before the save."""
    assert on_ranks(2, save_measured, tmp_path) == [0, 0]
