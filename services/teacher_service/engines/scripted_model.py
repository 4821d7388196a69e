"""A language model that is arithmetic on token ids: what the scripted engine serves, and the reference in its tests.

Row t depends on tokens 0..t only, strongly on token t, so that a student can learn it. Hidden states and head are
integers times powers of two: every sum is exact in float64, and no result depends on batch, order or machine.
Used by `scripted.py` and by tests; numpy alone, so that a service with it starts within a second.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from teacher_proto.requests import HiddenDtype, Query, TargetSpec
from teacher_proto.targets import TokenTargets, tensors_of

WIDTH = 32
_HIDDEN_UNIT = 2.0**-5
_HEAD_UNIT = 2.0**-17
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROW_CHUNK_ELEMENTS = 2**22


def mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): uint64 to uint64, every input bit moves every output bit."""
    z = value + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def prefix_hashes(tokens_T: np.ndarray) -> np.ndarray:
    """One uint64 per row [T], of tokens 0..t and their positions."""
    tokens = tokens_T.astype(np.uint64)
    places = mix(np.arange(len(tokens), dtype=np.uint64)) | np.uint64(1)
    return mix(np.cumsum((tokens + np.uint64(1)) * places, dtype=np.uint64))


def _whole_numbers(keys_N: np.ndarray, limit: int) -> np.ndarray:
    """Integers in [-limit, limit], [N, WIDTH], from one key per row."""
    lanes = np.arange(WIDTH, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    return (mix(keys_N[:, None] ^ lanes[None, :]) % np.uint64(2 * limit + 1)).astype(np.int64) - limit


def scripted_hidden(tokens_T: np.ndarray) -> np.ndarray:
    """Final hidden states [T, WIDTH] float64, multiples of 1/32 within 4: exact in fp16, bf16 and int8."""
    tokens = np.asarray(tokens_T)
    own = _whole_numbers(mix(tokens.astype(np.uint64)), 100)
    context = _whole_numbers(prefix_hashes(tokens), 27)
    return (own + context) * _HIDDEN_UNIT


@lru_cache(maxsize=4)
def scripted_head(vocab_size: int) -> np.ndarray:
    """The output head [V, WIDTH] float64, without a bias; read-only."""
    head = _whole_numbers(mix(np.arange(vocab_size, dtype=np.uint64) + np.uint64(2**40)), 2**16) * _HEAD_UNIT
    head.flags.writeable = False
    return head


def scripted_logits(tokens_T: np.ndarray, vocab_size: int) -> np.ndarray:
    """The reference for a sequence: raw logits [T, V] fp32 of the scripted teacher, a pure function."""
    return (scripted_hidden(tokens_T) @ scripted_head(vocab_size).T).astype(np.float32)


def reduce_sequence(query: Query, hidden_TD: np.ndarray, head_VD: np.ndarray, noise: float = 0.0) -> TokenTargets:
    """The targets of a query, reduced in chunks of rows. `noise` is the standard deviation of noise on the logits."""
    (start, stop), tokens_T, spec = query.rows, query.tokens_T, query.spec
    step = max(1, _ROW_CHUNK_ELEMENTS // len(head_VD))
    seeds_T = prefix_hashes(tokens_T)
    parts = []
    for a in range(start, stop, step):
        b = min(a + step, stop)
        logits_RV = (hidden_TD[a:b] @ head_VD.T).astype(np.float32)
        if noise:
            logits_RV += np.random.default_rng([a, len(tokens_T)]).normal(0, noise, logits_RV.shape).astype(np.float32)
        following_R = np.append(tokens_T, -1)[a + 1 : b + 1]
        gather = None if query.gather_ids_RG is None else query.gather_ids_RG[a - start : b - start]
        parts.append(reduce_logits(logits_RV, following_R, spec, gather, seeds_T[a:b]))
    tensors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "sampled_counts_R"}
    if "sampled" in spec.kinds:
        sizes_R = np.concatenate([part["sampled_counts_R"] for part in parts])
        tensors["sampled_offsets"] = np.concatenate([[0], np.cumsum(sizes_R)]).astype(np.int32)
    if spec.hidden_dtype is not None:
        tensors |= encode_hidden(hidden_TD[start:stop], spec.hidden_dtype)
    return TokenTargets(start=start, **tensors)


def reduce_logits(
    logits_RV: np.ndarray, following_R: np.ndarray, spec: TargetSpec, gather_ids_RG: np.ndarray | None,
    seeds_R: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The definitions of `teacher_proto.targets`, row by row. `following_R` is the next token, -1 if there is none."""
    wanted = tensors_of(spec.kinds)
    rows = np.arange(len(logits_RV))
    lse_R = _logsumexp(logits_RV)
    out: dict[str, np.ndarray] = {"lse": lse_R.astype(np.float32)} if "lse" in wanted else {}
    if "top_k" in spec.kinds:
        ids_RK = _largest(logits_RV, spec.top_k)
        out["ids"] = ids_RK.astype(np.uint16 if logits_RV.shape[1] <= 65_536 else np.int32)
        out["logprobs"] = (np.take_along_axis(logits_RV, ids_RK, axis=1) - lse_R[:, None]).astype(np.float16)
    if "next_logprob" in wanted:
        chosen_R = (logits_RV[rows, following_R] - lse_R).astype(np.float32)
        out["next_logprob"] = np.where(following_R < 0, np.float32(np.nan), chosen_R)
    if "log_z" in wanted:
        columns = [_logsumexp(logits_RV / np.float64(t)) - lse_R / t for t in spec.temperatures]
        out["log_z"] = np.stack(columns, 1).astype(np.float32) if columns else np.zeros((len(rows), 0), np.float32)
    if gather_ids_RG is not None and "gather" in spec.kinds:
        out["gather_logprobs"] = (logits_RV[rows[:, None], gather_ids_RG] - lse_R[:, None]).astype(np.float16)
    if "sampled" in spec.kinds:
        out |= _sample(logits_RV, spec, seeds_R)
    return out


def _logsumexp(logits_RV: np.ndarray) -> np.ndarray:
    logits_RV = logits_RV.astype(np.float64)
    top_R = logits_RV.max(axis=1)
    return top_R + np.log(np.exp(logits_RV - top_R[:, None]).sum(axis=1))


def _largest(logits_RV: np.ndarray, top_k: int) -> np.ndarray:
    """Ids [R, K] of the largest logits, largest first; of equal ones, the smaller id first."""
    vocab_size = logits_RV.shape[1]
    if top_k >= vocab_size:
        return np.argsort(-logits_RV, axis=1, kind="stable")
    candidates = np.sort(np.argpartition(-logits_RV, top_k - 1, axis=1)[:, :top_k], axis=1)
    order = np.argsort(-np.take_along_axis(logits_RV, candidates, axis=1), axis=1, kind="stable")
    return np.take_along_axis(candidates, order, axis=1)


def _sample(logits_RV: np.ndarray, spec: TargetSpec, seeds_R: np.ndarray) -> dict[str, np.ndarray]:
    """n draws per row by inverse transform sampling; a row's uniforms come from the seed and its own prefix."""
    lanes = np.arange(spec.num_samples, dtype=np.uint64) * _GOLDEN
    keys_RM = mix(seeds_R ^ mix(np.full_like(seeds_R, spec.seed)))[:, None] ^ lanes[None, :]
    uniform_RM = (mix(keys_RM) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    softened_RV = logits_RV.astype(np.float64) / spec.sample_temperature
    weights_RV = np.exp(softened_RV - softened_RV.max(axis=1, keepdims=True))
    ids, counts, sizes = [], [], []
    for weights_V, uniform_M in zip(weights_RV, uniform_RM, strict=True):
        cumulative_V = np.cumsum(weights_V)
        drawn_M = np.searchsorted(cumulative_V, uniform_M * cumulative_V[-1], side="right")
        unique, count = np.unique(np.minimum(drawn_M, len(weights_V) - 1), return_counts=True)
        ids.append(unique)
        counts.append(count)
        sizes.append(len(unique))
    id_type = np.uint16 if logits_RV.shape[1] <= 65_536 else np.int32
    return {
        "sampled_ids": np.concatenate(ids).astype(id_type),
        "sampled_counts": np.concatenate(counts).astype(np.uint16),
        "sampled_counts_R": np.array(sizes, dtype=np.int64),
    }


def encode_hidden(hidden_RD: np.ndarray, dtype: HiddenDtype) -> dict[str, np.ndarray]:
    """Hidden states as on the wire: fp16, bf16 as uint16 bits, or int8 with one scale per row (max|h| / 127)."""
    if dtype == "float16":
        return {"hidden": hidden_RD.astype(np.float16)}
    if dtype == "bfloat16":
        bits = hidden_RD.astype(np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return {"hidden": (rounded >> np.uint32(16)).astype(np.uint16)}
    scale_R = np.maximum(np.abs(hidden_RD).max(axis=1), 1e-8) / 127
    quantised = np.clip(np.rint(hidden_RD / scale_R[:, None]), -127, 127).astype(np.int8)
    return {"hidden": quantised, "hidden_scale": scale_R.astype(np.float32)}
