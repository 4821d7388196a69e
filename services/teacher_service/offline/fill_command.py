"""`stillhouse-teacher fill MODEL DATA --store FOLDER | --output URL`: a data set scored offline. Called by `main.py`.

    stillhouse-teacher fill HuggingFaceTB/SmolLM2-135M-Instruct data/ --store targets --top-k 64 --temperatures 2,5
    stillhouse-teacher fill HuggingFaceTB/SmolLM2-135M-Instruct data/ --output s3://bucket/targets --slice 3/16
    stillhouse-teacher fill Qwen/Qwen3-8B data/ --output s3://bucket/targets --ray auto --replicas 16

Options that are not fill's own are the service's: --engine, --dtype, --window, vLLM's. The same command resumes.
Exit codes: 0 all is there, 1 some sequences failed or were lost, 2 can't be done as requested, 70 the engine died, 75
stopped by SIGTERM or Ctrl-C within 5 s: what was scored is kept.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_proto.errors import EngineDeadError
from teacher_proto.process.stages import stage
from teacher_proto.process.stopping import StopSignals
from teacher_service.offline.fill_options import FillOptions, check_against, parse_fill, sequence_length

if TYPE_CHECKING:
    from teacher_proto.requests import Kind, Limits
    from teacher_service.engines.protocol import Engine
    from teacher_service.offline.documents import Piece
    from teacher_service.offline.fill import FillReport

_FAILED, _ENGINE_DIED = 1, 70


def fill_command(arguments: list[str], signals: StopSignals) -> int:
    """Run the command; returns the exit code. ValueError in one line for what can't be done; `Stop` for a signal."""
    options = parse_fill(arguments)
    # Slow imports come after parsing.
    with stage("importing libraries"):
        from serving.logs import set_up_logs
        from teacher_service.offline.documents import find_files

    set_up_logs(options.settings.log_format, "warning")
    files = find_files(Path(options.own.data))
    try:
        fill = _fill_on_ray if options.own.ray is not None else _fill_here
        report = fill(options, files, signals)
    except asyncio.CancelledError:
        signals.check()
        raise
    except EngineDeadError as error:
        print(f"stillhouse-teacher: the engine died: {error}. What was scored is kept; run it again.", file=sys.stderr)
        return _ENGINE_DIED
    return _tell(report)


def _fill_here(options: FillOptions, files: list[Path], signals: StopSignals) -> FillReport:
    return asyncio.run(_fill(options, files, signals))


def _fill_on_ray(options: FillOptions, files: list[Path], signals: StopSignals) -> FillReport:
    with stage("importing libraries"):
        from teacher_service.offline.ray_fill import RayCluster
        from teacher_service.offline.units import read_units

    own = options.own
    with RayCluster(options, signals) as cluster:
        with stage(f"starting the first of {own.replicas} engines with {options.settings.model}"):
            info = cluster.teacher()
        pieces = _pieces(options, files, info.limits, info.kinds)
        with _Scoring(sum(path.stat().st_size for path in files), own.replicas) as scoring:
            return cluster.fill(info, read_units(pieces, own.shard_tokens), scoring.show)


def _pieces(options: FillOptions, files: list[Path], limits: Limits, kinds: tuple[Kind, ...]) -> Iterator[Piece]:
    """The documents as sequences for this teacher. ValueError if it does not serve such requests."""
    from teacher_proto.model_files import find_model
    from teacher_service.offline.documents import Cutting, read_pieces
    from teacher_service.text import Text

    settings, own = options.settings, options.own
    cutting = Cutting(sequence_length(limits, own), limits.vocab_size, not own.no_special_tokens)
    check_against(options.request, limits, kinds)
    scripted = settings.engine == "scripted"
    folder = None if scripted else find_model(settings.model, revision=settings.revision).path
    return read_pieces(files, Text(folder, limits.vocab_size), cutting)


async def _fill(options: FillOptions, files: list[Path], signals: StopSignals) -> FillReport:
    with stage("importing libraries"):
        from teacher_proto.store.target_store import TargetStore
        from teacher_service.offline.fill import fill
        from teacher_service.run import ENGINES

    settings = options.settings
    task = asyncio.current_task()
    assert task is not None
    engine = ENGINES[settings.engine](settings)
    with ExitStack() as stack:
        # Opened first, so that a store that can't be opened is reported before a model is loaded.
        store = stack.enter_context(TargetStore(settings.store, settings.store_bytes)) if settings.store else None
        stack.enter_context(signals.cancelling(task))
        try:
            with stage(f"starting the engine with {settings.model}"):
                await engine.start()
            pieces = _pieces(options, files, engine.limits, engine.kinds)
            with _Scoring(sum(path.stat().st_size for path in files)) as scoring:
                if store is None:
                    return await _into_dataset(engine, options, pieces, scoring.show)
                spec = options.request.spec
                return await fill(engine, store, pieces, spec, window=settings.window, on_progress=scoring.show)
        finally:
            await engine.close()


async def _into_dataset(
    engine: Engine, options: FillOptions, pieces: Iterator[Piece], show: Callable[[FillReport], object]
) -> FillReport:
    from teacher_proto.dataset.dataset import TargetDataset
    from teacher_proto.dataset.manifest import Manifest, versions
    from teacher_service.offline.dataset_fill import fill_dataset
    from teacher_service.offline.scoring import info_of
    from teacher_service.offline.units import read_units

    manifest = Manifest(info_of(engine), options.request.spec, options.codec, versions())
    units = read_units(pieces, options.own.shard_tokens)
    with TargetDataset(options.own.output, create=manifest) as dataset:
        return await fill_dataset(
            engine, dataset, units, options.part, window=options.settings.window, on_progress=show
        )


class _Scoring:
    """Shows the progress of a fill, by bytes of data, and how many sequences were scored, skipped or failed."""

    def __init__(self, num_bytes: int, replicas: int = 1):
        self._replicas = replicas
        unit, self._bytes_a_unit = ("MB", 1e6) if num_bytes >= 10e6 else ("kB", 1e3)
        size = max(num_bytes, 1) / self._bytes_a_unit
        self._stage = stage("filling", size, unit, note=self._note, closing=False)
        self._report: FillReport | None = None

    def show(self, report: FillReport) -> None:
        self._report = report
        self._doing.done = report.bytes_done / self._bytes_a_unit

    def _note(self) -> str:
        report = self._report
        if report is None:
            return ""
        rate = report.tokens / self._doing.seconds
        counts = f"{report.scored:,} scored, {report.skipped:,} already stored, {report.failed:,} failed"
        said = f"{counts}, {rate:,.0f} tokens/s"
        hours = self._replicas * self._doing.seconds / 3600
        return said if self._replicas == 1 else f"{said}, {hours:,.2f} engine hours so far"

    def __enter__(self) -> _Scoring:
        self._doing = self._stage.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self._stage.__exit__(*what)


def _tell(report: FillReport) -> int:
    rate = report.tokens / report.seconds if report.seconds else 0.0
    print(
        f"stillhouse-teacher: {report.scored} sequences scored ({report.tokens} tokens, {rate:,.0f} per second), "
        f"{report.skipped} already stored, {report.failed} failed"
    )
    for failure in report.failures:
        print(f"stillhouse-teacher: failed: {failure}", file=sys.stderr)
    if report.lost:
        print(
            f"stillhouse-teacher: {report.lost} entries were lost: the store is too small; increase --store-bytes",
            file=sys.stderr,
        )
    return _FAILED if report.failed or report.lost else 0
