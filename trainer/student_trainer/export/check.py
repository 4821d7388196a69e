"""Runs an export in third-party software and compares its logits with the student's. Called by `cli.export` and tests.

Ternary students are sensitive: int8 rounding turns the last bit of a sum into a step of 1/127, so results differ even
between two machines or numbers of threads. Therefore `compare_logits` returns distances of distributions, not a yes or
no.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Runs in a process where our packages cannot be imported.
_SCRIPT = """
import pathlib, sys
for name in ("student_trainer", "teacher_proto", "serving", "teacher_service", "attention_service"):
    sys.modules[name] = None
import numpy, torch, transformers
scratch, *folders = sys.argv[1:]
ids_BT = torch.from_numpy(numpy.load(f"{scratch}/ids.npy"))
for index, folder in enumerate(folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if pathlib.Path(folder, "adapter").is_dir():
        import peft
        model = peft.PeftModel.from_pretrained(model, f"{folder}/adapter").eval()
    with torch.no_grad():
        numpy.save(f"{scratch}/{index}.npy", model(ids_BT, use_cache=False).logits.float().numpy())
"""


@dataclass(frozen=True)
class LogitsComparison:
    """Two sets of logits compared: mean KL(ours || theirs) in nats, fraction of rows with the same likeliest token, and
    the root mean square difference in units of our logits' standard deviation.
    """

    kl: float
    agreement: float
    difference: float


def compare_logits(ours_NV: np.ndarray, theirs_NV: np.ndarray) -> LogitsComparison:
    """Compare [..., V] logits row by row, in float64. ValueError if the shapes differ."""
    if ours_NV.shape != theirs_NV.shape:
        raise ValueError(f"logits of shape {ours_NV.shape} cannot be compared with {theirs_NV.shape}")
    ours, theirs = ours_NV.astype(np.float64), theirs_NV.astype(np.float64)
    log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
    return LogitsComparison(
        kl=float((np.exp(log_ours) * (log_ours - log_theirs)).sum(-1).mean()),
        agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        difference=float(np.sqrt(np.square(ours - theirs).mean()) / ours.std()),
    )


def _log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    shifted_NV = logits_NV - logits_NV.max(-1, keepdims=True)
    return shifted_NV - np.log(np.exp(shifted_NV).sum(-1, keepdims=True))


def transformers_logits(folders: Sequence[Path], ids_BT: np.ndarray, *, compiled: bool = False) -> list[np.ndarray]:
    """Logits [B, T, V] of exports loaded by transformers, in a process that cannot import our packages.

    `compiled` lets transformers compile its BitNet layers, which needs a C++ compiler on CPUs; the result is the same
    up to rounding. RuntimeError with that process's last output if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch) / "ids.npy", ids_BT)
        environment = os.environ | {"TORCHDYNAMO_DISABLE": "0" if compiled else "1"}
        command = [sys.executable, "-c", _SCRIPT, scratch, *map(str, folders)]
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if outcome.returncode:
            raise RuntimeError(f"transformers could not run the export: {outcome.stderr[-2000:]}")
        return [np.load(Path(scratch) / f"{index}.npy") for index in range(len(folders))]


def llama_cpp_logits(file: Path, ids_T: np.ndarray) -> np.ndarray | None:
    """Logits [T, V] of a GGUF file in llama.cpp, or None if its Python package is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    model = Llama(str(file), n_ctx=len(ids_T), logits_all=True, verbose=False)
    try:
        model.eval(ids_T.tolist())
        return np.array(model.scores[: len(ids_T)])
    finally:
        model.close()
