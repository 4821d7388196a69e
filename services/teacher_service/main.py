"""`stillhouse-teacher MODEL`: serve a language model as a teacher.

    stillhouse-teacher HuggingFaceTB/SmolLM2-135M-Instruct --port 8000
    stillhouse-teacher scripted --engine scripted --port 0

On stdout comes one line, when requests can be answered: `stillhouse-teacher: ready at URL, MODEL, FINGERPRINT`.
Logs go to stderr. Exit codes: 0 drained, 1 aborted, 2 can't serve what was asked, 70 the engine died.
"""

from __future__ import annotations

import sys

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


def main(arguments: list[str] | None = None) -> None:
    """Entry point. What the user did wrong comes as one line on stderr and exit code 2."""
    from teacher_service.settings import parse_settings

    try:
        settings = parse_settings(sys.argv[1:] if arguments is None else arguments)
        # Only now the imports that take their time: --help and a misspelt option are answered at once.
        from teacher_service.run import run

        code = run(settings)
    except ValueError as error:
        print(f"stillhouse-teacher: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
