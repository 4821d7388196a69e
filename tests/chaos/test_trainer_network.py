"""A network that is slow, or breaks off in the middle of an answer, between a trainer and its teacher: not one wrong
target, and the trace of a run that nothing disturbed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proxy import Fault, FaultyProxy
from tests.teacher_process import TeacherProcess
from tests.trainer_run import Workshop, final_files, lines_of, trace_of, train

STEPS = 24
# An answer of this run is about 15 kB, so a connection lives for two or so.
FAULTS = {
    "200 ms each way": Fault("latency", 0.2),
    "1 Mbit": Fault("bandwidth", 125_000),
    "RST in the body": Fault("reset", 60_000),
    "FIN in the body": Fault("finish", 60_000),
    "a black hole": Fault("silence", 120_000),
}


def arguments(workshop: Workshop, root: Path, url: str) -> list[str]:
    return workshop.settings(
        root, f"run.steps={STEPS}", "prefetch.depth=4", "teacher.read_timeout_s=1", "teacher.deadline_s=60",
        "checkpoint.every=0", f"teacher.url={url}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(workshop: Workshop, teacher: TeacherProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("straight")
    assert train(arguments(workshop, root, teacher.url), root / "output.txt") == 0
    return root / "run"


SLOW = ("RST in the body", "a black hole")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAULTS])
def test_a_faulty_network_changes_no_bit_of_the_run(
    workshop: Workshop, teacher: TeacherProcess, straight: Path, tmp_path: Path, name: str
) -> None:
    fault = FAULTS[name]
    with FaultyProxy(teacher.port, fault) as proxy:
        assert train(arguments(workshop, tmp_path, proxy.url), tmp_path / "output.txt") == 0, (
            tmp_path / "output.txt"
        ).read_text()
        if fault.kind in ("reset", "finish", "silence"):
            assert proxy.hits >= 2, "the fault was never met"
    assert trace_of(tmp_path / "run") == trace_of(straight)
    assert final_files(tmp_path / "run", STEPS) == final_files(straight, STEPS)
    assert all(0 <= line["wait_share"] <= 1 for line in lines_of(tmp_path / "run"))
