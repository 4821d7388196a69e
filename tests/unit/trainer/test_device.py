"""Which device a run and each of its ranks takes: with GPUs pretended and what torch is told of them recorded."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist

from student_trainer import randomness
from student_trainer.device import choose_device, use_device
from student_trainer.ranks import RankError, Ranks, open_ranks
from student_trainer.settings import RunSettings, Settings


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Two GPUs, as far as torch says; the calls that choose among them or connect ranks, in order."""
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", str(device))))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: calls.append(("init", backend)))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(("destroy", None)))
    return calls


def on(device: str) -> RunSettings:
    return RunSettings(device=device)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(on("auto")) == choose_device(on("cpu"), 3) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"cuda:1: no CUDA device is available; use run\.device=cpu"):
        choose_device(on("cuda:1"))


def test_each_rank_takes_a_gpu_of_its_own(gpus: list[tuple[str, object]]) -> None:
    assert choose_device(on("auto")) == torch.device("cuda", 0)
    assert choose_device(on("auto"), 1) == choose_device(on("cuda"), 1) == torch.device("cuda", 1)
    assert choose_device(on("cuda:1")) == torch.device("cuda", 1)
    assert choose_device(on("cpu"), 1) == torch.device("cpu")
    with pytest.raises(ValueError, match="needs CUDA device 2, but the machine has 2"):
        choose_device(on("auto"), 2)
    with pytest.raises(ValueError, match=r"several ranks would share it; use run\.device=cuda"):
        choose_device(on("cuda:0"), 1)


@pytest.mark.parametrize("name", ["mps", "gpu", "cuda:x"])
def test_what_is_no_device_of_ours_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"run.device={name}: expected auto, cpu, cuda or cuda:N"):
        choose_device(on(name))


def test_a_rank_takes_its_gpu_before_it_connects(
    gpus: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        assert open_ranks(Settings(), stack) == Ranks(1, 2, 1)
    assert gpus == [("set_device", "cuda:1"), ("init", "cpu:gloo,cuda:nccl"), ("destroy", None)]


def test_on_a_cpu_ranks_connect_by_gloo_and_no_gpu_is_touched(
    gpus: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        open_ranks(Settings(run=on("cpu")), stack)
    assert gpus == [("init", "gloo"), ("destroy", None)]
    use_device(torch.device("cpu"))
    assert gpus == [("init", "gloo"), ("destroy", None)]


def test_random_states_are_kept_of_this_process_s_gpu_alone(
    gpus: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, restored = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    tensors, plain = randomness.capture()
    assert [name for name in tensors if "cuda" in name] == ["torch.cuda.1"]
    randomness.restore(tensors, plain)
    assert len(restored) == 1 and torch.equal(restored[0], state)
    randomness.restore({name: tensor for name, tensor in tensors.items() if "cuda" not in name}, plain)
    assert len(restored) == 1


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp: remote process exited or there was a network error"
        ),
        dist.DistNetworkError("The client socket has failed to connect"),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3071"),
    ],
)
def test_a_lost_rank_is_recognised_by_both_backends_words(error: RuntimeError) -> None:
    with pytest.raises(RankError, match="another rank is gone"), Ranks(0, 2).noticing_the_gone():
        raise error
    with pytest.raises(type(error)), Ranks().noticing_the_gone():
        raise error


def test_another_error_is_not_a_lost_rank() -> None:
    with pytest.raises(RuntimeError, match="shapes"), Ranks(0, 2).noticing_the_gone():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
