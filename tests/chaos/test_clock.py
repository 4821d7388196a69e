"""A clock that jumps by an hour: deadlines, retries and waiting are told by the monotonic clock alone."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.teacher_process import TeacherProcess
from tests.trainer_run import TrainerProcess, Workshop, teacher_script, trace_of, train

ROOT = Path(__file__).parents[2]
WALL_CLOCK = re.compile(r"time\.time\(|datetime\.(?:now|utcnow|today)\(|time\.(?:localtime|gmtime|strftime)\(")
# Where the time of day is what is wanted: it is written down, and nothing is decided by it.
STAMPS = {
    "services/teacher_service/compat/completions.py": "`created` of an answer",
    "services/teacher_service/compat/token_generate.py": "`created` of an answer",
    "trainer/student_trainer/reporting/logs.py": "`time` of a line",
    "trainer/student_trainer/reporting/prometheus.py": "when the last step was",
    "trainer/student_trainer/checkpoint/run_folder.py": "a run's name",
}


def test_the_time_of_day_is_read_only_to_be_written_down() -> None:
    found = set()
    for root in ("proto", "services", "trainer"):
        for path in (ROOT / root).rglob("*.py"):
            if WALL_CLOCK.search(path.read_text()):
                found.add(str(path.relative_to(ROOT)))
    assert found <= STAMPS.keys(), f"a deadline by the time of day jumps with it: {sorted(found - STAMPS.keys())}"


def jump() -> None:
    """From now on the time of day jumps an hour ahead or back with every few looks at it."""
    real, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return real() + (3600.0, 0.0, -3600.0)[looks[0] // 3 % 3]

    time.time = jumping


def test_a_run_under_a_jumping_clock_is_the_run_under_a_steady_one(workshop: Workshop, tmp_path: Path) -> None:
    settings = ("teacher.read_timeout_s=5", "teacher.deadline_s=20", "teacher.outage_timeout_s=20", "prefetch.depth=1")
    with TeacherProcess(script=teacher_script(delay_s=0.1)) as teacher:
        steady = workshop.settings(tmp_path / "steady", *settings, url=teacher.url)
        assert train(steady, tmp_path / "steady.txt") == 0
        jumping = workshop.settings(tmp_path / "jumping", *settings, url=teacher.url)
        with TrainerProcess(jumping, tmp_path / "jumping.txt", prelude=jump) as trainer:
            assert trainer.wait() == 0, trainer.text
    assert trace_of(tmp_path / "jumping" / "run") == trace_of(tmp_path / "steady" / "run")
    assert "no targets for" not in trainer.text
