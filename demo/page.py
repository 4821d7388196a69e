"""What a demo shows at its end: a table for the terminal, and the report page. Called by `run` and `bitdistill`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from student_trainer.reporting.json_lines import read_lines


def figures_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """`rows`: a student's name -> its metrics by source."""
    shown = Table(title=title)
    for column in ("source", "student", "cross-entropy", "KL(teacher‖student)", "agreement"):
        shown.add_column(column, justify="left" if column in ("source", "student") else "right")
    last = list(rows)[-1]
    for source in rows[last]:
        for name, by_source in rows.items():
            figures = by_source[source]
            shown.add_row(
                source, name, f"{figures['cross_entropy']:.3f}", f"{figures['kl']:.3f}", f"{figures['agreement']:.1%}",
                end_section=name == last,
            )  # fmt: skip
    return shown


def write_page(runs: Path, summary: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """`about`: the arms, in their order, with what each learns from."""
    from student_trainer.reporting.report import RunRecord, write_report

    records = [RunRecord.read(runs / name, name.replace("_", " ")) for name in about]
    # Only the first arm has evaluated the student that all start from.
    before = records[0].evaluations[:1]
    records = [records[0], *(replace(record, evaluations=before + record.evaluations) for record in records[1:])]
    teacher, machine = summary["teacher"], summary["machine"]
    identity, plan = teacher["semantic"], machine["plan"]
    write_report(
        records,
        runs / "report.html",
        title="Stillhouse demo: a pruned model, healed",
        lead="Six of the teacher's thirty layers are cut out; what is left is healed for a few minutes. The students "
        "differ only in what they learn from. "
        + "; ".join(f"{name.replace('_', ' ')}: {loss}" for name, loss in about.items())
        + ".",
        facts=[
            ("teacher", f"{identity['model']}, {identity['dtype']}, fingerprint {teacher['fingerprint']}"),
            ("engine", " ".join(str(teacher["numeric"][key]) for key in ("engine", "engine_version", "device"))),
            ("machine", f"{machine['cpu']}, {machine['cores']} cores: teacher "
             f"{machine['teacher_tokens_per_second']:,.0f} tokens per second in {machine['teacher_dtype']}, student "
             f"{machine['student_tokens_per_second']:,.0f} in {machine['student_dtype']}"),
            ("steps", ", ".join(f"{arm['steps']} {name.replace('_', ' ')}" for name, arm in summary["arms"].items())
             + f", of {plan['seq_len']} tokens each"),
            ("agreement", agreement_fact(summary["verdict"])),
            ("time", f"{summary['seconds']:.0f} s in total"),
        ],
        others={"teacher": read_lines(runs / "teacher_texts.jsonl")},
        untrained="pruned",
    )  # fmt: skip


def agreement_fact(verdict: Mapping[str, Any]) -> str:
    found = verdict["agreement"]
    return (
        f"{100 * found['mean']:+.2f} ± {100 * found['standard_error']:.2f} points with the teacher, over both sources "
        f"(one standard error of the paired difference, {found['documents']} documents)"
    )
