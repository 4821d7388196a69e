"""`stillhouse-teacher pack`: a target store as Parquet files, for sharing on a hub, and back. Called by `main.py`.

stillhouse-teacher pack export STORE PARQUET_FOLDER
stillhouse-teacher pack import STORE PARQUET_FOLDER [--teacher FINGERPRINT]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from teacher_proto.process.stages import stage


def pack_command(arguments: list[str]) -> int:
    """Run the command; returns the exit code: 1 if rows were left out or lost. ValueError in one line for what can't be
    done.

    A signal's `Stop` propagates: an export that it ends leaves no file, an import what was read until then.
    """
    options = _parser().parse_args(arguments)
    with stage("importing libraries"):
        from teacher_proto.store.parquet import export_parquet
        from teacher_proto.store.parquet_read import import_parquet
        from teacher_proto.store.target_store import TargetStore

    exporting = options.direction == "export"
    with TargetStore(options.store, options.store_bytes, readonly=exporting) as store:
        stats = store.stats()
        what = "writing entries" if exporting else "reading entries"
        with stage(what, stats.entries if exporting else None, "entries", closing=False) as doing:

            def advance() -> None:
                doing.done += 1

            if exporting:
                packed = export_parquet(store, options.folder, on_entry=advance)
            else:
                packed = import_parquet(options.folder, store, teacher=options.teacher, on_entry=advance)
        stats = store.stats()
    print(f"stillhouse-teacher: {packed.entries} entries in {packed.files} files")
    if left_out := packed.left_out:
        print(f"stillhouse-teacher: {left_out} rows were left out: they are not valid targets", file=sys.stderr)
    if lost := stats.damaged if exporting else stats.evicted + stats.refused:
        why = "they are damaged" if exporting else "the store is too small; increase --store-bytes"
        print(f"stillhouse-teacher: {lost} entries were lost: {why}", file=sys.stderr)
    return 1 if left_out or lost else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillhouse-teacher pack", description="Export a target store to Parquet files, or import such files."
    )
    parser.add_argument("direction", choices=("export", "import"))
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the target store")
    parser.add_argument("folder", type=Path, metavar="PARQUET", help="folder of the Parquet files")
    parser.add_argument("--store-bytes", type=int, default=50 * 2**30, help="import: maximum size of the store")
    parser.add_argument(
        "--teacher",
        metavar="FINGERPRINT",
        help="import: only this teacher's rows; default: those of the teachers already in the store",
    )
    return parser
