"""Exports a run's student for other software: `stillhouse-train export RUN --format FORMAT`. Called by `main`.

Rebuilds the student from the run's newest checkpoint, writes it with a model card, loads the files with the software
that they are for, and compares the logits with the student's. Exit code 1 if the two are not the same model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from student_trainer.checkpoint.earlier_run import earlier_run, load_student, model_behind, settings_of
from student_trainer.checkpoint.files import Snapshot
from student_trainer.export.card import ModelCard
from student_trainer.export.check import LogitsComparison, compare_logits, llama_cpp_logits, transformers_logits
from student_trainer.export.export import EXPORTS
from student_trainer.export.folder import ExportReport
from student_trainer.export.packed import load_packed
from student_trainer.reporting.json_lines import read_lines
from student_trainer.settings import StudentSettings
from student_trainer.settings.redact import public_tree
from student_trainer.students.diffusion_record import read_diffusion
from student_trainer.students.load import merged
from student_trainer.students.pretrained import load_quantised
from student_trainer.students.quant_linear import is_quantised
from student_trainer.students.student import Student
from teacher_proto.process.stages import stage

# Mean KL in nats. Int8 rounding on another machine changes a deep ternary model by hundredths; a wrong export, by nats.
SAME_MODEL_KL = 0.2
CHECKED_TOKENS = 64


class NotTheSameError(ArithmeticError):
    """The exported files, loaded again, are not the student."""


def main(arguments: Sequence[str]) -> int:
    """Write and check. ValueError for a run that this format cannot hold, NotTheSameError if the check fails."""
    options = _parser().parse_args(arguments)
    snapshot = earlier_run(str(options.run))
    if snapshot is None:
        raise ValueError(f"{options.run} is not the folder of a run: expected one with settings.yaml in it")
    trained = settings_of(snapshot)
    settings = StudentSettings(
        architecture=trained.architecture, quantiser=trained.quantiser, checkpoint_path=str(options.run),
        attention="sdpa",
    )  # fmt: skip
    model = model_of(load_student(settings, torch.device("cpu")))
    tokenizer = _tokenizer(settings)
    card = card_of(options.run, snapshot, options.name or options.run.resolve().name)
    folder = options.out or options.run / "exports" / options.format
    extra: dict[str, Any] = {}
    if options.format == "gguf":
        extra["ternary_type"] = options.ternary_type
    elif options.format == "hf":
        extra["architecture"] = options.architecture
    elif options.format == "dense":
        extra["adapter"] = options.adapter
    with stage(f"writing {folder}"):
        report = EXPORTS[options.format](model.eval(), tokenizer, folder, card, **extra)
    print(f"{report.folder}: {report.format}, {report.architecture}, {report.num_bytes / 2**20:,.1f} MiB")
    for note in report.notes:
        print(f"  note: {note}")
    if not options.skip_check:
        try:
            with stage("reloading the export to check it"):
                _check(model, tokenizer, report)
        except KeyboardInterrupt:
            # The files are complete but not checked, and would be in the way of the same command, started again.
            shutil.rmtree(report.folder, ignore_errors=True)
            raise
    return 0


def model_of(student: Student) -> Any:
    """The model to write: an adapter is merged into full-precision weights, but kept beside quantised ones."""
    return student.model if is_quantised(student.model) else merged(student)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stillhouse-train export", description="Export the student of a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--format", choices=list(EXPORTS), required=True,
        help="hf: full-precision (latent) weights, for transformers; bitnet: 2 bits per weight, for transformers; "
        "gguf: one file, for llama.cpp; sdar: a block-diffusion student, for SGLang; packed: integer codes and scales, "
        "in safetensors; dense: the dequantised weights, for any software",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder to create (default: RUN/exports/FORMAT)")
    parser.add_argument("--name", help="name on the model card (default: the run's)")
    parser.add_argument(
        "--architecture", choices=("auto", "original"), default="auto",
        help="hf: original keeps the base model's architecture and weight names (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ternary-type", choices=("TQ1_0", "TQ2_0"), default="TQ2_0",
        help="gguf: 1.69 or 2.06 bits per weight (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", choices=("merged", "beside"), default="merged",
        help="dense: merge the adapter into the weights, or write it beside them for peft (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-check", action="store_true",
        help="do not load the export to compare its logits with the student's",
    )  # fmt: skip
    return parser


def card_of(run: Path, snapshot: Snapshot, name: str) -> ModelCard:
    """What the run knows about its student: base model, teacher, data, last evaluation, and settings."""
    settings, teacher = public_tree(snapshot.state["settings"]), snapshot.state["teacher"]
    base = model_behind(StudentSettings.model_validate(settings["student"])).checkpoint_path
    return ModelCard(
        name=name,
        base_model=Path(base).name if Path(base).is_dir() else base,
        teacher=teacher["name"] if teacher else "",
        teacher_fingerprint=teacher["fingerprint"] if teacher else "",
        data=tuple(_sources(settings["data"]["sources"])),
        figures=_figures(run, snapshot),
        config=yaml.safe_dump(settings, sort_keys=False),
    )


def _sources(sources: dict[str, Any]) -> list[str]:
    lines = []
    for name, source in sources.items():
        where = source["name"] or ", ".join(Path(path).name for path in source["path"])
        lines.append(f"{name}: {source['kind']} {where}, weight {source['weight']:g}".replace("  ", " "))
    return lines


def _figures(run: Path, snapshot: Snapshot) -> dict[str, str]:
    """Steps and tokens trained, and the last evaluation up to the checkpoint's step."""
    figures = {"steps": f"{snapshot.step:,}", "tokens": f"{snapshot.state['tokens']:,}"}
    lines = read_lines(run / "evaluation.jsonl")
    last: dict[str, Any] = next((line for line in reversed(lines) if line["step"] <= snapshot.step), {})
    for source, values in last.items():
        if isinstance(values, dict):
            named = ((figure, value) for figure, value in values.items() if isinstance(value, float))
            figures |= {f"held-out {figure}, {source}, step {last['step']}": f"{value:.4f}" for figure, value in named}
    return figures


def _tokenizer(settings: StudentSettings) -> PreTrainedTokenizerBase:
    behind = model_behind(settings)
    return AutoTokenizer.from_pretrained(behind.tokenizer or behind.checkpoint_path, revision=behind.revision)


def _check(model: Any, tokenizer: PreTrainedTokenizerBase, report: ExportReport) -> None:
    """Print how far the files' logits are from the student's, on the text of the model card."""
    words = (report.folder / "README.md").read_text()
    ids_BT = np.array([tokenizer(words)["input_ids"][:CHECKED_TOKENS]])
    reader, comparison = reopened(model, report, ids_BT)
    _write_findings(report, reader, comparison)
    if comparison is None:
        print(
            "  reloaded: every tensor is as it was written; logits not compared, as llama-cpp-python is not installed"
        )
        return
    print(
        f"  reloaded with {reader}: KL {comparison.kl:.2g} nats, same first choice in {comparison.agreement:.1%}, "
        f"logits differ by {comparison.difference:.2g} of their spread"
    )
    if not comparison.kl <= SAME_MODEL_KL:
        raise NotTheSameError(
            f"{report.folder} does not match the trained student: KL {comparison.kl:.3g} nats with {reader}, "
            f"expected at most {SAME_MODEL_KL}"
        )


def _write_findings(report: ExportReport, reader: str, comparison: LogitsComparison | None) -> None:
    """Write `export.json`, for programs: what was written and how it compares."""
    findings = {
        "format": report.format, "architecture": report.architecture, "stands_alone": report.stands_alone,
        "num_bytes": report.num_bytes, "reader": reader,
        "comparison": None if comparison is None else asdict(comparison),
    }  # fmt: skip
    (report.folder / "export.json").write_text(json.dumps(findings, indent=1))


def reopened(model: Any, report: ExportReport, ids_BT: np.ndarray) -> tuple[str, LogitsComparison | None]:
    """What loaded the files, and how their logits compare with the model's; None if the loader is not installed."""
    with torch.no_grad():
        ours_BTV = model.eval()(torch.from_numpy(ids_BT), use_cache=False).logits.float().numpy()
    if report.format == "gguf":
        (file,) = report.folder.glob("*.gguf")
        theirs = [llama_cpp_logits(file, ids_T) for ids_T in ids_BT]
        kept = [logits_TV for logits_TV in theirs if logits_TV is not None]
        return ("llama.cpp", compare_logits(ours_BTV, np.stack(kept))) if kept else ("gguf", None)
    if report.format == "sdar":
        return "this trainer's own SDAR loader", compare_logits(*_in_blocks(model, report.folder, ids_BT))
    if report.stands_alone:
        try:
            (theirs_BTV,) = transformers_logits([report.folder], ids_BT)
        except RuntimeError as error:
            raise NotTheSameError(str(error)) from None
        return "transformers alone", compare_logits(ours_BTV, theirs_BTV)
    opened_by = load_packed if report.format == "packed" else load_quantised
    with torch.no_grad():
        again = opened_by(str(report.folder)).eval()
        theirs_BTV = again(torch.from_numpy(ids_BT), use_cache=False).logits.float().numpy()
    return opened_by.__name__, compare_logits(ours_BTV, theirs_BTV)


def _in_blocks(model: Any, folder: Path, ids_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logits of a text read block by block: the model's, and those of the export, loaded as any SDAR folder."""
    settings = StudentSettings(architecture="diffusion", checkpoint_path=str(folder), attention="sdpa")
    again = load_student(settings, torch.device("cpu")).model.eval()
    record = read_diffusion(again.config)
    assert record is not None
    block_T = torch.arange(ids_BT.shape[1]) // record.block_size
    mask_BTT = (block_T[:, None] >= block_T[None, :])[None, None].expand(len(ids_BT), 1, -1, -1)
    with torch.no_grad():
        ours_BTV, theirs_BTV = (
            each(torch.from_numpy(ids_BT), attention_mask=mask_BTT, use_cache=False).logits.float().numpy()
            for each in (model.eval(), again)
        )
    return ours_BTV, theirs_BTV
