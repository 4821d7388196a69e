"""Targets as vLLM's JSON, in pieces of bytes: `prompt_logprobs` and OpenAI's `logprobs`. CPU work, run in a thread.

Entry t of `prompt_logprobs` is about token t given those before it, so it is row t - 1 of our targets; entry 0 is
null. It lists the actual token first, as vLLM does, and the K most likely by rank. An actual token outside the top K
has rank K + 1: its true rank is not known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from teacher_proto.targets import TokenTargets
from teacher_service.text import JsonPieces, Text

LOWEST = -9999.0
# Entries that are joined at a time: a join of some thousands blocks all other threads for a millisecond.
PIECE_ENTRIES = 8192
_PIECE_ROWS = 64


def prompt_logprobs(tokens_T: np.ndarray, targets: TokenTargets, top_k: int, pieces: JsonPieces) -> list[bytes]:
    """The list [T] as JSON, in pieces. `targets` covers at least rows [0, T - 1); `top_k` 0 lists only the actual
    tokens."""
    count = len(tokens_T) - 1
    assert targets.start == 0 and targets.next_logprob is not None
    rows = max(1, PIECE_ENTRIES // (top_k + 1))
    listed = [_entries(tokens_T, targets, top_k, pieces, i, min(i + rows, count)) for i in range(0, count, rows)]
    return [b"[null", *listed, b"]"]


def _entries(
    tokens_T: np.ndarray, targets: TokenTargets, top_k: int, pieces: JsonPieces, start: int, stop: int
) -> bytes:
    """The entries of rows [start, stop), each with a comma in front."""
    assert targets.next_logprob is not None
    came_R, logprob_R = tokens_T[start + 1 : stop + 1], targets.next_logprob[start:stop]
    if not top_k:
        return b"".join(
            b",{" + pieces.entries[token][1:] + b'%.9g,"rank":null}}' % max(value, LOWEST)
            for token, value in zip(came_R.tolist(), logprob_R.tolist(), strict=True)
        )
    assert targets.ids is not None and targets.logprobs is not None
    ids_RK = targets.ids[start:stop, :top_k]
    parts = np.empty((stop - start, 3 * top_k + 2), dtype=object)
    parts[:, 1:-1:3] = pieces.entries[ids_RK]
    parts[:, 2:-1:3] = pieces.half[np.ascontiguousarray(targets.logprobs[start:stop, :top_k]).view(np.uint16)]
    parts[:, 3:-1:3] = pieces.ranks(top_k)[None, :]
    parts[:, -1] = b"}"
    ranks_R = np.full(stop - start, top_k + 1)
    inside, places = np.nonzero(ids_RK == came_R[:, None])
    ranks_R[inside] = places + 1
    for slot in (1, 2, 3):  # the actual token is listed first, and only once
        parts[inside, 3 * places + slot] = b""
    for row, (token, value, rank) in enumerate(zip(came_R.tolist(), logprob_R.tolist(), ranks_R.tolist(), strict=True)):
        parts[row, 0] = b',{%b%.9g,"rank":%d}' % (pieces.entries[token][1:], max(value, LOWEST), rank)
    return b"".join(parts.ravel().tolist())


def at_temperature(targets: TokenTargets, temperature: float | None) -> TokenTargets:
    """The record with its logprobs at the one requested temperature; unchanged for None.

    log p(v; T) = log p(v) / T - log_z(T), in fp16 for the K and the gathered ids, as at temperature 1.
    """
    if temperature is None:
        return targets
    assert targets.log_z is not None
    log_z_R1 = targets.log_z[:, :1]
    changed: dict[str, Any] = {"log_z": None}
    for name in ("logprobs", "gather_logprobs"):
        if (logprobs_RC := getattr(targets, name)) is not None:
            logprobs_RC = logprobs_RC.astype(np.float32) / temperature - log_z_R1
            changed[name] = np.minimum(logprobs_RC, 0).clip(np.finfo(np.float16).min).astype(np.float16)
    if targets.next_logprob is not None:
        next_R = targets.next_logprob / np.float32(temperature) - log_z_R1[:, 0]
        changed["next_logprob"] = np.minimum(next_R, 0)
    return replace(targets, **changed)


def openai_logprobs(
    tokens_T: np.ndarray, targets: TokenTargets, top_k: int, text: Text, as_ids: bool, generated: int | None
) -> list[bytes]:
    """OpenAI's `logprobs` object of an echoed prompt and of the token that follows it, if one was `generated`."""
    name = _namer(text, as_ids)
    tokens = tokens_T.tolist() + ([] if generated is None else [generated])
    values: list[float | None] = [None]
    tops = [b"null"]
    assert targets.next_logprob is not None
    rows = max(1, PIECE_ENTRIES // (top_k + 1))
    for start in range(0, len(tokens) - 1, rows):
        stop = min(start + rows, len(tokens) - 1)
        ids_RK = targets.ids[start:stop].tolist() if targets.ids is not None else [[]] * (stop - start)
        logprobs_RK = _rounded(targets.logprobs[start:stop]) if targets.logprobs is not None else ids_RK
        for row, token in enumerate(tokens[start + 1 : stop + 1]):
            top = dict(zip(ids_RK[row][:top_k], logprobs_RK[row][:top_k], strict=True))
            came = float(targets.next_logprob[start + row])
            # The last row has no next token: the one generated after it is the most likely.
            value = logprobs_RK[row][0] if np.isnan(came) else max(round(came, 6), LOWEST)
            values.append(value)
            # Listed first, with the same number as above: lm-eval counts it as greedy if it is the largest listed.
            listed = {token: value} | {i: lp for i, lp in top.items() if i != token}
            tops.append(_json(_by_name(listed, name)))
    return _object([name(token) for token in tokens], values, tops)


def next_token_logprobs(targets: TokenTargets, token: int, top_k: int, text: Text, as_ids: bool) -> list[bytes]:
    """OpenAI's `logprobs` of the generated token alone, from the last row."""
    assert targets.ids is not None and targets.logprobs is not None
    name = _namer(text, as_ids)
    values = _rounded(targets.logprobs[-1:])[0]
    top = dict(zip(targets.ids[-1, :top_k].tolist(), values[:top_k], strict=True)) or {token: values[0]}
    return _object([name(token)], [values[0]], [_json(_by_name(top, name))])


def _by_name(listed: dict[int, float], name: Callable[[int], str]) -> dict[str, float]:
    """The logprobs by their tokens' names. Parts of a character have the same name: the first of them keeps it."""
    named: dict[str, float] = {}
    for token, value in listed.items():
        named.setdefault(name(token), value)
    return named


def _namer(text: Text, as_ids: bool) -> Callable[[int], str]:
    """How tokens are named: by their text, or as vLLM's `token_id:5`."""
    return (lambda token: f"token_id:{token}") if as_ids else text.strings().__getitem__


def _object(names: list[str], values: list[float | None], tops: list[bytes]) -> list[bytes]:
    """The object as JSON, in pieces; `tops` are already JSON."""
    offsets = np.concatenate([[0], np.cumsum([len(name) for name in names])[:-1]]).astype(int).tolist()
    fields = {"text_offset": offsets, "token_logprobs": values, "tokens": names}
    pieces = [b"{"]
    for field, items in fields.items():
        blocks = (_json(items[i : i + PIECE_ENTRIES])[1:-1] for i in range(0, len(items), PIECE_ENTRIES))
        pieces += [b'"%b":[' % field.encode(), b",".join(blocks), b"],"]
    blocks_of_tops = [b",".join(tops[i : i + _PIECE_ROWS]) for i in range(0, len(tops), _PIECE_ROWS)]
    listed = [b"," + block if i else block for i, block in enumerate(blocks_of_tops)]
    return [*pieces, b'"top_logprobs":[', *listed, b"]}"]


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _rounded(logprobs_RK: np.ndarray) -> list[list[float]]:
    """fp16 logprobs rounded to five decimals, and not below `LOWEST`."""
    return np.maximum(np.round(logprobs_RK.astype(np.float64), 5), LOWEST).tolist()
