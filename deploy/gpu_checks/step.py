"""Compares steps of the trainer with flex attention and with SDPA, on packed documents."""

from __future__ import annotations

from deploy.gpu_checks import trainers
from deploy.gpu_checks.models import TINY, save_qwen3, write_tokens
from deploy.gpu_checks.report import Options, Report

STEPS = 3
# On relative errors of a step's loss and gradient norm. In bfloat16 the two kernels round attention differently.
BOUNDS = {"float32": 2e-4, "bfloat16": 3e-2}


def run(report: Report, options: Options) -> None:
    # On a GPU heads of 64, which flex attention's kernels are made for, and longer rows.
    shape = TINY if options.tiny else TINY | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
    length, rows = (48, 4) if options.tiny else (1024, 8)
    student = save_qwen3(options.folder / "student", shape)
    teacher = save_qwen3(options.folder / "teacher", TINY, seed=1)
    text = write_tokens(options.folder / "text.jsonl", 40 if options.tiny else 400, length // 2)
    # Flex attention has no backward pass on a CPU, so there SDPA is compared with itself in two micro batches.
    attention = {"sdpa, two passes": "sdpa"} if options.device == "cpu" else {"flex": "flex"}
    ways = {name: (f"student.attention={kind}", f"optim.micro_batch_rows={rows // 2}")
            for name, kind in attention.items()} | {"sdpa": ("student.attention=sdpa",)}  # fmt: skip
    for compute in ("float32",) if options.tiny else ("float32", "bfloat16"):
        started = {}
        for name, overrides in ways.items():
            folder = options.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{compute}"
            folder.mkdir()
            arguments = trainers.settings(
                options, folder, student, teacher, f"student.compute={compute}", f"data.sources.text.path={text}",
                f"run.steps={STEPS}", f"data.seq_len={length}", f"data.rows={rows}", "checkpoint.every=0",
                "optim.learning_rate=1e-3", *overrides,
            )  # fmt: skip
            started[name] = (trainers.start(arguments, folder / "output.txt"), folder)
        for process, folder in started.values():
            trainers.finish(process, folder / "output.txt")
        (tried, ours), (other, theirs) = ((name, trainers.metrics(folder)) for name, (_, folder) in started.items())
        report.check(f"{compute}: steps made", len(ours) == len(theirs) == STEPS, f"{len(ours)} and {len(theirs)}")
        for figure in ("loss", "grad_norm"):
            error = max(abs(a[figure] - b[figure]) / abs(b[figure]) for a, b in zip(ours, theirs, strict=True))
            report.close(f"{compute}: {figure} of {STEPS} steps, {tried} against {other}", error, BOUNDS[compute])
