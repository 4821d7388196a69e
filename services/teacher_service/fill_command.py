"""`stillhouse-teacher fill MODEL DATA --store FOLDER`: a data set scored into a target store. Called by `main.py`.

    stillhouse-teacher fill HuggingFaceTB/SmolLM2-135M-Instruct data/ --store targets --top-k 64 --temperatures 2,5

Options that are not fill's own are the service's: --engine, --dtype, --window, vLLM's. Run it again to go on.
Exit codes: 0 all is there, 1 some sequences failed, 2 can't be done as asked, 70 the engine died, 75 stopped by SIGTERM
or Ctrl-C within 5 s: what was scored is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from teacher_proto.errors import EngineDeadError, RequestError
from teacher_proto.requests import KINDS, TargetsRequest, check_request
from teacher_proto.stages import stage
from teacher_proto.stopping import StopSignals
from teacher_service.settings import TeacherSettings, parse_settings

if TYPE_CHECKING:
    from teacher_service.engine import Engine
    from teacher_service.fill import FillReport

_FAILED, _ENGINE_DIED = 1, 70


def fill_command(arguments: list[str], signals: StopSignals) -> int:
    """Run the command; the exit code. ValueError in one line for what can't be done; `Stop` for a signal."""
    options, rest = _parser().parse_known_args(arguments)
    for name, value in (("MODEL", options.model), ("DATA", options.data)):
        if value is None or value.startswith("-"):
            raise ValueError(f"{name} is not given: stillhouse-teacher fill MODEL DATA --store FOLDER")
    settings = parse_settings([options.model, *rest])
    if settings.store is None:
        raise ValueError("--store is not given: the folder of the target store to fill")
    request = _request(options)
    # Only now the imports that take their time.
    with stage("importing libraries"):
        from serving.logs import set_up_logs
        from teacher_service.fill_data import find_files

    set_up_logs(settings.log_format, "warning")
    files = find_files(Path(options.data))
    try:
        report = asyncio.run(_fill(settings, request, files, options, signals))
    except asyncio.CancelledError:
        signals.check()
        raise
    except EngineDeadError as error:
        print(f"stillhouse-teacher: the engine died: {error}. What was scored is kept; run it again.", file=sys.stderr)
        return _ENGINE_DIED
    return _tell(report)


async def _fill(
    settings: TeacherSettings, request: TargetsRequest, files: list[Path], options: argparse.Namespace,
    signals: StopSignals,
) -> FillReport:  # fmt: skip
    with stage("importing libraries"):
        from teacher_proto.model_files import find_model
        from teacher_proto.store import TargetStore
        from teacher_service.fill import fill
        from teacher_service.fill_data import Cutting, read_pieces
        from teacher_service.run import ENGINES
        from teacher_service.text import Text

    assert settings.store is not None
    task = asyncio.current_task()
    assert task is not None
    engine = ENGINES[settings.engine](settings)
    with TargetStore(settings.store, settings.store_bytes) as store, signals.cancelling(task):
        try:
            with stage(f"starting the engine with {settings.model}"):
                await engine.start()
            cutting = Cutting(_length(engine, options), engine.limits.vocab_size, not options.no_special_tokens)
            _check(request, engine)
            scripted = settings.engine == "scripted"
            folder = None if scripted else find_model(settings.model, revision=settings.revision).path
            pieces = read_pieces(files, Text(folder, engine.limits.vocab_size), cutting)
            with _Scoring(sum(path.stat().st_size for path in files)) as scoring:
                return await fill(engine, store, pieces, request.spec, window=settings.window, on_progress=scoring.show)
        finally:
            await engine.close()


def _length(engine: Engine, options: argparse.Namespace) -> int:
    limit = engine.limits.max_sequence_length
    length = limit if options.max_length is None else options.max_length
    if not 1 <= length <= limit:
        raise ValueError(f"--max-length {length}: this teacher takes sequences of 1 to {limit} tokens")
    return length


def _request(options: argparse.Namespace) -> TargetsRequest:
    """What is asked of every sequence, with one of them as a stand-in."""
    asked = {
        "kinds": options.kinds.split(","), "top_k": options.top_k, "num_samples": options.num_samples,
        "temperatures": [float(t) for t in options.temperatures.split(",") if t],
        "sample_temperature": options.sample_temperature, "seed": options.seed, "hidden_dtype": options.hidden_dtype,
    }  # fmt: skip
    if "gather" in asked["kinds"]:
        raise ValueError("--kinds gather: its ids come from the student, and there is none here")
    try:
        return TargetsRequest(sequences=([0],), **asked)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ValueError(f"--{name}: {first['msg']}, got {first['input']!r}") from None


def _check(request: TargetsRequest, engine: Engine) -> None:
    try:
        check_request(request, engine.limits, engine.kinds)
    except RequestError as error:
        raise ValueError(f"--{(error.field or '').partition('.')[0].replace('_', '-')}: {error.message}") from None


class _Scoring:
    """How far it is, by the data that is done with, and what became of the sequences."""

    def __init__(self, num_bytes: int):
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
        return f"{report.scored:,} scored, {report.skipped:,} there, {report.failed:,} failed, {rate:,.0f} tokens/s"

    def __enter__(self) -> _Scoring:
        self._doing = self._stage.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self._stage.__exit__(*what)


def _tell(report: FillReport) -> int:
    rate = report.tokens / report.seconds if report.seconds else 0.0
    print(
        f"stillhouse-teacher: {report.scored} sequences scored ({report.tokens} tokens, {rate:,.0f} a second), "
        f"{report.skipped} were there, {report.failed} failed"
    )
    for failure in report.failures:
        print(f"stillhouse-teacher: failed: {failure}", file=sys.stderr)
    if report.lost:
        print(
            f"stillhouse-teacher: {report.lost} entries did not stay: the store is too small; raise --store-bytes",
            file=sys.stderr,
        )
    return _FAILED if report.failed or report.lost else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillhouse-teacher fill", allow_abbrev=False,
        description="Score a data set into a target store, without a server. Run it again to go on where it stopped.",
        epilog="Put MODEL and DATA first. Other options are those of stillhouse-teacher: --store (required), --engine, "
        "--dtype, --window, --store-bytes.",
    )  # fmt: skip
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder with a model, or its name on a hub")
    parser.add_argument("data", nargs="?", metavar="DATA", help=".jsonl, .parquet or .txt file, or a folder of such")
    parser.add_argument("--kinds", default="top_k", help=f"of {', '.join(KINDS)}, by commas (default: top_k)")
    parser.add_argument("--top-k", type=int, default=64, help="K (default: 64)")
    parser.add_argument("--temperatures", default="", help="temperatures of log_z, by commas")
    parser.add_argument("--num-samples", type=int, default=50, help="draws a row, for kind sampled (default: 50)")
    parser.add_argument("--sample-temperature", type=float, default=1.0, help="for kind sampled (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="for kind sampled (default: 0)")
    parser.add_argument("--hidden-dtype", default="float16", help="float16, bfloat16 or int8, for kind hidden")
    parser.add_argument("--max-length", type=int, help="tokens a sequence; the teacher's limit if not given")
    parser.add_argument("--no-special-tokens", action="store_true", help="leave out what a tokenizer adds by itself")
    return parser
