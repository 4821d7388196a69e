"""`POST /generate` in SGLang's JSON, for trainers that score through SGLang: slime, miles, axolotl. Used by `app.py`.

A teacher scores: `max_new_tokens` is 0, or 1 for the most likely next token. How every field is treated is in
`sglang_fields.py`. Entry i of `input_token_logprobs` is about token `logprob_start_len` + i given those before it; the
first has no logprob, as in SGLang.
"""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import numpy as np

from serving.http.replies import JSON_WEIGHT, Work
from serving.http.streams import Outlet
from teacher_proto.request_checks import within
from teacher_proto.requests import Kind, Query, TargetsRequest
from teacher_proto.targets import TokenTargets
from teacher_service.compat.completion_json import LOWEST, PIECE_ENTRIES, at_temperature
from teacher_service.compat.requests import Face, check_cost, checked_work
from teacher_service.compat.sglang_fields import GenerateRequest, read_generate
from teacher_service.compat.writing import encoded, write_items
from teacher_service.service import TeacherService
from teacher_service.text import JsonPieces, Text

_OUR_NAMES = {"sequences": "input_ids", "temperatures.0": "sampling_params.temperature",
              "gather_ids": "token_ids_logprob", "rows": "input_ids"}  # fmt: skip
# A value takes some 11 bytes as base64 of a float32 and an int32, 4 on our wire, and is never a Python number.
_BASE64_WEIGHT = JSON_WEIGHT // 2


def parse(body: dict[str, Any], service: TeacherService) -> GenerateRequest:
    """A request that this teacher can serve. OutOfRangeError names a field that it can't."""
    limits = service.engine.limits
    return read_generate(body, min(limits.max_top_k, limits.vocab_size))


async def work_of(request: GenerateRequest, service: TeacherService, client: str, request_id: str) -> Work[Query]:
    """The request as one for targets. OutOfRangeError if a sequence or its response would be too long."""
    sequences, starts, gathered = request.sequences, request.starts, request.gathered
    limits, tokens, width = service.engine.limits, sum(map(len, sequences)), max(map(len, request.gathered or [[]]))
    tempered = request.temperature is not None
    top_k = max(request.top_logprobs_num or 0, 1 if request.written or (tempered and not gathered) else 0)
    kinds: tuple[Kind, ...] = ("top_k",) if top_k else ("score",)
    if gathered:
        within("token_ids_logprob", min(map(len, gathered)), 1, limits.max_gather, "ids")
        within("token_ids_logprob", width, 1, limits.max_gather, "ids")
        # Before the ids are repeated for every row.
        check_cost("input_ids", tokens, top_k + width, service)
        kinds = (*kinds, "gather")
    rows = tuple((min(start, max(len(ids) - 1, 0)), len(ids)) for ids, start in zip(sequences, starts, strict=True))
    targets = TargetsRequest(
        sequences=tuple(sequences), kinds=kinds, top_k=top_k or 1, rows=rows,
        temperatures=(request.temperature,) if request.temperature is not None else (),
        gather_ids=tuple(np.tile(ids, (stop - start, 1)) for ids, (start, stop) in zip(gathered, rows, strict=True))
        if gathered else None,
    )  # fmt: skip
    weight = _BASE64_WEIGHT if request.return_flat_raw_top_logprobs_b64 and not gathered else JSON_WEIGHT
    return checked_work(targets, _OUR_NAMES, service, client, request_id, weight)


async def answer(
    request: GenerateRequest, work: Work[Query], service: TeacherService, text: Text, pieces: JsonPieces, outlet: Outlet
) -> None:
    """Write the response: an object, or for several sequences a list."""
    started = time.perf_counter()
    writer = _Writer(request, service.engine.identity.fingerprint, work.request_id, text, pieces)

    def item(index: int, query: Query, targets: TokenTargets) -> list[bytes]:
        return writer.item(index, query, targets, time.perf_counter() - started)

    found = await encoded(work, service, item)
    await outlet.start("application/json")
    await outlet.write(b"[" if request.batched else b"")
    await write_items(found, outlet)
    await outlet.write(b"]" if request.batched else b"", last=True)


class _Writer:
    """Targets as the items of SGLang's response, in pieces of bytes. CPU work, run in a thread."""

    def __init__(self, request: GenerateRequest, fingerprint: str, request_id: str, text: Text, pieces: JsonPieces):
        self._request = request
        self._fingerprint = fingerprint
        self._request_id = request_id
        self._text = text
        self._pieces = pieces

    def item(self, index: int, query: Query, targets: TokenTargets, latency_s: float) -> list[bytes]:
        """The response for one sequence as JSON."""
        request, tokens_T = self._request, query.tokens_T
        targets = at_temperature(targets, request.temperature)
        written = targets.ids[-1, :1].tolist() if request.written and targets.ids is not None else []
        meta = {
            "id": f"{self._request_id}-{index}" if request.batched else self._request_id,
            "finish_reason": {"type": "length", "length": len(written)}, "prompt_tokens": len(tokens_T),
            "completion_tokens": len(written), "cached_tokens": 0, "weight_version": self._fingerprint,
            "e2e_latency": round(latency_s, 6),
        }  # fmt: skip
        head = {"text": self._text.decode(written) if written else "", "output_ids": written}
        start = json.dumps(head).encode()[:-1] + b', "meta_info": ' + json.dumps(meta).encode()[:-1]
        lists = self._lists(index, tokens_T, targets) if request.return_logprob else []
        return [start, *lists, b"}}"]

    def _lists(self, index: int, tokens_T: np.ndarray, targets: TokenTargets) -> list[bytes]:
        """The members of `meta_info` that hold logprobs, each with a comma in front. Row r of `targets` is about the
        listed token r + 1; the last row is about the generated token."""
        listed_T = tokens_T[self._request.starts[index] :]
        assert targets.next_logprob is not None
        pieces = [b', "input_token_logprobs": [', *self._came(listed_T, targets.next_logprob), b"]"]
        ids_RK, logprobs_RK = targets.ids, targets.logprobs
        out = b""
        if self._request.written:
            assert ids_RK is not None and logprobs_RK is not None
            # Without the comma and the outer brackets of a row.
            out = self._rows(ids_RK[-1:, :1], logprobs_RK[-1:, :1])[0][2:-1]
        pieces.append(b', "output_token_logprobs": [%b], "output_token_logprobs_length": %d' % (out, bool(out)))
        if k := self._request.top_logprobs_num:
            assert ids_RK is not None and logprobs_RK is not None
            flat = self._request.return_flat_raw_top_logprobs
            pieces += self._member("top_logprobs", listed_T, ids_RK[:, :k], logprobs_RK[:, :k], flat=bool(flat))
        if self._request.gathered:
            assert targets.gather_logprobs is not None
            ids_RG = np.broadcast_to(self._request.gathered[index], targets.gather_logprobs.shape)
            pieces += self._member("token_ids_logprobs", listed_T, ids_RG, targets.gather_logprobs)
        return pieces

    def _came(self, listed_T: np.ndarray, logprob_R: np.ndarray) -> list[bytes]:
        """[logprob, id, text] of each actual token, in fp32."""
        if not len(listed_T):
            return []
        ends_T, values = self._ends[listed_T].tolist(), logprob_R[: len(listed_T) - 1].tolist()
        written = [b",[%.9g" % max(value, LOWEST) + end for value, end in zip(values, ends_T[1:], strict=True)]
        blocks = (b"".join(written[i : i + PIECE_ENTRIES]) for i in range(0, len(written), PIECE_ENTRIES))
        return [b"[null" + ends_T[0], *blocks]

    @property
    def _ends(self) -> np.ndarray:
        return self._pieces.named_ends if self._request.return_text_in_logprobs else self._pieces.plain_ends

    def _member(
        self, name: str, listed_T: np.ndarray, ids_RC: np.ndarray, logprobs_RC: np.ndarray, *, flat: bool = False
    ) -> list[bytes]:
        """`input_` and `output_` of that name: C lists [logprob, id, text] at every position but the first."""
        rows = max(len(listed_T) - 1, 0)
        if flat:
            pieces = self._flat(len(listed_T), ids_RC[:rows], logprobs_RC[:rows])
        else:
            first = [b"null"] if len(listed_T) else []
            pieces = [b', "input_%b": [' % name.encode(), *first, *self._rows(ids_RC[:rows], logprobs_RC[:rows]), b"]"]
        out = b"".join(self._rows(ids_RC[-1:], logprobs_RC[-1:]))[1:] if self._request.written else b""
        return [*pieces, b', "output_%b": [%b]' % (name.encode(), out)]

    def _rows(self, ids_RC: np.ndarray, logprobs_RC: np.ndarray) -> list[bytes]:
        """Rows of lists [logprob, id, text], each row with a comma in front."""
        num_rows, columns = ids_RC.shape
        step = max(1, PIECE_ENTRIES // columns)
        return [self._block(ids_RC[i : i + step], logprobs_RC[i : i + step]) for i in range(0, num_rows, step)]

    def _block(self, ids_RC: np.ndarray, logprobs_RC: np.ndarray) -> bytes:
        num_rows, columns = ids_RC.shape
        parts = np.empty((num_rows, 3 * columns + 1), dtype=object)
        parts[:, 0:-1:3] = b",["
        parts[:, 0] = b",[["
        parts[:, 1:-1:3] = self._pieces.half[np.ascontiguousarray(logprobs_RC).view(np.uint16)]
        parts[:, 2:-1:3] = self._ends[ids_RC]
        parts[:, -1] = b"]"
        return b"".join(parts.ravel().tolist())

    def _flat(self, count: int, ids_RK: np.ndarray, logprobs_RK: np.ndarray) -> list[bytes]:
        """SGLang's flat form of `input_top_logprobs`: the values of all positions but the null ones, row by row."""
        k = ids_RK.shape[1]
        shape = {"input_top_logprobs_shape": [count, k], "input_top_logprobs_null_prefix": min(count, 1)}
        pieces = [b", " + json.dumps(shape).encode()[1:-1]]
        for name, array in {"val": logprobs_RK.astype("<f4"), "idx": ids_RK.astype("<i4")}.items():
            member = f"input_top_logprobs_{name}_flat".encode()
            if self._request.return_flat_raw_top_logprobs_b64:
                told = (member, array.dtype.name.encode(), member)
                pieces += [b', "%b_b64_dtype": "%b", "%b_b64": "' % told, base64.b64encode(array.tobytes()), b'"']
            else:
                numbers = np.maximum(array.ravel(), LOWEST).tolist() if name == "val" else array.ravel().tolist()
                pieces += [b', "%b": ' % member, json.dumps(numbers).encode()]
        return pieces


FACE = Face(parse, work_of, answer)
