"""The demo's teacher as a service, which can score in advance what a run will request. Used by `step` and
`quality_sharing`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.servers import END_WITH_ME
from demo.prepare import TEACHER

READY_WITHIN_S = 900.0
READY = re.compile(r"^stillhouse-teacher: ready at (\S+),", re.MULTILINE)


@contextmanager
def serve_teacher(root: Path, *options: str) -> Iterator[str]:
    """Serve the demo's teacher with transformers, by default in float32 with a target store; yields the URL. SystemExit
    if it does not become ready.
    """
    options = options or ("--dtype", "float32", "--store", str(root / "store"))
    command = [sys.executable, "-m", "teacher_service.main", str(TEACHER), "--port", "0", "--engine", "hf", *options]
    log = root / "teacher.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | END_WITH_ME)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while not (ready := READY.search(log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the teacher did not become ready: see {log}")
            time.sleep(0.5)
        yield ready[1]
    finally:
        process.terminate()
        process.wait(timeout=60)


def fill(arguments: list[str], steps: int, url: str) -> None:
    """Have the teacher score all that a run will request, every kind of target in one pass."""
    from student_trainer.build_components import load_tokenizer
    from student_trainer.cli.compose import compose_arguments
    from student_trainer.data.loader import BatchSource
    from student_trainer.targets.background import EventThread
    from student_trainer.targets.queries import queries_of
    from student_trainer.targets.remote import RemoteTargets
    from teacher_proto.client.teacher_client import TeacherClient
    from teacher_proto.requests import TargetSpec

    settings = compose_arguments(arguments)
    source = BatchSource(settings.data, load_tokenizer(settings), settings.run.seed)
    state, batches = source.initial_state(), []
    for number in range(steps):
        batch, state = source.batch(state, number)
        batches.append(batch)
    held_out = [batch for name in source.names for batch in source.held_out(name)]
    source.close()
    spec = TargetSpec(("top_k", "sampled", "hidden"), top_k=64, num_samples=50, hidden_dtype="float16")
    with EventThread() as thread:
        teacher = RemoteTargets(lambda: TeacherClient(url), (url,), settings.teacher)
        thread.call(teacher.open())
        for batch in (*batches, *held_out):
            thread.call(teacher.fetch(batch, queries_of(batch, spec)))
        thread.call(teacher.close())
