"""A run on a target dataset in a bucket is the run on the local store and the one that is online, to the last bit."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from student_trainer import main
from tests.e2e.test_teachers import STEPS, arguments, assert_same, run
from tests.teacher_process import TeacherProcess
from tests.trainer_run import Workshop, steps_of, teacher_script, trace_of, train
from tests.unit.data.stores import BUCKET, STORES

ASK = ("--top-k", "16", "--temperatures", "2")
PROTOCOLS = {"s3": "s3", "gs": "gs"}


def reach(protocol: str, options: dict[str, Any]) -> None:
    """What variables FSSPEC_S3_ENDPOINT_URL and the like would do in a process that is started, not forked."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    fsspec.config.conf[protocol] = dict(options)


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    with STORES[request.param]() as options:
        before = dict(fsspec.config.conf)
        fsspec.config.conf[request.param] = dict(options)
        yield request.param, options
        fsspec.config.conf.clear()
        fsspec.config.conf.update(before)


@pytest.fixture(scope="module")
def sequences(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sequences")
    assert main.run(["sequences", str(root / "sequences.jsonl"), *arguments(workshop, root)]) == 0
    return root / "sequences.jsonl"


@pytest.fixture(scope="module")
def online(workshop: Workshop, teacher: TeacherProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("online")
    run(workshop, root, f"teacher.url={teacher.url}")
    return root


def fill(data: Path, *where: object, environment: dict[str, str] | None = None) -> None:
    words = [sys.executable, "-m", "teacher_service.main", "fill", "scripted", str(data), "--engine", "scripted",
             "--script", json.dumps(teacher_script()), *ASK, *map(str, where)]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True, timeout=120, env={**os.environ, **(environment or {})})


def run_there(workshop: Workshop, root: Path, bucket: tuple[str, dict[str, Any]], *overrides: str) -> tuple[int, str]:
    root.mkdir(exist_ok=True)
    prelude = functools.partial(reach, *bucket)
    code = train(arguments(workshop, root, *overrides), root / "output.txt", prelude)
    return code, (root / "output.txt").read_text()


def test_a_run_from_a_bucket_is_the_run_from_a_store_and_the_one_online(
    workshop: Workshop, online: Path, sequences: Path, bucket: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    protocol, options = bucket
    url = f"{protocol}://{BUCKET}/{tmp_path.name}"
    variables = {f"FSSPEC_{protocol.upper()}_{name.upper()}": value for name, value in options.items()}
    fill(sequences, "--output", url, "--shard-tokens", "2000", environment=variables)
    fill(sequences, "--store", tmp_path / "store")
    cache = f"teacher.store_cache={tmp_path / 'cache'}"
    code, said = run_there(workshop, tmp_path / "bucket", bucket, "teacher=cached", f"teacher.store={url}", cache)
    assert code == 0, said
    assert "has all " in said and (tmp_path / "cache").exists()
    assert_same(tmp_path / "bucket", online)
    run(workshop, tmp_path / "local", "teacher=cached", f"teacher.store={tmp_path / 'store'}")
    assert_same(tmp_path / "bucket", tmp_path / "local")


def test_what_a_dataset_lacks_is_told_before_the_start_and_can_be_asked_for(
    workshop: Workshop, teacher: TeacherProcess, online: Path, sequences: Path, tmp_path: Path
) -> None:
    lines = sequences.read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[: len(lines) // 2]))
    dataset = tmp_path / "dataset"
    fill(tmp_path / "some.jsonl", "--output", dataset)
    cached = ("teacher=cached", f"teacher.store={dataset}")
    (tmp_path / "refused").mkdir()
    assert train(arguments(workshop, tmp_path / "refused", *cached), tmp_path / "refused" / "output.txt") == 2
    said = (tmp_path / "refused" / "output.txt").read_text()
    missing = tmp_path / "refused" / "run" / "missing.jsonl"
    left = len(lines) - len(lines) // 2
    assert f"lacks {left:,} of the {len(lines):,} documents of this run" in said and "Traceback" not in said
    assert f"fill MODEL {missing} --output {dataset} --kinds top_k --top-k 16 --temperatures 2" in said
    assert missing.read_text().splitlines() == [line.strip() for line in lines[len(lines) // 2 :]]
    assert steps_of(tmp_path / "refused" / "run") == []

    less = (*cached, "teacher.top_k=32")
    assert train(arguments(workshop, tmp_path / "refused", *less), tmp_path / "refused" / "less.txt") == 2
    assert "was filled with --kinds top_k --top-k 16" in (tmp_path / "refused" / "less.txt").read_text()

    through = (*cached, "teacher.on_miss=remote", f"teacher.url={teacher.url}")
    said = run(workshop, tmp_path / "through", *through)
    assert f"lacks {left:,} of the" in said and "will be requested from the teacher behind the dataset" in said
    assert_same(tmp_path / "through", online)
    # What was asked for is in the dataset now; a killed start fills what is left of it with `missing.jsonl`.
    fill(missing, "--output", dataset)
    run(workshop, tmp_path / "again", *cached)
    assert_same(tmp_path / "again", online)


def test_a_dataset_of_another_teacher_than_the_run_began_with_is_refused(
    workshop: Workshop, sequences: Path, tmp_path: Path
) -> None:
    fill(sequences, "--output", tmp_path / "one")
    root = tmp_path / "run"
    run(workshop, root, "teacher=cached", f"teacher.store={tmp_path / 'one'}")
    script = json.dumps(teacher_script(identity={"semantic.dtype": "bfloat16"}))
    words = [sys.executable, "-m", "teacher_service.main", "fill", "scripted", str(sequences), "--engine", "scripted",
             "--script", script, *ASK, "--output", str(tmp_path / "two")]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    given = arguments(workshop, root, "teacher=cached", f"teacher.store={tmp_path / 'two'}", f"run.steps={STEPS + 4}",
                      "run.allow_changes=[run.steps]")  # fmt: skip
    assert train(given, root / "second.txt") != 0
    said = (root / "second.txt").read_text()
    assert "semantic.dtype" in said and "Traceback" not in said, said


def test_a_run_on_eight_bits_a_logprob_stays_near_the_exact_one(
    workshop: Workshop, online: Path, sequences: Path, tmp_path: Path
) -> None:
    fill(sequences, "--output", tmp_path / "compact", "--codec", "compact:8")
    cached = ("teacher=cached", f"teacher.store={tmp_path / 'compact'}")
    run(workshop, tmp_path / "one", *cached)
    exact, near = trace_of(online / "run"), trace_of(tmp_path / "one" / "run")
    for theirs, ours in zip(exact, near, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    assert near != exact
    run(workshop, tmp_path / "two", *cached)
    assert_same(tmp_path / "one", tmp_path / "two")
