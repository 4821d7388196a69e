"""`make demo` with one step an arm: the real model behind real vLLM, two trainers, summary and page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.vllm
def test_demo_goes_through_and_says_what_it_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo.run", "--steps", "2"], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((ROOT / "runs/demo/summary.json").read_text())
    assert set(summary) == {"seconds", "teacher", "arms"}
    for arm in ("cross_entropy", "distilled"):
        for when in ("before", "after"):
            assert set(summary["arms"][arm][when]) == {"prose", "code"}
            for figures in summary["arms"][arm][when].values():
                assert set(figures) == {"cross_entropy", "kl", "agreement", "tokens"} and figures["tokens"] > 1000
    # The same student before: the arms differ in the loss alone.
    assert summary["arms"]["cross_entropy"]["before"] == summary["arms"]["distilled"]["before"]
    assert summary["arms"]["cross_entropy"]["after"] != summary["arms"]["distilled"]["after"]
    page = (ROOT / "runs/demo/report.html").read_text()
    assert '"passages": [{' in page
