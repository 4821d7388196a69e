"""Stops a command within seconds of SIGTERM or Ctrl-C, whatever its main thread does. Every command enters it first, in
`command_end.stoppable`.

A signal raises `Stop` in the main thread, which ends waiting, reading and computing alike. In three kinds of block it
does not:

- `holding`: the signal waits for the end of the block (an update, a copy of the state to be saved);
- `finishing`: the same, for work that must be done before the process ends, however long it takes: saving, uploading;
- `cancelling`: an asyncio task is cancelled instead, since an exception would not get through asyncio.

A native call that does not return delays the exception. So a second thread learns of the signal too, raises it again
every second, and after `GRACE_S` ends the process itself, with its child processes; `rescued` registers what it does
before. The same limit applies while a main thread that has caught `Stop` closes what is open.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from teacher_proto.process.stages import DISPLAY
from teacher_proto.process.tree import descendants, end

if TYPE_CHECKING:
    import asyncio

EXIT_STOPPED = 75  # EX_TEMPFAIL: start the command again and it continues
EXIT_IMPATIENT = 130
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The exception is raised again at this interval: a library may have swallowed it as an error of its own.
AGAIN_S = 1.0
# After this long the process ends whatever its main thread does, well within the five seconds that are promised.
GRACE_S = 3.5
# Time for closing what is open after a block of `holding` or `finishing` that took longer than that.
CLOSE_S = 2.0
# How long an ending process waits until the line that names its signal is printed: nobody may read standard error.
TELL_S = 1.0
POLL_S = 0.1


class Stop(KeyboardInterrupt):
    """A signal has asked the process to end. Not an `Exception`: libraries catch those and go on."""


class StopSignals:
    """Handles the signals while entered, in the main thread; in others it installs nothing. `program` is the prefix of
    its messages.

    A second Ctrl-C, at least a second after the first signal, ends the process at once, without saving.
    """

    Stop = Stop

    def __init__(self, program: str = "stillhouse") -> None:
        self.received: signal.Signals | None = None
        self._program = program
        self._raising, self._unlimited, self._obeyed, self._taken_over = True, False, False, False
        self._since = self._limit_from = 0.0
        self._rescue: Callable[[], None] | None = None
        self._cancel: Callable[[], object] | None = None
        self._children: dict[int, str] = {}
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._told = threading.Event()
        self._unraisable_before = sys.unraisablehook

    def check(self) -> None:
        """Raise `Stop` if a signal has arrived."""
        if self.received is not None and not self._obeyed:
            raise self.Stop(f"{self.received.name} received")

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A signal ends the block at once, as it does outside of any block."""
        with self._mode(True, self._unlimited):
            yield

    @contextmanager
    def holding(self) -> Iterator[None]:
        """A signal waits for the end of the block, or for a `raising` block inside it."""
        with self._mode(False, True):
            yield

    def finishing(self) -> AbstractContextManager[None]:
        """Like `holding`, for saving and uploading. Afterwards there are `CLOSE_S` seconds to close what is open."""
        return self.holding()

    @contextmanager
    def cancelling(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """A signal cancels `task`, which the main thread's event loop runs; leaving the block then raises `Stop`."""
        loop = task.get_loop()
        # Called within a signal handler: `task.cancel` alone would not wake an event loop that is asleep.
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            with self._mode(False, False):
                if self.received is not None:
                    task.cancel()
                yield
        finally:
            self._cancel = None

    @contextmanager
    def rescued(self, rescue: Callable[[], None]) -> Iterator[None]:
        """If the main thread is stuck in a native call of a `raising` block, the watching thread calls `rescue` before
        it ends the process; the main thread runs nothing from then on.
        """
        self._rescue = rescue
        try:
            yield
        finally:
            self._rescue = None

    def obey(self) -> None:
        """Called by whoever caught `Stop`: it is not raised again, and what is open must be closed in the time left."""
        self._obeyed, self._raising = True, False
        self._wait_for_takeover()

    def leave(self, code: int) -> NoReturn:
        """End the process and its children without waiting for its threads: one that loads a model can't be stopped,
        and the interpreter would wait minutes for it.
        """
        if self.received is not None and self._pipe is not None:
            self._told.wait(TELL_S)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                stream.flush()
        self._end(code)

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        global _active
        _active = self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        # Python's C handler writes to this pipe at once, even while the main thread runs native code.
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        pipe = self._pipe
        self.forget()
        if pipe is not None:
            os.close(pipe[1])  # which ends the thread

    def forget(self) -> None:
        """Restore the signal handlers from before."""
        global _active
        if self._pipe is not None:
            _active = self._pipe = None
            signal.set_wakeup_fd(-1)
            sys.unraisablehook = self._unraisable_before
            for number, before in self._before.items():
                signal.signal(number, before)

    @contextmanager
    def _mode(self, raising: bool, unlimited: bool) -> Iterator[None]:
        before = self._raising, self._unlimited
        self._limit_from = time.monotonic()
        self._raising, self._unlimited = raising and not self._obeyed, unlimited
        try:
            self._wait_for_takeover()
            if raising:
                self.check()
            yield
        finally:
            self._limit_from = time.monotonic()
            self._raising, self._unlimited = before[0] and not self._obeyed, before[1]
        if self._raising:
            self.check()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: runs in the main thread, between two bytecode instructions."""
        if self.received is None:
            self.received = signal.Signals(number)
            # Before anything unwinds: if a child is ended on the way, its own children can no longer be found.
            self._children |= descendants(os.getpid())
        if self._pipe is not None:
            _write(self._pipe[1], bytes([number]))
        self._wait_for_takeover()
        if self._cancel is not None:
            self._cancel()
        if self._raising:
            self.check()

    def _on_unraisable(self, unraisable: Any) -> None:
        """Report unraisable exceptions only before a signal. A `Stop` raised in a finaliser can't be caught, but the
        watching thread raises it again; and an object that it left half built may lack attributes in its finaliser.
        """
        if self.received is None:
            self._unraisable_before(unraisable)

    def _wait_for_takeover(self) -> None:
        """Hold the main thread here once the watching thread has begun to end the process."""
        while self._taken_over:
            time.sleep(POLL_S)

    def _watch(self, pipe: int) -> None:
        """The watching thread: waits for the first signal, then limits the time until the process has ended."""
        first = _read(pipe)
        if first is None:
            os.close(pipe)
            return
        self._since = self._limit_from = time.monotonic()
        again_at = self._since + AGAIN_S
        self._say(f"{signal.Signals(first).name} received, stopping")
        while True:
            if select.select([pipe], [], [], POLL_S)[0]:
                number = _read(pipe)
                if number is None:
                    os.close(pipe)
                    return
                if number == signal.SIGINT and time.monotonic() - self._since > AGAIN_S:
                    self._say("Ctrl-C again, ending at once")
                    self._end(EXIT_IMPATIENT)
            self._children |= descendants(os.getpid())
            now = time.monotonic()
            if self._unlimited and not self._raising:
                continue
            if now > max(self._since + GRACE_S, self._limit_from + CLOSE_S):
                self._take_over()
            elif not self._obeyed and now > again_at:
                again_at = now + AGAIN_S
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _take_over(self) -> None:
        """End the process from the watching thread. Returns if the main thread has entered `holding` meanwhile."""
        self._taken_over = True
        if self._unlimited and not self._raising:
            self._taken_over = False
            return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # its handler waits for the takeover
        code = EXIT_STOPPED
        if not self._obeyed and self._rescue is not None:
            self._say("the current computation can't be interrupted: saving without it")
            try:
                self._rescue()
            except Exception as error:  # the process ends in any case, and prints what went wrong
                self._say(f"{type(error).__name__}: {error}")
                code = 1
        self._end(code)

    def _say(self, text: str) -> None:
        """Print from another thread: standard error may block, or the main thread may hold the stream's lock."""

        def say() -> None:
            DISPLAY.print(f"{self._program}: {text}")
            self._told.set()

        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        saying.join(POLL_S)

    def _end(self, code: int) -> NoReturn:
        self._children |= descendants(os.getpid())
        end(self._children)
        if os.isatty(2):
            _write(2, b"\x1b[?25h")  # a bar may have hidden the cursor
        os._exit(code)


_active: StopSignals | None = None


def finishing() -> AbstractContextManager[None]:
    """`StopSignals.finishing` of the running command, for code that does not have the object."""
    on_main = threading.current_thread() is threading.main_thread()
    return _active.finishing() if _active is not None and on_main else nullcontext()


def _forget_in_child() -> None:
    """A forked child does not inherit the handling: its signals are its own, and the pipe is its parent's."""
    if _active is not None:
        _active.forget()


os.register_at_fork(after_in_child=_forget_in_child)


def _read(pipe: int) -> int | None:
    data = os.read(pipe, 1)
    return data[0] if data else None


def _write(descriptor: int, data: bytes) -> None:
    """Write to the descriptor directly, since a signal may have interrupted code that holds a stream's lock. Writes
    nothing if that would block.
    """
    try:
        if select.select([], [descriptor], [], 0)[1]:
            os.write(descriptor, data)
    except OSError:
        return  # nobody reads it any more
