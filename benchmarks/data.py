"""Cost of the trainer's data: ten million short documents on disk, opened, resumed midway, read and tokenised.

    python -m benchmarks.data            # 10,000,000 documents, about 10 GB of disk under --folder while it runs
    python -m benchmarks.data --quick    # 200,000 documents
    python -m benchmarks.data --keep     # keeps documents and index, and reuses those of the last time

Each measurement runs in a fresh process, as a trainer's start and resume do. The index is memory-mapped, so pages that
were read count as resident until the system reclaims them; anonymous memory is what the process itself holds. The
baseline is `datasets` with `shuffle`, the usual way to read in shuffled order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import report

STEP_SECONDS = 0.1
STEP_TOKENS = 16_384
WORDS = Path(__file__).read_text().split()


def main() -> None:
    """Write the documents, run each measurement in its own process, and report."""
    arguments = _arguments()
    if arguments.measure:
        print(json.dumps(MEASUREMENTS[arguments.measure](arguments)))
        return
    count = 200_000 if arguments.quick else arguments.documents
    with ExitStack() as stack:
        if arguments.keep:
            folder = Path(arguments.folder) / f"stillhouse-data-{count}"
            folder.mkdir(exist_ok=True)
        else:
            made = tempfile.TemporaryDirectory(dir=arguments.folder, prefix="stillhouse-data-")
            folder = Path(stack.enter_context(made))
        path = folder / "documents.jsonl"
        size = path.stat().st_size if path.exists() else write_documents(path, count)
        rows, figures = [], {}
        for name in ("index", "start", "middle", "steady", "one_core", "peer"):
            figures[name] = _run(name, arguments, folder, count)
            rows += [{"measurement": name, "figure": figure, "value": value} for figure, value in figures[name].items()]
    one_core = figures["one_core"]["tokens_per_second"]
    report(
        "data",
        rows,
        {
            "documents": count,
            "bytes": size,
            "start_s": figures["start"]["first_batch_s"],
            "resume_in_the_middle_s": figures["middle"]["first_batch_s"],
            "anonymous_growth_mb": figures["steady"]["anonymous_growth_mb"],
            "tokens_per_second_one_core": one_core,
            "needed_for_a_step_of_100_ms": STEP_TOKENS / STEP_SECONDS,
            "keeps_ahead": one_core >= STEP_TOKENS / STEP_SECONDS,
        },
        title=f"{count:,} documents, {size / 1e9:.2f} GB of JSON lines",
    )


def write_documents(path: Path, count: int) -> int:
    """Write distinct documents of 20 to 120 words; returns the file's size in bytes."""
    rng = random.Random(0)
    pool = [" ".join(rng.choices(WORDS, k=rng.randint(20, 120))) for _ in range(5000)]
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"id": i, "text": f"{i} {pool[(i * 7919) % 5000]}"}) + "\n")
    partial.replace(path)
    return path.stat().st_size


def _run(name: str, arguments: argparse.Namespace, folder: Path, count: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.data",
        "--measure",
        name,
        "--folder",
        str(folder),
        "--documents",
        str(count),
    ]
    command += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
    if name == "one_core" and shutil.which("taskset"):
        command = ["taskset", "-c", "0", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode:
        raise SystemExit(f"measurement {name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, result, file=sys.stderr)
    return result


def _open(arguments: argparse.Namespace, workers: int = 2) -> tuple[Any, float, float]:
    """A `BatchSource` over the documents, and the seconds taken by imports and by opening it."""
    began = time.monotonic()
    from transformers import AutoTokenizer

    from student_trainer.data.loader import BatchSource
    from student_trainer.settings.data import DataSettings, SourceSettings

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else _tiny_tokenizer()
    imported = time.monotonic()
    folder, rows = Path(arguments.folder), STEP_TOKENS // 2048
    source = SourceSettings(kind="jsonl", path=(str(folder / "documents.jsonl"),), held_out_fraction=0.001)
    settings = DataSettings(
        sources={"s": source},
        seq_len=2048,
        rows=rows,
        workers=workers,
        cache_folder=str(folder / "cache"),
    )
    opened = BatchSource(settings, tokenizer, seed=0)
    return opened, imported - began, time.monotonic() - imported


def _tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with 8,192 tokens, trained on this file (the documents' words) and on `argparse`."""
    import argparse as library
    import inspect

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(), inspect.getsource(library)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def measure_index(arguments: argparse.Namespace) -> dict[str, Any]:
    """The first opening, which builds the index."""
    source, _, seconds = _open(arguments)
    source.close()
    return {"open_s": seconds, "documents_per_second": arguments.documents / seconds, **_memory()}


def measure_start(arguments: argparse.Namespace) -> dict[str, Any]:
    """From opening to the first batch, with an existing index."""
    source, imports, seconds = _open(arguments)
    return _first_batch(source, source.initial_state(), imports, seconds)


def measure_middle(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same, for a first batch in the middle of the documents."""
    source, imports, seconds = _open(arguments)
    return _first_batch(source, _at(source.initial_state(), arguments.documents // 2), imports, seconds)


def measure_steady(arguments: argparse.Namespace) -> dict[str, Any]:
    """Batches prefetched as fast as possible: their rate, and the growth of memory from the 50th batch to the last."""
    from student_trainer.data.stream import BatchStream

    source, _, _ = _open(arguments)
    state = _at(source.initial_state(), arguments.documents // 3)
    steps, tokens, fill = max(100, arguments.documents // 20_000), 0, 0.0
    with BatchStream(source, state) as stream:
        for step, (batch, _) in enumerate(stream):
            if step == 50:
                before, began = _memory(), time.monotonic()
            elif step > 50:
                tokens += int((batch.document_ids_BT >= 0).sum())
                fill += batch.fill_rate
            if step == 50 + steps:
                break
        seconds = time.monotonic() - began
    source.close()
    after = _memory()
    return {
        "batches": steps,
        "tokens_per_second": tokens / seconds,
        "fill_rate": fill / steps,
        "anonymous_growth_mb": after["anonymous_mb"] - before["anonymous_mb"],
        **after,
    }


def measure_one_core(arguments: argparse.Namespace) -> dict[str, Any]:
    """Batches made by one worker, with this process pinned to one core."""
    source, _, _ = _open(arguments, workers=1)
    state = source.initial_state()
    for _ in range(5):
        _, state = source.batch(state, state.number)
    steps, tokens, began, cpu = 100, 0, time.monotonic(), time.process_time()
    for _ in range(steps):
        batch, state = source.batch(state, state.number)
        tokens += int((batch.document_ids_BT >= 0).sum())
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    source.close()
    return {
        "batches": steps,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu,
        "tokeniser_alone": source.rate.tokens_per_second,
        **_memory(),
    }


def measure_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """`datasets` on the same Arrow file: shuffle, then read a document in the middle."""
    import datasets

    datasets.disable_progress_bars()
    began = time.monotonic()
    path = next((Path(arguments.folder) / "cache").glob("*.arrow"))
    order = datasets.Dataset.from_file(str(path)).shuffle(seed=0)
    order[arguments.documents // 2]
    return {"first_document_s": time.monotonic() - began, **_memory()}


def _at(state: Any, document: int) -> Any:
    (source,) = state.sources
    return replace(state, sources=(replace(source, cursor=replace(source.cursor, document=document)),))


def _first_batch(source: Any, state: Any, imports: float, opened: float) -> dict[str, Any]:
    began = time.monotonic()
    source.batch(state, state.number)
    made = time.monotonic() - began
    source.close()
    return {"imports_s": imports, "open_s": opened, "first_batch_s": opened + made, **_memory()}


def _memory() -> dict[str, float]:
    """Resident megabytes of this process: anonymous memory and mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {name: int(status[name].split()[0]) for name in ("RssAnon", "RssFile")}
    return {"anonymous_mb": kilobytes["RssAnon"] / 1024, "mapped_mb": kilobytes["RssFile"] / 1024}


MEASUREMENTS = {
    "index": measure_index,
    "start": measure_start,
    "middle": measure_middle,
    "steady": measure_steady,
    "one_core": measure_one_core,
    "peer": measure_peer,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200,000 documents")
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to put the documents and the index")
    parser.add_argument("--keep", action="store_true", help="keep documents and index, reuse existing ones")
    parser.add_argument("--tokenizer", help="folder or name of a tokenizer; default: train one of 8,192 tokens")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
