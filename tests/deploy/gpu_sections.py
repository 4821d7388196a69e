"""Sections of the GPU check that go wrong in every way, for the tests of how they are run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from deploy.gpu_checks.report import Options, Report


def sound(report: Report, options: Options) -> None:
    report.check("one and one", 1 + 1 == 2)
    report.figure("a number", 3.0, "of them")


def wrong(report: Report, options: Options) -> None:
    report.close("one and one", 0.5, 0.1)
    report.close("not a number", float("nan"), 0.1)


def raising(report: Report, options: Options) -> None:
    report.check("before", True)
    raise ZeroDivisionError("as when a library has a fault")


def crashing(report: Report, options: Options) -> None:
    report.check("before", True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(report: Report, options: Options) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (options.folder / "child").write_text(str(child.pid))
    report.check("before", True)
    time.sleep(600)


def idle(report: Report, options: Options) -> None:
    report.note("left out: there is nothing to do")
