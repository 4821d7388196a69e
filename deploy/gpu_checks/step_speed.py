"""Measures tokens per second, memory, recompilations and waits for the device of training steps at Qwen3's shapes.

The real trainer with random weights and a tiny teacher of the same vocabulary in its process, so that the student's
step is measured: forward, fused head, backward, clipping, AdamW.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch

from deploy.gpu_checks import trainers
from deploy.gpu_checks.models import QWEN3_0_6B, QWEN3_1_7B, TINY, save_qwen3, write_tokens
from deploy.gpu_checks.report import Options, Report

ROWS, LENGTH = 4, 2048


def small(report: Report, options: Options) -> None:
    _run(report, options, QWEN3_0_6B)


def large(report: Report, options: Options) -> None:
    if options.tiny:
        report.note("left out: on a CPU, both shapes would be the same tiny one")
    else:
        _run(report, options, QWEN3_1_7B)


def _run(report: Report, options: Options, shape: dict[str, Any]) -> None:
    rows, length = (2, 48) if options.tiny else (ROWS, LENGTH)
    shape = TINY if options.tiny else shape
    with torch.device(options.device):
        dtype = torch.float32 if options.tiny else torch.bfloat16
        student = save_qwen3(options.folder / "student", shape, dtype=dtype)
        teacher = save_qwen3(options.folder / "teacher", TINY | {"vocab_size": shape["vocab_size"]}, seed=1)
    if options.device == "cuda":
        torch.cuda.empty_cache()
    text = write_tokens(options.folder / "text.jsonl", 1200 if not options.tiny else 60, length // 2)
    arguments = trainers.settings(
        options, options.folder, student, teacher, f"data.sources.text.path={text}", "run.steps=1000",
        f"data.seq_len={length}", f"data.rows={rows}", "checkpoint.every=0", "optim.learning_rate=1e-5",
    )  # fmt: skip
    output, found = options.folder / "trainer.txt", options.folder / "watched.json"
    trainers.finish(trainers.start([str(found), *arguments], output, "deploy.gpu_checks.watched"), output)
    seen = json.loads(found.read_text())
    lines = [line for line in trainers.metrics(options.folder) if seen["from"] < line["step"] <= seen["until"]]
    rate = statistics.median(line["tokens_per_second"] for line in lines)
    report.figure(f"tokens per second, {rows} rows of {length:,}, {len(lines)} steps", rate, "tokens/s")
    report.figure("seconds per step", statistics.median(line["seconds"] for line in lines), "s")
    report.figure("of which waiting for targets", statistics.median(line["wait_s"] for line in lines), "s")
    if options.device == "cuda":
        report.figure("peak memory of the process", seen["peak_bytes"] / 1e9, "GB")
        waits = seen["waits"]
        report.figure("waits for the device per step", sum(waits.values()) / seen["waited_steps"], "waits")
        for place, count in sorted(waits.items(), key=lambda item: -item[1])[:8]:
            report.note(f"  {count / seen['waited_steps']:.1f} per step at {place}")
    report.figure("compiled graphs by the end", seen["graphs"], "graphs")
    report.figure("recompilations after the second step", seen["recompilations"], "", "0")
