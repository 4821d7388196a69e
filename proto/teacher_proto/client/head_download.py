"""The teacher's output head on its way to a client: what has come so far, where to go on, and whether it is whole.

`fetch_head` fills it, one exchange after the other; `teacher_client.py` decides when to ask again. A gigabyte need not
be sent twice because a connection broke: what came stays, and the rest is asked for with `Range`.
"""

from __future__ import annotations

import base64
import hashlib
import re

import httpx

from teacher_proto.client.exchange import AnyRoute, error_of, open_response, plain_body
from teacher_proto.errors import TruncatedError, WireError, WrongTeacherError

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]+):")


class HeadDownload:
    """The beginning of a file of `total` bytes with the entity tag `etag`; nothing at first."""

    def __init__(self) -> None:
        self.size = 0
        self.total: int | None = None
        self._etag: str | None = None
        self._sha256: bytes | None = None
        self._chunks: list[bytes] = []

    def headers(self) -> dict[str, str]:
        """What to ask with: for the rest where the beginning of a file that can be named is here."""
        if not self.size or self._etag is None:
            return {}
        return {"range": f"bytes={self.size}-", "if-range": self._etag}

    def begin(self, response: httpx.Response) -> None:
        """Take up an answer: 206 goes on where we are, 200 begins again. WireError for the middle of something else."""
        headers = response.headers
        if response.status_code == 206:
            place = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if place is None or int(place[1]) != self.size or headers.get("etag") != self._etag:
                self.forget()
                raise WireError(
                    f"the rest of the head was asked for, and {headers.get('content-range', 'no range')!r} came"
                )
            return
        self.forget()
        self._etag = headers.get("etag")
        length = headers.get("content-length", "")
        self.total = int(length) if length.isdigit() else None
        told = _SHA256.search(headers.get("repr-digest", ""))
        self._sha256 = base64.b64decode(told[1]) if told is not None else None

    def take(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self.size += len(chunk)

    def forget(self) -> None:
        self.__init__()  # type: ignore[misc]

    def whole(self) -> bytes:
        """The file. TruncatedError where the end is missing, and what came stays; WireError where it is not what the
        teacher sent, and then all is forgotten. A teacher of an older edition tells no checksum."""
        if self.total is not None and self.size != self.total:
            got, total = self.size, self.total
            if got > total:
                self.forget()
            raise TruncatedError(f"{got} of {total} bytes of the teacher's head came")
        file = b"".join(self._chunks)
        if self._sha256 is not None and hashlib.sha256(file).digest() != self._sha256:
            self.forget()
            raise WireError(f"the teacher's head was changed on its way: its {len(file)} bytes have another sha256")
        return file


async def fetch_head(
    http: httpx.AsyncClient, url: str, route: AnyRoute, fingerprint: str, timeouts: httpx.Timeout,
    download: HeadDownload,
) -> bytes:  # fmt: skip
    """The file of `GET /v1/head`, going on where `download` is. NotFoundError where the teacher serves none,
    WrongTeacherError if another answers; what came before an error stays in `download`."""
    headers = download.headers()
    async with open_response(http, "GET", url, "/v1/head", route, timeouts=timeouts, headers=headers) as response:
        if response.status_code != 200 and not (response.status_code == 206 and headers):
            raise error_of(response, await plain_body(response), route)
        told = response.headers.get("x-teacher-fingerprint")
        if told != fingerprint:
            raise WrongTeacherError(
                f"{url} gave the head of teacher {told}, {fingerprint} was asked",
                field="fingerprint", got=told, limit=fingerprint,
            )  # fmt: skip
        download.begin(response)
        async for chunk in response.aiter_bytes():
            download.take(chunk)
    return download.whole()
