"""`stillhouse-attention MODEL`: serve a language model's attention beside a teacher of the same model.

    stillhouse-attention HuggingFaceTB/SmolLM2-135M-Instruct --port 8001
    stillhouse-attention MODEL --teacher-url http://localhost:8000 --layer 20

Prints one line on stdout once it is ready:
`stillhouse-attention: ready at URL, MODEL, FINGERPRINT in DTYPE`. Logs go to stderr.
Exit codes: 0 drained, 1 aborted, 2 can't serve what was requested, 70 the engine died.
"""

from __future__ import annotations

from serving.main import run_command


def main(arguments: list[str] | None = None) -> None:
    """Entry point. User errors become one line on stderr and exit code 2."""
    run_command("stillhouse-attention", _serve, arguments)


def _serve(arguments: list[str]) -> int:
    from attention_service.settings import parse_settings

    settings = parse_settings(arguments)
    # Slow imports come after parsing, so that --help and a misspelt option are answered at once.
    from attention_service.app import run

    return run(settings)


if __name__ == "__main__":
    main()
