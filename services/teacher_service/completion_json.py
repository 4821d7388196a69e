"""Targets as vLLM's JSON: `prompt_logprobs` and OpenAI's `logprobs`. CPU work without a lock, run in a thread.

Entry t of `prompt_logprobs` is about token t given those before it, so it is row t - 1 of our targets; entry 0 is
null. It holds the K most likely tokens by rank and the token that came, first if it is not among them. A token that is
not among the K has rank K + 1: how far below it lies is not known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from teacher_proto.targets import TokenTargets
from teacher_service.text import JsonPieces, Text

_LOWEST = -9999.0


def prompt_logprobs(tokens_T: np.ndarray, targets: TokenTargets, top_k: int, pieces: JsonPieces) -> bytes:
    """The list [T] as JSON. `targets` covers rows [0, T - 1) at least; `top_k` 0 lists the token that came alone."""
    count = len(tokens_T) - 1
    assert targets.start == 0 and targets.next_logprob is not None
    came, logprob = tokens_T[1:], targets.next_logprob[:count]
    if not top_k:
        rows = [
            b"{" + pieces.entries[token] + b'%.6g,"rank":null}}' % max(value, _LOWEST)
            for token, value in zip(came.tolist(), logprob.tolist(), strict=True)
        ]
        return b"[null" + b"".join(b"," + row for row in rows) + b"]"
    assert targets.ids is not None and targets.logprobs is not None
    ids_RK = targets.ids[:count, :top_k]
    parts = np.empty((count, 3 * top_k + 2), dtype=object)
    parts[:, 0] = b",{"
    parts[:, 1:-1:3] = pieces.entries[ids_RK]
    parts[:, 2:-1:3] = pieces.half[np.ascontiguousarray(targets.logprobs[:count, :top_k]).view(np.uint16)]
    parts[:, 3:-1:3] = pieces.ranks(top_k)[None, :]
    parts[:, -1] = b"}"
    outside = ~(ids_RK == came[:, None]).any(axis=1)
    for row in np.flatnonzero(outside).tolist():
        entry = pieces.entries[came[row]]
        parts[row, 0] = b',{%b%.6g,"rank":%d},' % (entry, max(float(logprob[row]), _LOWEST), top_k + 1)
    return b"[null" + b"".join(parts.ravel().tolist()) + b"]"


def openai_logprobs(
    tokens_T: np.ndarray, targets: TokenTargets, top_k: int, text: Text, as_ids: bool, generated: int | None
) -> bytes:
    """OpenAI's `logprobs` object of an echoed prompt, and of the token that follows it where one was `generated`."""
    name = _namer(text, as_ids)
    tokens = tokens_T.tolist() + ([] if generated is None else [generated])
    values: list[float | None] = [None]
    tops: list[dict[str, float] | None] = [None]
    ids_RK = targets.ids.tolist() if targets.ids is not None else [[]] * len(tokens_T)
    logprobs_RK = _rounded(targets.logprobs) if targets.logprobs is not None else [[]] * len(tokens_T)
    assert targets.next_logprob is not None
    for row, token in enumerate(tokens[1:]):
        top = dict(zip(ids_RK[row][:top_k], logprobs_RK[row][:top_k], strict=True))
        came = float(targets.next_logprob[row])
        # The last row has no next token: what is written after it is the most likely one.
        value = logprobs_RK[row][0] if np.isnan(came) else max(round(came, 6), _LOWEST)
        values.append(value)
        listed = top if token in top else {token: value} | top
        tops.append({name(i): listed_value for i, listed_value in listed.items()})
    return _object([name(token) for token in tokens], values, tops)


def next_token_logprobs(targets: TokenTargets, token: int, top_k: int, text: Text, as_ids: bool) -> bytes:
    """OpenAI's `logprobs` of the generated token alone, out of the last row."""
    assert targets.ids is not None and targets.logprobs is not None
    name = _namer(text, as_ids)
    values = _rounded(targets.logprobs[-1:])[0]
    top = {name(i): lp for i, lp in zip(targets.ids[-1, :top_k].tolist(), values[:top_k], strict=True)}
    return _object([name(token)], [values[0]], [top or {name(token): values[0]}])


def _namer(text: Text, as_ids: bool) -> Callable[[int], str]:
    """How a token is written: as text, or as vLLM's `token_id:5`."""
    return (lambda token: f"token_id:{token}") if as_ids else text.strings().__getitem__


def _object(names: list[str], values: list[float | None], tops: list[dict[str, float] | None]) -> bytes:
    offsets = np.concatenate([[0], np.cumsum([len(name) for name in names])[:-1]]).astype(int).tolist()
    body: dict[str, Any] = {"text_offset": offsets, "token_logprobs": values, "tokens": names, "top_logprobs": tops}
    return json.dumps(body, separators=(",", ":")).encode()


def _rounded(logprobs_RK: np.ndarray) -> list[list[float]]:
    """fp16 numbers with the five digits that tell them apart."""
    return np.maximum(np.round(logprobs_RK.astype(np.float64), 5), _LOWEST).tolist()
