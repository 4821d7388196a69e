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

if TYPE_CHECKING:
    from teacher_proto.process.stopping import StopSignals

from student_trainer.exit_codes import FAILED, USAGE, code_of

# Imported only when they are asked for.
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
    """Entry point. What the user did wrong comes as one line on stderr and exit code 2."""
    end_with_parent_if_asked()
    atexit.register(skip_teardown)  # what is registered first is called last
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read what we print has seen enough, as `head` does; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        leave(code)
    hasten_end(code)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End one of several ranks: all of ours is closed, and the interpreter is not taken apart. The native threads of
    gloo outlive the process group, which FSDP's mesh holds on to, and would run on while what they use is destroyed.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """The exit code of a command; one that a signal stopped ends the process itself."""
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
    """Compose the settings, build the run, train it to its end."""
    from student_trainer.cli.compose import compose_arguments
    from teacher_proto.process.stages import DISPLAY, stage

    started = time.monotonic()
    settings = compose_arguments(arguments)
    if DISPLAY.shown != "off":
        DISPLAY.shown = settings.logging.progress
    # Only now the imports that take their time: a misspelt setting is answered at once.
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
            # Before anything is closed, which the signal would else interrupt again.
            signals.obey()
            raise


def guarded(command: Callable[[], int], signals: StopSignals) -> int:
    """The edge of the process: every error becomes a message and a code; a traceback is for our own mistakes. An error
    after a signal is what somebody made of the exception that the signal raised in the middle of their work.
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
    """By name and text: torch may not be imported, and its allocator on a CPU raises a plain RuntimeError."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at the time: a bar stands in for it, to keep itself below all lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start_logging() -> None:
    """Our own messages to stderr, one form for logs and warnings; libraries speak up from warnings on. Of several
    ranks, all but the first tell of errors alone. A crash in native code says where every thread was.
    """
    faulthandler.enable(2)  # the descriptor: what stands for sys.stderr need not have one
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
