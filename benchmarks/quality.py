"""What each loss teaches: one student, one text, equal tokens, several losses, several seeds.

    python -m benchmarks.quality --docs               the table of docs/quality.md; 40 minutes on 2 cores alone
    python -m benchmarks.quality --steps 4 --seeds 0 --keep 6      a few minutes, to see that it works

The teacher scores the text of each seed once, into a target store; the runs then learn from the store, so a run costs
its student's steps alone. Runs are kept in runs/quality, and a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.report import markdown, publish, report
from benchmarks.servers import END_WITH_ME
from demo.prepare import TEACHER, prepare

ROOT = Path("runs/quality")
READY_WITHIN_S = 900.0
DOCS = Path("docs/quality.md")
READY = re.compile(r"^stillhouse-teacher: ready at (\S+),", re.MULTILINE)
PLAIN, FULL = "cross-entropy alone", "full KL, from hidden states"


def term(kind: str, **fields: Any) -> list[str]:
    """One loss alone, with coefficient 1."""
    settings = {"kind": kind, "coefficient": 1.0, **fields}
    return ["distillation=none", *(f"distillation.terms.loss.{name}={value}" for name, value in settings.items())]


# By arm: what of the teacher's answer it reads, and its settings. K and the number of draws stand in `common`.
ARMS: dict[str, tuple[str | None, list[str]]] = {
    PLAIN: (None, term("cross_entropy")),
    "renormalised top-64": ("top_k", term("forward_kl", tail="renormalise")),
    "top-64 and tail": ("top_k", term("forward_kl")),
    "sampled-50": ("sampled", term("sampled")),
    "reverse KL, top-64 and tail": ("top_k", term("reverse_kl")),
    "JSD, top-64 and tail": ("top_k", term("jsd")),
    FULL: ("hidden", term("forward_kl", support="full")),
    "0.5 cross-entropy + top-64 and tail": ("top_k", ["distillation=logits_only"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=int, default=24, help="layers of the teacher's 30 that the student keeps")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--url", help="a teacher that runs already, with a store; default: one is started")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, help="some of the losses; the two ends of the gap among them"
    )
    parser.add_argument("--held-out-rows", type=int, default=8, help="rows of each source that figures are taken on")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/quality.md")
    options = parser.parse_args()
    prepare()
    ROOT.mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in ARMS if not options.arms or arm in options.arms]
    missing = [(seed, arm) for seed in options.seeds for arm in arms if result(options, arm, seed) is None]
    if missing:
        student = make_student(options.keep)
        with nullcontext(options.url) if options.url else serve_teacher(ROOT) as url:
            for seed, arm in missing:
                settings = common(options, student, seed, url)
                figures = bytes_file(options, seed)
                if not figures.exists():
                    figures.write_text(json.dumps(fill(settings, options.steps, url)))
                learn([*settings, *ARMS[arm][1], f"run.id={folder_of(options, arm, seed).name}"])
    rows = write_table(options, arms)
    if options.docs:
        publish(DOCS, f"{title_of(options)}:\n\n{markdown(rows)}")
    return 0


def common(options: argparse.Namespace, student: Path, seed: int, url: str) -> list[str]:
    """The settings in which no two arms differ; the seed decides which texts come, and in which order."""
    return [
        "--config-folder", "demo/config", "data=stdlib", f"data.seq_len={options.seq_len}",
        f"data.held_out_rows={options.held_out_rows}", f"run.root={ROOT}", f"run.seed={seed}",
        f"run.steps={options.steps}", f"student.checkpoint_path={student}", f"teacher.url={url}", "teacher.top_k=64",
        f"optim.learning_rate={options.learning_rate}", "optim.weight_decay=0.01",
        f"optim.schedule.warmup_steps={max(1, options.steps // 8)}", f"evaluation.every={options.steps}",
        "evaluation.kl=full", "checkpoint.every=0", "logging.wandb=off", "logging.progress=off",
    ]  # fmt: skip


def make_student(keep: int) -> Path:
    """The teacher with `keep` of its layers, spread evenly, the first and the last among them."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / f"student-{keep}"
    if folder.is_dir():
        return folder
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16)
    layers = model.model.layers
    kept = sorted({round(i * (len(layers) - 1) / (keep - 1)) for i in range(keep)})
    model.model.layers = nn.ModuleList(layers[i] for i in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder)
    return folder


@contextmanager
def serve_teacher(root: Path) -> Iterator[str]:
    """The demo's teacher as a process, float32 in transformers, before a target store."""
    command = [
        str(Path(sys.executable).parent / "stillhouse-teacher"), str(TEACHER), "--port", "0", "--engine", "hf",
        "--dtype", "float32", "--store", str(root / "store"),
    ]  # fmt: skip
    log = root / "teacher.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | END_WITH_ME)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while not (ready := READY.search(log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the teacher is not ready: see {log}")
            time.sleep(0.5)
        yield ready[1]
    finally:
        process.terminate()
        process.wait(timeout=60)


def fill(arguments: list[str], steps: int, url: str) -> dict[str, float]:
    """Have the teacher score all that the runs of a seed will ask, in one pass; bytes a token of each kind."""
    from student_trainer.build_components import load_tokenizer
    from student_trainer.cli.compose import compose_arguments
    from student_trainer.data.loader import BatchSource
    from student_trainer.targets.background import EventThread
    from student_trainer.targets.queries import queries_of
    from student_trainer.targets.remote import RemoteTargets
    from teacher_proto.client.teacher_client import TeacherClient
    from teacher_proto.requests import TargetSpec
    from teacher_proto.targets import tensors_of

    settings = compose_arguments(arguments)
    source = BatchSource(settings.data, load_tokenizer(settings), settings.run.seed)
    state, batches = source.initial_state(), []
    for number in range(steps):
        batch, state = source.batch(state, number)
        batches.append(batch)
    held_out = [batch for name in source.names for batch in source.held_out(name)]
    source.close()
    spec = TargetSpec(("top_k", "sampled", "hidden"), top_k=64, num_samples=50, hidden_dtype="float16")
    sums: dict[str, float] = dict.fromkeys(spec.kinds, 0.0)
    rows = 0
    with EventThread() as thread:
        teacher = RemoteTargets(lambda: TeacherClient(url), (url,), settings.teacher)
        thread.call(teacher.open())
        for batch in (*batches, *held_out):
            for answer in thread.call(teacher.fetch(batch, queries_of(batch, spec))).documents:
                if answer is not None:
                    rows += answer.num_rows
                    for kind in spec.kinds:
                        arrays = answer.tensors()
                        sums[kind] += sum(arrays[name].nbytes for name in tensors_of((kind,)) if name in arrays)
        thread.call(teacher.close())
    return {kind: total / rows for kind, total in sums.items()}


def learn(arguments: list[str]) -> None:
    """One run, as `stillhouse-train` makes it, in this process: what it imports is imported once."""
    from student_trainer import main as trainer

    code = trainer.run([*arguments, "run.resume=never"])
    if code:
        raise SystemExit(f"stillhouse-train ended with code {code}: {arguments[-1]}")


def folder_of(options: argparse.Namespace, arm: str, seed: int) -> Path:
    name = re.sub("[^a-z0-9]+", "-", arm.lower()).strip("-")
    return ROOT / f"{name}-{size_of(options)}-{seed}"


def bytes_file(options: argparse.Namespace, seed: int) -> Path:
    return ROOT / f"bytes-{size_of(options)}-{seed}.json"


def size_of(options: argparse.Namespace) -> str:
    """What a run's figures depend on beside loss and seed."""
    rate = f"{options.learning_rate:g}".replace(".", "_")
    return f"{options.steps}x{options.seq_len}-{options.keep}-layers-{rate}-{options.held_out_rows}"


def result(options: argparse.Namespace, arm: str, seed: int) -> dict[str, float] | None:
    """Held-out figures at the end of a run, means over the tokens of all sources; None if there is no such run."""
    path = folder_of(options, arm, seed) / "evaluation.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if len(lines) < 2:
        return None
    return {"start_kl": mean(lines[0], "kl")} | {
        figure: mean(lines[-1], figure) for figure in ("cross_entropy", "kl", "agreement")
    }


def mean(line: Mapping[str, Any], figure: str) -> float:
    sources = [figures for name, figures in line.items() if name != "step"]
    return sum(f[figure] * f["tokens"] for f in sources) / sum(f["tokens"] for f in sources)


def write_table(options: argparse.Namespace, arms: Sequence[str]) -> list[dict[str, Any]]:
    seeds: Sequence[int] = options.seeds
    results = {arm: [result(options, arm, seed) for seed in seeds] for arm in arms}
    bytes_by_kind = json.loads(bytes_file(options, seeds[0]).read_text())
    rows = []
    for arm in arms:
        kind = ARMS[arm][0]
        got = [r for r in results[arm] if r is not None]
        assert len(got) == len(seeds), arm
        rows.append({
            "loss": arm,
            "cross-entropy": spread([r["cross_entropy"] for r in got], 3),
            "KL": spread([r["kl"] for r in got], 3),
            "agreement %": spread([100 * r["agreement"] for r in got], 1),
            "bytes a token": round(bytes_by_kind[kind]) if kind else 0,
            "gap closed, KL %": spread(closed(results, arm, "kl"), 0),
            "gap closed, cross-entropy %": spread(closed(results, arm, "cross_entropy"), 0),
        })  # fmt: skip
    start = [r["start_kl"] for r in results[PLAIN] if r is not None]
    report(
        "quality", rows, {"KL before the first step": start[0]},
        title=title_of(options),
        notes=("mean ± standard deviation over seeds", f"results of each run: {ROOT}/*/evaluation.jsonl"),
    )  # fmt: skip
    return rows


def title_of(options: argparse.Namespace) -> str:
    return (
        f"{options.steps} steps of {options.seq_len} tokens, {len(options.seeds)} seeds, {options.keep} of the "
        f"teacher's 30 layers, learning rate {options.learning_rate:g}"
    )


def closed(results: Mapping[str, Sequence[Mapping[str, float] | None]], arm: str, figure: str) -> list[float]:
    """By seed, per cent of the way from cross-entropy alone to full KL."""
    triples = zip(results[PLAIN], results[arm], results[FULL], strict=True)
    return [
        100 * (plain[figure] - got[figure]) / (plain[figure] - full[figure])
        for plain, got, full in triples
        if plain is not None and got is not None and full is not None
    ]


def spread(values: Sequence[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
