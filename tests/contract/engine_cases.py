"""What an engine's answers are held against: a plain transformers forward pass, and numpy over its logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from serving.engine import Job
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import TokenTargets

TEMPERATURES = (1.0, 2.0, 5.0)


def logsumexp(logits_RV: np.ndarray) -> np.ndarray:
    return torch.logsumexp(torch.tensor(logits_RV), dim=1).numpy()


def log_softmax(logits_RV: np.ndarray) -> np.ndarray:
    return logits_RV - logsumexp(logits_RV)[:, None]


def chi_square_p(observed: np.ndarray, expected: np.ndarray) -> float:
    """The chance of counts at least this far from what is expected."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def reference_logits(folder: Path, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits [T, V] float64 of each sequence, from one float32 pass each without padding or chunks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor(tokens_T)[None]).logits[0].double().numpy() for tokens_T in sequences]


def sequences_of(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, length) for length in lengths]


def job(tokens_T: np.ndarray, spec: TargetSpec, rows: tuple[int, int] | None = None, ids_RG: np.ndarray | None = None,
        **fields: bool) -> Job[Query]:  # fmt: skip
    """`fields` are `urgent` and `fresh`."""
    return Job(Query(tokens_T, rows or (0, len(tokens_T)), spec, ids_RG), "test", **fields)


def assert_top_k(targets: TokenTargets, logits_RV: np.ndarray, within: float = 1e-4) -> None:
    """The ids are those of the K largest logits, in order, but for logits that are closer than `within`."""
    assert targets.ids is not None and targets.logprobs is not None and targets.lse is not None
    ids_RK = targets.ids.astype(np.int64)
    largest_RK = -np.sort(-logits_RV, axis=1)[:, : ids_RK.shape[1]]
    np.testing.assert_allclose(np.take_along_axis(logits_RV, ids_RK, axis=1), largest_RK, atol=within, rtol=0)
    assert all(len(set(row)) == len(row) for row in ids_RK.tolist())
    lse_R = logsumexp(logits_RV)
    np.testing.assert_allclose(targets.lse, lse_R, atol=within, rtol=0)
    half = np.spacing(np.abs(targets.logprobs).astype(np.float16)).astype(np.float64)
    off = np.abs(targets.logprobs - (np.take_along_axis(logits_RV, ids_RK, axis=1) - lse_R[:, None]))
    assert (off <= within + half / 2).all(), f"a logprob is off by {off.max()}"


def assert_temperatures(log_z_RT: np.ndarray | None, logits_RV: np.ndarray, within: float = 1e-4) -> None:
    """log_z = lse(z / T) - lse(z) / T at each of TEMPERATURES."""
    assert log_z_RT is not None
    truth = [logsumexp(logits_RV / t) - logsumexp(logits_RV) / t for t in TEMPERATURES]
    np.testing.assert_allclose(log_z_RT, np.stack(truth, axis=1), atol=within, rtol=0)


def assert_next(targets: TokenTargets, tokens_T: np.ndarray, logits_TV: np.ndarray, within: float = 1e-4) -> None:
    """The logprob of the token that follows each row, NaN after the last."""
    assert targets.next_logprob is not None
    start, stop = targets.start, targets.start + targets.num_rows
    logprob_TV = log_softmax(logits_TV)
    truth_T = np.append(logprob_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]], np.nan)
    np.testing.assert_allclose(targets.next_logprob, truth_T[start:stop], atol=within, rtol=0)


def widen(hidden: np.ndarray, dtype: str, scale_R: np.ndarray | None) -> np.ndarray:
    """Hidden states [R, D] float64 of any transport."""
    if dtype == "bfloat16":
        return (hidden.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "int8":
        assert scale_R is not None
        return hidden.astype(np.float64) * scale_R[:, None]
    return hidden.astype(np.float64)
