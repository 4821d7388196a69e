"""The wheel in environments that have nothing of the repository: the core alone, and `stillhouse[losses]`.

uv makes them, with its cache and the package index that is configured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv") or str(ROOT / ".cache/uv/bin/uv")
pytestmark = pytest.mark.slow

STEP = """
import torch
from student_trainer.losses import TeacherRows, head_loss, token_term

torch.manual_seed(0)
hidden_ND, weight_VD = torch.randn(6, 8, requires_grad=True), torch.nn.Parameter(torch.randn(50, 8))
logits_NV = torch.randn(6, 50)
logprobs_NK, ids_NK = logits_NV.log_softmax(-1).topk(10)
log_z_N1 = (logits_NV / 2).logsumexp(-1, keepdim=True) - logits_NV.logsumexp(-1, keepdim=True) / 2
rows = TeacherRows(ids_NK=ids_NK, logprobs_NK=logprobs_NK, log_z_NT=log_z_N1, temperatures=(2.0,))
terms = [token_term("kl", "forward_kl", temperature=2.0), token_term("cross_entropy", "cross_entropy")]
optimizer = torch.optim.SGD([weight_VD], lr=0.05)
totals = []
for _ in range(5):
    loss = head_loss(hidden_ND, weight_VD, torch.arange(6), rows, terms).total / 6
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    totals.append(loss.item())
assert totals[-1] < totals[0], totals
print("steps", totals)
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"UV_FIND_LINKS": os.environ.get("UV_FIND_LINKS", os.environ.get("PIP_FIND_LINKS", ""))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", str(folder), str(ROOT)]
    subprocess.run(command, env=environment, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def install(
    wheel: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of commands of a fresh environment with an extra, "" for none."""

    def make(extra: str) -> Path:
        folder = tmp_path_factory.mktemp("fresh") / "venv"
        subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, str(folder)], env=environment, check=True)
        constraints = ["--constraints", str(ROOT / "constraints.txt"), "--overrides", str(ROOT / "overrides-cpu.txt")]
        into = [UV, "pip", "install", "--quiet", "--python", str(folder / "bin/python"), *constraints]
        subprocess.run([*into, f"stillhouse{extra} @ {wheel.as_uri()}"], env=environment, check=True)
        return folder / "bin"

    return make


def run(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_command_without_its_extra_names_it(
    install: Callable[[str], Path], environment: dict[str, str], tmp_path: Path
) -> None:
    commands = install("")
    for name, arguments, extra in (
        ("stillhouse-teacher", ["--help"], "pip install 'stillhouse[teacher]', on a CPU 'stillhouse[teacher-cpu]'"),
        ("stillhouse-teacher", ["fill", "--help"], "pip install 'stillhouse[teacher]', on a CPU"),
        ("stillhouse-attention", ["--help"], "pip install 'stillhouse[attention]'"),
        ("stillhouse-train", ["student.checkpoint_path=x"], "pip install 'stillhouse[trainer]'"),
        ("stillhouse-train", ["check", "student.checkpoint_path=x"], "pip install 'stillhouse[trainer]'"),
    ):
        done = run([str(commands / name), *arguments], environment, tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
        (line,) = done.stdout.strip().splitlines()
        assert line.startswith(f"{name} needs ") and "which is not installed" in line and extra in line, line
    help_of_trainer = run([str(commands / "stillhouse-train"), "--help"], environment, tmp_path)
    assert help_of_trainer.returncode == 0 and "optim.learning_rate" in help_of_trainer.stdout
    client = [
        str(commands / "python"),
        "-c",
        "from teacher_proto.client.sync_client import SyncTeacherClient as C; C('http://x')",
    ]
    assert run(client, environment, tmp_path).returncode == 0


def test_losses_alone(install: Callable[[str], Path], environment: dict[str, str], tmp_path: Path) -> None:
    python = str(install("[losses]") / "python")
    done = run([python, "-c", STEP], environment, tmp_path)
    assert done.returncode == 0, done.stdout
    absent = (
        "import importlib.util as u; print([n for n in ('hydra', 'wandb', 'transformers', 'rich') if u.find_spec(n)])"
    )
    assert run([python, "-c", absent], environment, tmp_path).stdout.strip() == "[]"
