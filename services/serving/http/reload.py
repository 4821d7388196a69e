"""Reloads TLS certificates and the keys file when they are replaced on disk. Used by `process.py`."""

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
    """`load` is called when one of `paths` has changed; if it raises ValueError, the old contents stay in use."""

    name: str
    paths: Sequence[Path]
    load: Callable[[], None]


async def keep_loaded(watched: Sequence[Watched]) -> None:
    """Look at the files every two seconds, forever."""
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
    """Certificate chain and key (PEM); with `client_ca`, only clients with a certificate signed by it are accepted."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.cert, self.key, self.client_ca) if path is not None)

    def context(self) -> ssl.SSLContext:
        """A server context, TLS 1.2 or newer. ValueError names the file at fault."""
        for path in self.paths:
            if not path.is_file():
                raise ValueError(f"the TLS file {path} does not exist")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key)
        except (ssl.SSLError, OSError) as error:
            raise ValueError(f"{self.cert} and {self.key} are not a certificate and its key: {error}") from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, OSError) as error:
                raise ValueError(f"{self.client_ca} holds no CA certificate: {error}") from None
            context.verify_mode = ssl.CERT_REQUIRED
            # A resumed session would not be verified again.
            context.num_tickets = 0
            context.options |= ssl.OP_NO_TICKET
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Read the files again, for new connections of `context`. ValueError names the file at fault, and nothing has
        changed then."""
        # Each handshake is given a context of its own: what a context trusts can be added to, but not taken away.
        fresh = self.context()

        def use(connection: ssl.SSLObject, name: str | None, initial: ssl.SSLContext) -> None:
            connection.context = fresh

        context.sni_callback = use
