"""What a service writes while it starts and when it ends: our own lines and nobody else's, and how soon it obeys."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
import pytest

from serving import logs
from tests.models import save_tiny_llama
from tests.teacher_process import AttentionProcess, ServiceProcess, TeacherProcess

AROUND = ["service imported", "everything needed to serve requests"]
LOADED_HERE = [
    *AROUND,
    "torch and transformers imported",
    "model found",
    "weights loaded, first pass",
    "weights hashed",
]
IN_VLLM = ["vLLM imported", "weights loaded", "engine up, memory measured"]
BESIDE_VLLM = ["model found", "weights hashed", "tokenizer and head imported"]


def done(process: ServiceProcess) -> dict[str, float]:
    """The stages that were said to be over, in order, with their seconds."""
    return {event["done"]: event["seconds"] for event in process.events("starting") if "done" in event}


def ends_quietly(process: ServiceProcess) -> None:
    """SIGTERM: exit code 0, and not a line on stderr that is not one of our events."""
    process.signal()
    assert process.wait() == 0
    lines = process.log.splitlines()
    assert lines and all(line.startswith("{") and "event" in json.loads(line) for line in lines), process.log


def test_the_transformers_teacher_says_each_stage_and_its_dtype_and_ends_quietly(tiny_llama: Path) -> None:
    with TeacherProcess(str(tiny_llama), "--engine", "hf", wait=False) as teacher:
        assert teacher.process.stdout is not None
        ready = teacher.process.stdout.readline()
        assert re.fullmatch(
            r"stillhouse-teacher: ready at \S+, tiny-llama, [0-9a-f]{32}\.[0-9a-f]{16} in float32\n", ready
        )
        assert sorted(done(teacher)) == sorted(LOADED_HERE) and all(seconds >= 0 for seconds in done(teacher).values())
        ends_quietly(teacher)


def test_the_attention_service_says_each_stage_and_ends_quietly(tiny_llama: Path) -> None:
    with AttentionProcess(tiny_llama) as service:
        assert sorted(done(service)) == sorted(LOADED_HERE)
        ends_quietly(service)


@pytest.mark.vllm
def test_the_vllm_teacher_says_each_stage_and_ends_quietly(tiny_llama: Path) -> None:
    with TeacherProcess(str(tiny_llama), "--engine", "vllm", "--kv-cache-bytes=4194304") as teacher:
        said = done(teacher)
        assert [name for name in said if name in IN_VLLM] == IN_VLLM
        assert [name for name in said if name in BESIDE_VLLM] == BESIDE_VLLM and list(said)[-2] == "first pass"
        assert [name for name in said if name in AROUND] == AROUND and said[AROUND[1]] > said["vLLM imported"]
        children = psutil.Process(teacher.pid).children(recursive=True)
        ends_quietly(teacher)
        assert not psutil.wait_procs(children, timeout=15)[1]


def test_a_dtype_that_is_emulated_is_warned_of_in_the_log(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "tiny")
    lesser = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    with TeacherProcess(str(model), "--engine=hf", "--dtype=bfloat16", environment=lesser) as teacher:
        assert re.search(r"bfloat16 is emulated on this CPU.*took [\d.e+]+ times as long", teacher.log)


@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0, 2.5])
def test_a_service_that_starts_obeys_at_once(tiny_llama: Path, after_s: float) -> None:
    """From the moment its port is taken; before that the signal's own way ends it."""
    with TeacherProcess(str(tiny_llama), "--engine", "hf", wait=False) as teacher:
        time.sleep(after_s)
        teacher.signal()
        told = time.monotonic()
        assert teacher.wait(30) in (-15, 1, 0)  # 0: it was ready already
        assert time.monotonic() - told < 15
        assert "Traceback" not in teacher.log


def test_a_stage_that_lasts_says_that_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, object]] = []
    monkeypatch.setattr(logs.log, "info", lambda event, **facts: said.append({"event": event, **facts}), raising=False)
    monkeypatch.setattr(logs, "SAY_EVERY_S", 0.02)
    with logs.stage("weights loaded", gpu=1):
        while len(said) < 3:
            time.sleep(0.005)
    assert said[0]["still"] == "weights loaded" and said[0]["gpu"] == 1 and said[-1]["done"] == "weights loaded"
    with pytest.raises(ValueError, match="no such model"), logs.stage("model found"):
        raise ValueError("no such model")
    assert said[-1]["done"] == "weights loaded", "a stage that failed is not done"
