"""What waiting OpenMP threads cost: a training step by how long they spin, alone and beside another training process.

    make bench-spinning                       1.5 minutes; six layers of SmolLM2-135M's shape, 256 tokens per step
    python -m benchmarks.spinning --seconds 20

Each process trains on all cores for the same seconds; its figure is the mean time of a step. `as started` is what
`teacher_proto.process.threads` sets, `default` is libgomp without any setting.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.report import report
from teacher_proto.process.threads import CHOSEN_BY, SPINS

WAYS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "as started": {"GOMP_SPINCOUNT": str(SPINS)},
    "10 times as long": {"GOMP_SPINCOUNT": str(10 * SPINS)},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="training time of each measurement")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(train(options.seconds))
        return 0
    rows: list[dict[str, Any]] = []
    for name, variables in WAYS.items():
        alone, two = (measure(processes, variables, options.seconds) for processes in (1, 2))
        rows.append({"waiting": name, "alone, ms a step": 1000 * alone, "two at once, ms a step": 1000 * two})
    by_name = {row["waiting"]: row for row in rows}
    ratios = {
        f"as started / {other}, {what}": by_name["as started"][what] / by_name[other][what]
        for other in ("default", "passive") for what in ("alone, ms a step", "two at once, ms a step")
    }  # fmt: skip
    report("spinning", rows, ratios, title=f"A training step on {len(os.sched_getaffinity(0))} cores")
    return 0


def measure(processes: int, variables: dict[str, str], seconds: float) -> float:
    """Mean seconds of a step over processes that train at the same time."""
    inherited = {name: value for name, value in os.environ.items() if name not in (*CHOSEN_BY, "OMP_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.spinning", "--train", "--seconds", str(seconds)]
    started = [
        subprocess.Popen(command, env=inherited | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in started) / processes


def train(seconds: float) -> float:
    """Train a model with random weights for that long, once told to; mean seconds of a step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from teacher_proto.hardware import auto_dtype

    config = LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    model, dtype = LlamaForCausalLM(config), auto_dtype("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids_BT = torch.randint(config.vocab_size, (1, 256))

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the warm-up
    print("ready", flush=True)
    sys.stdin.readline()
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        step()
        steps += 1
    return (time.perf_counter() - begin) / steps


if __name__ == "__main__":
    sys.exit(main())
