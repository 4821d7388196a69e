"""The dashboard and the alert rules ask only for what a live teacher and a live trainer export, and Prometheus takes
every query.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.docs.markdown import ROOT
from tests.teacher_process import TeacherProcess, free_port
from tests.trainer_run import TrainerProcess, Workshop, teacher_script, wait_for_step

DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/stillhouse.json").read_text())
RULES = ROOT / "deploy/prometheus/alerts.yml"
METRIC = re.compile(r"\bstillhouse_\w+")


def queries() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    alerts = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return panels + alerts


def exported(text: str) -> set[str]:
    """Names of the samples in an answer of /metrics."""
    return set(re.findall(r"^(stillhouse_\w+)(?:\{| )", text, re.MULTILINE))


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a teacher with keys and a store, and a trainer that learns from it, answer at /metrics."""
    folder = tmp_path_factory.mktemp("run")
    keys = "trainer 0123456789abcdef\nprometheus fedcba9876543210"
    port = free_port()
    with TeacherProcess("--store", str(folder / "store"), script=teacher_script(), keys=keys) as teacher:
        refused = httpx.post(
            f"{teacher.url}/v1/targets", json={"sequences": [[10**6]]}, headers=bearer("trainer", keys)
        )
        assert refused.status_code == 422
        with TrainerProcess(
            Workshop(folder).settings(
                folder, "run.steps=100000", "evaluation.every=5", f"logging.prometheus_port={port}", url=teacher.url
            ),
            folder / "output",
            prelude=_with_key,
        ) as trainer:
            wait_for_step(folder / "run", 6, trainer)
            time.sleep(0.5)
            trainer_says = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        teacher_says = httpx.get(f"{teacher.url}/metrics", headers=bearer("prometheus", keys)).text
    return {"teacher": teacher_says, "trainer": trainer_says}


def _with_key() -> None:
    import os

    os.environ["STILLHOUSE_KEY"] = "0123456789abcdef"


def bearer(name: str, keys: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {dict(line.split() for line in keys.splitlines())[name]}"}


# Counted from the first time that it happens, which a run that goes well never has.
ONLY_IN_TROUBLE = {"stillhouse_cancelled_total"}


def test_every_query_asks_for_what_is_exported(scraped: dict[str, str]) -> None:
    names = exported(scraped["teacher"]) | exported(scraped["trainer"])
    asked = {name for query in queries() for name in METRIC.findall(query)}
    assert len(asked) > 25
    assert asked - names - ONLY_IN_TROUBLE == set()
    assert all(f"# TYPE {name.removesuffix('_total')}" in scraped["teacher"] for name in ONLY_IN_TROUBLE)


def test_labels_that_queries_use_are_exported(scraped: dict[str, str]) -> None:
    labels = set(re.findall(r'[{,](\w+)="', scraped["teacher"] + scraped["trainer"])) | {"job", "instance"}
    told = {name for query in queries() for group in re.findall(r"by \(([^)]*)\)", query) for name in group.split(", ")}
    legends = {
        name for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
        for name in re.findall(r"{{(\w+)}}", target["legendFormat"])
    }  # fmt: skip
    assert told | legends <= labels


def test_the_trainer_tells_prometheus_what_it_tells_its_file(scraped: dict[str, str]) -> None:
    text = scraped["trainer"]
    assert sample(text, "stillhouse_train_step") >= 6
    assert sample(text, 'stillhouse_train_steps{run="run"}') == 100_000
    assert 0 <= sample(text, "stillhouse_train_wait_share") <= 1
    assert sample(text, "stillhouse_train_tokens_total") > 0
    for term in ("cross_entropy", "top_k_kl"):
        assert sample(text, f'stillhouse_train_term_loss{{term="{term}"}}') > 0
    assert sample(text, 'stillhouse_train_held_out{figure="kl",source="a"}') > 0


def sample(text: str, name: str) -> float:
    match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert match, f"{name} is not in\n{text}"
    return float(match[1])


def test_a_port_that_is_taken_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    from student_trainer.reporting.prometheus import Exporter

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"logging.prometheus_port: can't listen on 127.0.0.1:\d+: "):
            Exporter("127.0.0.1", taken.getsockname()[1], "run", 1)


def test_panels_do_not_overlap_and_fill_their_lines() -> None:
    lines: dict[int, list[dict[str, Any]]] = {}
    for panel in DASHBOARD["panels"]:
        lines.setdefault(panel["gridPos"]["y"], []).append(panel["gridPos"])
    for places in lines.values():
        ends = [place["x"] + place["w"] for place in places]
        assert [place["x"] for place in places] == [0, *ends[:-1]] and ends[-1] == 24


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    every = {"groups": [{"name": "dashboard", "rules": [
        {"record": f"q{number}", "expr": query} for number, query in enumerate(queries())]}]}  # fmt: skip
    (tmp_path / "queries.yml").write_text(yaml.safe_dump(every))
    for file in (RULES, tmp_path / "queries.yml"):
        done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
