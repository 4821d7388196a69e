"""What a record's numbers must be to be a distribution: the checks behind `targets.check_targets`, array by array.

Comparisons are written so that NaN fails them. At K = 64 the whole takes less than a microsecond a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from teacher_proto.errors import InvalidTargetsError

# fp16 keeps 11 bits of a logprob: below 16 nats a probability is off by at most 2**-8 of itself, and so is a sum.
MASS_TOLERANCE = 2.0**-8
# fp32 logprobs are differences of numbers around 10 to 100.
LOGPROB_TOLERANCE = 1e-3


def refuse_rows(bad_R: np.ndarray | np.bool, start: int, message: str) -> None:
    """InvalidTargetsError that names the first bad row, counted from the beginning of the sequence."""
    if bad_R.any():
        raise InvalidTargetsError(f"{message}, first on row {start + int(bad_R.argmax())}")


def check_top_k(ids_RK: np.ndarray, logprobs_RK: np.ndarray, start: int, vocab_size: int) -> None:
    """Ids below the vocabulary, different within a row; logprobs finite, at most 0, falling, of a mass of at most 1."""
    check_ids(ids_RK, "ids", vocab_size)
    wide_RK = logprobs_RK.astype(np.float32)
    refuse_rows(~(wide_RK[:, 0] <= 0), start, "logprobs: the largest is NaN or above 0")
    refuse_rows(~(wide_RK[:, 1:] <= wide_RK[:, :-1]).all(axis=1), start, "logprobs are NaN or not largest first")
    refuse_rows(~(wide_RK[:, -1] >= np.finfo(np.float16).min), start, "logprobs: the smallest is infinite")
    refuse_rows(~(np.exp(wide_RK).sum(axis=1) <= 1 + MASS_TOLERANCE), start, "the probabilities sum to more than 1")
    ordered_RK = np.sort(ids_RK, axis=1)
    refuse_rows((ordered_RK[:, 1:] == ordered_RK[:, :-1]).any(axis=1), start, "ids: one comes twice")


def check_ids(ids: np.ndarray, name: str, vocab_size: int) -> None:
    if ids.dtype.itemsize < 3 and vocab_size > 65_536:
        raise InvalidTargetsError(f"{name} are {ids.dtype}, too narrow for a vocabulary of {vocab_size}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise InvalidTargetsError(f"{name} from {ids.min()} to {ids.max()} came, the vocabulary has {vocab_size}")


def check_logprobs(logprobs: np.ndarray, name: str, start: int) -> None:
    """Finite and at most 0; [R] or [R, G]."""
    good = np.isfinite(logprobs) & (logprobs <= LOGPROB_TOLERANCE)
    refuse_rows(~good.all(axis=tuple(range(1, good.ndim))), start, f"{name}: NaN, infinite or above 0")


def check_finite(array: np.ndarray, name: str, start: int) -> None:
    refuse_rows(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))), start, f"{name}: NaN or infinite")


def check_log_z(
    log_z_RT: np.ndarray, best_R: np.ndarray, temperatures: Sequence[float], start: int, vocab_size: int
) -> None:
    """The most probable id has a probability of at most 1 and at least 1/V at every temperature; the normaliser is 0 at
    temperature 1 and grows with temperature, being log sum p**(1/T).
    """
    for column, temperature in enumerate(temperatures):
        best_at_t_R = best_R.astype(np.float32) / np.float32(temperature) - log_z_RT[:, column]
        slack = MASS_TOLERANCE * (1 + 1 / temperature) + 2.0**-11 * np.abs(best_R.astype(np.float32)) / temperature
        good_R = (best_at_t_R <= slack) & (best_at_t_R >= -np.log(vocab_size) - slack)
        if temperature == 1:
            good_R &= np.abs(log_z_RT[:, column]) <= LOGPROB_TOLERANCE
        refuse_rows(~good_R, start, f"log_z: no normaliser of temperature {temperature:g}")
    if len(temperatures) > 1:
        rising_RT = log_z_RT[:, np.argsort(temperatures, kind="stable")]
        slack_RT = LOGPROB_TOLERANCE + 1e-6 * np.abs(rising_RT[:, 1:])
        falls_R = (rising_RT[:, 1:] < rising_RT[:, :-1] - slack_RT).any(axis=1)
        refuse_rows(falls_R, start, "log_z: no normaliser of temperature: it does not grow with it")


def check_next(
    ids_RK: np.ndarray, logprobs_RK: np.ndarray, next_logprob_R: np.ndarray, next_ids_R: np.ndarray, start: int
) -> None:
    """Where a sequence's own next token is among the K, both tensors say the same of it: else the record is of other
    tokens."""
    n = len(next_ids_R)
    at = np.flatnonzero(ids_RK[:n] == next_ids_R.astype(ids_RK.dtype)[:, None])
    rows = at // ids_RK.shape[1]
    listed = logprobs_RK.reshape(-1)[at].astype(np.float32)
    apart = np.abs(listed - np.maximum(next_logprob_R[rows], np.finfo(np.float16).min))
    bad_R = np.zeros(len(ids_RK), dtype=bool)
    bad_R[rows[~(apart <= LOGPROB_TOLERANCE + 2.0**-10 * np.abs(listed))]] = True
    refuse_rows(bad_R, start, "next_logprob is not the logprob of the sequence's next token")


def check_samples(
    offsets: np.ndarray, ids_M: np.ndarray, counts_M: np.ndarray, vocab_size: int, num_samples: int
) -> None:
    """Offsets rise from 0 to M; ids ascend within a row; counts are at least 1 and sum to `num_samples`."""
    if offsets[0] != 0 or offsets[-1] != len(ids_M) or len(ids_M) != len(counts_M) or not (np.diff(offsets) > 0).all():
        raise InvalidTargetsError("sampled_offsets do not rise from 0 to the number of sampled ids")
    check_ids(ids_M, "sampled_ids", vocab_size)
    first_M = np.zeros(len(ids_M), dtype=bool)
    first_M[offsets[:-1]] = True
    wide_M = ids_M.astype(np.int64)
    if not ((np.diff(wide_M) > 0) | first_M[1:]).all():
        raise InvalidTargetsError("sampled_ids: a row's ids do not ascend")
    totals_R = np.add.reduceat(counts_M.astype(np.int64), offsets[:-1])
    if counts_M.min() < 1 or not (totals_R == num_samples).all():
        raise InvalidTargetsError(f"sampled_counts: a count is below 1, or a row has not {num_samples} draws")


def each(names: Sequence[str], arrays: dict[str, np.ndarray], check: Callable[[np.ndarray, str], None]) -> None:
    """Run `check` on those of `names` that are there."""
    for name in names:
        if name in arrays:
            check(arrays[name], name)
