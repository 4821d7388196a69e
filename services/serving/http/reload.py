"""Files that take effect when they are replaced, TLS certificates and keys. `process.py` has them looked at."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

log = structlog.get_logger("stillhouse.reload")
_LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class Watched:
    """`load` is called when one of `paths` has changed; with ValueError it keeps what it had."""

    name: str
    paths: Sequence[Path]
    load: Callable[[], None]


async def keep_loaded(watched: Sequence[Watched]) -> None:
    """Look at the files every two seconds, for ever."""
    seen = [_stamps(one.paths) for one in watched]
    while watched:
        await asyncio.sleep(_LOOK_EVERY_S)
        for i, one in enumerate(watched):
            if (now := _stamps(one.paths)) == seen[i]:
                continue
            seen[i] = now
            try:
                one.load()
                log.info("reloaded", what=one.name)
            except ValueError as error:
                log.error("not reloaded, the old one stays", what=one.name, reason=str(error))


def _stamps(paths: Sequence[Path]) -> list[tuple[int, ...] | None]:
    stamps: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            stat = path.stat()
            stamps.append((stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_ctime_ns))
        except OSError:
            stamps.append(None)
    return stamps


@dataclass(frozen=True)
class TlsFiles:
    """Certificate chain and key (PEM); with `client_ca`, only clients whose certificate it signed are let in."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.cert, self.key, self.client_ca) if path is not None)

    def context(self) -> ssl.SSLContext:
        """A server's context, TLS 1.2 or newer. ValueError names the file at fault."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load_into(context)
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Read the files again: connections made from now on see the new certificate."""
        for path in self.paths:
            if not path.is_file():
                raise ValueError(f"the TLS file {path} is not there")
        try:
            # Tried on a context of its own first: half a replacement must not break the one in use.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key)
            context.load_cert_chain(self.cert, self.key)
        except (ssl.SSLError, OSError) as error:
            raise ValueError(f"{self.cert} and {self.key} are not a certificate and its key: {error}") from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, OSError) as error:
                raise ValueError(f"{self.client_ca} holds no CA certificate: {error}") from None
