"""What SubLN costs SmolLM2-135M-Instruct before any training, by its initial gains: cross-entropy on prose of the
standard library. `make bench-sub_norm_start [ARGS=--docs]`, two minutes of a core.

The gains are calibrated on the first rows, and cross-entropy is measured on the rest. Columns are fractions of
quantisation, as its warm-up passes through them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.report import publish, report
from demo.comparison import markdown
from demo.prepare import TEACHER, TEXT, prepare
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import CausalDocuments, View
from student_trainer.calibration.sub_norms import calibrate_sub_norms
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.reporting.json_lines import read_lines
from student_trainer.settings import QuantisationSettings, StudentSettings
from student_trainer.students.quant_linear import set_quantisation_blend
from student_trainer.students.student import Student

LENGTH, CALIBRATED, HELD_OUT = 256, 4, 8  # tokens per row; rows for each purpose
BLENDS = (0.0, 0.25, 0.5, 1.0)
STARTS = {"without SubLN": ("none", "ones"), "gains of 1": ("output", "ones"), "typical RMS": ("output", "rms")}
DOCS = Path(__file__).parent.parent / "docs" / "guides" / "bitdistill.md"


def rows_of(ids_BT: torch.Tensor) -> MicroBatch:
    """Every token but a row's first is a label, predicted by the one before it."""
    labels_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    labels_BT[:, :-1] = True
    rows_N = labels_BT.flatten().nonzero().flatten()
    none_N = torch.zeros_like(rows_N)
    view = View(
        ids_BT, torch.arange(ids_BT.shape[1]).expand_as(ids_BT), CausalDocuments(torch.zeros_like(ids_BT).int()),
        rows_N, ids_BT.flatten()[rows_N + 1], torch.arange(len(rows_N)),
    )  # fmt: skip
    return MicroBatch(view, none_N, none_N, None)


@torch.no_grad()
def cross_entropy(student: Student, micro: MicroBatch) -> float:
    view = micro.view
    hidden_BTD = student.body(view.input_ids_BT, view.position_ids_BT, view.attention)
    logits_NV = student.head.logits(hidden_BTD.flatten(0, 1)[view.rows_N])
    return float(F.cross_entropy(logits_NV, view.labels_N))


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/guides/bitdistill.md")
    options = parser.parse_args()
    prepare(("teacher", "text"))
    documents = [line["text"] for line in read_lines(TEXT / "prose.jsonl")]
    ids = AutoTokenizer.from_pretrained(TEACHER)("\n\n".join(documents)[:100_000], return_tensors="pt").input_ids[0]
    ids_BT = ids[: (CALIBRATED + HELD_OUT) * LENGTH].view(-1, LENGTH)
    calibrating, held_out = rows_of(ids_BT[:CALIBRATED]), rows_of(ids_BT[CALIBRATED:])
    rows = []
    for name, (sub_norm, start) in STARTS.items():
        quantisation = QuantisationSettings(sub_norm=sub_norm, sub_norm_start=start)
        student = load_student(
            StudentSettings(quantiser="bitnet", checkpoint_path=str(TEACHER), compute="float32",
                            quantisation=quantisation),
            torch.device("cpu"),
        )  # fmt: skip
        if start == "rms":
            calibrate_sub_norms(student, [calibrating])
        row = {"student": name}
        for blend in BLENDS:
            set_quantisation_blend(student.model, blend)
            row[f"{100 * blend:.0f} % quantised"] = f"{cross_entropy(student, held_out):.2f}"
        rows.append(row)
    report("sub_norm_start", rows, title="cross-entropy before any training, by what SubLN starts with")
    if options.docs:
        publish(DOCS, markdown(rows))


if __name__ == "__main__":
    main()
