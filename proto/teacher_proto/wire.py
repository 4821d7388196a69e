"""Records <-> msgpack messages: tensors, checksums, limits. Used by services, client, store and tests alike.

The specification is WIRE.md. A body is a sequence of msgpack maps; decoding is bounded before it allocates:
containers and their sizes are counted, no extension types, tensors only as binary of exactly the length that
dtype and shape say.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from teacher_proto.errors import ChecksumError, StillhouseError, TruncatedError, VersionError, WireError, from_json
from teacher_proto.requests import Limits, TargetsRequest
from teacher_proto.targets import TENSORS, TokenTargets, id_dtype

VERSION = 1
MSGPACK = "application/msgpack"
JSON = "application/json"
REQUEST_ID_HEADER = "x-request-id"

ITEM_SIZE = {"<f2": 2, "<f4": 4, "<u2": 2, "<u4": 4, "<i4": 4, "|u1": 1, "|i1": 1, "u3": 3}
MAX_MESSAGE_BYTES = 2**31 - 1
_MAX_CONTAINERS_A_MESSAGE = 64


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


# --- tensors ---------------------------------------------------------------------------------------------------


def encode_tensor(array: np.ndarray, dtype: str | None = None) -> dict[str, Any]:
    """A tensor map of an array. `dtype` "u3" packs integers below 2**24 into three bytes each."""
    name = dtype or array.dtype.newbyteorder("<").str
    if name not in ITEM_SIZE:
        raise ValueError(f"dtype {name} is not on the wire; allowed are {', '.join(ITEM_SIZE)}")
    shape = list(array.shape)
    if name == "u3":
        flat = np.ascontiguousarray(array, dtype="<u4").reshape(-1, 1).view(np.uint8)
        data = np.ascontiguousarray(flat[:, :3])
    else:
        data = np.ascontiguousarray(array, dtype=name)
    return {"dtype": name, "shape": shape, "data": data.reshape(-1).view(np.uint8).data}


def decode_tensor(value: Any, name: str = "tensor", dtypes: Iterable[str] = ITEM_SIZE) -> np.ndarray:
    """A read-only view of a tensor map's data; `u3` becomes int32, which copies. WireError says what is wrong."""
    if not isinstance(value, Mapping) or set(value) != {"dtype", "shape", "data"}:
        raise WireError(f"{name}: a tensor is a map of dtype, shape and data")
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if dtype not in ITEM_SIZE or dtype not in tuple(dtypes):
        raise WireError(f"{name}: dtype {dtype!r} came, one of {', '.join(dtypes)} was expected")
    shape = shape.tolist() if isinstance(shape, np.ndarray) else shape
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 4:
        raise WireError(f"{name}: shape {shape!r} is not a list of at most four sizes")
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise WireError(f"{name}: data is {type(data).__name__}, binary was expected")
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if len(data) != expected:
        raise WireError(f"{name}: {len(data)} bytes of data, {dtype} of shape {list(shape)} takes {expected}")
    if dtype != "u3":
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    wide = np.zeros((math.prod(shape), 4), dtype=np.uint8)
    wide[:, :3] = np.frombuffer(data, dtype=np.uint8).reshape(-1, 3)
    return wide.view("<i4").reshape(shape)


# --- the request -----------------------------------------------------------------------------------------------


def encode_request(request: TargetsRequest) -> bytes:
    """The msgpack body of a request: sequences as int32 tensors, fields at their defaults left out."""
    body: dict[str, Any] = {"sequences": [encode_tensor(tokens_T, "<i4") for tokens_T in request.sequences]}
    for name, field in TargetsRequest.model_fields.items():
        value = getattr(request, name)
        if name in ("sequences", "gather_ids") or value == field.default:
            continue
        body[name] = value
    if request.gather_ids is not None:
        body["gather_ids"] = [encode_tensor(ids_RG, "<i4") for ids_RG in request.gather_ids]
    return msgpack.packb(body)


def decode_request(body: bytes, limits: Limits) -> dict[str, Any]:
    """The plain fields of a msgpack request body, tensors and lists of ints as arrays. WireError if it is none."""
    budget = _Budget(8 * limits.max_sequences + _MAX_CONTAINERS_A_MESSAGE, 4 * limits.max_request_tokens)
    unpacker = _unpacker(budget, limits.max_request_tokens, len(body), as_arrays=True)
    unpacker.feed(body)
    message = _next(unpacker)
    if message is None:
        raise TruncatedError(f"the body stops inside its message, after {len(body)} bytes")
    if unpacker.tell() != len(body):
        raise WireError(f"{len(body) - unpacker.tell()} bytes follow the request; one message was expected")
    for name, value in message.items():
        if name in ("sequences", "gather_ids") and isinstance(value, list):
            message[name] = [
                decode_tensor(item, f"{name}.{i}") if isinstance(item, Mapping) else item
                for i, item in enumerate(value)
            ]
        elif isinstance(value, np.ndarray):
            message[name] = value.tolist()
    return message


# --- the answer ------------------------------------------------------------------------------------------------


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


class ResponseDecoder:
    """Feeds on chunks of an answer's body and yields its messages; `close()` tells whether it was whole.

        decoder = ResponseDecoder()
        for chunk in body: for message in decoder.feed(chunk): ...
        decoder.close()

    WireError for bytes that are not the wire's, ChecksumError and TruncatedError for what happened on the way.
    """

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES):
        self._budget = _Budget(_MAX_CONTAINERS_A_MESSAGE)
        self._unpacker = _unpacker(self._budget, 64, max_message_bytes)
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
        kind = message.get("type")
        if self._ended:
            raise WireError(f"a message of type {kind!r} follows the end")
        if kind == "header":
            return self._on_header(message)
        if kind == "error":
            index = None if message.get("index") is None else self._index(message)
            return Failure(index, from_json(message))
        if self._header is None:
            raise WireError(f"the first message is of type {kind!r}, a header was expected")
        if kind == "targets":
            return Targets(self._index(message), _decode_targets(message))
        if kind == "end":
            return self._on_end(message, self._header)
        raise WireError(f"unknown message type {kind!r}")

    def _on_header(self, message: dict[str, Any]) -> Header:
        if self._header is not None:
            raise WireError("a second header came")
        if message.get("version") != VERSION:
            raise VersionError(
                f"the teacher speaks version {message.get('version')!r} of the wire, this client {VERSION}"
            )
        ints = {name: _integer(message, name) for name in ("num_sequences", "vocab_size", "top_k")}
        texts = {name: message.get(name) for name in ("request_id", "fingerprint")}
        temperatures = message.get("temperatures")
        if not all(isinstance(text, str) for text in texts.values()) or not isinstance(temperatures, list):
            raise WireError("the header lacks request_id, fingerprint or temperatures")
        if not all(isinstance(t, (int, float)) and not isinstance(t, bool) for t in temperatures):
            raise WireError("the header's temperatures are not numbers")
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
    """Counts containers, which cost 70 times their bytes when they are empty and many, and the items of lists."""

    def __init__(self, containers: int, items: int = 2**16):
        self._limits = containers, items
        self.reset()

    def reset(self) -> None:
        self._containers, self._items = self._limits

    def spend(self, items: int) -> None:
        self._containers -= 1
        self._items -= items
        if self._containers < 0:
            raise WireError(f"more than {self._limits[0]} lists and maps in one message")
        if self._items < 0:
            raise WireError(f"more than {self._limits[1]} items in the lists of one message")


def _unpacker(budget: _Budget, max_array: int, max_bytes: int, as_arrays: bool = False) -> msgpack.Unpacker:
    def on_list(items: list[Any]) -> Any:
        budget.spend(len(items))
        # A long list of ints becomes an array at once: 4 to 8 bytes an id instead of 40.
        return np.array(items, dtype=np.int64) if as_arrays and len(items) > 8 and _all_ints(items) else items

    def on_pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        budget.spend(len(pairs))
        result = dict(pairs)
        if len(result) != len(pairs):
            raise WireError("a map has the same key twice")
        return result

    return msgpack.Unpacker(
        raw=False, strict_map_key=True, use_list=True, max_buffer_size=max_bytes, max_bin_len=max_bytes,
        max_str_len=65_536, max_array_len=max_array, max_map_len=32, max_ext_len=0, list_hook=on_list,
        object_pairs_hook=on_pairs,
    )  # fmt: skip


def _all_ints(items: list[Any]) -> bool:
    return set(map(type, items)) == {int} and max(items) < 2**63


def _next(unpacker: msgpack.Unpacker) -> dict[str, Any] | None:
    """The next whole message, or None where more bytes are needed."""
    try:
        message = unpacker.unpack()
    except msgpack.OutOfData:
        return None
    except StillhouseError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise WireError(f"not msgpack as the wire allows it: {error}") from None
    if not isinstance(message, dict):
        raise WireError(f"a message is a map, got {type(message).__name__}")
    return message


def _integer(message: Mapping[str, Any], name: str) -> int:
    value = message.get(name)
    if type(value) is not int or value < 0:
        raise WireError(f"{name} is {value!r}, a whole number was expected")
    return value
