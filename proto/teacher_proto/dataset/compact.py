"""The codec `compact`: top-K records in a third to a half of their bytes, with an error that is measured as they are
written. Used by `codecs.py`.

Each of a row's K ids is replaced by its place in the order of frequency within the shard's first row group. The places
are sorted, and their differences stored: small numbers, which `compact_layouts` turns into bytes. Sorting loses the
order by logprob, so each id also keeps a level of `bits` bits: level 0 is the row's largest logprob, stored unchanged,
and the other levels divide the range of the other logprobs into equal steps. Level 1 is placed such that the K ids
together keep their probability, but never above the largest logprob. The logprob of the sequence's own next token,
`lse` and `log_z` are stored in float16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from teacher_proto.dataset.compact_layouts import LAYOUTS, SCALE_COLUMNS, Layout, Packed
from teacher_proto.store.entry import Entry
from teacher_proto.store.parquet import Pair
from teacher_proto.targets import TokenTargets

MIN_BITS, MAX_BITS = 2, 8
# A probability this many nats below the largest is negligible, and would cost the others resolution.
_DEEPEST = 64.0
_KEPT = ("ids", "logprobs", "lse", "next_logprob", "log_z")


class Compact:
    """`bits` per logprob, 2 to 8; `vocab_size` of the teacher; `version` of the layout."""

    def __init__(self, bits: int, vocab_size: int, version: int):
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"codec compact: got {bits} bits per logprob, expected {MIN_BITS} to {MAX_BITS}")
        self._levels, self._vocab_size = 2**bits - 1, vocab_size
        self._layout: Layout = LAYOUTS[version](bits, vocab_size)
        self.columns = self._layout.columns
        self._by_place, self._place_of = self._orders(np.empty(0, np.int64))
        self._seen = np.empty(0, np.int64)
        self._errors: dict[str, float] = {"sum_kl": 0.0, "max_kl": 0.0}

    def learn(self, pairs: Iterable[Pair]) -> None:
        counts_V = np.zeros(self._vocab_size, np.int64)
        for _, targets in pairs:
            if targets.ids is not None:
                counts_V += np.bincount(targets.ids.reshape(-1), minlength=self._vocab_size)
        order_V = np.argsort(-counts_V, kind="stable")
        self._seen = order_V[: np.count_nonzero(counts_V)]
        self._by_place, self._place_of = self._orders(self._seen)

    def state(self) -> bytes:
        return self._seen.astype("<u4").tobytes()

    def restore_state(self, state: bytes) -> None:
        self._by_place, self._place_of = self._orders(np.frombuffer(state, "<u4").astype(np.int64))

    def errors(self) -> dict[str, float]:
        """KL(exact || kept) in nats over the K ids and the tail as one bucket, at temperature 1 and those requested."""
        return self._errors

    def encode(self, row: dict[str, Any], entry: Entry, targets: TokenTargets) -> dict[str, Any]:
        blank = dict.fromkeys(self.columns)
        if entry.kind != "top_k":
            return row | blank
        assert targets.ids is not None and targets.logprobs is not None and targets.lse is not None
        assert targets.next_logprob is not None and targets.log_z is not None
        # Frequent ids have small places, so sorted places lie close together and their differences take few bits.
        places_RK = self._place_of[targets.ids]
        order_RK = np.argsort(places_RK, axis=1)
        places_RK = np.take_along_axis(places_RK, order_RK, axis=1)
        logprobs_RK = np.take_along_axis(targets.logprobs, order_RK, axis=1).astype(np.float32)
        # The next token's logprob has a separate column; if the token is among the K, decoding puts it there.
        next_R = targets.next_logprob.astype(np.float16)
        at_R = _next_column(self._by_place[places_RK], entry)
        # Levels first, by the uncorrected scale; `keeping_mass` then shifts all of them alike, so they stay valid.
        scale = _scale_of(logprobs_RK, self._levels)
        levels_RK = scale.levels(logprobs_RK, self._levels)
        scale = scale.keeping_mass(logprobs_RK, levels_RK, next_R, at_R)
        columns = (scale.largest_R, scale.first_R, scale.step_R, next_R, targets.lse, *targets.log_z.T)
        columns_CR = np.stack([column.astype(np.float16) for column in columns])
        coded_row = row | dict.fromkeys(_KEPT) | self._layout.pack(Packed(places_RK, levels_RK, columns_CR))
        # Decode again at once: the reported error must be that of the bytes as written.
        self._measure(targets, self.decode(dict(coded_row)), entry)
        return coded_row

    def decode(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["coded_ids"] is None:
            return row
        rows, top_k = row["stop"] - row["start"], row["top_k"]
        # The inverse: bytes to places and levels, places to ids, levels to logprobs, then sort by descending logprob.
        packed = self._layout.unpack(row, rows, top_k)
        ids_RK = self._by_place[packed.places_RK]
        scale, (next_R, lse_R, *_) = packed.columns_CR[:SCALE_COLUMNS], packed.columns_CR[SCALE_COLUMNS:]
        kept_RK = _Scale(*scale).logprobs(packed.levels_RK)
        at_R = _next_column(ids_RK, row)
        listed = np.flatnonzero(at_R >= 0)
        kept_RK[listed, at_R[listed]] = next_R[listed]
        ids_RK, kept_RK = _largest_first(ids_RK, kept_RK)
        return row | {
            "ids": ids_RK.reshape(-1), "logprobs": kept_RK.reshape(-1), "lse": lse_R.astype(np.float32),
            "next_logprob": next_R.astype(np.float32),
            "log_z": packed.columns_CR[SCALE_COLUMNS + 2 :].T.astype(np.float32).reshape(-1),
        }  # fmt: skip

    def _orders(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids by place, `first` and then all others, and the place of each id."""
        rest = np.ones(self._vocab_size, dtype=bool)
        rest[first] = False
        # Ids that are not in the first row group come last, by number, so that every id has a place.
        by_place = np.concatenate([first, np.flatnonzero(rest)]).astype(np.int32)
        place_of = np.empty(self._vocab_size, np.int32)
        place_of[by_place] = np.arange(self._vocab_size, dtype=np.int32)
        return by_place, place_of

    def _measure(self, targets: TokenTargets, decoded: dict[str, Any], entry: Entry) -> None:
        assert targets.ids is not None and targets.logprobs is not None and targets.log_z is not None
        shape = targets.ids.shape
        # Compare in the order of ids: the codec may have changed the order of close logprobs.
        by_id_RK, ids_RK = np.argsort(targets.ids, axis=1), decoded["ids"].reshape(shape)
        exact_RK = np.take_along_axis(targets.logprobs, by_id_RK, axis=1).astype(np.float64)
        kept_RK = np.take_along_axis(decoded["logprobs"].reshape(shape), np.argsort(ids_RK, axis=1), axis=1)
        kl_R = tail_kl(exact_RK, kept_RK.astype(np.float64))
        self._add("kl", kl_R)
        log_z_RT = decoded["log_z"].reshape(targets.log_z.shape)
        for column, temperature in enumerate(entry.temperatures):
            if temperature != 1:
                # log p at T = logprob / T - log_z(T), each side with its own log_z.
                exact = exact_RK / temperature - targets.log_z[:, column, None]
                kept = kept_RK.astype(np.float64) / temperature - log_z_RT[:, column, None]
                self._add(f"kl_at_{temperature:g}", tail_kl(exact, kept))

    def _add(self, name: str, kl_R: np.ndarray) -> None:
        self._errors[f"sum_{name}"] = self._errors.get(f"sum_{name}", 0.0) + float(kl_R.sum())
        self._errors[f"max_{name}"] = max(self._errors.get(f"max_{name}", 0.0), float(kl_R.max()))


def tail_kl(exact_RK: np.ndarray, kept_RK: np.ndarray) -> np.ndarray:
    """KL(exact || kept) per row in nats, over the K ids and the tail as one bucket."""
    # At least 1e-6: rounding may lift the mass of the K above 1, and the logarithm of the tail must stay finite.
    tails = [np.maximum(1 - np.exp(logprobs_RK).sum(axis=1), 1e-6) for logprobs_RK in (exact_RK, kept_RK)]
    head_R = (np.exp(exact_RK) * (exact_RK - kept_RK)).sum(axis=1)
    kl_R: np.ndarray = head_R + tails[0] * np.log(tails[0] / tails[1])
    return kl_R


@dataclass(frozen=True, eq=False)
class _Scale:
    """The meaning of levels, float16 [R] each: level 0 is `largest`, level n is `first` - (n - 1) * `step`."""

    largest_R: np.ndarray
    first_R: np.ndarray
    step_R: np.ndarray

    def levels(self, logprobs_RK: np.ndarray, highest: int) -> np.ndarray:
        """The nearest levels [R, K] of float32 logprobs; 0 only for the largest, of equal ones the first."""
        steps_R = np.maximum(self.step_R.astype(np.float32), np.float32(1e-6))
        below_RK = self.first_R.astype(np.float32)[:, None] - logprobs_RK
        # level n is first - (n - 1) step, so n = 1 + (first - logprob) / step; 0 is reserved for the largest.
        levels_RK = np.clip(1 + np.rint(below_RK / steps_R[:, None]), 1, highest).astype(np.uint8)
        levels_RK[np.arange(len(levels_RK)), logprobs_RK.argmax(axis=1)] = 0
        return levels_RK

    def logprobs(self, levels_RK: np.ndarray) -> np.ndarray:
        """The logprobs of levels, float16 [R, K]."""
        step = self.step_R.astype(np.float32)[:, None]
        rest_RK = self.first_R.astype(np.float32)[:, None] - (levels_RK - np.float32(1)) * step
        largest = self.largest_R.astype(np.float32)[:, None]
        kept_RK = np.maximum(np.where(levels_RK == 0, largest, rest_RK), np.float32(np.finfo(np.float16).min))
        return kept_RK.astype(np.float16)

    def keeping_mass(
        self, logprobs_RK: np.ndarray, levels_RK: np.ndarray, next_R: np.ndarray, at_R: np.ndarray
    ) -> _Scale:
        """The scale with `first` moved such that the K ids keep their total probability; never above `largest`."""
        # Moving `first` moves all but the largest and the next token, whose logprobs are stored separately.
        moves_RK = levels_RK > 0
        listed = np.flatnonzero(at_R >= 0)
        moves_RK[listed, at_R[listed]] = False
        wanted_R = np.where(moves_RK, np.exp(logprobs_RK), np.float32(0)).sum(axis=1)
        ours_R = np.where(moves_RK, np.exp(self.logprobs(levels_RK).astype(np.float32)), np.float32(0)).sum(axis=1)
        # A shift by log(wanted / ours) multiplies each of their probabilities by wanted / ours.
        moved_R = np.log(np.maximum(wanted_R, 1e-30) / np.maximum(ours_R, 1e-30))
        first_R = np.minimum(self.first_R.astype(np.float32) + moved_R, self.largest_R.astype(np.float32))
        return replace(self, first_R=first_R.astype(np.float16))


def _scale_of(logprobs_RK: np.ndarray, highest: int) -> _Scale:
    largest_R = logprobs_RK.max(axis=1)
    if logprobs_RK.shape[1] == 1:
        return _Scale(*(column.astype(np.float16) for column in (largest_R, largest_R, np.zeros_like(largest_R))))
    second_R = -np.partition(-logprobs_RK, 1, axis=1)[:, 1]
    # `highest` levels for all but the largest: `highest` - 1 steps from the second largest to the smallest.
    deep_R = np.minimum(second_R - logprobs_RK.min(axis=1), _DEEPEST)
    return _Scale(*(column.astype(np.float16) for column in (largest_R, second_R, deep_R / max(highest - 1, 1))))


def _next_column(ids_RK: np.ndarray, row: Entry | dict[str, Any]) -> np.ndarray:
    """The column of each row's next token among its ids [R]; -1 if it is not among them, or there is none."""
    if isinstance(row, Entry):
        tokens_T, start, stop = row.tokens_T, row.start, row.stop
    else:
        tokens_T, start, stop = row["tokens"], row["start"], row["stop"]
    next_R = np.full(stop - start, -1, np.int64)
    following = tokens_T[start + 1 : stop + 1]
    next_R[: len(following)] = following
    is_next_RK = ids_RK == next_R[:, None]
    column_R: np.ndarray = np.where(is_next_RK.any(axis=1), is_next_RK.argmax(axis=1), -1)
    return column_R


def _largest_first(ids_RK: np.ndarray, logprobs_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sorted by descending logprob; equal ones keep their order, on every machine."""
    # The bits of a float16 <= 0, read as an integer, grow as it falls, except for +0, whose sign bit is set here.
    bits_RK = np.ascontiguousarray(logprobs_RK).view(np.uint16) | np.uint16(0x8000)
    # One sort for both: the logprob in the upper 16 bits, the column, which breaks ties, in the lower 16.
    keys_RK = bits_RK.astype(np.uint32) << 16 | np.arange(ids_RK.shape[1], dtype=np.uint32)
    keys_RK.sort(axis=1)
    order_RK = (keys_RK & 0xFFFF).astype(np.int64)
    return np.take_along_axis(ids_RK, order_RK, axis=1), (keys_RK >> 16).astype(np.uint16).view(np.float16)
