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

from teacher_proto.errors import InvalidTargetsError
from teacher_proto.requests import Kind, TargetsRequest

# fp16 keeps 11 bits of a logprob: near 0 a probability is off by at most 2**-11 of itself, so a sum may pass 1.
MASS_TOLERANCE = 2e-3


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


def check_targets(
    targets: TokenTargets, *, kinds: Iterable[Kind], rows: tuple[int, int], top_k: int, num_temperatures: int,
    vocab_size: int, sequence_length: int,
) -> None:  # fmt: skip
    """Refuse a record that cannot be the answer to what was asked. InvalidTargetsError names tensor and row.

    Shapes and presence; finite values; ids below the vocabulary and different within a row; logprobs not positive,
    largest first, of a mass not above 1.
    """
    start, stop = rows
    if targets.start != start or targets.num_rows != stop - start:
        got = f"[{targets.start}, {targets.start + targets.num_rows})"
        raise InvalidTargetsError(f"rows {got} came, [{start}, {stop}) were asked for")
    wanted = set(tensors_of(kinds)) - {"hidden_scale"}
    have = set(targets.tensors()) - {"hidden_scale"}
    if wanted != have:
        raise InvalidTargetsError(f"tensors {sorted(have)} came, {sorted(wanted)} were asked for")
    sizes = {"R": stop - start, "R+1": stop - start + 1, "K": top_k, "T": num_temperatures}
    for name, array in targets.tensors().items():
        axes = TENSORS[name].axes
        if array.ndim != len(axes) or any(sizes.get(axis, n) != n for axis, n in zip(axes, array.shape, strict=True)):
            raise InvalidTargetsError(f"{name} has shape {list(array.shape)}, axes {list(axes)} with {sizes} expected")
    _check_finite(targets, sequence_length)
    if targets.ids is not None and targets.logprobs is not None:
        _check_top_k(targets.ids, targets.logprobs, vocab_size)
    if targets.sampled_offsets is not None:
        _check_samples(targets, vocab_size)


def check_answer(targets: TokenTargets, request: TargetsRequest, index: int, vocab_size: int) -> None:
    """`check_targets` against what `request` asks of its sequence `index`."""
    spec = request.spec
    check_targets(
        targets, kinds=spec.kinds, rows=request.row_range(index), top_k=spec.top_k,
        num_temperatures=len(spec.temperatures), vocab_size=vocab_size,
        sequence_length=len(request.sequences[index]),
    )  # fmt: skip


def _check_finite(targets: TokenTargets, sequence_length: int) -> None:
    for name, array in targets.tensors().items():
        if array.dtype.kind != "f":
            continue
        bad = ~np.isfinite(array)
        if name == "next_logprob" and targets.start + len(array) == sequence_length:
            bad = bad.copy()
            bad[-1] = not np.isnan(array[-1])
        if bad.any():
            row = int(np.argwhere(bad)[0][0]) + targets.start
            raise InvalidTargetsError(f"{name} is not finite on row {row}: the teacher computed NaN or infinity")
    for name in ("next_logprob", "gather_logprobs"):
        array = getattr(targets, name)
        if array is not None and (array > MASS_TOLERANCE).any():
            row = int(np.argwhere(array > MASS_TOLERANCE)[0][0]) + targets.start
            raise InvalidTargetsError(f"{name} is positive on row {row}: a logprob is at most 0")


def _check_top_k(ids_RK: np.ndarray, logprobs_RK: np.ndarray, vocab_size: int) -> None:
    if ids_RK.size and int(ids_RK.max()) >= vocab_size:
        raise InvalidTargetsError(f"ids reach {int(ids_RK.max())} with a vocabulary of {vocab_size}")
    logprobs_RK = logprobs_RK.astype(np.float32)
    faults = {
        "logprobs are not sorted, largest first": (logprobs_RK[:, 1:] > logprobs_RK[:, :-1]).any(axis=1),
        "a logprob is positive": (logprobs_RK[:, :1] > 0).any(axis=1),
        "the probabilities sum to more than 1": np.exp(logprobs_RK).sum(axis=1) > 1 + MASS_TOLERANCE,
        "an id comes twice": (np.diff(np.sort(ids_RK, axis=1), axis=1) == 0).any(axis=1),
    }
    for message, bad_R in faults.items():
        if bad_R.any():
            raise InvalidTargetsError(f"top_k: {message}, first in row {int(bad_R.argmax())} of the record")


def _check_samples(targets: TokenTargets, vocab_size: int) -> None:
    offsets, ids, counts = targets.sampled_offsets, targets.sampled_ids, targets.sampled_counts
    assert offsets is not None and ids is not None and counts is not None
    if offsets[0] != 0 or offsets[-1] != len(ids) or len(ids) != len(counts) or (np.diff(offsets) <= 0).any():
        raise InvalidTargetsError("sampled_offsets do not rise from 0 to the number of sampled ids")
    if int(ids.max()) >= vocab_size or int(counts.min()) < 1:
        raise InvalidTargetsError(f"sampled: an id is not below {vocab_size}, or a count is below 1")
    totals = np.add.reduceat(counts.astype(np.int64), offsets[:-1])
    if (totals != totals[0]).any():
        raise InvalidTargetsError("sampled: rows have different numbers of draws")


assert {field.name for field in fields(TokenTargets)} == {"start", *TENSORS}
