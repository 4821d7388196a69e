"""On a CPU the memory that a step frees is there for the next one: no page is given back and cleared again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from student_trainer import device

COUNT = """
import resource, torch
from student_trainer.device import use_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(2**24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
use_device(torch.device("cpu"))
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_arrays_of_a_step_are_made_of_the_pages_of_the_last() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept * 10 <= given_back, f"{kept} pages touched anew, {given_back} before"


def test_another_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not device.keep_freed_memory()
