"""Writes a run's metrics to `metrics.jsonl`, `evaluation.jsonl` and other files, the terminal, and trackers if any.

Built by `build`, written by `loop`. The files are authoritative: each line is flushed when it is written, and on resume
the lines of steps that will be repeated are removed first.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_trainer.checkpoint.files import replace_text
from student_trainer.reporting.progress import Progress
from student_trainer.reporting.step_metrics import StepMetrics
from student_trainer.reporting.trackers import Tracker, open_trackers

if TYPE_CHECKING:
    from student_trainer.evaluation.records import Evaluation, SampledText
    from student_trainer.ranks import Ranks
    from student_trainer.settings import Settings
    from student_trainer.state import TrainState

logger = logging.getLogger(__name__)
METRICS, EVALUATION, SAMPLES = "metrics.jsonl", "evaluation.jsonl", "samples.jsonl"
DOCUMENTS, CLASSES = "documents.jsonl", "classes.jsonl"
FILES = (METRICS, EVALUATION, SAMPLES, DOCUMENTS, CLASSES)


class RunLog:
    """Close it, or use it in a `with`. Without a folder no files are written: only rank 0 has one."""

    def __init__(self, folder: Path | None, progress: Progress, trackers: Sequence[Tracker]):
        self._files = {name: LineFile(folder / name) for name in FILES} if folder else {}
        self._progress, self._trackers = progress, tuple(trackers)
        self.evaluated = _last_step(folder / EVALUATION) if folder else -1

    def step(self, state: TrainState, metrics: StepMetrics, seconds: float, prefetch_depth: int) -> None:
        """Write one line for the update that led to `state`."""
        line = step_line(state, metrics, seconds, prefetch_depth)
        self._write(METRICS, line)
        self._progress.step(state.step, metrics, seconds)
        if (decision := state.policy.decision) is not None:
            self._progress.decision(decision, state.policy.lag)
        for tracker in self._trackers:
            tracker.log(state.step, {key: value for key, value in line.items() if key not in ("step", "time")})

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Write one line with the step and the metrics of each source under its name; also one line per held-out
        document, and one per source with classes."""
        by_source = evaluation.by_source
        if not by_source:
            return
        for document in evaluation.documents:
            self._write(DOCUMENTS, {"step": step, **vars(document)})
        for classes in evaluation.classes:
            self._write(CLASSES, {"step": step, **asdict(classes)})
        self._write(EVALUATION, {"step": step, **by_source})
        self.evaluated = step
        self._progress.evaluation(step, by_source)
        flat = {f"held_out/{name}/{key}": value for name, f in by_source.items() for key, value in f.items()}
        for tracker in self._trackers:
            tracker.log(step, {key: value for key, value in flat.items() if value is not None})

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        if name in self._files:
            self._files[name].append(line)

    def samples(self, step: int, samples: Sequence[SampledText]) -> None:
        """Write one line per text; trackers get the texts of a source as one."""
        texts: dict[str, str] = {}
        for sample in samples:
            self._write(SAMPLES, {"step": step, **vars(sample)})
            name = f"samples/{sample.source}"
            texts[name] = f"{texts[name]}\n\n---\n\n" if name in texts else ""
            texts[name] += f"{sample.prompt} ▸ {sample.written}"
        for tracker in self._trackers if texts else ():
            tracker.log(step, texts)

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._progress.stop()
        for tracker in self._trackers:
            tracker.close()
        for file in self._files.values():
            file.close()


class LineFile:
    """A file of JSON lines. Lines that can't be written (full disk) are kept, up to a limit, for the next attempt."""

    KEEP = 100_000

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a")
        self._waiting: list[str] = []

    def append(self, line: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps(line) + "\n")
        self._write()

    def close(self) -> None:
        if self._waiting:
            self._write()
        self._file.close()

    def _write(self) -> None:
        size = self._path.stat().st_size
        try:
            self._file.write("".join(self._waiting))
            self._file.flush()
        except OSError as error:
            logger.error("%s could not be written (%s); keeping its %d lines to try again", self._path.name, error,
                         len(self._waiting))  # fmt: skip
            self._reopen(size)
            del self._waiting[: -self.KEEP]
        else:
            self._waiting.clear()

    def _reopen(self, size: int) -> None:
        """Discard the failed buffer, and whatever part of it reached the file."""
        descriptor = self._file.buffer.raw if hasattr(self._file.buffer, "raw") else self._file
        descriptor.close()
        self._file = self._path.open("a")
        self._file.truncate(size)


def open_log(settings: Settings, run_id: str, folder: Path, step: int, ranks: Ranks) -> RunLog:
    """The log of a run that is at `step`, with the trackers in its settings. Ranks but the first get one that writes
    nothing.
    """
    if not ranks.first:
        return RunLog(None, Progress(settings.run.steps, step, "off"), ())
    progress = Progress(settings.run.steps, step, settings.logging.progress)
    return RunLog(folder, progress, open_trackers(settings, run_id, folder))


def forget_after(folder: Path, step: int) -> None:
    """Remove the lines of steps after `step`, which a resumed run will repeat, and an incomplete last line."""
    for name in FILES:
        path = folder / name
        if path.is_file():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            replace_text(path, "".join(kept))


def _last_step(path: Path) -> int:
    """The step in the file's last line; -1 if there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return int(_step_of(lines[-1])) if lines else -1


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def step_line(state: TrainState, metrics: StepMetrics, seconds: float, prefetch_depth: int) -> dict[str, Any]:
    """A line of `metrics.jsonl`. Losses are means in nats per token; `wait_share` is a fraction of this step's time."""
    rates = list(metrics.rates.values())
    return {
        "step": state.step,
        "tokens": state.tokens,
        **metrics.losses.by_name(),
        **{f"mixture/{source}": weight for source, weight in metrics.mixture.items()},
        **_decision(state),
        **{f"coefficient/{name}": value for name, value in metrics.coefficients.items()},
        **{f"gradient_share/{name}": value for name, value in metrics.gradient_shares.items()},
        "learning_rate": rates[0] if rates else None,
        **{f"learning_rate/{name}": value for name, value in metrics.rates.items()},
        "grad_norm": metrics.losses.grad_norm,
        **_attention(metrics),
        **_rollout(metrics),
        "seconds": seconds,
        "tokens_per_second": metrics.losses.tokens / seconds if seconds else None,
        "wait_s": metrics.waited_s,
        "wait_share": metrics.waited_s / seconds if seconds else 0.0,
        "prefetch_depth": prefetch_depth,
        "time": time.time(),
    }


def _decision(state: TrainState) -> dict[str, Any]:
    """The mixture policy's decision after the update: weights that apply `lag` batches later, and the reasons."""
    decision = state.policy.decision
    if decision is None:
        return {}
    decided: dict[str, Any] = {f"decided/{source}": weight for source, weight in decision.weights.items()}
    for source, figures in decision.reasons.items():
        decided |= {f"reason/{source}/{name}": value for name, value in figures.items()}
    return decided | ({"decided_note": decision.note} if decision.note else {})


def _rollout(metrics: StepMetrics) -> dict[str, Any]:
    """In an on-policy run: whether the batch is a rollout, its length and logprob if so, and the time spent writing."""
    if metrics.wrote_s is None:
        return {}
    of_it = {f"on_policy/{name}": value for name, value in (metrics.rollout or {}).items()}
    return {"on_policy": int(metrics.rollout is not None), **of_it, "on_policy/write_s": metrics.wrote_s}


def _attention(metrics: StepMetrics) -> dict[str, Any]:
    """In a run with QK-clip: the largest attention logit before clipping, and the number of clipped heads."""
    clipped = metrics.clipped
    if clipped is None:
        return {}
    seen = clipped.largest_logit if math.isfinite(clipped.largest_logit) else None
    return {"attention/largest_logit": seen, "attention/clipped_heads": clipped.clipped_heads}
