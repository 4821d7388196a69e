"""A real service as a child process, for tests that go through the front door.

with TeacherProcess(script={"delay_s": 0.1}, keys="alice 0123456789abcdef") as teacher:
    httpx.get(teacher.url + "/v1/teacher")
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.workers import ports_of_this_worker

READY = re.compile(r"stillhouse-(?:teacher|attention): ready at (\S+), (\S+), (\S+)")
START_TIMEOUT_S = 240.0


_given: set[int] = set()


def free_port() -> int:
    """A port that nobody holds, that no other worker is given, and that is below those that the kernel gives away by
    itself: until its user binds it, no outgoing connection takes it, and none that tries to reach it meets itself.
    """
    while True:
        port = random.SystemRandom().choice(ports_of_this_worker())
        if port in _given:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.add(port)
            return port


class ServiceProcess:
    """Starts `python -m MODULE ARGUMENTS` on a free port.

    `url`, `model` and `fingerprint` are the ready line's. `log` is what it has written to stderr. Leaving the block
    kills it if it still runs.
    """

    def __init__(
        self, module: str, *arguments: str, keys: str | None = None, port: int = 0,
        environment: dict[str, str] | None = None, wait: bool = True,
    ):  # fmt: skip
        self._folder = tempfile.TemporaryDirectory(prefix="stillhouse-test-")
        command = [sys.executable, "-m", module, *arguments, "--port", str(port)]
        if keys is not None:
            keys_file = Path(self._folder.name, "keys")
            keys_file.write_text(keys + "\n")
            command += ["--keys", str(keys_file)]
        self._log = Path(self._folder.name, "log").open("w+")  # noqa: SIM115 - closed by stop()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=inherited | {"OMP_NUM_THREADS": "1", "STILLHOUSE_DIE_WITH_PARENT": "1"} | (environment or {}),
        )  # fmt: skip
        self.pid = self.process.pid
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.stop()
                raise

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Read the ready line; AssertionError with the log if the process ends before it."""
        killer = threading.Timer(timeout_s, self.process.kill)
        killer.start()
        try:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            while line and not READY.match(line):
                line = self.process.stdout.readline()
        finally:
            killer.cancel()
        match = READY.match(line)
        assert match, f"the service ended before it was ready:\n{self.log}"
        self.url, self.model, self.fingerprint = match.groups()
        host, port = str(self.url).rpartition("//")[2].split(":")
        self.host: str = host
        self.port = int(port)

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's events of this name."""
        lines = (json.loads(line) for line in self.log.splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == name]

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class TeacherProcess(ServiceProcess):
    """`stillhouse-teacher` with the scripted engine, or whatever `options` say."""

    def __init__(self, *options: str, script: dict[str, Any] | None = None, **arguments: Any):
        scripted: tuple[str, ...] = ()
        if not any(option.startswith("--engine") for option in options):
            scripted = ("scripted", "--engine", "scripted", "--script", json.dumps(script or {}))
        super().__init__("teacher_service.main", *scripted, *options, **arguments)


class AttentionProcess(ServiceProcess):
    """`stillhouse-attention` over the model in a folder."""

    def __init__(self, model: Path, *options: str, **arguments: Any):
        super().__init__("attention_service.main", str(model), *options, **arguments)
