"""Named API keys: who may send requests, and under which name they are counted. Required by all routes but the probes.

A keys file has one line per client, `NAME KEY` or `NAME sha256:HEX`; `#` begins a comment. Only digests are kept. A key
is sent as `Authorization: Bearer KEY`, or as the password of Basic authentication, for browsers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from pathlib import Path

from fastapi import Request

from teacher_proto.errors import UnauthorizedError

ANONYMOUS = "anonymous"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MIN_KEY_LENGTH = 16


class Keys:
    """Digests of keys by client name. Without a file, everyone is let in as `anonymous`. `reload` reads it again."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self._digests = None if path is None else _read(path)

    def reload(self) -> None:
        """Read the file again. If that raises ValueError, the keys stay as they were."""
        if self.path is not None:
            self._digests = _read(self.path)

    @property
    def required(self) -> bool:
        return self._digests is not None

    def client(self, secret: str | None) -> str:
        """The name of a key's client. UnauthorizedError if there is none. Constant time for keys of equal length."""
        if self._digests is None:
            return ANONYMOUS
        if secret is None:
            raise UnauthorizedError(
                "a key is needed: send `Authorization: Bearer KEY`, with a key from the file that the service was "
                "started with (--keys)", field="Authorization",
            )  # fmt: skip
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        if found is None:
            raise UnauthorizedError("unknown key: it is not in the service's keys file", field="Authorization")
        return found


def _read(path: Path) -> dict[str, bytes]:
    """Digests of a keys file. ValueError with the number of the line at fault, not its text, which may hold a key."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the keys file {path} can't be read: {error}") from None
    digests: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) != 2 or not _NAME.fullmatch(words[0]) or words[0] == ANONYMOUS:
            raise ValueError(f"{path}, line {number}: expected a name of letters, digits, . _ - and a key")
        name, secret = words
        if name in digests:
            raise ValueError(f"{path}, line {number}: {name!r} already has a key")
        digests[name] = _digest_of(secret, path, number)
    if not digests:
        raise ValueError(f"the keys file {path} has no key: nobody could send requests")
    return digests


def _digest_of(secret: str, path: Path, number: int) -> bytes:
    kind, _, hexadecimal = secret.partition(":")
    if kind == "sha256":
        if not re.fullmatch(r"[0-9a-fA-F]{64}", hexadecimal):
            raise ValueError(f"{path}, line {number}: expected 64 hexadecimal digits after sha256:")
        return bytes.fromhex(hexadecimal)
    if not secret.isascii():
        raise ValueError(
            f"{path}, line {number}: a key with characters beyond ASCII, which clients send in different encodings: "
            "choose one of letters, digits and ASCII signs"
        )
    if len(secret) < _MIN_KEY_LENGTH:
        raise ValueError(f"{path}, line {number}: expected a key of at least {_MIN_KEY_LENGTH} characters")
    return hashlib.sha256(secret.encode()).digest()


def presented_key(authorization: str | None) -> str | None:
    """The key in an Authorization header, None if there is none or it can't be decoded."""
    scheme, _, value = (authorization or "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value:
        return value
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


async def require_client(request: Request) -> str:
    """FastAPI dependency: the name of the client, by the key in the Authorization header and by nothing else."""
    keys: Keys = request.app.state.keys
    request.state.client = keys.client(presented_key(request.headers.get("authorization")))
    return request.state.client
