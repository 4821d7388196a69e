"""Encodes and decodes responses, streams of messages: a header, a record for each sequence in any order, an end.

Progress messages may come between header and end, if the client requested them. `records.py` reads targets with this,
`attention.py` attention. Decoding is bounded (`reader.py`), and a tensor's data must have exactly the length that its
dtype and shape imply.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgpack
import numpy as np

from teacher_proto.errors import ChecksumError, StillhouseError, TruncatedError, VersionError, WireError, from_json
from teacher_proto.wire.reader import Budget, MessageStream
from teacher_proto.wire.tensors import decode_tensor

VERSION = 1
PROGRESS_HEADER = "x-progress"
SEQUENCE_CRC_HEADER = "x-sequence-crc"
PROGRESS_INTERVAL_S = (1.0, 10.0)  # a service clamps the requested interval to this range
MAX_MESSAGE_BYTES = 2**31 - 1
# A record has 14 tensors at most; an error may quote a long text.
BUDGET = Budget(containers=64, items=1024, text=65_536, array_from=1024)


class AnyHeader(Protocol):
    """What the header of every response holds."""

    @property
    def request_id(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def num_sequences(self) -> int: ...


HeaderT = TypeVar("HeaderT", bound=AnyHeader)
RecordT = TypeVar("RecordT")


@dataclass(frozen=True)
class ResponseFormat(Generic[HeaderT, RecordT]):
    """How to read one route's responses: the message type of its records, and parsers of headers and records."""

    record: str
    read_header: Callable[[dict[str, Any]], HeaderT]
    read_record: Callable[[dict[str, Any], HeaderT], RecordT]


@dataclass(frozen=True)
class Targets(Generic[RecordT]):
    """The record of one sequence. `sequence_crc`: None if the service did not send it."""

    index: int
    targets: RecordT
    sequence_crc: int | None = None


@dataclass(frozen=True)
class Failure:
    """One sequence that failed, or with `index` None the whole request."""

    index: int | None
    error: StillhouseError


@dataclass(frozen=True)
class Progress:
    """Progress of a request: `tokens_done` of its `tokens` are answered, and `tokens_ahead` of other requests are
    computed before the rest. `tokens_per_second` is the rate over all of them, 0 while it is unknown."""

    tokens_done: int
    tokens: int
    tokens_ahead: int
    tokens_per_second: float


@dataclass(frozen=True)
class End:
    num_sequences: int


def sequence_crc(index: int, tokens_T: np.ndarray) -> int:
    """By which a client sees that a record is for the sequence that its index says: the CRC-32 of both."""
    return zlib.crc32(tokens_T.astype("<i4").tobytes(), zlib.crc32(index.to_bytes(4, "little")))


def record_message(
    kind: str, index: int, fields: Mapping[str, Any], tensors: Mapping[str, dict[str, Any]],
    sequence_crc: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A record as a map; its checksum is the CRC-32 of the tensors' data, in their order."""
    own = {} if sequence_crc is None else {"sequence_crc": sequence_crc}
    checksum = 0
    for tensor in tensors.values():
        checksum = zlib.crc32(tensor["data"], checksum)
    return {"type": kind, "index": index, **own, **fields, **tensors, "checksum": checksum}


def read_tensors(
    message: dict[str, Any], dtypes: Mapping[str, Collection[str]], fields: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The tensors of a record's message by name, as views of the message; only these names and dtypes are allowed.

    `fields` are the other fields that the message may have. WireError for anything else, ChecksumError if the data was
    corrupted in transit.
    """
    unknown = set(message) - {"type", "index", "sequence_crc", "checksum", *fields, *dtypes}
    if unknown:
        raise WireError(f"unknown tensors {sorted(unknown)} in a message of type {message['type']}")
    arrays, checksum = {}, 0
    for name, allowed in dtypes.items():
        if name in message:
            arrays[name] = decode_tensor(message[name], name, allowed)
            checksum = zlib.crc32(message[name]["data"], checksum)
    if integer(message, "checksum") != checksum:
        raise ChecksumError(f"sequence {message['index']}: the data's CRC-32 is {checksum}, expected "
                            f"{message['checksum']}: it was corrupted in transit")  # fmt: skip
    return arrays


def read_names(message: Mapping[str, Any]) -> dict[str, Any]:
    """What every header holds: `request_id`, `fingerprint` and `num_sequences`."""
    num_sequences = integer(message, "num_sequences")
    texts = {name: message.get(name) for name in ("request_id", "fingerprint")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise WireError("the header lacks request_id or fingerprint")
    return texts | {"num_sequences": num_sequences}


def encode_failure(index: int | None, error: StillhouseError) -> bytes:
    return msgpack.packb({"type": "error", "index": index, **error.to_json()})


def encode_end(num_sequences: int) -> bytes:
    return msgpack.packb({"type": "end", "num_sequences": num_sequences})


def encode_progress(progress: Progress) -> bytes:
    """A `progress` message. It has at most 90 bytes, so that one per second costs next to nothing."""
    fields = {"type": "progress", "tokens_done": progress.tokens_done, "tokens": progress.tokens,
              "tokens_ahead": progress.tokens_ahead, "tokens_per_second": progress.tokens_per_second}  # fmt: skip
    return msgpack.packb(fields, use_single_float=True)


class ResponseDecoder(Generic[HeaderT, RecordT]):
    """Decodes a response body chunk by chunk and yields its messages; `close()` checks that it was complete.

        decoder = ResponseDecoder(FORMAT)
        for chunk in body: for message in decoder.feed(chunk): ...
        decoder.close()

    WireError for bytes that do not follow WIRE.md, ChecksumError and TruncatedError for damage in transit.
    """

    def __init__(self, form: ResponseFormat[HeaderT, RecordT], max_message_bytes: int = MAX_MESSAGE_BYTES):
        self._format = form
        self._messages = MessageStream(BUDGET, max_message_bytes)
        self._header: HeaderT | None = None
        self._answered: set[int] = set()
        self._ended = False
        self._received = 0

    def feed(self, chunk: bytes) -> Iterator[HeaderT | Targets[RecordT] | Failure | Progress | End]:
        self._received += len(chunk)
        for message in self._messages.feed(chunk):
            if not isinstance(message, dict):
                raise WireError(f"expected a map as message, got {type(message).__name__}")
            yield self._interpret(message)

    def close(self) -> None:
        """TruncatedError unless the `end` message has arrived."""
        if not self._ended:
            want = self._header.num_sequences if self._header else "unknown"
            raise TruncatedError(
                f"the body stopped after {self._received} bytes with {len(self._answered)} of {want} sequences "
                "and no end message: the connection was cut"
            )

    def _interpret(self, message: dict[str, Any]) -> HeaderT | Targets[RecordT] | Failure | Progress | End:
        kind = str(message.get("type"))[:40]
        if self._ended:
            raise WireError(f"a message of type {kind} follows the end")
        if kind == "header":
            return self._on_header(message)
        if kind == "error":
            index = None if message.get("index") is None else self._index(message)
            return Failure(index, from_json(message))
        if self._header is None:
            raise WireError(f"the first message is of type {kind}, expected a header")
        if kind == self._format.record:
            crc = integer(message, "sequence_crc") if "sequence_crc" in message else None
            return Targets(self._index(message), self._format.read_record(message, self._header), crc)
        if kind == "progress":
            return _read_progress(message)
        if kind == "end":
            return self._on_end(message, self._header)
        raise WireError(f"unknown message type {kind}")

    def _on_header(self, message: dict[str, Any]) -> HeaderT:
        if self._header is not None:
            raise WireError("got a second header")
        if message.get("version") != VERSION:
            raise VersionError(
                f"the teacher uses version {str(message.get('version'))[:40]} of the wire format, this client "
                f"{VERSION}: update the older of the two"
            )
        self._header = self._format.read_header(message)
        return self._header

    def _on_end(self, message: dict[str, Any], header: HeaderT) -> End:
        if integer(message, "num_sequences") != header.num_sequences or len(self._answered) != header.num_sequences:
            raise TruncatedError(f"the body ends with {len(self._answered)} of {header.num_sequences} sequences")
        self._ended = True
        return End(header.num_sequences)

    def _index(self, message: dict[str, Any]) -> int:
        index = integer(message, "index")
        if self._header is not None and index >= self._header.num_sequences:
            raise WireError(f"got sequence {index}, expected 0 to {self._header.num_sequences - 1}")
        if index in self._answered:
            raise WireError(f"got sequence {index} twice")
        self._answered.add(index)
        return index


def _read_progress(message: Mapping[str, Any]) -> Progress:
    rate = message.get("tokens_per_second")
    if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate < math.inf:
        raise WireError(f"tokens_per_second: got {str(rate)[:40]!r}, expected a number of at least 0")
    return Progress(
        integer(message, "tokens_done"), integer(message, "tokens"), integer(message, "tokens_ahead"), float(rate)
    )


def integer(message: Mapping[str, Any], name: str) -> int:
    """A field that is an integer from 0 to 2**32 - 1. WireError if it is anything else."""
    value = message.get(name)
    if type(value) is not int or not 0 <= value < 2**32:
        raise WireError(f"{name}: got {str(value)[:40]!r}, expected an integer from 0 to 2**32 - 1")
    return value
