"""`stillhouse-train`: distil a student from a served teacher.

    stillhouse-train student.checkpoint_path=FOLDER data=text data.sources.text.path=FOLDER teacher.url=http://HOST:PORT
    stillhouse-train check SETTINGS...     check the settings and say what would run, without training
    stillhouse-train report RUN ...        write the HTML report of a run
    stillhouse-train sequences FILE SETTINGS...   write the sequences of a run, for `stillhouse-teacher fill`
    stillhouse-train influence DATA --target DATA SETTINGS...   weight documents by their influence on a target
    stillhouse-train export RUN --format hf|bitnet|gguf|sdar    export a student for transformers, llama.cpp, SGLang
    stillhouse-train generate FOLDER --prompt TEXT    generate text with the student of a run or an export

Exit codes: 0 done; 1 stopped by an error; 2 wrong settings or input; 75 start it again: it was stopped by a signal and
has saved its state, or a service that it needs did not answer; 130 a second Ctrl-C. Every command obeys SIGTERM and
Ctrl-C within 5 s, plus the time that a checkpoint takes to save.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NoReturn, TextIO

from teacher_proto.process.command_end import hasten_end, skip_teardown, stoppable
from teacher_proto.process.parent import end_with_parent_if_asked
from teacher_proto.process.threads import spin_briefly

if TYPE_CHECKING:
    from teacher_proto.process.stopping import StopSignals

from student_trainer.exit_codes import FAILED, USAGE, code_of

# Imported only when called.
SUBCOMMANDS = {
    "check": "student_trainer.cli.check",
    "export": "student_trainer.cli.export",
    "generate": "student_trainer.cli.generate",
    "influence": "student_trainer.cli.influence",
    "report": "student_trainer.reporting.report",
    "sequences": "student_trainer.cli.sequences",
}
logger = logging.getLogger("stillhouse")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A mistake of the user gives one line on stderr and exit code 2."""
    end_with_parent_if_asked()
    spin_briefly()
    atexit.register(skip_teardown)  # registered first, so called last
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has seen enough, such as `head`. What is left in the buffer is dropped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        leave(code)
    hasten_end(code)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End one of several ranks without tearing down the interpreter; all our resources are closed. gloo's threads
    outlive the process group, which FSDP's mesh keeps alive, and would run on while what they use is destroyed.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """The exit code of a command. A command that was stopped by a signal ends the process itself."""
    return stoppable("stillhouse-train", lambda signals: choose(arguments, signals))


def choose(arguments: list[str], signals: StopSignals) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from student_trainer.cli.help import print_help

        print_help(str(__doc__))
        return 0 if arguments else USAGE
    start_logging()
    if arguments[0] in SUBCOMMANDS:
        return guarded(lambda: subcommand(*arguments), signals)
    return guarded(lambda: train(arguments, signals), signals)


def subcommand(name: str, *arguments: str) -> int:
    from teacher_proto.process.stages import stage

    with stage("importing libraries"):
        command: Callable[[list[str]], int] = importlib.import_module(SUBCOMMANDS[name]).main
    return command(list(arguments))


def train(arguments: list[str], signals: StopSignals) -> int:
    """Compose the settings, build the run, and train."""
    from student_trainer.cli.compose import compose_arguments
    from teacher_proto.process.stages import DISPLAY, stage

    started = time.monotonic()
    settings = compose_arguments(arguments)
    if DISPLAY.shown != "off":
        DISPLAY.shown = settings.logging.progress
    # The slow imports come only now, so that a misspelt setting is reported at once.
    with stage("importing libraries"):
        from student_trainer import loop
        from student_trainer.build import build

    with ExitStack() as stack:
        stack.callback(DISPLAY.close)
        try:
            run = build(settings, signals, stack)
            with run.ranks.noticing_the_gone():
                return loop.train(run, started)
        except signals.Stop:
            # Before anything is closed, or the signal would interrupt that too.
            signals.obey()
            raise


def guarded(command: Callable[[], int], signals: StopSignals) -> int:
    """Turns every error into a message and an exit code; only bugs of ours give a traceback. An error after a signal is
    not reported: some library made it from the exception that the signal raised in the middle of its work.
    """
    from student_trainer.settings.redact import redact
    from teacher_proto.errors import StillhouseError
    from teacher_proto.extras import explain_missing

    try:
        return command()
    except (ValueError, StillhouseError, ArithmeticError, OSError) as error:
        signals.check()
        print(redact(f"stillhouse-train: {error}"), file=sys.stderr)
        return code_of(error)
    except ModuleNotFoundError as error:
        signals.check()
        print(explain_missing("stillhouse-train", error), file=sys.stderr)
        return USAGE
    except Exception as error:
        signals.check()
        if _is_out_of_memory(error):
            what = str(error).strip().partition("\n")[0] or type(error).__name__
            print(
                f"stillhouse-train: out of memory ({what}): lower optim.micro_batch_rows, which gives the same result, "
                "or set student.gradient_checkpointing=true", file=sys.stderr,
            )  # fmt: skip
            return FAILED
        logger.exception("the run ended with an unexpected error")
        return FAILED


def _is_out_of_memory(error: Exception) -> bool:
    """Recognised by name and text, since torch may not be imported, and on a CPU raises a plain RuntimeError."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stderr, which a progress bar replaces to keep itself below all lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start_logging() -> None:
    """Log to stderr, with warnings in the same format; libraries log from level WARNING on. Of several ranks, all but
    the first log only errors. A crash in native code prints where every thread was.
    """
    faulthandler.enable(2)  # the descriptor, which a replacement of sys.stderr may not have
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"rank {rank} "
    from student_trainer.settings.redact import RedactingFormatter, redact
    from teacher_proto.process.stages import DISPLAY

    DISPLAY.clean = redact

    to_stderr = StderrHandler()
    to_stderr.setFormatter(RedactingFormatter(f"{who}%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[to_stderr])
    for name in ("student_trainer", "teacher_proto", "stillhouse"):
        logging.getLogger(name).setLevel(logging.INFO if rank == "0" else logging.ERROR)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        logging.getLogger("stillhouse").warning("%s", message)

    warnings.showwarning = show


if __name__ == "__main__":
    main()
