"""Target datasets: bytes per token and information lost, beside DistillKit's compressor; speed; a large index.

    python -m benchmarks.dataset [--tokens 1000000] [--documents 20000000] [--text-tokens 10000]
    python -m benchmarks.dataset --tokens 10000000 --for-s 300      in slices: the next call continues

Sizes depend on the data, so they are measured on a real model's targets for real text, if `make demo` has made one, and
on synthetic records whose ids are drawn by Zipf's law. KL is over the K ids, renormalised, as in DistillKit's own
evaluation of its compressor.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.distillkit import SCHEMES, distillkit, renormalised_kl
from benchmarks.report import BENCH_DIR, report
from benchmarks.target_records import TEACHER, TEMPERATURE, TEXT, manifest, of_a_model, renamed, synthetic
from student_trainer.reporting.json_lines import read_lines
from teacher_proto.dataset.manifest import Manifest
from teacher_proto.dataset.shards import Rows, encode_shard, open_shard
from teacher_proto.requests import Query
from teacher_proto.store.entry import split
from teacher_proto.store.parquet import Pair
from teacher_proto.targets import TokenTargets

BITS = (2, 3, 4, 5, 6, 8)
VOCAB_SIZE, SHARD_TOKENS = 49_152, 2**17
SPEEDS, INDEX = BENCH_DIR / "dataset-speeds.jsonl", BENCH_DIR / "dataset-index.json"


def shard(records: Sequence[tuple[np.ndarray, TokenTargets]], which: Manifest) -> list[list[Pair]]:
    """Documents in the form that `encode_shard` takes, cut to the manifest's K."""
    return [
        split(
            which.teacher.fingerprint, Query(tokens_T, (0, len(tokens_T)), which.spec),
            targets.narrow(0, len(tokens_T), which.spec.top_k),
        )
        for tokens_T, targets in records
    ]  # fmt: skip


def column_bytes(data: bytes, names: Sequence[str]) -> int:
    import pyarrow.parquet as pq

    metadata, total = pq.read_metadata(io.BytesIO(data)), 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if column.path_in_schema.split(".")[0] in names:
                total += column.total_compressed_size
    return total


def by_id(pairs: Sequence[Pair]) -> np.ndarray:
    """Logprobs of all rows [R, K], each row sorted by id."""
    found = []
    for _, targets in pairs:
        assert targets.ids is not None and targets.logprobs is not None
        found.append(np.take_along_axis(targets.logprobs, np.argsort(targets.ids, axis=1), axis=1).astype(np.float64))
    return np.concatenate(found)


def ours(records: Sequence[tuple[np.ndarray, TokenTargets]], vocab_size: int, top_k: int, codec: str) -> dict[str, Any]:
    which = manifest(vocab_size, top_k, codec)
    documents = shard(records, which)
    data, (note, _, _) = encode_shard(which, documents)
    with open_shard(io.BytesIO(data), "shard") as file:
        kept = [pair for group in range(len(note.groups)) for pair in Rows(file, group, which, "shard").all()]
    exact = [pair for document in documents for pair in document]
    size = column_bytes(data, ("ids", "logprobs", "coded_ids", "coded_widths", "coded_logprobs", "coded_scales"))
    a, b = by_id(exact), by_id(kept)
    return {
        "K": top_k, "codec": codec.partition(":")[0], "bits": int(codec.partition(":")[2] or 16),
        "ids and logprobs B": size / note.rows, "after zstd": size / note.rows, "shard B": note.footer / note.rows,
        "KL": max(renormalised_kl(a, b), 0.0), f"KL at T={TEMPERATURE:g}": max(renormalised_kl(a, b, TEMPERATURE), 0.0),
    }  # fmt: skip


def codec_rows(
    source: str, records: Sequence[tuple[np.ndarray, TokenTargets]], vocab_size: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Table rows for one kind of records, and for each DistillKit scheme the smallest of ours that loses no more."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {}
    for name, (top_k, _, _) in SCHEMES.items():
        pairs = [pair for document in shard(records, manifest(vocab_size, top_k, "lossless")) for pair in document]
        theirs = distillkit(pairs, vocab_size, name, TEMPERATURE)
        mine = [ours(records, vocab_size, top_k, c) for c in (*(f"compact:{bits}" for bits in BITS), "lossless")]
        rows += [{"records": source, **row} for row in (theirs, *mine)]
        least = next(row for row in mine if row["KL"] <= theirs["KL"])
        ratios[f"{source}, {name}"] = {
            "bits": least["bits"], "of its bytes": least["ids and logprobs B"] / theirs["ids and logprobs B"],
            "of its bytes after zstd": least["ids and logprobs B"] / theirs["after zstd"],
            "our KL": least["KL"], "its KL": theirs["KL"],
        }  # fmt: skip
    rows += [{"records": source, **ours(records, vocab_size, 64, c)} for c in ("compact:6", "compact:8", "lossless")]
    return rows, ratios


def speed(tokens: int, top_k: int, until: float) -> list[dict[str, Any]] | None:
    """Tokens per second of one core, in processor time: encoding records into shards, and decoding and checking them.
    Each shard is a line of `SPEEDS`, so that the next call continues; None if `until` (monotonic) came first.
    """
    SPEEDS.parent.mkdir(parents=True, exist_ok=True)
    SPEEDS.touch()
    lines = read_lines(SPEEDS)
    done = {(line["codec"], line["shard"]) for line in lines if line["K"] == top_k}
    drawn: list[tuple[np.ndarray, TokenTargets]] = []
    for number in range(-(-tokens // SHARD_TOKENS)):
        for codec in ("lossless", "compact:8"):
            if (codec, number) in done:
                continue
            if time.monotonic() > until:
                print(f"{len(lines)} shards measured: run it again to continue", file=sys.stderr)
                return None
            drawn = drawn or list(synthetic(SHARD_TOKENS, VOCAB_SIZE, top_k))
            lines.append({"K": top_k, "shard": number, **_speed_of(renamed(drawn, VOCAB_SIZE, number), codec, top_k)})
            with SPEEDS.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    found = []
    for codec in ("lossless", "compact:8"):
        mine = [line for line in lines if line["codec"] == codec and line["K"] == top_k]
        rows, size, wrote, read = (sum(line[name] for line in mine) for name in ("rows", "bytes", "write s", "read s"))
        found.append(
            {"K": top_k, "codec": codec, "tokens": rows, "shard B": size / rows, "write us": wrote / rows * 1e6,
             "read us": read / rows * 1e6, "written a second": rows / wrote, "read a second": rows / read}
        )  # fmt: skip
    return found


def _speed_of(records: Sequence[tuple[np.ndarray, TokenTargets]], codec: str, top_k: int) -> dict[str, Any]:
    which = manifest(VOCAB_SIZE, top_k, codec)
    documents, rows = shard(records, which), 0
    began = time.process_time()
    data, (note, _, _) = encode_shard(which, documents)
    wrote = time.process_time() - began
    began = time.process_time()
    with open_shard(io.BytesIO(data), "shard") as file:
        for group in range(len(note.groups)):
            rows += sum(targets.num_rows for _, targets in Rows(file, group, which, "shard").all())
    return {"codec": codec, "rows": rows, "bytes": len(data), "write s": wrote, "read s": time.process_time() - began}


LOOK_UP = """
import json, resource, sys, time
import numpy as np
from pathlib import Path
from teacher_proto.dataset.index import Index, IndexFile
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
before = resident()
began = time.process_time()
index = Index([IndexFile(np.memmap(sys.argv[1], np.uint8, "r"), "index")])
opened = time.process_time() - began
keys = np.random.default_rng(1).integers(0, 2**64, 20000, dtype=np.uint64)
began = time.monotonic()
index.contains(keys)
many = time.monotonic() - began
began = time.monotonic()
for key in keys[:2000].tolist():
    list(index.places(key))
one = time.monotonic() - began
print(json.dumps({"start s": opened, "own memory MB": resident() - before, "look-up us": one / 2000 * 1e6,
                  "of 20,000 at once us": many / 20000 * 1e6}))
"""


MAKE = """
import resource, sys, time
import numpy as np
from pathlib import Path
from teacher_proto.dataset.index import ShardNote, encode_index
documents, path = int(sys.argv[1]), Path(sys.argv[2])
rng, shards = np.random.default_rng(0), max(documents // 1000, 1)
groups = np.stack([np.arange(64) * 2**22, np.full(64, 2**22), np.full(64, 16)], axis=1)
each = documents // shards
parts = [
    (ShardNote(f"targets-{n:024x}.parquet", 2**28, f"{n:064x}", 2**28 - 2**16, 1000, 2**20, 2**20, groups),
     rng.integers(0, 2**64, each, dtype=np.uint64), rng.integers(0, 64, each, dtype=np.uint32))
    for n in range(shards)
]
began = time.process_time()
path.write_bytes(encode_index(parts))
print(each * shards, time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def large_index(documents: int) -> dict[str, Any]:
    """Build an index of that many documents in one fresh process and query it in another. Its pages are mapped and not
    counted as the reader's own memory. The result is kept in `INDEX`, for a benchmark that is continued.
    """
    if INDEX.exists() and (kept := json.loads(INDEX.read_text()))["asked"] == documents:
        return dict(kept)
    BENCH_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BENCH_DIR) as folder:
        path = Path(folder) / "merged.idx"
        made = subprocess.run(
            [sys.executable, "-c", MAKE, str(documents), str(path)], check=True, capture_output=True, text=True
        )
        count, seconds, peak = map(float, made.stdout.split())
        done = subprocess.run([sys.executable, "-c", LOOK_UP, str(path)], check=True, capture_output=True, text=True)
        size = path.stat().st_size
    found = {
        "asked": documents, "documents": int(count), "file MB": size / 1e6, "merge CPU s": seconds,
        "merge peak MB": peak / 1e6, **json.loads(done.stdout),
    }  # fmt: skip
    INDEX.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens written and read to measure speed")
    parser.add_argument("--documents", type=int, default=20_000_000, help="documents in the large index")
    parser.add_argument("--text-tokens", type=int, default=10_000, help="tokens of the model's records")
    parser.add_argument("--drawn-tokens", type=int, default=20_000, help="tokens of synthetic records")
    parser.add_argument("--for-s", type=float, default=float("inf"), help="seconds to run; the next call continues")
    options = parser.parse_args()
    index = large_index(options.documents)
    throughput = speed(options.tokens, 64, time.monotonic() + options.for_s)
    if throughput is None:
        return
    rows, ratios = codec_rows("Zipf", list(synthetic(options.drawn_tokens, VOCAB_SIZE, 128)), VOCAB_SIZE)
    notes = [
        "Bytes and nats per token. `shard B` is all of a row, with token ids, lse, next_logprob and log_z at one T."
    ]
    if TEACHER.exists() and TEXT.exists():
        vocab_size, records = of_a_model(options.text_tokens, 128)
        real_rows, real_ratios = codec_rows("SmolLM2-135M", records, vocab_size)
        rows, ratios = real_rows + rows, real_ratios | ratios
    else:
        notes.append("No records of a real model: `make demo` makes the model and text that they need.")
    for row in rows:
        row["of the wire"] = row["shard B"] / (4 * row["K"] + 16) if row["shard B"] else None
    ratios |= {"speed": throughput, "index": index}
    report("dataset", rows, ratios, title="Target datasets, per token", notes=notes)
    SPEEDS.unlink()
    INDEX.unlink()


if __name__ == "__main__":
    main()
