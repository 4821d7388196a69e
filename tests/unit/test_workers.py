"""Workers of pytest-xdist: how many a machine carries, and that no two of them take the same port."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import workers
from tests.teacher_process import free_port


@pytest.mark.parametrize(
    ("cores", "gib", "expected"), [(2, 23.4, 2), (2, 5.0, 1), (1, 64.0, 1), (4, 2.0, 1), (64, 256.0, 8), (8, 16.0, 5)]
)
def test_one_worker_a_core_as_far_as_memory_goes(
    cores: int, gib: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_cores", lambda: cores)
    monkeypatch.setattr(workers, "_memory", lambda: gib * 2**30)
    assert workers.worker_count() == expected


def test_a_containers_limits_are_asked(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert workers.cgroup_limit("cpu.max", tmp_path) == 2.5
    assert workers.cgroup_limit("memory.max", tmp_path) is None
    assert workers.cgroup_limit("nothing.max", tmp_path) is None


def test_two_workers_never_share_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    ranges = []
    for number in range(3):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{number}")
        ranges.append(workers.ports_of_this_worker())
        assert free_port() in ranges[-1]
    assert sum(map(len, ranges)) == len(set().union(*ranges)) == len(workers.PORTS)


def test_a_port_is_given_once() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == len(ports) and all(port in workers.ports_of_this_worker() for port in ports)
