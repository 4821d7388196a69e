"""Weights the documents of a data set by their influence on a target: `stillhouse-train influence DATA --target DATA
SETTINGS...`. Called by `main`.

DATA is a file, folder or glob (.jsonl, .parquet, else text), or the name of one of the settings' sources. The student,
the loss and the teacher are those of the settings; a student that has been trained a little gives better estimates than
a freshly pruned one. Writes a Parquet file of the documents with columns `influence` and `weight`, for a source with
`weight_column=weight`. The same command resumes where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet

from student_trainer.build_components import build_components
from student_trainer.cli.compose import compose
from student_trainer.components import Components
from student_trainer.data.tokenise import pad_id
from student_trainer.influence.measure import Influence, Measure, Objective, Options
from student_trainer.influence.part_files import PartFiles
from student_trainer.losses.kinds import terms_of
from student_trainer.losses.terms import Needs
from student_trainer.settings import Settings
from student_trainer.settings.data import DataSettings, SourceSettings
from student_trainer.targets.background import EventThread
from teacher_proto.process.stages import DISPLAY, stage

ROWS_A_GROUP = 4096
KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}


def main(arguments: Sequence[str]) -> int:
    """ValueError or StillhouseError for settings that could not be trained with either."""
    given = _parser().parse_intermixed_args(list(arguments))
    if wrong := [text for text in given.settings if "=" not in text]:
        raise ValueError(f"'{wrong[0]}' is not a setting: give only one DATA, and settings as NAME=VALUE")
    # Two paths are enough: without sources in the settings, no preset is composed for them.
    named = any(text.startswith(("data=", "data.sources")) for text in given.settings)
    composed = compose([*([] if named else ["data=none"]), *given.settings], given.config_folder)
    settings = with_sources(composed, given.data, given.target)
    if DISPLAY.shown != "off":
        DISPLAY.shown = settings.logging.progress
    options = Options(**{name: getattr(given, name) for name in Options.__dataclass_fields__})
    out: Path = given.out or Path(f"{Path(given.data).stem.strip('*') or 'data'}.weighted.parquet")
    with ExitStack() as stack:
        stack.callback(DISPLAY.close)
        thread = stack.enter_context(EventThread())
        components = build_components(settings, thread, stack)
        objective = _objective(settings, components)
        measure = Measure(
            components.source, components.student, objective, thread, options, pad_id(components.tokenizer)
        )
        kept = PartFiles(out.with_name(out.name + ".work"), measure.fingerprint())
        influence = measure(kept)
        write(out, components, settings.data.sources["data"], influence)
        kept.remove()
    _say(out, influence)
    return 0


def with_sources(settings: Settings, data: str, target: str) -> Settings:
    """The settings with `data` and `target` as the only sources, and without compilation."""
    sources = {name: _source(settings.data, text) for name, text in (("data", data), ("target", target))}
    read = settings.data.model_copy(update={"sources": sources})
    student = settings.student.model_copy(update={"compile": False})
    return settings.model_copy(update={"data": read, "student": student})


def _source(data: DataSettings, text: str) -> SourceSettings:
    if text in data.sources:
        source = data.sources[text]
        # All of its documents are read, whatever share a run would read.
        return source.model_copy(update={"weight": 1.0, "held_out_fraction": 0.0, "weight_column": None})
    return SourceSettings(kind=KINDS.get(Path(text).suffix, "text"), path=(text,), held_out_fraction=0.0)


def _objective(settings: Settings, components: Components) -> Objective:
    terms = terms_of(settings.distillation)
    needs = Needs.of(terms)
    if needs.late:
        raise ValueError(
            f"the loss needs targets for ids that only a training step chooses ({', '.join(sorted(needs.late))}), so "
            "it can't weight documents: use a loss without support gather, such as distillation=logits_only"
        )
    spec = components.spec(settings, terms)
    return Objective(terms, settings.distillation.chunk_rows, spec, components.targets, components.head)


def write(out: Path, components: Components, source: SourceSettings, influence: Influence) -> None:
    """Write the documents in the order of the measurement, each with its influence and weight."""
    unfinished = out.with_name(out.name + ".unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(components, source, influence)
    writer: pyarrow.parquet.ParquetWriter | None = None
    with stage(f"writing {out.name}", len(influence.weights_N), "documents") as doing:
        try:
            while group := [row for _, row in zip(range(ROWS_A_GROUP), rows, strict=False)]:
                table = pa.Table.from_pylist(group, writer.schema if writer else None)
                writer = writer or pyarrow.parquet.ParquetWriter(unfinished, table.schema)
                writer.write_table(table)
                doing.done += len(group)
        finally:
            if writer is not None:
                writer.close()
    unfinished.replace(out)


def _rows(components: Components, source: SourceSettings, influence: Influence) -> Iterator[dict[str, Any]]:
    documents = components.source.raw_documents("data")
    for raw, score, weight in zip(documents, influence.influence_N.tolist(), influence.weights_N.tolist(), strict=True):
        fields = raw.content if isinstance(raw.content, dict) else {source.column_name: raw.content}
        yield {**fields, "influence": None if score != score else score, "weight": weight}


def _say(out: Path, influence: Influence) -> None:
    weights_N = influence.weights_N
    read = int((weights_N > 0).sum())
    print(
        f"{out}: {len(weights_N):,} documents weighted for {influence.targets:,} target documents, using gradients of "
        f"{influence.landmarks:,}; {read:,} have a weight above 0, the largest weight is {float(weights_N.max()):.2f}"
    )
    if influence.trust is not None:
        print(
            f"influence estimated from neighbours has a rank correlation of {influence.trust:.2f} with the measured one"
            + (": too low to rely on, increase --landmarks" if influence.trust < 0.3 else "")
        )
    print(f"read it with kind=parquet path={out} weight_column=weight")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"influence: {message}; stillhouse-train influence DATA --target DATA SETTINGS...")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="stillhouse-train influence", description=__doc__, allow_abbrev=False)
    defaults = Options()
    parser.add_argument("data", metavar="DATA", help="documents to weight: a path, or the name of a source")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings of a run")
    parser.add_argument("--target", required=True, metavar="DATA",
                        help="held-out data that stands for the goal: a path, or the name of a source")  # fmt: skip
    parser.add_argument("--out", type=Path, help="Parquet file to write (default: DATA's name with .weighted.parquet)")
    parser.add_argument("--config-folder", type=Path, help="folder with configuration groups of your own")
    numbers = {
        "landmarks": "documents whose gradients are computed",
        "target_documents": "documents of the target to use, from its beginning",
        "blocks": "layers of the student whose states make the embeddings",
        "tangents": "random weight directions per embedding",
        "sketch": "dimension that gradients are projected to",
    }
    for name, about in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name), help=about)
    parser.add_argument("--parameters", default=defaults.parameters,
                        help="regular expression: parameters whose gradients are used")  # fmt: skip
    parser.add_argument("--strength", type=float, default=defaults.strength,
                        help="change of a weight per standard deviation of influence")  # fmt: skip
    return parser
