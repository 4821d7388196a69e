"""Messages between the service and its vLLM process: msgpack over a pipe, each a list that begins with its name. Used
by `vllm_engine.py` and `vllm_link.py` on the service's side, by `vllm_process.py` and `vllm_adapter.py` on the other.

To the engine: `job NUMBER TOKENS ASKED PRIORITY READS_CACHE`, `abort NUMBER`, `close`. From it: `stage WHAT SECONDS`,
`ready FACTS`, `refused REASON`, `answer NUMBER TOKENS_COMPUTED ROWS BYTES_PER_ROW` followed by the bytes themselves as
a separate message, `failed NUMBER REASON`. This module imports neither vLLM nor torch.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import msgpack

from teacher_proto.requests import Query, TargetSpec

SPEC_FIELDS = tuple(TargetSpec.__dataclass_fields__)


def arguments(query: Query, sample_key: int = 0) -> dict[str, Any]:
    """A query without its tokens, as `extra_kwargs` of a vLLM request: plain values and bytes, which vLLM's own
    messages can carry."""
    plain: dict[str, Any] = {name: getattr(query.spec, name) for name in SPEC_FIELDS}
    plain |= {"rows": query.rows, "sample_key": sample_key}
    if query.gather_width and query.gather_ids_RG is not None:
        plain |= {"gather_width": query.gather_width, "gather_ids": query.gather_ids_RG.astype("<i4").tobytes()}
    return plain


def send(connection: Connection, *message: Any) -> None:
    connection.send_bytes(msgpack.packb(message))


def receive(connection: Connection) -> list[Any]:
    """The next message. EOFError if the other side is gone."""
    message: list[Any] = msgpack.unpackb(connection.recv_bytes())
    return message
