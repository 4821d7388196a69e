"""Records <-> msgpack messages: tensors, checksums, limits. Used by services, client, store and tests alike.

The specification is WIRE.md. The request's half is in `wire_request.py`, tensors in `wire_tensor.py`, JSON in
`wire_json.py`; their names are handed on here. An answer is a stream of msgpack maps; decoding is bounded: containers
and their sizes are limited, no extension types, tensors only as binary of exactly the length that dtype and shape say.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from teacher_proto.errors import ChecksumError, StillhouseError, TruncatedError, VersionError, WireError, from_json
from teacher_proto.targets import TENSORS, TokenTargets, id_dtype
from teacher_proto.wire_read import Budget, read_message
from teacher_proto.wire_request import decode_request, encode_request
from teacher_proto.wire_tensor import ITEM_SIZE, decode_tensor, encode_tensor

VERSION = 1
MSGPACK = "application/msgpack"
JSON = "application/json"
REQUEST_ID_HEADER = "x-request-id"

MAX_MESSAGE_BYTES = 2**31 - 1
_MAX_CONTAINERS_A_MESSAGE = 64

__all__ = [
    "ITEM_SIZE", "JSON", "MSGPACK", "REQUEST_ID_HEADER", "VERSION",
    "End", "Failure", "Header", "Message", "ResponseDecoder", "Targets",
    "decode_request", "decode_targets", "decode_tensor",
    "encode_end", "encode_failure", "encode_header", "encode_request", "encode_targets", "encode_tensor",
    "targets_message",
]  # fmt: skip


@dataclass(frozen=True)
class Header:
    """First message of an answer. `temperatures` are those of `log_z`, in order."""

    request_id: str
    fingerprint: str
    num_sequences: int
    vocab_size: int
    top_k: int
    temperatures: tuple[float, ...]
    version: int = VERSION


@dataclass(frozen=True)
class Targets:
    index: int
    targets: TokenTargets


@dataclass(frozen=True)
class Failure:
    """One sequence that failed, or with `index` None the whole request."""

    index: int | None
    error: StillhouseError


@dataclass(frozen=True)
class End:
    num_sequences: int


Message = Header | Targets | Failure | End


def encode_header(header: Header) -> bytes:
    return msgpack.packb({"type": "header", "version": header.version, "request_id": header.request_id,
                          "fingerprint": header.fingerprint, "num_sequences": header.num_sequences,
                          "vocab_size": header.vocab_size, "top_k": header.top_k,
                          "temperatures": list(header.temperatures)})  # fmt: skip


def targets_message(index: int, targets: TokenTargets, vocab_size: int) -> dict[str, Any]:
    """A `targets` message as a map; its checksum is CRC-32 over the tensors' data in the order of TENSORS."""
    message: dict[str, Any] = {"type": "targets", "index": index, "start": targets.start}
    checksum = 0
    for name, array in targets.tensors().items():
        dtype = id_dtype(vocab_size) if name in ("ids", "sampled_ids") else None
        message[name] = encode_tensor(array, dtype)
        checksum = zlib.crc32(message[name]["data"], checksum)
    return message | {"checksum": checksum}


def encode_targets(index: int, targets: TokenTargets, vocab_size: int) -> bytes:
    return msgpack.packb(targets_message(index, targets, vocab_size))


def encode_failure(index: int | None, error: StillhouseError) -> bytes:
    return msgpack.packb({"type": "error", "index": index, **error.to_json()})


def encode_end(num_sequences: int) -> bytes:
    return msgpack.packb({"type": "end", "num_sequences": num_sequences})


def decode_targets(message: bytes) -> Targets:
    """One `targets` message by itself; its tensors are views of `message`. WireError if it is none."""
    fields = read_message(message, Budget(containers=_MAX_CONTAINERS_A_MESSAGE, items=1024))
    if not isinstance(fields, dict) or fields.get("type") != "targets":
        raise WireError("a targets message was expected")
    return Targets(_integer(fields, "index"), _decode_targets(fields))


class ResponseDecoder:
    """Feeds on chunks of an answer's body and yields its messages; `close()` tells whether it was whole.

        decoder = ResponseDecoder()
        for chunk in body: for message in decoder.feed(chunk): ...
        decoder.close()

    WireError for bytes that are not the wire's, ChecksumError and TruncatedError for what happened on the way.
    """

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES):
        self._budget = _Budget(_MAX_CONTAINERS_A_MESSAGE)
        self._unpacker = _unpacker(self._budget, max_message_bytes)
        self._header: Header | None = None
        self._answered: set[int] = set()
        self._ended = False
        self._received = 0

    def feed(self, chunk: bytes) -> Iterator[Message]:
        self._received += len(chunk)
        try:
            self._unpacker.feed(chunk)
        except msgpack.BufferFull as error:
            raise WireError("a message is larger than the client accepts") from error
        while (message := _next(self._unpacker)) is not None:
            self._budget.reset()
            yield self._interpret(message)

    def close(self) -> None:
        """TruncatedError unless the `end` message has come."""
        if not self._ended:
            want = self._header.num_sequences if self._header else "unknown"
            raise TruncatedError(
                f"the body stopped after {self._received} bytes with {len(self._answered)} of {want} sequences "
                "and no end message: the connection was cut"
            )

    def _interpret(self, message: dict[str, Any]) -> Message:
        kind = str(message.get("type"))[:40]
        if self._ended:
            raise WireError(f"a message of type {kind} follows the end")
        if kind == "header":
            return self._on_header(message)
        if kind == "error":
            index = None if message.get("index") is None else self._index(message)
            return Failure(index, from_json(message))
        if self._header is None:
            raise WireError(f"the first message is of type {kind}, a header was expected")
        if kind == "targets":
            return Targets(self._index(message), _decode_targets(message))
        if kind == "end":
            return self._on_end(message, self._header)
        raise WireError(f"unknown message type {kind}")

    def _on_header(self, message: dict[str, Any]) -> Header:
        if self._header is not None:
            raise WireError("a second header came")
        if message.get("version") != VERSION:
            raise VersionError(
                f"the teacher speaks version {str(message.get('version'))[:40]} of the wire, this client {VERSION}: "
                "update the older of the two"
            )
        ints = {name: _integer(message, name) for name in ("num_sequences", "vocab_size", "top_k")}
        texts = {name: message.get(name) for name in ("request_id", "fingerprint")}
        temperatures = message.get("temperatures")
        if not all(isinstance(text, str) for text in texts.values()) or not isinstance(temperatures, list):
            raise WireError("the header lacks request_id, fingerprint or temperatures")
        if not all(type(t) in (int, float) and math.isfinite(t) for t in temperatures):
            raise WireError("the header's temperatures are not finite numbers")
        self._header = Header(**texts, **ints, temperatures=tuple(float(t) for t in temperatures))  # type: ignore[arg-type]
        return self._header

    def _on_end(self, message: dict[str, Any], header: Header) -> End:
        if _integer(message, "num_sequences") != header.num_sequences or len(self._answered) != header.num_sequences:
            raise TruncatedError(f"the body ends with {len(self._answered)} of {header.num_sequences} sequences")
        self._ended = True
        return End(header.num_sequences)

    def _index(self, message: dict[str, Any]) -> int:
        index = _integer(message, "index")
        if self._header is not None and index >= self._header.num_sequences:
            raise WireError(f"sequence {index} of {self._header.num_sequences} came")
        if index in self._answered:
            raise WireError(f"sequence {index} came twice")
        self._answered.add(index)
        return index


def _decode_targets(message: dict[str, Any]) -> TokenTargets:
    unknown = set(message) - {"type", "index", "start", "checksum", *TENSORS}
    if unknown:
        raise WireError(f"unknown tensors {sorted(unknown)} in a targets message")
    arrays, checksum = {}, 0
    for name, spec in TENSORS.items():
        if name in message:
            arrays[name] = decode_tensor(message[name], name, spec.dtypes)
            checksum = zlib.crc32(message[name]["data"], checksum)
    if _integer(message, "checksum") != checksum:
        raise ChecksumError(f"sequence {message['index']}: the data's CRC-32 is {checksum}, the message says "
                            f"{message['checksum']}: it changed on the way")  # fmt: skip
    return TokenTargets(start=_integer(message, "start"), **arrays)


# --- bounded unpacking -----------------------------------------------------------------------------------------


class _Budget:
    """Counts containers, which cost 70 times their bytes when they are empty and many."""

    def __init__(self, containers: int):
        self._limit = containers
        self._left = containers

    def reset(self) -> None:
        self._left = self._limit

    def spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise WireError(f"more than {self._limit} lists and maps in one message")


def _unpacker(budget: _Budget, max_bytes: int) -> msgpack.Unpacker:
    def on_list(items: list[Any]) -> list[Any]:
        budget.spend()
        return items

    def on_pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        budget.spend()
        result = dict(pairs)
        if len(result) != len(pairs) or not all(isinstance(key, str) for key in result):
            raise WireError("a map has the same key twice, or one that is not text")
        return result

    return msgpack.Unpacker(
        raw=False, strict_map_key=True, use_list=True, max_buffer_size=max_bytes, max_bin_len=max_bytes,
        max_str_len=65_536, max_array_len=64, max_map_len=32, max_ext_len=0, list_hook=on_list,
        object_pairs_hook=on_pairs,
    )  # fmt: skip


def _next(unpacker: msgpack.Unpacker) -> dict[str, Any] | None:
    """The next whole message, or None where more bytes are needed."""
    try:
        message = unpacker.unpack()
    except msgpack.OutOfData:
        return None
    except StillhouseError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise WireError(f"not msgpack as the wire allows it: {str(error) or type(error).__name__}") from None
    if not isinstance(message, dict):
        raise WireError(f"a message is a map, got {type(message).__name__}")
    return message


def _integer(message: Mapping[str, Any], name: str) -> int:
    value = message.get(name)
    if type(value) is not int or not 0 <= value < 2**32:
        raise WireError(f"{name} is {str(value)[:40]!r}, a whole number below 2**32 was expected")
    return value
