"""What tests of the trainer stand on: a tiny student, text that the scripted teacher would write, the trainer as a
process, and the scripted teacher without a socket.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.engine import Job
from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.checkpoint import files
from student_trainer.targets.protocol import Queries, TeacherCard
from student_trainer.targets.queries import spec_of
from teacher_proto.client.waiting import Waiting
from teacher_proto.identity import tokenizer_sha256
from teacher_proto.process.parent import end_spawned_with_parent
from teacher_service.engines.scripted import Script, ScriptedEngine
from teacher_service.engines.scripted_model import scripted_logits
from tests.models import VOCAB_SIZE, save_tiny_llama, tiny_tokenizer

# One process that has imported everything, from which trainers are forked: a start costs no imports.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["student_trainer.build", "student_trainer.main", "transformers.models.llama"])


TOKENS = len(tiny_tokenizer())


def tokenizer_hash() -> str:
    """What a teacher with the tiny students' tokenizer would publish."""
    return tokenizer_sha256({index: token for token, index in tiny_tokenizer().get_vocab().items()})


def teacher_script(**changes: Any) -> dict[str, Any]:
    """A script for a scripted teacher that has the tiny students' tokenizer."""
    identity = {"semantic.tokenizer_sha256": tokenizer_hash(), **changes.pop("identity", {})}
    return {"vocab_size": VOCAB_SIZE, "identity": identity, **changes}


def write_documents(path: Path, count: int, seed: int, longest: int = 40, sharpness: float = 1.5) -> Path:
    """JSON lines of token ids as the scripted teacher would write them, so that it is right about its own text."""
    draw = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(count):
            tokens = [int(draw.integers(2, TOKENS))]
            for _ in range(int(draw.integers(0, longest))):
                logits_V = scripted_logits(np.array(tokens), VOCAB_SIZE)[-1, :TOKENS] * sharpness
                p_V = np.exp(logits_V - logits_V.max())
                tokens.append(int(draw.choice(TOKENS, p=p_V / p_V.sum())))
            file.write(json.dumps({"input_ids": tokens}) + "\n")
    return path


class Workshop:
    """A folder with a tiny student and two sources; `settings` gives the command line of a small run over them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.student = save_tiny_llama(folder / "student", num_hidden_layers=1)
        self.sources = {name: write_documents(folder / f"{name}.jsonl", 150, seed) for seed, name in enumerate("ab")}

    def settings(self, root: Path, *overrides: str, url: str | None = None) -> list[str]:
        lines = [
            f"student.checkpoint_path={self.student}", "student.compute=float32", f"run.root={root}", "run.id=run",
            "run.steps=12", "run.threads=1", "data.seq_len=48", "data.rows=4", "data.held_out_rows=3", "data.workers=1",
            f"data.cache_folder={self.folder / 'cache'}", "teacher.top_k=16", "evaluation.every=0",
            "checkpoint.every=4", "logging.wandb=off", "logging.progress=off", "optim.learning_rate=3e-3",
        ]  # fmt: skip
        for name, path in self.sources.items():
            lines += [f"data.sources.{name}.{field}" for field in (
                "kind=jsonl", "format=tokens", f"path={path}", "held_out_fraction=0.1")]  # fmt: skip
        return [*lines, *([f"teacher.url={url}"] if url else []), *overrides]


class TrainerProcess:
    """`stillhouse-train ARGUMENTS` in a process of its own, forked from one that has done the imports.

    What it prints goes to `output`. Leaving the block kills it if it still runs. `prelude` is run first, in the child.
    """

    def __init__(self, arguments: list[str], output: Path, prelude: Callable[[], None] | None = None):
        self.output = output
        self._process = FORKS.Process(target=_child, args=(arguments, str(output), prelude), daemon=False)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def signal(self, number: int) -> None:
        """Nothing where it has just ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout_s: float = 120.0) -> int:
        """The exit code; minus the signal's number where one ended it."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"the trainer still runs after {timeout_s} s:\n{self.text}"
        return self._process.exitcode

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _child(arguments: list[str], output: str, prelude: Callable[[], None] | None) -> None:
    with open(output, "ab", buffering=0) as file:  # noqa: PTH123 - its descriptor becomes this process's own
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    from student_trainer import main

    end_spawned_with_parent()
    if prelude is not None:
        prelude()
    code = main.run(arguments)
    sys.stderr.flush()
    # As a fresh interpreter would end: forkserver's own exit handlers are none of the trainer's.
    os._exit(code)


def train(
    arguments: list[str], output: Path, prelude: Callable[[], None] | None = None, timeout_s: float = 120.0
) -> int:
    """Run a trainer to its end and return its exit code."""
    with TrainerProcess(arguments, output, prelude) as trainer:
        return trainer.wait(timeout_s)


def wait_for_step(
    folder: Path, step: int, trainer: TrainerProcess, timeout_s: float = 90.0, since: float = 0.0
) -> None:
    """Until the run's metrics have reached `step`, by a line of later than `since`, as time.time() has it: those that a
    killed run left are there until its next start takes them out.
    """
    deadline = time.monotonic() + timeout_s
    while not any(line["step"] >= step and line["time"] >= since for line in lines_of(folder)):
        assert trainer.running, f"the trainer ended before step {step}:\n{trainer.text}"
        assert time.monotonic() < deadline, f"step {step} was not reached:\n{trainer.text}"
        time.sleep(0.02)


def lines_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = folder / name
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in lines_of(folder)]


# What of a metrics line must be the same in two runs that claim to be one: all but times and how it was prefetched.
TIMES = ("time", "seconds", "tokens_per_second", "wait_s", "wait_share", "prefetch_depth", "on_policy/write_s")


def trace_of(folder: Path) -> list[dict[str, Any]]:
    """The run's figures step by step, to the last bit (JSON floats round-trip)."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines_of(folder)]


def final_files(folder: Path, step: int) -> dict[str, bytes]:
    """Parameters, optimizer and random state of a checkpoint: of each tensor its type, shape and bytes, by file and
    name. What several ranks wrote in shards is named as one rank's.
    """
    snapshot = files.read(folder / "checkpoints" / f"step-{step:08d}")
    return {
        f"{file}/{name}": repr((tensor.dtype, tensor.shape)).encode()
        + tensor.view(-1).view(torch.uint8).numpy().tobytes()
        for file, tensors in snapshot.tensors.items()
        for name, tensor in tensors.items()
    }


class ScriptedTargets:
    """`Targets` of a scripted engine in this process. `delay(batch number)` seconds pass before each answer."""

    def __init__(self, script: dict[str, Any] | None = None, delay: Callable[[int], float] = lambda number: 0.0):
        self.engine = ScriptedEngine(Script(**(script or teacher_script())))
        self._delay = delay
        self.fetched: list[int] = []

    async def open(self) -> TeacherCard:
        identity, limits = self.engine.identity, self.engine.limits
        return TeacherCard(
            name="scripted", fingerprint=identity.fingerprint, vocab_size=limits.vocab_size,
            max_sequence_length=limits.max_sequence_length, tokenizer_sha256=identity.semantic.tokenizer_sha256,
            max_top_k=limits.max_top_k, kinds=self.engine.kinds, identity=identity.model_dump(mode="json"),
        )  # fmt: skip

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        self.fetched.append(batch.number)
        await asyncio.sleep(self._delay(batch.number))
        answers = [None if query is None else await self.engine.score(Job(query, "test")) for query in queries]
        return BatchTargets(tuple(answers), spec_of(queries), self.engine.identity.fingerprint)

    def outage(self) -> str:
        return ""

    def waiting(self) -> Waiting | None:
        return None

    async def close(self) -> None:
        await self.engine.close()


def random_delays(seed: int, longest_s: float) -> Callable[[int], float]:
    draw = random.Random(seed)
    return lambda number: draw.uniform(0.0, longest_s)


def run_here(arguments: list[str], targets: Any | None = None) -> int:
    """A whole run in this process; `targets` stand in for the teacher at the URL."""
    import torch

    from student_trainer import build_components, loop
    from student_trainer.build import build
    from student_trainer.cli.compose import compose
    from student_trainer.targets.open import Teacher
    from teacher_proto.process.stopping import StopSignals

    threads = torch.get_num_threads()

    def open_here(settings: Any, thread: Any, stack: ExitStack, saved: Any = None) -> Teacher:
        assert targets is not None
        return Teacher(thread.call(targets.open()), targets)

    real = build_components.open_teacher
    if targets is not None:
        build_components.open_teacher = open_here
    try:
        with ExitStack() as stack:
            return loop.train(build(compose(arguments), StopSignals(), stack))
    finally:
        build_components.open_teacher = real
        torch.set_num_threads(threads)


SIGKILL, SIGTERM = signal.SIGKILL, signal.SIGTERM
