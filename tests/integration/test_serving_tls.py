"""TLS and mutual TLS of the servers, over real connections (line 18 of the security list)."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509

from shardlib.errors import InvalidArgument
from shardlib_ops.serving.server import listen
from shardlib_ops.serving.tls import ServerTls
from shardlib_ops.settings import LimitSettings, ServerSettings, TlsSettings
from tests.support.certificates import Authority, Certificate
from tests.support.served import Served

LOCAL = ("localhost", "127.0.0.1")
REFUSED = (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("strangers"), "strangers")


@asynccontextmanager
async def serving(tls: TlsSettings, **limits: float) -> AsyncIterator[str]:
    served = Served(
        server=ServerSettings(port=0, metrics_port=0, tls=tls, shutdown_s=1),
        limits=LimitSettings.model_validate(limits),
    )
    registry = served.metrics.registry
    async with listen(served.asgi, served.server, limits=served.limits, metrics=registry) as (listening, _):
        assert listening.metrics_url is not None
        assert listening.metrics_url.startswith("https://")
        yield listening.url


def files(server: Certificate, client_ca: Authority | None = None) -> TlsSettings:
    return TlsSettings(
        cert_file=server.cert, key_file=server.key, client_ca_file=client_ca.ca if client_ca is not None else None
    )


async def health(url: str, context: ssl.SSLContext) -> httpx.Response:
    async with httpx.AsyncClient(verify=context, trust_env=False, timeout=20) as client:
        return await client.get(url + "/health")


async def presented(url: str, context: ssl.SSLContext) -> tuple[int, str]:
    """Serial number of the server's certificate, and the version that was spoken."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
    try:
        found: ssl.SSLObject = writer.get_extra_info("ssl_object")
        content = found.getpeercert(binary_form=True)
        assert content is not None
        return x509.load_der_x509_certificate(content).serial_number, found.version() or ""
    finally:
        writer.close()
        await writer.wait_closed()
        del reader


async def test_s07_18_tls_from_1_2_on(ours: Authority) -> None:
    server = ours.issue("server", hosts=LOCAL)
    async with serving(files(server)) as url:
        for version, spoken in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
            context = ours.context()
            context.minimum_version = context.maximum_version = version
            assert await presented(url, context) == (server.serial, spoken)
        old = ours.context()
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            old.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await presented(url, old)
        answer = await health(url, ours.context())
        assert answer.headers["strict-transport-security"]
    newest = TlsSettings(cert_file=server.cert, key_file=server.key, minimum="1.3")
    async with serving(newest) as url:
        context = ours.context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await presented(url, context)


async def test_s07_18_plain_http_gets_no_answer_and_no_redirect(ours: Authority) -> None:
    async with serving(files(ours.issue("server", hosts=LOCAL))) as url:
        async with httpx.AsyncClient(timeout=20) as client:
            with pytest.raises(REFUSED):
                await client.get(url.replace("https:", "http:") + "/health")
        assert (await health(url, ours.context())).status_code == 200, "the server goes on"


async def test_s07_18_a_client_notices_a_stranger_and_another_name(ours: Authority, strangers: Authority) -> None:
    for server in (
        strangers.issue("stranger", hosts=LOCAL),
        ours.issue("other", hosts=("other.example",)),
        ours.issue("expired", hosts=LOCAL, since_days=-10),
    ):
        async with serving(files(server)) as url:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await health(url, ours.context())


async def test_s07_18_mutual_tls(ours: Authority, strangers: Authority) -> None:
    async with serving(files(ours.issue("server", hosts=LOCAL), ours)) as url:
        assert (await health(url, ours.context(ours.issue("client")))).status_code == 200
        refused = {
            "none": None,
            "wrong authority": strangers.issue("client"),
            "expired": ours.issue("old-client", since_days=-10),
            "not yet valid": ours.issue("new-client", since_days=10),
        }
        for client in refused.values():
            with pytest.raises(REFUSED):
                await health(url, ours.context(client))
        assert (await health(url, ours.context(ours.issue("client")))).status_code == 200


async def test_a_client_that_does_not_come_to_the_end_of_the_handshake(ours: Authority) -> None:
    async with serving(files(ours.issue("server", hosts=LOCAL)), header_timeout_s=0.5) as url:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"\x16\x03\x01\x02\x00")
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


def replaced(at: Certificate, by: Certificate) -> None:
    shutil.copy(by.key, at.key)
    shutil.copy(by.cert, at.cert)


async def test_a_renewed_certificate_counts_without_a_restart(ours: Authority) -> None:
    old, new = ours.issue("renewed", hosts=LOCAL), ours.issue("renewing", hosts=LOCAL)
    async with (
        serving(files(old)) as url,
        httpx.AsyncClient(verify=ours.context(), trust_env=False, timeout=20) as before,
    ):
        assert (await before.get(url + "/health")).status_code == 200
        replaced(old, new)
        assert (await presented(url, ours.context()))[0] == new.serial
        assert (await before.get(url + "/health")).status_code == 200, "connections that stand stay"


async def test_a_half_written_certificate_does_not_count(ours: Authority, caplog: pytest.LogCaptureFixture) -> None:
    old, new = ours.issue("halved", hosts=LOCAL), ours.issue("halving", hosts=LOCAL)
    async with serving(files(old)) as url:
        content = new.cert.read_bytes()
        old.cert.write_bytes(content[: len(content) // 2])
        assert (await presented(url, ours.context()))[0] == old.serial
        old.cert.write_bytes(content)
        assert (await presented(url, ours.context()))[0] == old.serial, "the key is still the old one"
        old.key.unlink()
        assert (await presented(url, ours.context()))[0] == old.serial
        shutil.copy(new.key, old.key)
        assert (await presented(url, ours.context()))[0] == new.serial
    assert "cannot be used" in caplog.text


async def test_the_authorities_of_clients_can_be_replaced(
    ours: Authority, strangers: Authority, tmp_path: Path
) -> None:
    """A client that comes again is looked at again: no session is resumed with what an authority once said."""
    authorities = tmp_path / "clients.pem"
    shutil.copy(ours.ca, authorities)
    server = ours.issue("server", hosts=LOCAL)
    tls = TlsSettings(cert_file=server.cert, key_file=server.key, client_ca_file=authorities)
    async with serving(tls) as url:
        one, other = ours.context(ours.issue("client")), ours.context(strangers.issue("client"))
        assert (await health(url, one)).status_code == 200
        with pytest.raises(REFUSED):
            await health(url, other)
        shutil.copy(strangers.ca, authorities)
        assert (await health(url, other)).status_code == 200
        with pytest.raises(REFUSED):
            await health(url, one)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_no_session_is_resumed(version: ssl.TLSVersion, ours: Authority) -> None:
    context = ours.context(ours.issue("client"))
    context.minimum_version = context.maximum_version = version

    def twice(url: str) -> list[bool]:
        parts, session, found = urlsplit(url), None, []
        for _ in range(2):
            with (
                socket.create_connection((parts.hostname, parts.port), timeout=20) as plain,
                context.wrap_socket(plain, server_hostname="localhost", session=session) as secure,
            ):
                secure.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                while secure.recv(65536):
                    pass
                session = secure.session
                found.append(bool(secure.session_reused))
        return found

    async with serving(files(ours.issue("server", hosts=LOCAL), ours)) as url:
        assert await asyncio.to_thread(twice, url) == [False, False]


def test_files_that_cannot_be_used_do_not_start(ours: Authority, tmp_path: Path) -> None:
    one, other = ours.issue("one"), ours.issue("two")
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    nothing = tmp_path / "nothing.pem"
    for cert, key, ca in (
        (one.cert, other.key, None), (rubbish, one.key, None), (one.cert, rubbish, None), (nothing, one.key, None),
        (one.cert, one.key, rubbish), (one.cert, one.key, nothing),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument):
            ServerTls(TlsSettings(cert_file=cert, key_file=key, client_ca_file=ca))
