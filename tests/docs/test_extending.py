"""docs/extending.md is true: each diff applies to a copy of the tree, and what it adds then trains or serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.docs.markdown import ROOT
from tests.trainer_run import Workshop

PACKAGES = ("proto", "services", "trainer")
SECTION = re.compile(r"^## (.+?)$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
TRAINS = """
import sys
from pathlib import Path
import student_trainer
from tests.trainer_run import ScriptedTargets, run_here
assert Path(student_trainer.__file__).is_relative_to(sys.argv[1]), student_trainer.__file__
sys.exit(run_here(sys.argv[2:], ScriptedTargets()))
"""
SERVES = """
import asyncio, sys
from pathlib import Path
import numpy as np
import teacher_service
from serving.engine import Job
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import check_targets
from teacher_service.run import ENGINES
from teacher_service.settings import parse_settings
assert Path(teacher_service.__file__).is_relative_to(sys.argv[1]), teacher_service.__file__

async def ask():
    settings = parse_settings(sys.argv[2:])
    engine = ENGINES[settings.engine](settings)
    await engine.start()
    query = Query(np.array([3, 1, 4, 1, 5]), (0, 5), TargetSpec(kinds=("top_k",), top_k=4, temperatures=(2.0,)))
    targets = await engine.score(Job(query, "test"))
    check_targets(targets, query, engine.limits.vocab_size)
    table = np.load(settings.model)[query.tokens_T].astype(np.float64)
    np.testing.assert_array_equal(targets.ids, np.argsort(-table, axis=1)[:, :4])
    np.testing.assert_allclose(targets.lse, np.log(np.exp(table).sum(1)), rtol=1e-6)
    await engine.close()

asyncio.run(ask())
"""


def _block(language: str, text: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"a section without a {language} block"
    return found[1]


TEXT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = {title: body for title, body in SECTION.findall(TEXT) if "```diff" in body}


@pytest.mark.parametrize("title", SECTIONS)
def test_what_it_takes_is_all_that_it_takes(title: str, workshop: Workshop, tmp_path: Path) -> None:
    tree, (command, *arguments) = tmp_path / "tree", _block("sh", SECTIONS[title]).split()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    applied = subprocess.run(
        ["git", "apply", "--whitespace=error", "-"], cwd=tree, input=_block("diff", SECTIONS[title]), text=True,
        capture_output=True, check=False, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)},
    )  # fmt: skip
    assert applied.returncode == 0, applied.stderr
    if command == "stillhouse-teacher":
        np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32))
        program, arguments = SERVES, [str(tmp_path / each) if each.endswith(".npy") else each for each in arguments]
    else:
        program, arguments = TRAINS, workshop.settings(tmp_path, "run.steps=2", *arguments)
    path = os.pathsep.join(str(tree / package) for package in PACKAGES)
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tree), *arguments], cwd=ROOT, text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    if command == "stillhouse-train":
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)


def test_every_kind_of_extension_is_shown() -> None:
    assert len(SECTIONS) == 7, list(SECTIONS)
