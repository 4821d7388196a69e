"""What a teacher answers for one sequence: `TokenTargets`, and the checks that it is a distribution.

Engines make it, the wire carries it, the store keeps it, losses read it.

Row t is the teacher's distribution of token t+1 given tokens 0..t. At temperature 1 a row holds the K largest
logprobs (`logit - lse`, fp16, largest first); at temperature T the exact probability of an id is
`exp(logprob / T - log_z)` with `log_z = lse(z / T) - lse(z) / T`, and the raw logit is `logprob + lse`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from teacher_proto import target_checks as checks
from teacher_proto.errors import InvalidTargetsError
from teacher_proto.requests import HiddenDtype, Kind, Query, TargetSpec


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a record: the dtypes it may have on the wire, its axes, and the kinds that ask for it.

    Axes: R rows, R+1, K top-k, T temperatures, G gathered ids, M samples of all rows, D hidden width.
    """

    dtypes: tuple[str, ...]
    axes: tuple[str, ...]
    kinds: tuple[Kind, ...]


# The order of the keys in a `targets` message, and of the bytes under its checksum.
TENSORS: dict[str, TensorSpec] = {
    "ids": TensorSpec(("<u2", "u3"), ("R", "K"), ("top_k",)),
    "logprobs": TensorSpec(("<f2",), ("R", "K"), ("top_k",)),
    "lse": TensorSpec(("<f4",), ("R",), ("top_k", "gather", "sampled", "hidden")),
    "next_logprob": TensorSpec(("<f4",), ("R",), ("top_k", "score")),
    "log_z": TensorSpec(("<f4",), ("R", "T"), ("top_k", "gather")),
    "gather_logprobs": TensorSpec(("<f2",), ("R", "G"), ("gather",)),
    "sampled_offsets": TensorSpec(("<i4",), ("R+1",), ("sampled",)),
    "sampled_ids": TensorSpec(("<u2", "u3"), ("M",), ("sampled",)),
    "sampled_counts": TensorSpec(("<u2",), ("M",), ("sampled",)),
    "hidden": TensorSpec(("<f2", "<u2", "|i1"), ("R", "D"), ("hidden",)),
    "hidden_scale": TensorSpec(("<f4",), ("R",), ("hidden",)),
}

HIDDEN_DTYPES: dict[HiddenDtype, str] = {"float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}
# Three bytes on the wire are four in memory.
_IN_MEMORY = {"ids": ("<i4",), "sampled_ids": ("<i4",)}


def tensors_of(kinds: Iterable[Kind]) -> tuple[str, ...]:
    """Names of the tensors that an answer of these kinds holds, in wire order (`hidden_scale` only with int8)."""
    asked = set(kinds)
    return tuple(name for name, spec in TENSORS.items() if asked & set(spec.kinds))


def id_dtype(vocab_size: int) -> str:
    """Ids take two bytes where the vocabulary fits them, else three."""
    return "<u2" if vocab_size <= 65_536 else "u3"


@dataclass(frozen=True, eq=False)
class TokenTargets:
    """The teacher's answer for rows [start, start + R) of one sequence; tensors not asked for are None.

    ids [R, K] uint16 or int32, logprobs [R, K] fp16, lse [R] fp32, next_logprob [R] fp32 (NaN on the last row of
    the sequence), log_z [R, T] fp32, gather_logprobs [R, G] fp16. Samples are ragged: row r has sampled_ids and
    sampled_counts [offsets[r]:offsets[r+1]]. hidden [R, D] is fp16, bf16 as its uint16 bits, or int8 with
    hidden_scale [R].
    """

    start: int
    ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    lse: np.ndarray | None = None
    next_logprob: np.ndarray | None = None
    log_z: np.ndarray | None = None
    gather_logprobs: np.ndarray | None = None
    sampled_offsets: np.ndarray | None = None
    sampled_ids: np.ndarray | None = None
    sampled_counts: np.ndarray | None = None
    hidden: np.ndarray | None = None
    hidden_scale: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors that are there, in wire order."""
        present = ((name, getattr(self, name)) for name in TENSORS)
        return {name: array for name, array in present if array is not None}

    @property
    def num_rows(self) -> int:
        for name, array in self.tensors().items():
            axis = TENSORS[name].axes[0]
            if axis in ("R", "R+1"):
                return len(array) - (axis == "R+1")
        return 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors().values())

    def probabilities(self, temperature_index: int | None = None, temperature: float = 1.0) -> np.ndarray:
        """Exact probabilities [R, K] of the top-K ids at `temperature`, whose place in the request is given.

        No index is needed at temperature 1, where log_z is 0.
        """
        assert self.logprobs is not None, "probabilities() is for kind top_k"
        logprobs_RK = self.logprobs.astype(np.float32)
        if temperature == 1.0:
            return np.exp(logprobs_RK)
        if temperature_index is None or self.log_z is None:
            raise ValueError(f"temperature {temperature} needs its log_z: ask for it in `temperatures`")
        return np.exp(logprobs_RK / temperature - self.log_z[:, temperature_index, None])

    def narrow(self, start: int, stop: int, top_k: int | None = None) -> TokenTargets:
        """Rows [start, stop) of the sequence, and the first `top_k` of each: views, not copies."""
        a, b = start - self.start, stop - self.start
        if not 0 <= a <= b <= self.num_rows:
            raise ValueError(f"rows [{start}, {stop}) lie outside [{self.start}, {self.start + self.num_rows})")
        cut: dict[str, Any] = {"start": start}
        for name, array in self.tensors().items():
            axes = TENSORS[name].axes
            if axes[0] == "R":
                cut[name] = array[a:b, :top_k] if axes == ("R", "K") and top_k else array[a:b]
        if self.sampled_offsets is not None:
            offsets = self.sampled_offsets[a : b + 1]
            cut["sampled_offsets"] = offsets - offsets[0]
            for name in ("sampled_ids", "sampled_counts"):
                cut[name] = getattr(self, name)[offsets[0] : offsets[-1]]
        return replace(self, **cut)


def check_targets(targets: TokenTargets, query: Query, vocab_size: int) -> None:
    """Refuse a record that cannot be the answer to `query`. InvalidTargetsError names tensor and row.

    Presence, shapes and dtypes; finite values; ids below the vocabulary and different within a row; logprobs at most
    0, largest first, of a mass not above 1; normalisers that are ones of the temperatures, the next token's logprob
    where the sequence's own next token is among the K, as many draws as were asked for.
    """
    spec, (start, stop), length = query.spec, query.rows, query.num_tokens
    if targets.start != start or targets.num_rows != stop - start:
        got = f"[{targets.start}, {targets.start + targets.num_rows})"
        raise InvalidTargetsError(f"rows {got} came, [{start}, {stop}) were asked for")
    arrays = targets.tensors()
    _check_presence(arrays, spec)
    sizes = {"R": stop - start, "R+1": stop - start + 1, "K": spec.top_k, "T": len(spec.temperatures)}
    _check_shapes(arrays, sizes if query.gather_ids_RG is None else sizes | {"G": query.gather_width})
    checks.each(("lse", "log_z", "hidden_scale"), arrays, lambda array, name: checks.check_finite(array, name, start))
    if "hidden" in arrays and arrays["hidden"].dtype.kind == "f":
        checks.check_finite(arrays["hidden"], "hidden", start)
    if "next_logprob" in arrays:
        # The last row of a sequence has no next token.
        known = min(stop, length - 1) - start
        checks.check_logprobs(arrays["next_logprob"][:known], "next_logprob", start)
        if not np.isnan(arrays["next_logprob"][known:]).all():
            raise InvalidTargetsError(f"next_logprob is a number on row {length - 1}, which has no next token")
    if "gather_logprobs" in arrays:
        checks.check_logprobs(arrays["gather_logprobs"], "gather_logprobs", start)
    if "ids" in arrays:
        ids_RK, logprobs_RK = arrays["ids"], arrays["logprobs"]
        checks.check_top_k(ids_RK, logprobs_RK, start, vocab_size)
        checks.check_log_z(arrays["log_z"], logprobs_RK[:, 0], spec.temperatures, start, vocab_size)
        next_ids_R = query.tokens_T[start + 1 : stop + 1]
        checks.check_next(ids_RK, logprobs_RK, arrays["next_logprob"], next_ids_R, start)
    if "sampled_offsets" in arrays:
        checks.check_samples(
            arrays["sampled_offsets"], arrays["sampled_ids"], arrays["sampled_counts"], vocab_size, spec.num_samples
        )


def _check_presence(arrays: dict[str, np.ndarray], spec: TargetSpec) -> None:
    expected = set(tensors_of(spec.kinds)) - (set() if spec.hidden_dtype == "int8" else {"hidden_scale"})
    if expected != set(arrays):
        raise InvalidTargetsError(f"tensors {sorted(arrays)} came, {sorted(expected)} were asked for")
    for name, array in arrays.items():
        if array.dtype.newbyteorder("<").str not in (*TENSORS[name].dtypes, *_IN_MEMORY.get(name, ())):
            raise InvalidTargetsError(f"{name} is {array.dtype}, one of {', '.join(TENSORS[name].dtypes)} was expected")
    if spec.hidden_dtype and arrays["hidden"].dtype.newbyteorder("<").str != HIDDEN_DTYPES[spec.hidden_dtype]:
        raise InvalidTargetsError(f"hidden is {arrays['hidden'].dtype}, {spec.hidden_dtype} was asked for")


def _check_shapes(arrays: dict[str, np.ndarray], sizes: dict[str, int]) -> None:
    for name, array in arrays.items():
        axes = TENSORS[name].axes
        if array.ndim != len(axes) or any(sizes.get(axis, n) != n for axis, n in zip(axes, array.shape, strict=True)):
            expected = [sizes.get(axis, axis) for axis in axes]
            raise InvalidTargetsError(f"{name} has shape {list(array.shape)}, {expected} was expected")


assert {field.name for field in fields(TokenTargets)} == {"start", *TENSORS}
