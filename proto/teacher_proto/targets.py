"""`TokenTargets`, a teacher's targets for one sequence, and the checks that they are a distribution.

Engines make it, `wire` encodes and decodes it, the store keeps it, losses read it.

Row t is the teacher's distribution of token t+1 given tokens 0..t. At temperature 1 a row holds the K largest
logprobs (`logit - lse`, fp16, largest first); at temperature T the exact probability of an id is
`exp(logprob / T - log_z)` with `log_z = lse(z / T) - lse(z) / T`, and the raw logit is `logprob + lse`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from teacher_proto.errors import InvalidTargetsError
from teacher_proto.requests import HiddenDtype, Kind, Query, TargetSpec

# fp16 keeps 11 bits of a logprob: below 16 nats, a probability and so a sum have a relative error of at most 2**-8.
MASS_TOLERANCE = 2.0**-8
# fp32 logprobs are differences of numbers around 10 to 100.
LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a record: the dtypes it may have on the wire, its axes, and the kinds that contain it.

    Axes: R rows, R+1, K top-k, T temperatures, G gathered ids, M samples of all rows, D hidden width.
    """

    dtypes: tuple[str, ...]
    axes: tuple[str, ...]
    kinds: tuple[Kind, ...]


# In the order of the keys of a `targets` message, and of its checksum.
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
# Ids of three bytes on the wire are int32 in memory.
_IN_MEMORY = {"ids": ("<i4",), "sampled_ids": ("<i4",)}


def tensors_of(kinds: Iterable[Kind]) -> tuple[str, ...]:
    """Names of the tensors in a record of these kinds, in wire order (`hidden_scale` only with int8)."""
    asked = set(kinds)
    return tuple(name for name, spec in TENSORS.items() if asked & set(spec.kinds))


def id_dtype(vocab_size: int) -> str:
    """The dtype of ids on the wire: two bytes if the vocabulary fits, else three."""
    return "<u2" if vocab_size <= 65_536 else "u3"


@dataclass(frozen=True, eq=False)
class TokenTargets:
    """The teacher's targets for rows [start, start + R) of one sequence; tensors that were not requested are None.

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
        """The tensors that are present, in wire order."""
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
        """Exact probabilities [R, K] of the top-K ids at `temperature`, given its index in the request.

        No index is needed at temperature 1, where log_z is 0.
        """
        assert self.logprobs is not None, "probabilities() is for kind top_k"
        logprobs_RK = self.logprobs.astype(np.float32)
        if temperature == 1.0:
            return np.exp(logprobs_RK)
        if temperature_index is None or self.log_z is None:
            raise ValueError(f"temperature {temperature} needs its log_z: request it in `temperatures`")
        return np.exp(logprobs_RK / temperature - self.log_z[:, temperature_index, None])

    def narrow(self, start: int, stop: int, top_k: int | None = None) -> TokenTargets:
        """Only rows [start, stop) of the sequence, and the first `top_k` ids of each: views, not copies."""
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


assert {field.name for field in fields(TokenTargets)} == {"start", *TENSORS}


def check_targets(targets: TokenTargets, query: Query, vocab_size: int) -> None:
    """Check that a record can be the response to `query`. InvalidTargetsError names tensor and row.

    Checks presence, shapes and dtypes; finite values; ids within the vocabulary and distinct within a row; logprobs at
    most 0, largest first, with a mass of at most 1; plausible normalisers for the temperatures; the next token's
    logprob, where that token is among the K; the number of draws. Comparisons are written so that NaN fails them. At
    K = 64 all of it takes less than a microsecond per row.
    """
    spec, (start, stop), length = query.spec, query.rows, query.num_tokens
    if targets.start != start or targets.num_rows != stop - start:
        got = f"[{targets.start}, {targets.start + targets.num_rows})"
        raise InvalidTargetsError(f"got rows {got}, expected [{start}, {stop})")
    arrays = targets.tensors()
    _check_presence(arrays, spec)
    sizes = {"R": stop - start, "R+1": stop - start + 1, "K": spec.top_k, "T": len(spec.temperatures)}
    _check_shapes(arrays, sizes if query.gather_ids_RG is None else sizes | {"G": query.gather_width})
    for name in ("lse", "log_z", "hidden", "hidden_scale"):
        if name in arrays and arrays[name].dtype.kind == "f":
            _check_finite(arrays[name], name, start)
    if "next_logprob" in arrays:
        # The last row of a sequence has no next token.
        known = min(stop, length - 1) - start
        _check_logprobs(arrays["next_logprob"][:known], "next_logprob", start)
        if not np.isnan(arrays["next_logprob"][known:]).all():
            raise InvalidTargetsError(f"next_logprob is a number on row {length - 1}, which has no next token")
    if "gather_logprobs" in arrays:
        _check_logprobs(arrays["gather_logprobs"], "gather_logprobs", start)
    if "ids" in arrays:
        ids_RK, logprobs_RK = arrays["ids"], arrays["logprobs"]
        _check_top_k(ids_RK, logprobs_RK, start, vocab_size)
        _check_log_z(arrays["log_z"], logprobs_RK[:, 0], spec.temperatures, start, vocab_size)
        next_ids_R = query.tokens_T[start + 1 : stop + 1]
        _check_next(ids_RK, logprobs_RK, arrays["next_logprob"], next_ids_R, start)
    if "sampled_offsets" in arrays:
        _check_samples(
            arrays["sampled_offsets"], arrays["sampled_ids"], arrays["sampled_counts"], vocab_size, spec.num_samples
        )


def _check_presence(arrays: dict[str, np.ndarray], spec: TargetSpec) -> None:
    expected = set(tensors_of(spec.kinds)) - (set() if spec.hidden_dtype == "int8" else {"hidden_scale"})
    if expected != set(arrays):
        raise InvalidTargetsError(f"got tensors {sorted(arrays)}, expected {sorted(expected)}")
    for name, array in arrays.items():
        if array.dtype.newbyteorder("<").str not in (*TENSORS[name].dtypes, *_IN_MEMORY.get(name, ())):
            raise InvalidTargetsError(f"{name}: got {array.dtype}, expected one of {', '.join(TENSORS[name].dtypes)}")
    if spec.hidden_dtype and arrays["hidden"].dtype.newbyteorder("<").str != HIDDEN_DTYPES[spec.hidden_dtype]:
        raise InvalidTargetsError(f"hidden: got {arrays['hidden'].dtype}, expected {spec.hidden_dtype}")


def _check_shapes(arrays: dict[str, np.ndarray], sizes: dict[str, int]) -> None:
    for name, array in arrays.items():
        axes = TENSORS[name].axes
        if array.ndim != len(axes) or any(sizes.get(axis, n) != n for axis, n in zip(axes, array.shape, strict=True)):
            expected = [sizes.get(axis, axis) for axis in axes]
            raise InvalidTargetsError(f"{name}: got shape {list(array.shape)}, expected {expected}")


def _refuse_rows(bad_R: np.ndarray | np.bool, start: int, message: str) -> None:
    """Raise InvalidTargetsError if any row is bad, with the number of the first in the sequence."""
    if bad_R.any():
        raise InvalidTargetsError(f"{message}, first on row {start + int(bad_R.argmax())}")


def _check_top_k(ids_RK: np.ndarray, logprobs_RK: np.ndarray, start: int, vocab_size: int) -> None:
    """Ids within the vocabulary, distinct within a row; logprobs finite, at most 0, descending, with a mass <= 1."""
    _check_ids(ids_RK, "ids", vocab_size)
    wide_RK = logprobs_RK.astype(np.float32)
    _refuse_rows(~(wide_RK[:, 0] <= 0), start, "logprobs: the largest is NaN or above 0")
    _refuse_rows(~(wide_RK[:, 1:] <= wide_RK[:, :-1]).all(axis=1), start, "logprobs are NaN or not largest first")
    _refuse_rows(~(wide_RK[:, -1] >= np.finfo(np.float16).min), start, "logprobs: the smallest is infinite")
    _refuse_rows(~(np.exp(wide_RK).sum(axis=1) <= 1 + MASS_TOLERANCE), start, "the probabilities sum to more than 1")
    ordered_RK = np.sort(ids_RK, axis=1)
    _refuse_rows((ordered_RK[:, 1:] == ordered_RK[:, :-1]).any(axis=1), start, "ids: one is repeated")


def _check_ids(ids: np.ndarray, name: str, vocab_size: int) -> None:
    if ids.dtype.itemsize < 3 and vocab_size > 65_536:
        raise InvalidTargetsError(f"{name}: {ids.dtype} is too narrow for a vocabulary of {vocab_size}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise InvalidTargetsError(f"{name}: got {ids.min()} to {ids.max()}, expected 0 to {vocab_size - 1}")


def _check_logprobs(logprobs: np.ndarray, name: str, start: int) -> None:
    """Finite and at most 0; [R] or [R, G]."""
    good = np.isfinite(logprobs) & (logprobs <= LOGPROB_TOLERANCE)
    _refuse_rows(~good.all(axis=tuple(range(1, good.ndim))), start, f"{name}: NaN, infinite or above 0")


def _check_finite(array: np.ndarray, name: str, start: int) -> None:
    _refuse_rows(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))), start, f"{name}: NaN or infinite")


def _check_log_z(
    log_z_RT: np.ndarray, best_R: np.ndarray, temperatures: Sequence[float], start: int, vocab_size: int
) -> None:
    """At every temperature, the most probable id has a probability of at most 1 and at least 1/V. The normaliser,
    log sum p**(1/T), is 0 at temperature 1 and grows with temperature.
    """
    for column, temperature in enumerate(temperatures):
        best_at_t_R = best_R.astype(np.float32) / np.float32(temperature) - log_z_RT[:, column]
        slack = MASS_TOLERANCE * (1 + 1 / temperature) + 2.0**-11 * np.abs(best_R.astype(np.float32)) / temperature
        good_R = (best_at_t_R <= slack) & (best_at_t_R >= -np.log(vocab_size) - slack)
        if temperature == 1:
            good_R &= np.abs(log_z_RT[:, column]) <= LOGPROB_TOLERANCE
        _refuse_rows(~good_R, start, f"log_z: not a valid normaliser for temperature {temperature:g}")
    if len(temperatures) > 1:
        rising_RT = log_z_RT[:, np.argsort(temperatures, kind="stable")]
        slack_RT = LOGPROB_TOLERANCE + 1e-6 * np.abs(rising_RT[:, 1:])
        falls_R = (rising_RT[:, 1:] < rising_RT[:, :-1] - slack_RT).any(axis=1)
        _refuse_rows(falls_R, start, "log_z: does not increase with temperature")


def _check_next(
    ids_RK: np.ndarray, logprobs_RK: np.ndarray, next_logprob_R: np.ndarray, next_ids_R: np.ndarray, start: int
) -> None:
    """If a sequence's own next token is among the K, both tensors must have the same logprob for it. Otherwise the
    record is of other tokens."""
    n = len(next_ids_R)
    at = np.flatnonzero(ids_RK[:n] == next_ids_R.astype(ids_RK.dtype)[:, None])
    rows = at // ids_RK.shape[1]
    listed = logprobs_RK.reshape(-1)[at].astype(np.float32)
    apart = np.abs(listed - np.maximum(next_logprob_R[rows], np.finfo(np.float16).min))
    bad_R = np.zeros(len(ids_RK), dtype=bool)
    bad_R[rows[~(apart <= LOGPROB_TOLERANCE + 2.0**-10 * np.abs(listed))]] = True
    _refuse_rows(bad_R, start, "next_logprob is not the logprob of the sequence's next token")


def _check_samples(
    offsets: np.ndarray, ids_M: np.ndarray, counts_M: np.ndarray, vocab_size: int, num_samples: int
) -> None:
    """Offsets rise from 0 to M; ids ascend within a row; counts are at least 1 and sum to `num_samples` per row."""
    if offsets[0] != 0 or offsets[-1] != len(ids_M) or len(ids_M) != len(counts_M) or not (np.diff(offsets) > 0).all():
        raise InvalidTargetsError("sampled_offsets do not rise from 0 to the number of sampled ids")
    _check_ids(ids_M, "sampled_ids", vocab_size)
    first_M = np.zeros(len(ids_M), dtype=bool)
    first_M[offsets[:-1]] = True
    wide_M = ids_M.astype(np.int64)
    if not ((np.diff(wide_M) > 0) | first_M[1:]).all():
        raise InvalidTargetsError("sampled_ids: a row's ids do not ascend")
    totals_R = np.add.reduceat(counts_M.astype(np.int64), offsets[:-1])
    if counts_M.min() < 1 or not (totals_R == num_samples).all():
        raise InvalidTargetsError(f"sampled_counts: a count is below 1, or a row does not have {num_samples} draws")
