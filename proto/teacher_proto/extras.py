"""What to say where a package of ours is installed without the libraries of a command. Called by every command's edge.

The wheel holds all commands; `pip install 'stillhouse[EXTRA]'` brings what one of them imports.
"""

from __future__ import annotations

OURS = ("teacher_proto", "serving", "teacher_service", "attention_service", "student_trainer")
# By command, what to install.
EXTRAS = {
    "stillhouse-teacher": "'stillhouse[teacher]', on a CPU 'stillhouse[teacher-cpu]'",
    "stillhouse-attention": "'stillhouse[attention]'",
    "stillhouse-train": "'stillhouse[trainer]'",
}


def explain_missing(program: str, error: ModuleNotFoundError) -> str:
    """One line for a library that is not installed. The error itself is raised where a module of our own is missing."""
    library = (error.name or "").partition(".")[0]
    if not library or library in OURS:
        raise error
    return f"{program} needs {library}, which is not installed: pip install {EXTRAS[program]}"
