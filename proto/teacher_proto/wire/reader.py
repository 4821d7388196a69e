"""The msgpack reader of requests, responses and stored entries, with bounded memory use.

Generic decoders turn 10 MB of empty lists into 700 MB, and copy every binary twice. This one counts every list, map and
item against a budget before it reads it, limits the depth, refuses extension types and long texts, and returns binaries
as views of the body. `read_message` reads a complete body, `MessageStream` one that arrives in chunks.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_proto.errors import TruncatedError, WireError

MAX_DEPTH = 6
# Names, dtypes and fingerprints are short; a text of megabytes would otherwise be decoded and quoted in an error.
MAX_TEXT = 4096


@dataclass
class Budget:
    """What one message may hold: `containers` lists and maps, `items` list elements and map pairs, texts of at most
    `text` bytes. Lists of more than `array_from` token ids are returned as int64 arrays."""

    containers: int
    items: int
    text: int = MAX_TEXT
    array_from: int = 8


def read_message(body: bytes, budget: Budget) -> Any:
    """The single msgpack value in `body`. WireError for anything else, TruncatedError if it ends too early."""
    reader = _Reader(body, budget)
    value = reader.value(MAX_DEPTH)
    if reader.position != len(body):
        raise WireError(f"{len(body) - reader.position} bytes follow the message, expected a single message")
    return value


class MessageStream:
    """Parses messages from chunks of bytes. An incomplete message is parsed again only when the bytes that the last
    attempt lacked have arrived: at most once per value, however small the chunks are."""

    def __init__(self, budget: Budget, max_bytes: int):
        self._budget = budget
        self._max_bytes = max_bytes
        # `body` has been read up to `start`; `chunks` follow it.
        self._body, self._start = b"", 0
        self._chunks: list[bytes] = []
        self._size = 0
        self._needed = 1

    def feed(self, chunk: bytes) -> Iterator[Any]:
        """The messages that this chunk completes. WireError for what is not msgpack, or exceeds the budget."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        while self._size >= self._needed:
            if self._chunks:
                rest = [self._body[self._start :]] if self._start < len(self._body) else []
                self._body, self._start = b"".join([*rest, *self._chunks]), 0
                self._chunks.clear()
            reader = _Reader(self._body, self._budget, self._start)
            try:
                message = reader.value(MAX_DEPTH)
            except TruncatedError:
                self._needed = reader.needed - self._start
                if self._needed > self._max_bytes:
                    raise WireError(
                        f"a message is larger than the client accepts: {self._needed} bytes or more, expected at most "
                        f"{self._max_bytes}"
                    ) from None
                continue
            self._start = reader.position
            self._size, self._needed = len(self._body) - self._start, 1
            yield message


class _Reader:
    def __init__(self, body: bytes, budget: Budget, position: int = 0):
        self.position = position
        # After a TruncatedError: the length that the body needs for what was missing.
        self.needed = 0
        self._body = memoryview(body).toreadonly()
        self._containers = budget.containers
        self._items = budget.items
        self._budget = budget

    def value(self, depth: int) -> Any:
        code = self._take(1)[0]
        if code < 0x80:
            return code
        if code < 0x90:
            return self._map(code & 0x0F, depth)
        if code < 0xA0:
            return self._list(code & 0x0F, depth)
        if code < 0xC0:
            return self._text(code & 0x1F)
        if code >= 0xE0:
            return code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        if code not in _SIZED:
            raise WireError(f"msgpack type 0x{code:02x} at byte {self.position - 1} is not part of the wire format")
        size_format, read = _SIZED[code]
        return read(self, self._number(size_format), depth)

    def _take(self, size: int) -> memoryview:
        end = self.position + size
        if end > len(self._body):
            self.needed = end
            raise TruncatedError(
                f"the body has {len(self._body)} bytes, but the value at byte {self.position} ends at {end}"
            )
        part = self._body[self.position : end]
        self.position = end
        return part

    def _number(self, number: struct.Struct) -> Any:
        return number.unpack(self._take(number.size))[0]

    def _spend(self, items: int, depth: int) -> None:
        """Charge a container to the budget before it is allocated. Each item takes at least one byte of the rest."""
        self._containers -= 1
        self._items -= items
        if depth <= 0:
            raise WireError(f"lists and maps are nested more than {MAX_DEPTH} deep")
        if self._containers < 0 or self._items < 0:
            raise WireError(
                f"more than {self._budget.containers} lists and maps or {self._budget.items} items in one message; "
                "send numbers as tensors"
            )
        if items > len(self._body) - self.position:
            self.needed = self.position + items
            left = len(self._body) - self.position
            raise TruncatedError(f"a list or map of {items} items begins, but only {left} bytes of the body are left")

    def _list(self, size: int, depth: int) -> list[Any] | np.ndarray:
        self._spend(size, depth)
        if size > self._budget.array_from and (ids := self._token_ids(size)) is not None:
            return ids
        return [self.value(depth - 1) for _ in range(size)]

    def _token_ids(self, size: int) -> np.ndarray | None:
        """`size` unsigned integers of up to 32 bits as an int64 array, at 8 bytes each instead of 40. None, and the
        position unchanged, if there is anything else."""
        body, at = self._body, self.position
        ids = array("q")
        try:
            for _ in range(size):
                code = body[at]
                if code < 0x80:
                    ids.append(code)
                    at += 1
                elif code == 0xCD:
                    ids.append(body[at + 1] << 8 | body[at + 2])
                    at += 3
                elif code == 0xCE:
                    ids.append(_U32.unpack_from(body, at + 1)[0])
                    at += 5
                elif code == 0xCC:
                    ids.append(body[at + 1])
                    at += 2
                else:
                    return None
        except (IndexError, struct.error):
            return None
        self.position = at
        return np.frombuffer(ids, dtype=np.int64)

    def _map(self, size: int, depth: int) -> dict[str, Any]:
        self._spend(size, depth)
        result: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(1)
            if not isinstance(key, str):
                raise WireError(f"a map's key is {type(key).__name__}, expected text")
            if key in result:
                raise WireError(f"a map has the key {key[:80]!r} twice")
            result[key] = self.value(depth - 1)
        return result

    def _text(self, size: int, depth: int = 0) -> str:
        if size > self._budget.text:
            raise WireError(f"got a text of {size} bytes, expected at most {self._budget.text}")
        try:
            return str(self._take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise WireError(f"a text is not UTF-8: {error.reason} at its byte {error.start}") from None

    def _binary(self, size: int, depth: int) -> memoryview:
        return self._take(size)


_U8, _U16, _U32 = struct.Struct(">B"), struct.Struct(">H"), struct.Struct(">I")
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    0xCA: struct.Struct(">f"), 0xCB: struct.Struct(">d"),
    0xCC: _U8, 0xCD: _U16, 0xCE: _U32, 0xCF: struct.Struct(">Q"),
    0xD0: struct.Struct(">b"), 0xD1: struct.Struct(">h"), 0xD2: struct.Struct(">i"), 0xD3: struct.Struct(">q"),
}  # fmt: skip
_SIZED: dict[int, tuple[struct.Struct, Callable[[_Reader, int, int], Any]]] = {
    0xC4: (_U8, _Reader._binary), 0xC5: (_U16, _Reader._binary), 0xC6: (_U32, _Reader._binary),
    0xD9: (_U8, _Reader._text), 0xDA: (_U16, _Reader._text), 0xDB: (_U32, _Reader._text),
    0xDC: (_U16, _Reader._list), 0xDD: (_U32, _Reader._list),
    0xDE: (_U16, _Reader._map), 0xDF: (_U32, _Reader._map),
}  # fmt: skip
