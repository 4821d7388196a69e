"""`stillhouse-teacher dataset`: maintains target datasets in folders and buckets. Called by `main.py`.

stillhouse-teacher dataset stats URL               what is in it, by its index
stillhouse-teacher dataset check URL [--clean]     reads every byte; exit code 1 and a line for each fault
stillhouse-teacher dataset merge URL [FROM ...]    makes one index of many, and copies in the shards of other datasets
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from teacher_proto.process.stages import stage

if TYPE_CHECKING:
    from teacher_proto.dataset.folder import Folder


def dataset_command(arguments: list[str]) -> int:
    """Run the command; returns the exit code. ValueError in one line for what can't be done; `Stop` for a signal."""
    options = _parser().parse_args(arguments)
    if options.source and options.what != "merge":
        raise ValueError(f"dataset {options.what} takes one URL, got {1 + len(options.source)}")
    with stage("importing libraries"):
        from teacher_proto.dataset.folder import Folder

    if options.clean and options.what != "check":
        raise ValueError(f"--clean is for `dataset check`, not for `dataset {options.what}`")
    folder, others = Folder(options.url), [Folder(url) for url in options.source]
    if options.what == "stats":
        return _stats(folder)
    return _check(folder, options.clean) if options.what == "check" else _merge(folder, others)


def _stats(folder: Folder) -> int:
    from teacher_proto.dataset.check import dataset_stats

    stats = dataset_stats(folder)
    manifest = stats.manifest
    lines = {
        "teacher": f"{manifest.teacher.identity.semantic.model}, {manifest.teacher.fingerprint}",
        "query": json.dumps(manifest.says["query"]), "codec": json.dumps(dict(manifest.codec)),
        "written by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "shards": f"{stats.shards:,}" + (f", {stats.without_index:,} not in an index" if stats.without_index else ""),
        "documents": f"{stats.documents:,}" + (f", {stats.twice:,} of them twice" if stats.twice else ""),
        "tokens": f"{stats.tokens:,}", "bytes": f"{stats.bytes:,}",
        "bytes/token": f"{stats.bytes / max(stats.tokens, 1):.1f}",
    }  # fmt: skip
    for name, value in (lines | _errors(stats.errors)).items():
        print(f"{name + ':':<15}{value}")
    return 0


def _errors(errors: dict[str, float]) -> dict[str, str]:
    """What a codec lost, in nats per row; `kl_at_2` is at temperature 2."""
    return {
        name.removeprefix("sum_").replace(
            "_", " "
        ): f"{errors[name]:.3g} per row, {errors[name.replace('sum', 'max')]:.3g} at most"
        for name in sorted(errors)
        if name.startswith("sum_")
    }


def _check(folder: Folder, clean: bool) -> int:
    from teacher_proto.dataset.check import check_dataset
    from teacher_proto.dataset.listing import remove_unfinished, unfinished_files

    faults = 0
    with stage("reading shards", len(folder.list("shards")), "shards", closing=False) as doing:

        def advance() -> None:
            doing.done += 1

        for line in check_dataset(folder, advance):
            faults += 1
            print(f"stillhouse-teacher: {line}", file=sys.stderr)
    for name in remove_unfinished(folder) if clean else ():
        print(f"stillhouse-teacher: removed {folder.url}/{name}")
    for name in unfinished_files(folder):
        print(
            f"stillhouse-teacher: {folder.url}/{name} is being written, or was left by a fill that was killed; "
            "readers ignore it. --clean and the next fill remove it an hour after it was last written to"
        )
    print(f"stillhouse-teacher: {faults} faults" if faults else "stillhouse-teacher: all shards are intact")
    return 1 if faults else 0


def _merge(folder: Folder, others: list[Folder]) -> int:
    from teacher_proto.dataset.check import merge_dataset

    with stage("merging", unit="shards", closing=False) as doing:

        def advance() -> None:
            doing.done += 1

        shards = merge_dataset(folder, others, advance)
    print(f"stillhouse-teacher: the dataset has one index of {shards} shards")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillhouse-teacher dataset",
        description="Maintain a target dataset: show what is in it (stats), check every byte, or merge its indexes.",
    )
    parser.add_argument("what", choices=("check", "merge", "stats"))
    parser.add_argument("url", metavar="URL", help="the dataset: a folder, s3:// or gs://")
    parser.add_argument("source", nargs="*", metavar="FROM", help="merge: datasets whose shards are copied into URL")
    parser.add_argument("--clean", action="store_true", help="check: remove what interrupted fills left behind")
    return parser
