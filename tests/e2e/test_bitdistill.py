"""`make bitdistill` with little time: both services, both arms, three exports opened again, table and page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.vllm
def test_bitdistill_goes_through_and_says_what_it_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo.bitdistill", "--minutes", "5"],
        cwd=ROOT, capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((ROOT / "runs/bitdistill/summary.json").read_text())
    arms, machine = summary["arms"], summary["machine"]
    assert machine["student_tokens_per_second"] > 0 and machine["plan"]["steps"] >= 1
    assert machine["teacher_dtype"] in ("float32", "bfloat16") and "The plan: 3 arms" in done.stdout
    # Both arms begin with the student that stage 2 left.
    assert arms["cross_entropy"]["before"] == arms["distilled"]["before"]
    assert arms["cross_entropy"]["after"] != arms["distilled"]["after"]
    for arm in arms.values():
        assert set(arm["after"]) == {"prose", "code"}
    assert set(summary["exports"]) == {"hf", "bitnet", "gguf"}
    assert summary["verdict"]["agreement"]["documents"] >= 2
    for form in ("hf", "bitnet"):
        assert summary["exports"][form]["reader"] == "transformers alone"
        assert summary["exports"][form]["comparison"]["kl"] < 0.1
    assert summary["exports"]["bitnet"]["num_bytes"] < 0.5 * summary["exports"]["hf"]["num_bytes"]
    assert '"passages": [{' in (ROOT / "runs/bitdistill/report.html").read_text()
    assert "distilled" in done.stdout and "top-1 agreement" in done.stdout
