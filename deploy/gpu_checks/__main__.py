"""`deploy/gpu_check`: does everything work on this machine's GPU, and how fast? Writes runs/gpu/CARD.json too.

    deploy/gpu_check                          everything, in at most eight minutes; needs no network
    deploy/gpu_check --device cpu             the same with tiny shapes on a CPU, to test the check itself
    deploy/gpu_check --only head,head_speed   some sections; `--list` lists them
    deploy/gpu_check --wheels FOLDER          on a machine with a network: collect what a machine without one lacks if
                                              it has torch, transformers and Triton (--python 3.12: for that Python)
    deploy/gpu_check --install FOLDER         on that machine: unpack those wheels into runs/gpu/site, then check

Every section is a separate process with a time budget, so one that fails, crashes or hangs does not affect the others.
Findings are written to disk at once. Exit codes: 0 all checks of correctness passed, 1 some did not, 2 the command
cannot be run as given.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from deploy.gpu_checks import wheels


def main() -> int:
    options = _options()
    if options.wheels is not None:
        return wheels.collect(options.wheels, options.python)
    if options.install is not None:
        wheels.unpack(options.install, options.out / "site")
        # Start again, so that all processes find them.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [os.environ.get("PYTHONPATH", ""), str((options.out / "site").resolve())]
        )
        arguments = list(sys.argv[1:])
        at = next(i for i, argument in enumerate(arguments) if argument.startswith("--install"))
        del arguments[at : at + (1 if "=" in arguments[at] else 2)]
        os.execv(sys.executable, [sys.executable, "-m", "deploy.gpu_checks", *arguments])
    # Imports torch, so only now.
    from deploy.gpu_checks.run import SECTIONS, run_sections

    if options.list:
        for section in SECTIONS:
            print(f"{section.name:16} {section.about}, at most {section.budget_s} s")
        return 0
    names = options.only.split(",") if options.only else [section.name for section in SECTIONS]
    if unknown := set(names) - {section.name for section in SECTIONS}:
        print(f"gpu_check: unknown section {', '.join(sorted(unknown))}; --list shows the sections", file=sys.stderr)
        return 2
    try:
        return run_sections(names, options.device, options.out, options.minutes * 60)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deploy/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of all sections together (default: 8)")
    parser.add_argument("--only", metavar="NAME,...", help="run only these sections")
    parser.add_argument("--list", action="store_true", help="list the sections")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="only collect wheels for another machine")
    parser.add_argument(
        "--python", default=None, metavar="3.N", help="with --wheels: that machine's Python (default: this one's)"
    )
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="first unpack these wheels")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
