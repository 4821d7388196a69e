"""Sources of which it is known what they do for the probe: the policy's scores have the sign that retraining without
each of them shows, and the weights go where they should.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from student_trainer import loop
from tests.models import save_tiny_llama
from tests.trainer_run import lines_of, run_here

STATES, STEPS = 40, 120
SOURCES = ("duplicate", "useful", "useless", "harmful")


def chain(seed: int, states: Sequence[int], documents: int, table: dict[int, int], noise: float = 0.2) -> list[str]:
    """Walks along a table of successors, now and then to any state."""
    draw = np.random.default_rng(seed)
    lines = []
    for _ in range(documents):
        at = int(draw.choice(states))
        ids = [at]
        for _ in range(30):
            at = int(draw.choice(states)) if draw.random() < noise else table[at]
            ids.append(at)
        lines.append(json.dumps({"input_ids": ids}) + "\n")
    return lines


def successors(seed: int, states: Sequence[int]) -> dict[int, int]:
    return dict(zip(states, np.random.default_rng(seed).permutation(states).tolist(), strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe walks by a table; `duplicate` by the same, `useless` by one of other states, half of `useful` by
    the one and half by the other, `harmful` by another table of the probe's states.
    """
    folder = tmp_path_factory.mktemp("world")
    save_tiny_llama(folder / "student", num_hidden_layers=1)
    own, others = list(range(2, 2 + STATES)), list(range(200, 200 + STATES))
    table = successors(1, own)
    shuffled, apart = successors(2, own), successors(3, others)
    texts = {
        "probe": chain(1, own, 40, table),
        "duplicate": chain(2, own, 400, table),
        "useful": chain(3, own, 200, table) + chain(6, others, 200, apart),
        "useless": chain(4, others, 400, apart),
        "harmful": chain(5, own, 400, shuffled),
    }
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def train(world: Path, root: Path, names: Sequence[str], *changes: str) -> Path:
    """A run over these sources, two rows of each in a batch."""
    lines = [
        f"student.checkpoint_path={world / 'student'}", "student.compute=float32", f"run.root={root}", "run.id=run",
        f"run.steps={STEPS}", "run.threads=1", "data.seq_len=32", f"data.rows={2 * len(names)}", "data.workers=1",
        f"data.cache_folder={world / 'cache'}", "teacher.kind=none", "~distillation.terms.top_k_kl",
        "evaluation.every=20", "evaluation.samples=0", "data.held_out_rows=40", "logging.wandb=off",
        "logging.progress=off", "optim.learning_rate=3e-3", "optim.schedule.kind=constant",
    ]  # fmt: skip
    for name in ("probe", *names):
        lines += [f"data.sources.{name}.{field}" for field in (
            "kind=jsonl", "format=tokens", f"path={world / name}.jsonl",
            *(("weight=0", "held_out_fraction=1") if name == "probe" else ("held_out_fraction=0",)))]  # fmt: skip
    assert run_here([*lines, *changes]) == loop.DONE
    return root / "run"


def probe_loss(folder: Path) -> float:
    """At the end, as the mean of the last three evaluations."""
    return statistics.mean(line["probe"]["cross_entropy"] for line in lines_of(folder, "evaluation.jsonl")[-3:])


INFLUENCE = ("data.mixture.policy=influence", "data.mixture.probe=probe", "data.mixture.update_interval=10")


def test_scores_have_the_sign_of_leaving_a_source_out(world: Path, tmp_path: Path) -> None:
    """What the probe's loss is without a source less what it is with all: the others are trained on alike."""
    # No decision takes effect within the run.
    all_of_them = train(world, tmp_path / "all", SOURCES, *INFLUENCE, "data.mixture.lag=1000")
    whole = probe_loss(all_of_them)
    scores = {
        name: statistics.mean(
            line[f"reason/{name}/score"] for line in lines_of(all_of_them) if f"reason/{name}/score" in line
        )
        for name in SOURCES
    }
    left_out = {
        name: probe_loss(train(world, tmp_path / name, [other for other in SOURCES if other != name])) - whole
        for name in SOURCES
    }
    print("scores", scores, "left out", left_out)
    assert scores["duplicate"] > scores["useful"] > 0 > scores["harmful"]
    assert left_out["duplicate"] > 0 and left_out["useful"] > 0 > left_out["harmful"]
    assert abs(scores["useless"]) < min(abs(scores[name]) for name in SOURCES if name != "useless")
    assert abs(left_out["useless"]) < min(abs(left_out[name]) for name in SOURCES if name != "useless")


def test_the_weights_go_to_what_helps_and_the_probe_is_learnt_better(world: Path, tmp_path: Path) -> None:
    static = train(world, tmp_path / "static", SOURCES)
    led = train(world, tmp_path / "led", SOURCES, *INFLUENCE, "data.mixture.lag=2", "data.mixture.kept=0.5")
    last = lines_of(led)[-1]
    weights = {name: last[f"mixture/{name}"] for name in SOURCES}
    print("weights", weights, probe_loss(led), probe_loss(static))
    assert weights["duplicate"] > 0.25 > weights["harmful"]
    assert probe_loss(led) < probe_loss(static)
