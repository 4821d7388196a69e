"""Save and publish the results of `make classification` so far: `make bench-classification [ARGS=--docs]`, seconds.

Copies the results in `runs/classification` to `benchmarks/results/classification.jsonl` and, with --docs, writes the
tables into docs/classification.md. Unfinished runs are left out; nothing is trained here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import publish, report
from demo.classification_plan import Plan
from demo.classification_table import arm_rows, length_rows, search_rows, verdict
from demo.comparison import markdown
from student_trainer.reporting.json_lines import read_lines

RUNS = Path("runs/classification")
RESULTS = Path(__file__).parent / "results" / "classification.jsonl"
DOCS = Path(__file__).parent.parent / "docs" / "classification.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/classification.md")
    options = parser.parse_args()
    if not (RUNS / "results.jsonl").is_file():
        raise SystemExit(f"{RUNS} has no results.jsonl: run `make classification` first")
    plan = Plan(**json.loads((RUNS / "plan.json").read_text()))
    lines = read_lines(RUNS / "results.jsonl")
    RESULTS.write_text((RUNS / "results.jsonl").read_text())
    report("classification", arm_rows(lines), {"verdict": verdict(lines)}, title=title(plan, lines))
    if options.docs:
        publish(DOCS, body(plan, lines))
    return 0


def title(plan: Plan, lines: Sequence[dict[str, Any]]) -> str:
    seconds = sum(line["seconds"] for line in lines)
    return (
        f"A student of {plan.layers} layers; {plan.steps} steps of about 34 examples per arm, {plan.teacher_steps} for "
        f"the teacher, {plan.stage2_steps} steps of 1,024 tokens for stage 2. {len(lines)} runs, {seconds / 60:.0f} "
        f"minutes of training steps on {plan.machine['cpu']}, with other work on the machine"
    )


def body(plan: Plan, lines: Sequence[dict[str, Any]]) -> str:
    teacher = next((line for line in lines if line["phase"] == "teacher"), None)
    parts = [f"{title(plan, lines)}. Accuracy on the test split, mean ± standard deviation over seeds:"]
    parts += [markdown(arm_rows(lines))] if arm_rows(lines) else []
    if teacher is not None:
        parts.append(
            f"The teacher: {100 * teacher['accuracy']:.1f} % of {teacher['examples']} examples of the validation split."
        )
    parts.append(verdict(lines))
    if rows := length_rows(lines, plan):
        parts += ["Accuracy by stage 2's length, arm `logits`:", markdown(rows)]
    if rows := search_rows(lines):
        parts += ["Everything that was tried on the validation split:", markdown(rows)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
