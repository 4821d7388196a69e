"""`stillhouse-teacher MODEL`: serve a language model as a teacher.

    stillhouse-teacher HuggingFaceTB/SmolLM2-135M-Instruct --port 8000
    stillhouse-teacher scripted --engine scripted --port 0
    stillhouse-teacher fill MODEL DATA --store FOLDER       score a data set into a target store, without a server
    stillhouse-teacher fill MODEL DATA --output URL         the same into a target dataset, in any folder or bucket
    stillhouse-teacher pack export FOLDER PARQUET_FOLDER    a target store as Parquet files; `pack import` back
    stillhouse-teacher dataset check | merge | stats URL    look after a target dataset

Prints one line on stdout once it is ready:
`stillhouse-teacher: ready at URL, MODEL, FINGERPRINT in DTYPE`. Logs go to stderr.
Exit codes: 0 drained, 1 aborted, 2 can't serve what was requested, 70 the engine died. `fill`, `pack` and `dataset`
have their own; SIGTERM and Ctrl-C end them within 5 s with 75, and started again they continue.
"""

from __future__ import annotations

from serving.main import run_command
from teacher_proto.process.command_end import stoppable
from teacher_proto.process.parent import end_spawned_with_parent
from teacher_proto.process.stopping import StopSignals

# multiprocessing imports the main module first in a process that it spawns, so that vLLM's end with their parent.
end_spawned_with_parent()


def main(arguments: list[str] | None = None) -> None:
    """Entry point. User errors become one line on stderr and exit code 2."""
    run_command("stillhouse-teacher", _command, arguments)


def _command(arguments: list[str]) -> int:
    return COMMANDS.get(arguments[0] if arguments else "", _serve)(arguments)


def _serve(arguments: list[str]) -> int:
    from teacher_service.settings import parse_settings

    settings = parse_settings(arguments)
    # Slow imports come after parsing, so that --help and a misspelt option are answered at once.
    from teacher_service.run import run

    return run(settings)


def _fill(arguments: list[str]) -> int:
    def command(signals: StopSignals) -> int:
        from teacher_service.offline.fill_command import fill_command

        return fill_command(arguments[1:], signals)

    return stoppable("stillhouse-teacher fill", command)


def _pack(arguments: list[str]) -> int:
    def command(signals: StopSignals) -> int:
        from teacher_service.offline.pack_command import pack_command

        return pack_command(arguments[1:])

    return stoppable("stillhouse-teacher pack", command)


def _dataset(arguments: list[str]) -> int:
    def command(signals: StopSignals) -> int:
        from teacher_service.offline.dataset_command import dataset_command

        return dataset_command(arguments[1:])

    return stoppable("stillhouse-teacher dataset", command)


COMMANDS = {"fill": _fill, "pack": _pack, "dataset": _dataset}


if __name__ == "__main__":
    main()
