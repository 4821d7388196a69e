"""Size and error of DistillKit's logprob compression, reimplemented from its description. Used by `dataset.py`.

Ids take ceil(log2 V) bits each, in order of falling logprob; the first logprobs are stored in bfloat16; the others are
approximated by a curve, fitted by least squares over powers of the rank with float32 coefficients. DistillKit's README
recommends one configuration for new captures and a smaller one to save space. None of its code is used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from teacher_proto.store.parquet import Pair

# Name -> (K, how many logprobs are stored as they are, powers of the rank in the curve of the others).
SCHEMES: dict[str, tuple[int, int, tuple[float, ...]]] = {
    "budget": (50, 1, (0, 1, 0.5)),
    "recommended": (128, 16, (0, 1, 2, 3, 4, 0.5)),
}


def distillkit(pairs: Sequence[Pair], vocab_size: int, name: str, temperature: float) -> dict[str, Any]:
    """Size and error of DistillKit's scheme on these records, and its size after zstd."""
    import pyarrow as pa

    top_k, exact, powers = SCHEMES[name]
    logprobs_RK = np.concatenate([p[1].logprobs for p in pairs if p[1].logprobs is not None]).astype(np.float64)
    ids_RK = np.concatenate([p[1].ids for p in pairs if p[1].ids is not None]).astype(np.uint32)
    ranks = np.arange(top_k - exact, dtype=np.float64)
    curve = np.stack([ranks**power for power in powers], axis=1)
    coefficients = np.linalg.lstsq(curve, logprobs_RK[:, exact:].T, rcond=None)[0].astype(np.float32)
    bits = np.ascontiguousarray(logprobs_RK[:, :exact].astype(np.float32)).view(np.uint32)
    first = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    kept = np.concatenate(
        [(first.astype(np.uint32) << 16).view(np.float32), (curve.astype(np.float32) @ coefficients).T], axis=1
    ).astype(np.float64)
    width = int(np.ceil(np.log2(vocab_size)))
    packed = np.packbits(
        (ids_RK[:, :, None] >> np.arange(width - 1, -1, -1) & 1).astype(np.uint8).reshape(len(ids_RK), -1), axis=1
    )
    whole = packed.tobytes() + first.tobytes() + coefficients.tobytes()
    rows = len(ids_RK)
    return {
        "K": top_k, "codec": f"DistillKit, {name}", "bits": None, "ids and logprobs B": len(whole) / rows,
        "after zstd": len(pa.Codec("zstd", 9).compress(whole)) / rows, "shard B": None,
        "KL": renormalised_kl(logprobs_RK, kept),
        f"KL at T={temperature:g}": renormalised_kl(logprobs_RK, kept, temperature),
    }  # fmt: skip


def renormalised_kl(exact_RK: np.ndarray, kept_RK: np.ndarray, temperature: float = 1.0) -> float:
    """Mean over rows of KL(exact || kept) over the K ids, in nats, both renormalised to sum to one."""
    exact, kept = exact_RK / temperature, kept_RK / temperature
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    kept = kept - np.log(np.exp(kept).sum(axis=1, keepdims=True))
    return float((np.exp(exact) * (exact - kept)).sum(axis=1).mean())
