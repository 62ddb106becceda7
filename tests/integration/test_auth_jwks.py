"""Keys that another issuer publishes: fetched over HTTP, with every bound (lines 3, 7 and 13 of the security list)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from shardlib.errors import InvalidArgument
from shardlib_ops.auth import Unauthenticated, Verifier
from shardlib_ops.auth.jwks import BYTES_MAX, Jwks
from shardlib_ops.auth.keys import keys_of_document
from shardlib_ops.serving.server import listen
from shardlib_ops.settings import AuthSettings, EndpointSettings, ServerSettings, TlsSettings
from tests.support.certificates import Authority
from tests.support.eventually import eventually_async
from tests.support.tokens import b64, claims, forged

KEYS: dict[str, tuple[str, Any]] = {
    "rsa": ("RS256", rsa.generate_private_key(public_exponent=65537, key_size=2048)),
    "ec": ("ES256", ec.generate_private_key(ec.SECP256R1())),
    "ed": ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Issuer:
    """An HTTP server with a JWKS document, which can misbehave."""

    def __init__(self) -> None:
        self.names = ["rsa"]
        self.asked = 0
        self.hosts: list[str] = []
        self.status, self.headers = 200, [(b"content-type", b"application/json")]
        self.body: bytes | None = None
        self.hangs = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.asked += 1
        self.hosts.append(dict(scope["headers"])[b"host"].decode())
        if self.hangs:
            await receive()
            await receive()
            return
        body = self.body if self.body is not None else json.dumps(document(*self.names)).encode()
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": body})


def document(*names: str) -> dict[str, Any]:
    found = []
    for name in names:
        algorithm, private = KEYS[name]
        jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(private.public_key(), as_dict=True)
        found.append({**jwk, "kid": name, "use": "sig", "alg": algorithm})
    return {"keys": found}


def token(name: str, **head: Any) -> str:
    algorithm, private = KEYS[name]
    headers = {"typ": "at+jwt", "kid": name, **head}
    return jwt.PyJWS().encode(json.dumps(claims(time.time())).encode(), private, algorithm=algorithm, headers=headers)


@asynccontextmanager
async def publishing(tls: TlsSettings | None = None) -> AsyncIterator[tuple[Issuer, str]]:
    issuer = Issuer()
    async with listen(issuer, ServerSettings(port=0, metrics_port=None, tls=tls, shutdown_s=1)) as (at, _):
        yield issuer, at.url + "/jwks"


def verifier(url: str, clock: Clock, **changes: Any) -> tuple[Verifier, Jwks]:
    settings = AuthSettings(jwks_url=url, jwks_stale_max_s=3600, **changes)
    jwks = Jwks(settings, EndpointSettings(), monotonic=clock)
    return Verifier(settings, (), jwks=jwks), jwks


async def refused(by: Verifier, text: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await by.verify(text)
    return caught.value.reason_code


async def test_s07_07_keys_are_kept_and_fetched_again_for_an_unknown_one_once_a_minute() -> None:
    clock = Clock()
    async with publishing() as (issuer, url):
        by, jwks = verifier(url, clock)
        for _ in range(5):
            assert (await by.verify(token("rsa"))).subject == "alice"
        assert issuer.asked == 1
        issuer.names = ["rsa", "ed", "ec"]
        for _ in range(5):
            assert await refused(by, token("ed")) == "kid"
        assert issuer.asked == 1, "not within a minute of the last fetch, whoever names a key"
        clock.now += 60
        assert (await by.verify(token("ed"))).subject == "alice"
        assert (await by.verify(token("ec"))).subject == "alice"
        for number in range(5):
            assert await refused(by, token("rsa", kid=f"nobody-{number}")) == "kid"
        assert issuer.asked == jwks.fetches == 2
        issuer.names = ["ed"]
        clock.now += 301
        assert (await by.verify(token("rsa"))).subject == "alice", "nobody waits for the new keys"

        async def gone() -> bool:
            try:
                await by.verify(token("rsa"))
            except Unauthenticated:
                return True
            return False

        await eventually_async(gone, 20, "a key that is no longer published counts no more")
        await by.aclose()


async def test_s07_07_while_the_address_is_down_old_keys_count_for_their_time_and_never_longer() -> None:
    clock = Clock()
    async with publishing() as (_, url):
        by, _ = verifier(url, clock)
        await by.verify(token("rsa"))
    clock.now += 3599
    assert (await by.verify(token("rsa"))).subject == "alice"
    assert await refused(by, token("ed")) == "kid"
    clock.now += 62
    for _ in range(3):
        assert await refused(by, token("rsa")) == "kid"
    never, _ = verifier(url, clock)
    assert await refused(never, token("rsa")) == "kid", "without any key nobody comes in"
    await by.aclose()
    await never.aclose()


@pytest.mark.parametrize("fault", ["status", "redirect", "rubbish", "large", "empty", "deep", "hangs"])
async def test_s07_07_an_address_that_misbehaves_opens_nothing(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shardlib_ops.auth.jwks.FETCH_S", 1.0)
    async with publishing() as (good, other), publishing() as (issuer, url):
        match fault:
            case "status":
                issuer.status = 500
            case "redirect":
                issuer.status, issuer.headers = 302, [(b"location", other.encode())]
            case "rubbish":
                issuer.body = b"canary-77 {"
            case "large":
                issuer.body = json.dumps(document("rsa")).encode() + b" " * BYTES_MAX
            case "empty":
                issuer.body = b'{"keys": []}'
            case "deep":
                issuer.body = b"[" * 100_000
            case _:
                issuer.hangs = True
        by, _ = verifier(url, Clock())
        assert await refused(by, token("rsa")) == "kid"
        assert (issuer.asked, good.asked) == (1, 0)
        assert "auth.jwks_url" in caplog.text
        assert "canary-77" not in caplog.text
        await by.aclose()


async def test_s07_03_no_token_makes_the_server_fetch_what_it_names() -> None:
    async with publishing() as (elsewhere, there), publishing() as (issuer, url):
        by, _ = verifier(url, Clock())
        await by.verify(token("rsa"))
        for name in ("jku", "x5u"):
            assert await refused(by, token("rsa", **{name: there})) == "head"
        assert await refused(by, forged({"kid": "../rsa"}, claims(time.time()))) == "kid"
        assert (
            await refused(by, forged({"kid": "rsa", "jwk": document("ec")["keys"][0]}, claims(time.time()))) == "head"
        )
        assert (elsewhere.asked, issuer.asked) == (0, 1)
        await by.aclose()


async def test_s07_13_a_document_at_an_address_that_is_not_allowed_is_not_fetched() -> None:
    async with publishing() as (issuer, url):
        settings = AuthSettings(jwks_url=url)
        by = Verifier(settings, (), jwks=Jwks(settings, EndpointSettings(loopback=False)))
        assert await refused(by, token("rsa")) == "kid"
        assert issuer.asked == 0
        await by.aclose()


async def test_the_connection_goes_to_the_address_that_was_checked_under_the_name_that_was_given(
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path, "authority")
    server = authority.issue("server", hosts=("localhost",))
    async with publishing(TlsSettings(cert_file=server.cert, key_file=server.key)) as (issuer, url):
        for host, comes in (("localhost", True), ("127.0.0.1", False)):
            settings = AuthSettings(jwks_url=url.replace("127.0.0.1", host))
            by = Verifier(settings, (), jwks=Jwks(settings, EndpointSettings(), verify=authority.context()))
            if comes:
                assert (await by.verify(token("rsa"))).subject == "alice"
            else:
                assert await refused(by, token("rsa")) == "kid", "the certificate has no such name"
            await by.aclose()
        assert [host.partition(":")[0] for host in issuer.hosts] == ["localhost"]


@pytest.mark.parametrize("url", ["http://issuer.example/jwks", "ftp://127.0.0.1/x", "file:///keys", "issuer", ""])
def test_an_address_without_tls_does_not_start(url: str) -> None:
    with pytest.raises(InvalidArgument):
        Verifier.from_settings(AuthSettings(jwks_url=url))


def test_keys_for_another_use_are_left_out() -> None:
    good = document("rsa", "ec", "ed")["keys"]
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    other = ec.generate_private_key(ec.SECP384R1())

    def jwk(algorithm: str, key: Any) -> dict[str, Any]:
        return {**jwt.get_algorithm_by_name(algorithm).to_jwk(key, as_dict=True), "kid": "x"}

    bad = [
        {"kty": "oct", "k": b64(b"x" * 32), "kid": "x", "alg": "HS256"},
        {**good[0], "use": "enc"},
        {**good[0], "kid": None},
        {**good[0], "alg": "HS256"},
        {**good[0], "alg": "none"},
        {**good[0], "alg": "RS512"},
        {**good[1], "alg": "RS256"},
        jwk("RS256", short.public_key()),
        jwk("RS256", KEYS["rsa"][1]),
        jwk("ES384", other.public_key()),
        {"kid": "x"},
        {"kty": "RSA", "kid": "x", "n": "!", "e": 3},
        "x",
        None,
    ]
    found = keys_of_document({"keys": [*bad, *good]})
    assert [(key.kid, key.algorithm) for key in found] == [("rsa", "RS256"), ("ec", "ES256"), ("ed", "EdDSA")]
    assert [key.kid for key in keys_of_document({"keys": good}, ("ES256",))] == ["ec"]
    for wrong in (None, [], {}, {"keys": {}}):
        with pytest.raises(ValueError):
            keys_of_document(wrong)


async def test_many_that_come_at_once_wait_for_one_fetch() -> None:
    async with publishing() as (issuer, url):
        by, _ = verifier(url, Clock())
        found = await asyncio.gather(*(by.verify(token("rsa")) for _ in range(10)))
        assert len({each.token_id for each in found}) == 10
        assert issuer.asked == 1
        await by.aclose()
