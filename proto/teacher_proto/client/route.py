"""What a client must know of one service's route: its path, its answers, its checks.

`teacher_client.py` has the teacher's, `attention_client.py` the attention service's; `exchange.py` and
`replica_client.py` speak either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from teacher_proto.info import ServiceInfo
from teacher_proto.request_checks import SequencesRequest
from teacher_proto.wire.answers import AnswerFormat, HeaderT, RecordT

RequestT = TypeVar("RequestT", bound=SequencesRequest)
InfoT = TypeVar("InfoT", bound=ServiceInfo)


@dataclass(frozen=True)
class Route(Generic[RequestT, HeaderT, RecordT, InfoT]):
    """One service's route.

    `noun` and `command` are for messages. `read_info` makes an info of decoded JSON. `check_request` raises a
    RequestError for what the service would refuse, `check_header` a WireError where a header speaks of another
    request, `check_record` InvalidTargetsError for a record that can't be the answer to the sequence of that index.
    `cost` is what the service admits a request by.
    """

    noun: str
    command: str
    path: str
    answers: AnswerFormat[HeaderT, RecordT]
    read_info: Callable[[Any], InfoT]
    check_request: Callable[[RequestT, InfoT], None]
    check_header: Callable[[HeaderT, RequestT, InfoT], None]
    check_record: Callable[[RecordT, RequestT, int, InfoT], None]
    cost: Callable[[RequestT, InfoT], int]
