"""Services, trainers and other processes of a demo, each in its own process group, that end with it. Used by the demos.

They end however the demo ends. On an error, SIGTERM or Ctrl-C, `Processes` ends them within five seconds; if the demo
is killed, they notice that their parent is gone (STILLHOUSE_DIE_WITH_PARENT).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from demo.screen import POLL_S, Screen

BIN = Path(sys.executable).parent
READY_WITHIN_S = 600.0
ENDS_WITHIN_S = 3.5
# Services and student share the cores here: a thread that waits for another must not spin.
# The progress bars of libraries would appear line by line between ours.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TQDM_DISABLE": "1", **os.environ, "STILLHOUSE_DIE_WITH_PARENT": "1"}


class TooLongError(Exception):
    """A process missed its deadline and was ended."""


class Stopped(SystemExit):
    """A signal has stopped the demo; the exit code is the one that a shell reports for it."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@dataclass
class _Held:
    """Defers signals in its blocks: a process that is being started must be registered before it can be ended."""

    open: bool = True
    signals: list[int] = field(default_factory=list)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.open = False
        try:
            yield
        finally:
            self.open = True
        if self.signals:
            raise Stopped(self.signals.pop())


_held = _Held()


@contextmanager
def stoppable() -> Iterator[None]:
    """A block in which SIGTERM and SIGINT raise `Stopped`."""

    def stop(number: int, frame: object) -> None:
        if not _held.open:
            _held.signals.append(number)
            return
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Stopped as stopped:
        print(f"stopped by {stopped.signal.name}", file=sys.stderr, flush=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Processes:
    """All processes that a demo starts. Leaving the block ends them and what they have started."""

    def __init__(self, screen: Screen):
        self.screen = screen
        self._running: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # This takes bounded time and must not be interrupted.
        with _held():
            self._end(list(self._running))

    def start(self, command: list[str], **popen: Any) -> subprocess.Popen[Any]:
        """Start a process in its own session, which includes what it starts."""
        with _held():
            process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **popen)
            self._running.append(process)
        return process

    def end(self, process: subprocess.Popen[Any]) -> None:
        self._end([process])

    def _end(self, processes: list[subprocess.Popen[Any]]) -> None:
        """Send SIGTERM to all at once, and finally SIGKILL to whatever is left of their groups."""
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + ENDS_WITHIN_S
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in processes:
            # There is no group if all of it has ended, as it should have.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._running.remove(process)

    def run(
        self, what: str, command: list[str], *, detail: Callable[[], str] = str, deadline: float | None = None,
        own_bar: bool = False,
    ) -> None:  # fmt: skip
        """Run a command to its end and relay its lines. `own_bar`: on a terminal the command shows its own progress.

        SystemExit if it fails. TooLongError at `deadline` (monotonic), at which the command is ended.
        """
        inherits = own_bar and self.screen.is_terminal
        pipes = {} if inherits else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = self.start(command, **pipes)
        relay = _relayed(process.stdout, self.screen) if process.stdout else None

        def done() -> bool:
            if deadline is not None and time.monotonic() > deadline:
                raise TooLongError(f"{what} did not finish in time")
            return process.poll() is not None

        try:
            if inherits:
                while not done():
                    time.sleep(POLL_S)
            else:
                self.screen.until(what, done, detail)
        finally:
            code = process.poll()
            self.end(process)
            if relay is not None:
                relay.join(timeout=1)
        if code:
            raise SystemExit(f"{what} ended with code {code}: {' '.join(command)}")

    @contextmanager
    def serve(self, name: str, arguments: list[str], log_file: Path) -> Iterator[Callable[[], str]]:
        """Run the service `name` on a free port. Yields a function that waits until it is ready and returns its URL."""
        command = [str(BIN / name), *arguments, "--port", "0"]
        self.screen.say(f"$ {' '.join(command)}", style="dim")
        with log_file.open("wb") as log:
            process = self.start(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield lambda: self._wait_ready(process, name, log_file)
        finally:
            self.end(process)

    def _wait_ready(self, process: subprocess.Popen[Any], name: str, log_file: Path) -> str:
        """The URL that the service reports when it is ready. SystemExit with the end of its log if it never is."""
        tail = _Tail(log_file, name)
        deadline = time.monotonic() + READY_WITHIN_S
        with self.screen.waiting(f"starting {name}") as still:
            while time.monotonic() < deadline:
                ended = process.poll() is not None
                for line in tail.new_lines():
                    self.screen.relay(line)
                    if ready := re.match(rf"{name}: ready at (\S+?),", line):
                        return ready[1]
                if ended:
                    raise SystemExit(f"{name} ended with code {process.returncode}; end of {log_file}:\n{tail.end()}")
                still(f"log in {log_file}")
                time.sleep(POLL_S)
        raise SystemExit(f"{name} was not ready within {READY_WITHIN_S:.0f} s; see {log_file}")


class _Tail:
    """The service's own lines in its log, each once: those that begin with its name."""

    def __init__(self, path: Path, name: str):
        self._path, self._name, self._read = path, name, 0

    def new_lines(self) -> list[str]:
        text = self._path.read_text(errors="replace")
        whole = text.rfind("\n") + 1
        new, self._read = text[self._read : whole], max(self._read, whole)
        return [line for line in new.splitlines() if line.startswith(f"{self._name}: ")]

    def end(self) -> str:
        return "\n".join(self._path.read_text(errors="replace").splitlines()[-15:])


def _relayed(pipe: IO[str], screen: Screen) -> threading.Thread:
    """A thread that relays the lines of `pipe`."""

    def relay() -> None:
        for line in pipe:
            screen.relay(line.rstrip("\n"))

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    return thread


def train(processes: Processes, what: str, settings: list[str], detail: Callable[[], str] = str, **run: Any) -> None:
    """`stillhouse-train SETTINGS`, as a user would run it."""
    processes.run(what, [str(BIN / "stillhouse-train"), *settings], detail=detail, own_bar=True, **run)


def prepared(processes: Processes, *names: str) -> None:
    """Run `demo.prepare` in its own process, which can be ended at any time and then frees its memory."""
    processes.run("preparation", [sys.executable, "-m", "demo.prepare", *names])
