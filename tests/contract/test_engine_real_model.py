"""A real model on real text: SmolLM2-135M from vLLM in the dtype that this hardware computes in, against transformers
in float32 on the same weights.

What rounding explains is not guessed: transformers' own pass in that dtype is the measure, row by row. Where it is
float32 too, no rounding explains anything.
"""

from __future__ import annotations

import asyncio
import inspect
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from teacher_proto.hardware import auto_dtype
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_service.engines.vllm_engine import VllmEngine
from tests.contract.engine_cases import TEMPERATURES, job

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="session")]
LENGTHS = (2000, 3, 511, 64, 130)
SPEC = TargetSpec(kinds=("top_k", "score"), top_k=64, temperatures=TEMPERATURES)


@dataclass(frozen=True)
class Answer:
    """What a teacher says of one sequence: logits of the reference's K ids, lse, log_z, the K ids, next logprob."""

    logits_TK: np.ndarray
    lse_T: np.ndarray
    log_z_TT: np.ndarray
    ids_TK: np.ndarray
    next_T: np.ndarray


def texts(folder: Path) -> list[np.ndarray]:
    """Prose and code in turn, of LENGTHS tokens."""
    prose = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "lambda", "import", "dynamic-features"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = [tokenizer(text)["input_ids"] for text in (prose, inspect.getsource(asyncio.base_events))]
    return [np.array(sources[i % 2][100 : 100 + length]) for i, length in enumerate(LENGTHS)]


def transformers_logits(folder: Path, sequences: list[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.inference_mode():
        return [model(torch.tensor(tokens_T)[None]).logits[0] for tokens_T in sequences]


def answer_of(logits_TV: torch.Tensor, tokens_T: np.ndarray, ids_TK: torch.Tensor) -> Answer:
    z_TV = logits_TV.float()
    lse_T = z_TV.logsumexp(dim=1)
    log_z_TT = torch.stack([(z_TV / t).logsumexp(dim=1) - lse_T / t for t in TEMPERATURES], dim=1)
    next_T = z_TV[:-1].gather(1, torch.tensor(tokens_T[1:])[:, None])[:, 0] - lse_T[:-1]
    ids_own_TK = z_TV.topk(64).indices
    return Answer(*(t.numpy() for t in (z_TV.gather(1, ids_TK), lse_T, log_z_TT, ids_own_TK, next_T)))


def served(targets: TokenTargets, truth: Answer) -> Answer:
    """A served record as the same figures; its logits are at its own ids, NaN where the reference has others."""
    assert targets.ids is not None and targets.logprobs is not None and targets.lse is not None
    assert targets.log_z is not None and targets.next_logprob is not None
    logits_TK = np.full(truth.ids_TK.shape, np.nan, dtype=np.float32)
    for row, ids in enumerate(truth.ids_TK):
        _, ours, theirs = np.intersect1d(targets.ids[row], ids, return_indices=True)
        logits_TK[row, theirs] = targets.logprobs[row, ours].astype(np.float32) + targets.lse[row]
    ids = targets.ids.astype(np.int64)
    return Answer(logits_TK, targets.lse, targets.log_z, ids, targets.next_logprob[:-1])


def differences(answers: list[Answer], truths: list[Answer]) -> dict[str, np.ndarray]:
    """Absolute differences by figure over all rows; `missing` and `top_1` are shares of ids that differ."""
    pairs = list(zip(answers, truths, strict=True))
    found = {
        name: np.concatenate([np.abs(getattr(a, name) - getattr(b, name)).reshape(-1) for a, b in pairs])
        for name in ("logits_TK", "lse_T", "next_T")
    }
    for i, temperature in enumerate(TEMPERATURES):
        found[f"log_z({temperature:g})"] = np.concatenate(
            [np.abs(a.log_z_TT[:, i] - b.log_z_TT[:, i]) for a, b in pairs]
        )
    found["missing"] = np.concatenate(
        [[1 - len(np.intersect1d(x, y)) / 64 for x, y in zip(a.ids_TK, b.ids_TK, strict=True)] for a, b in pairs]
    )
    found["top_1"] = np.concatenate([a.ids_TK[:, 0] != b.ids_TK[:, 0] for a, b in pairs]).astype(float)
    return found


async def test_a_teacher_is_as_close_to_float32_as_its_dtype_can_be(
    demo_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequences = texts(demo_teacher)
    exact = transformers_logits(demo_teacher, sequences, torch.float32)
    ids = [logits_TV.topk(64).indices for logits_TV in exact]
    truths = [answer_of(*one) for one in zip(exact, sequences, ids, strict=True)]
    dtype = auto_dtype("cpu")
    rounded = exact if dtype == torch.float32 else transformers_logits(demo_teacher, sequences, dtype)
    noise = differences([answer_of(*one) for one in zip(rounded, sequences, ids, strict=True)], truths)
    del exact, rounded
    engine = VllmEngine(str(demo_teacher), kv_cache_bytes=2**28)
    try:
        await engine.start()
        answers = await asyncio.gather(*(engine.score(job(tokens_T, SPEC)) for tokens_T in sequences))
    finally:
        await engine.close()
    assert engine.identity.semantic.dtype == str(dtype).removeprefix("torch.")
    ours = differences([served(a, truth) for a, truth in zip(answers, truths, strict=True)], truths)
    with capsys.disabled():
        print(f"\n{f'|vLLM {dtype} - float32|':>32} {'mean':>9} {'largest':>9}   (transformers: mean, largest)")
        for name, off in ours.items():
            print(f"{name:>32} {np.nanmean(off):9.5f} {np.nanmax(off):9.4f}   "
                  f"({noise[name].mean():.5f}, {noise[name].max():.4f})")  # fmt: skip
    for name, off in ours.items():
        assert np.nanmean(off) <= 1.3 * noise[name].mean() + 2e-3, name
        assert np.nanmax(off) <= 2.5 * noise[name].max() + 1e-2, name
