"""TLS for a listener, out of files that may be replaced while it runs. Built by each service's `run`."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path


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
