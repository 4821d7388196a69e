"""Time and memory of a block-diffusion student's step, compared with an autoregressive step on the same tokens.

    make bench-diffusion_step                      the demo's small student, blocks of 4, 2 rows of 256 tokens
    python -m benchmarks.diffusion_step --block 16 --seq-len 512

A step is forward, cross-entropy and top-64 KL, backward, and the update, in float32. Views and targets are made in
advance, as prefetching does. Each contender runs in its own process, in turn. "Noisy half alone" is not a way to train:
it is the single view without its clean half, so the difference is the cost of the doubled sequence. Memory is the
process's peak resident size above its size with the model loaded; on a GPU, torch's peak allocation above the model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from benchmarks.loss import PeakMemory
from benchmarks.report import report
from demo.prepare import STUDENT, prepare
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import View, ViewSeed
from student_trainer.losses import token_term
from student_trainer.settings import DiffusionSettings, StudentSettings
from student_trainer.students.load import student_from_model
from student_trainer.students.student import Student
from teacher_proto import hardware
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets

AR, ONE, HALF, TWO = (
    "autoregressive",
    "diffusion, one view (suffix masks)",
    "diffusion, one view, noisy half alone",
    "diffusion, two complementary views",
)
WARM = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contender, in turn")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--contender", choices=(AR, ONE, HALF, TWO), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options)))
        return 0
    prepare(("student",))
    taken: dict[str, list[float]] = {name: [] for name in (AR, ONE, HALF, TWO)}
    most, labels = dict.fromkeys(taken, 0.0), dict.fromkeys(taken, 0)
    for _ in range(options.rounds):
        for name in taken:
            found = alone(name)
            taken[name] += found["seconds"]
            most[name], labels[name] = max(most[name], found["gib"]), found["labels"]
    tokens = options.rows * options.seq_len
    rows = [
        {"step": name, "labels": labels[name], "seconds, median": statistics.median(seconds), "fastest": min(seconds),
         "tokens a second": tokens / statistics.median(seconds), "peak memory, GiB": most[name]}
        for name, seconds in taken.items()
    ]  # fmt: skip
    middle = {name: statistics.median(seconds) for name, seconds in taken.items()}
    ratios = {
        "one view, autoregressive = 1": middle[ONE] / middle[AR],
        "two views, autoregressive = 1": middle[TWO] / middle[AR],
        "share of one view's step that is the clean half": 1.0 - middle[HALF] / middle[ONE],
        "peak memory of one view, autoregressive = 1": most[ONE] / most[AR],
    }
    title = f"{options.rows} rows of {options.seq_len} tokens, blocks of {options.block}, float32"
    report("diffusion_step", rows, ratios, title=title)
    return 0


def alone(contender: str) -> dict[str, Any]:
    """`measure` of one contender, in its own process."""
    command = [sys.executable, "-m", "benchmarks.diffusion_step", *sys.argv[1:], "--contender", contender]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each timed step, peak memory in GiB, and labels per step."""
    device = torch.device(hardware.pick_device("auto"))
    student = student_of(options, device)
    batch = random_batch(options)
    micro = [each.to(device) for each in cut(batch, random_targets(batch, student.vocab_size), student, ViewSeed(0))]
    if options.contender == HALF:
        micro = [replace(each, view=noisy_half(each.view)) for each in micro]
    terms = (token_term("cross_entropy", "cross_entropy"), token_term("kl", "forward_kl"))
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=1e-5)
    memory, seconds = PeakMemory(device.type), []
    memory.start()
    for _ in range(WARM + options.steps):
        began = time.perf_counter()
        step(student, micro, terms, optimizer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds[WARM:],
        "gib": memory.stop() / 2**30,
        "labels": sum(len(each.view.labels_N) for each in micro),
    }


def step(student: Student, micro: list[MicroBatch], terms: Any, optimizer: torch.optim.Optimizer) -> None:
    count = sum(each.view.count for each in micro)
    for each in micro:
        (student.loss(each, terms, None).total / count).backward()
    optimizer.step()
    optimizer.zero_grad()


def student_of(options: argparse.Namespace, device: torch.device) -> Student:
    settings = StudentSettings(checkpoint_path=str(STUDENT), compute="float32")
    if options.contender != AR:
        masks = "uniform" if options.contender == TWO else "suffix"
        wanted = DiffusionSettings(block_size=options.block, masks=masks)
        settings = settings.model_copy(update={"architecture": "diffusion", "diffusion": wanted})
    return student_from_model(settings, device)


def random_batch(options: argparse.Namespace) -> Batch:
    draw = np.random.default_rng(0)
    rows = [
        [Placed(0, str(row), draw.integers(0, 40_000, options.seq_len, dtype=np.int32), None)]
        for row in range(options.rows)
    ]
    return build_batch(0, rows, options.seq_len, 0, ("random",))


def random_targets(batch: Batch, vocab_size: int, k: int = 64) -> BatchTargets:
    draw = np.random.default_rng(1)
    answers = []
    for document in batch.documents:
        length = document.stop - document.start - 1
        ids = np.stack([draw.choice(vocab_size - 1, k, replace=False) for _ in range(length)]).astype(np.int32)
        logprobs = -np.sort(draw.exponential(2.0, (length, k)).astype(np.float16), -1) - np.float16(4.5)
        answers.append(TokenTargets(start=0, ids=ids, logprobs=logprobs))
    return BatchTargets(tuple(answers), TargetSpec(("top_k",), k), "")


def noisy_half(view: View) -> View:
    """The view without its clean half: half as wide, with each block on its own."""
    width = view.input_ids_BT.shape[1]
    half = width // 2
    attention = view.attention
    parts = {field.name: getattr(attention, field.name)[:, :half].contiguous() for field in fields(attention)}
    at_N = view.rows_N // width * half + view.rows_N % width
    return replace(
        view, input_ids_BT=view.input_ids_BT[:, :half].contiguous(), attention=replace(attention, **parts), rows_N=at_N,
        position_ids_BT=view.position_ids_BT[:, :half].contiguous(), clean_rows_N=None, clean_blocks_BT=None,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
