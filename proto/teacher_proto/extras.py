"""The message for a command whose libraries are not installed. Called by the entry point of every command.

The wheel contains all commands; `pip install 'stillhouse[EXTRA]'` installs the libraries that one of them needs.
"""

from __future__ import annotations

OURS = ("teacher_proto", "serving", "teacher_service", "attention_service", "student_trainer")
# What to install for each command.
EXTRAS = {
    "stillhouse-teacher": "'stillhouse[teacher]', on a CPU 'stillhouse[teacher-cpu]'",
    "stillhouse-attention": "'stillhouse[attention]'",
    "stillhouse-train": "'stillhouse[trainer]'",
}


def explain_missing(program: str, error: ModuleNotFoundError) -> str:
    """One line for a library that is not installed. If a module of our own is missing, `error` itself is raised."""
    library = (error.name or "").partition(".")[0]
    if not library or library in OURS:
        raise error
    return f"{program} needs {library}, which is not installed: pip install {EXTRAS[program]}"
