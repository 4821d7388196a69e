"""How a service's command ends: with the code that it earned, after its exit handlers, and before what libraries do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from serving.main import run_command

COMMAND = """
import argparse, atexit, sys
from serving.main import run_command

class Complains:  # as a library does whose objects are left when the interpreter ends
    def __del__(self):
        sys.stderr.write("leaked\\n")

def command(arguments):
    import builtins
    builtins.kept = Complains()
    atexit.register(lambda: print("closed"))
    return {body}

run_command("stillhouse-x", command, None)
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND.format(body=body)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("0", 0, ""),
        ("70", 70, ""),
        ("[].index(3)", 2, "stillhouse-x: 3 is not in list\n"),
        ("sys.exit(3)", 3, ""),
        ("argparse.ArgumentParser().parse_args(['--help'])", 0, ""),
        ("(_ for _ in ()).throw(KeyboardInterrupt)", 130, ""),
    ],
)
def test_the_code_is_the_command_s_and_nothing_is_said_behind_it(body: str, code: int, said: str) -> None:
    done = run(body)
    assert (done.returncode, done.stderr) == (code, said)
    assert done.stdout.endswith("closed\n"), "exit handlers ran"


def test_an_error_of_ours_has_its_traceback_and_code_1() -> None:
    done = run("1 / 0")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "leaked" not in done.stderr


def test_within_another_process_it_only_raises() -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("stillhouse-x", lambda arguments: len(arguments), ["a", "b"])
    assert ended.value.code == 2
