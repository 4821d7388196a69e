"""Targets for all text that the runs of a seed read, scored once and kept: exact ones, other tools' approximations at a
temperature, and those that a dataset's codec stores. Used by the `quality_*` tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_runs import ROOT, Size, common, local_teacher, teacher_of
from demo.prepare import make_whole
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.store.entry import split
from teacher_proto.targets import TokenTargets, tensors_of

MOST = 256  # K of the stored targets, from which a smaller K is served
TEMPERATURES = (2.0, 5.0)
DRAWS = (12, 50)
SPECS = (
    TargetSpec(("top_k", "sampled"), top_k=MOST, temperatures=TEMPERATURES, num_samples=DRAWS[1]),
    TargetSpec(("sampled",), num_samples=DRAWS[0]),
)
Answer = tuple[Query, TokenTargets]


def stored(size: Size, seed: int) -> Path:
    """The folder of the target store with the exact targets of a seed's text."""
    return _kept(size, seed, "exact", lambda folder: _score(folder, size, seed))


def as_others_have_it(size: Size, seed: int, how: str, temperature: float) -> Path:
    """Folder of top-64 targets whose probabilities at `temperature` are what other tools make of logprobs at T = 1:
    with "k_sums_to_1" the scaled 64 are given all the mass, with "left_at_1" they remain as at T = 1.
    """
    alter = {"k_sums_to_1": k_sums_to_1, "left_at_1": left_at_1}[how]

    def make(folder: Path) -> None:
        from teacher_proto.store.target_store import TargetStore

        store = TargetStore(folder)
        with _top_64(size, seed, (temperature,)) as (info, answers):
            store.remember(info)
            store.put_entries(
                pair for query, given in answers
                for pair in split(info.fingerprint, query, alter(given, temperature))
            )  # fmt: skip
        store.close()

    return _kept(size, seed, f"{how}-{temperature:g}", make)


def dataset(size: Size, seed: int, codec: str) -> Path:
    """Folder of a target dataset of the top 64, stored with `codec`."""

    def make(folder: Path) -> None:
        from teacher_proto.dataset.codecs import parse_codec
        from teacher_proto.dataset.dataset import TargetDataset
        from teacher_proto.dataset.manifest import Manifest

        with _top_64(size, seed) as (info, answers):
            spec = TargetSpec(("top_k",), top_k=64)
            with TargetDataset(str(folder), create=Manifest(info, spec, parse_codec(codec))) as made:
                for query, given in answers:
                    made.put_entries(split(info.fingerprint, query, given))

    return _kept(size, seed, f"dataset-{codec.replace(':', '-')}", make)


def _kept(size: Size, seed: int, name: str, make: Callable[[Path], None]) -> Path:
    folder = ROOT / size.name / f"targets-{seed}-{name}"
    if not folder.is_dir():
        make_whole(folder, make)
    return folder


def k_sums_to_1(targets: TokenTargets, temperature: float) -> TokenTargets:
    """Replace the vocabulary's normaliser by that of the K ids alone."""
    assert targets.logprobs is not None
    scaled_RK = targets.logprobs.astype(np.float64) / temperature
    largest_R1 = scaled_RK.max(axis=1, keepdims=True)
    log_z_R1 = largest_R1 + np.log(np.exp(scaled_RK - largest_R1).sum(axis=1, keepdims=True))
    return replace(targets, log_z=log_z_R1.astype(np.float32))


def left_at_1(targets: TokenTargets, temperature: float) -> TokenTargets:
    """Multiply by the temperature in advance, so that dividing by it gives the logprobs at T = 1."""
    assert targets.logprobs is not None and targets.log_z is not None
    scaled_RK = (targets.logprobs.astype(np.float32) * temperature).clip(-60_000).astype(np.float16)
    return replace(targets, logprobs=scaled_RK, log_z=np.zeros_like(targets.log_z))


@contextmanager
def _top_64(
    size: Size, seed: int, temperatures: tuple[float, ...] = ()
) -> Iterator[tuple[TeacherInfo, Iterator[Answer]]]:
    """The teacher's info, and the top-64 targets of each document, from the exact ones."""
    from teacher_proto.store.target_store import TargetStore

    spec = TargetSpec(("top_k",), top_k=64, temperatures=temperatures)
    store = TargetStore(stored(size, seed), readonly=True)
    (info,) = store.teachers()

    def answers() -> Iterator[Answer]:
        for entry, _ in store.entries():
            if entry.kind == "top_k":
                query = Query(np.asarray(entry.tokens_T), (entry.start, entry.stop), spec)
                found = store.get(info.fingerprint, query)
                assert found is not None, "targets stored at K = 256 serve K = 64"
                yield query, found

    try:
        yield info, answers()
    finally:
        store.close()


def _score(folder: Path, size: Size, seed: int) -> None:
    from teacher_proto.store.target_store import TargetStore

    store = TargetStore(folder)
    with _scored(size, seed) as (info, answers_to):
        store.remember(info)
        for spec in SPECS:
            for answers in answers_to(spec):
                store.put_entries(pair for query, given in answers for pair in split(info.fingerprint, query, given))
    store.close()


@contextmanager
def _scored(size: Size, seed: int) -> Iterator[tuple[TeacherInfo, Callable[[TargetSpec], Iterator[list[Answer]]]]]:
    """The teacher's info, and a function from a spec to the targets of each batch of the seed's run."""
    from student_trainer.build_components import load_tokenizer
    from student_trainer.cli.compose import compose_arguments
    from student_trainer.data.loader import BatchSource
    from student_trainer.data.stream import BatchStream
    from student_trainer.targets.background import EventThread
    from student_trainer.targets.local import LocalTargets
    from student_trainer.targets.queries import queries_of

    settings = compose_arguments([
        *common(size, teacher_of(size), seed), *local_teacher(size), "distillation=logits_only",
    ])  # fmt: skip
    source = BatchSource(settings.data, load_tokenizer(settings), settings.run.seed)
    with EventThread() as thread, ExitStack() as stack:
        stack.callback(source.close)
        teacher = LocalTargets(settings.teacher)
        stack.callback(lambda: thread.call(teacher.close()))
        info = thread.call(teacher.open()).info()

        def answers_to(spec: TargetSpec) -> Iterator[list[Answer]]:
            with BatchStream(source, source.initial_state()) as stream:
                for _ in range(settings.run.steps):
                    batch, _ = next(stream)
                    queries = queries_of(batch, spec)
                    given = thread.call(teacher.fetch(batch, queries)).documents
                    yield [
                        (query, answer) for query, answer in zip(queries, given, strict=True)
                        if query is not None and answer is not None
                    ]  # fmt: skip

        yield info, answers_to


def bytes_a_token(size: Size, seed: int) -> dict[str, float]:
    """Wire bytes per token, at temperature 1, of each kind, K and number of draws that the tables compare."""
    from teacher_proto.store.target_store import TargetStore

    rows = dict.fromkeys(("top_k", *DRAWS), 0)
    found: dict[str, float] = {}

    def add(name: str, num_bytes: float) -> None:
        found[name] = found.get(name, 0) + num_bytes

    store = TargetStore(stored(size, seed), readonly=True)
    for entry, targets in store.entries():
        arrays: dict[str, Any] = targets.tensors()
        kind = "top_k" if entry.kind == "top_k" else entry.num_samples
        if kind not in rows:
            continue
        rows[kind] += targets.num_rows
        if kind == "top_k":
            fixed = sum(arrays[name].nbytes for name in ("lse", "next_logprob"))
            for k in (16, 64, MOST):
                each = sum(arrays[name].nbytes for name in ("ids", "logprobs")) * k / MOST
                add(f"top-{k}", (each + fixed))
        else:
            add(f"sampled-{kind}", sum(arrays[name].nbytes for name in tensors_of(("sampled",)) if name in arrays))
    store.close()
    for name in found:
        found[name] /= rows["top_k" if name.startswith("top") else int(name.partition("-")[2])]
    return found
