"""TLS by options: what does not verify is refused on both sides, and a new certificate needs no restart."""

from __future__ import annotations

import asyncio
import datetime
import math
import ssl
import time
from pathlib import Path

import httpx
import pytest
import trustme

from tests.chaos.hostile import Held, hold, idle, trickled_headers
from tests.teacher_process import TeacherProcess


def save(certificate: trustme.LeafCert, folder: Path) -> tuple[Path, Path]:
    chain, key = folder / "chain.pem", folder / "key.pem"
    certificate.private_key_pem.write_to_path(str(key))
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    return chain, key


def trusting(authority: trustme.CA, client: trustme.LeafCert | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if client is not None:
        client.configure_cert(context)
    return context


def serial(teacher: TeacherProcess, context: ssl.SSLContext) -> str:
    with httpx.Client(verify=context) as client, client.stream("GET", f"{teacher.url}/health/live") as response:
        stream = response.extensions["network_stream"]
        return stream.get_extra_info("ssl_object").getpeercert()["serialNumber"]


def test_the_service_speaks_tls_and_only_with_those_who_trust_it(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    chain, key = save(authority.issue_cert("127.0.0.1"), tmp_path)
    with TeacherProcess("--tls-cert", str(chain), "--tls-key", str(key)) as teacher:
        assert teacher.url.startswith("https://")
        assert httpx.get(f"{teacher.url}/v1/teacher", verify=trusting(authority)).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{teacher.url}/v1/teacher", verify=trusting(stranger))
        with pytest.raises(httpx.TransportError):
            httpx.get(teacher.url.replace("https", "http") + "/v1/teacher")
        old = ssl.create_default_context()
        authority.configure_trust(old)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{teacher.url}/v1/teacher", verify=old)


async def test_strangers_can_hold_nothing_with_tls_either(tmp_path: Path) -> None:
    """Neither before the handshake nor after it, with their own side open."""
    authority = trustme.CA()
    chain, key = save(authority.issue_cert("127.0.0.1"), tmp_path)
    keys = "alice 0123456789abcdef"
    with TeacherProcess("--tls-cert", str(chain), "--tls-key", str(key), keys=keys) as teacher:
        until = time.monotonic() + 60
        helds = [Held(teacher.host, teacher.port, "") for _ in range(2)]
        reader, writer = await asyncio.open_connection(teacher.host, teacher.port, ssl=trusting(authority))
        ends = await asyncio.gather(hold(helds[0], idle, until), hold(helds[1], trickled_headers, until))
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        for held in helds:
            held.close()
        writer.close()
    assert all(math.isfinite(end) for end in ends)


def test_an_expired_certificate_is_refused_by_clients(tmp_path: Path) -> None:
    authority = trustme.CA()
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    chain, key = save(authority.issue_cert("127.0.0.1", not_after=yesterday), tmp_path)
    with (
        TeacherProcess("--tls-cert", str(chain), "--tls-key", str(key)) as teacher,
        pytest.raises(httpx.ConnectError, match="expired"),
    ):
        httpx.get(f"{teacher.url}/v1/teacher", verify=trusting(authority))


def test_clients_without_a_certificate_of_the_right_authority_are_refused(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    chain, key = save(authority.issue_cert("127.0.0.1"), tmp_path)
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    options = ("--tls-cert", str(chain), "--tls-key", str(key), "--tls-client-ca", str(ca))
    with TeacherProcess(*options) as teacher:
        mine = trusting(authority, authority.issue_cert("student"))
        assert httpx.get(f"{teacher.url}/v1/teacher", verify=mine).status_code == 200
        for context in (trusting(authority), trusting(authority, stranger.issue_cert("student"))):
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{teacher.url}/v1/teacher", verify=context)


def test_a_new_certificate_is_served_within_five_seconds_without_a_restart(tmp_path: Path) -> None:
    authority = trustme.CA()
    chain, key = save(authority.issue_cert("127.0.0.1"), tmp_path)
    with TeacherProcess("--tls-cert", str(chain), "--tls-key", str(key)) as teacher:
        context = trusting(authority)
        first = serial(teacher, context)
        chain.write_text("half a replacement")
        time.sleep(3)
        assert serial(teacher, context) == first
        save(authority.issue_cert("127.0.0.1"), tmp_path)
        replaced = time.monotonic()
        while serial(teacher, context) == first:
            time.sleep(0.1)
            assert time.monotonic() - replaced < 30
        print(f"a new certificate was served {time.monotonic() - replaced:.1f} s after it was written")
        assert teacher.events("not reloaded, the old one stays") and teacher.events("reloaded")
        assert teacher.process.poll() is None


def test_clients_of_an_authority_that_was_replaced_are_refused_without_a_restart(tmp_path: Path) -> None:
    authority, first, second = trustme.CA(), trustme.CA(), trustme.CA()
    chain, key = save(authority.issue_cert("127.0.0.1"), tmp_path)
    ca = tmp_path / "ca.pem"
    first.cert_pem.write_to_path(str(ca))
    options = ("--tls-cert", str(chain), "--tls-key", str(key), "--tls-client-ca", str(ca))
    with TeacherProcess(*options) as teacher:
        before, after = (trusting(authority, one.issue_cert("student")) for one in (first, second))

        def served(context: ssl.SSLContext) -> bool:
            try:
                return httpx.get(f"{teacher.url}/health/live", verify=context).status_code == 200
            except httpx.TransportError:
                return False

        assert served(before) and not served(after)
        second.cert_pem.write_to_path(str(ca))
        replaced = time.monotonic()
        while not served(after):
            time.sleep(0.1)
            assert time.monotonic() - replaced < 30
        assert not served(before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tls-cert", "nowhere.pem", "--tls-key", "nowhere.pem"), "nowhere.pem does not exist"),
        (("--tls-cert", "nowhere.pem"), "--tls-cert and --tls-key go together"),
        (("--tls-client-ca", "nowhere.pem"), "--tls-client-ca needs"),
    ],
)
def test_tls_that_cannot_be_is_refused_at_the_start(options: tuple[str, ...], reason: str) -> None:
    with TeacherProcess(*options, wait=False) as teacher:
        assert teacher.wait() == 2
        assert reason in teacher.log and "Traceback" not in teacher.log
