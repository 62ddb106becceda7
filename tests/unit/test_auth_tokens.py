"""Which tokens are believed (lines 1 to 6 of the security list)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from pydantic import SecretStr

from shardlib.errors import InvalidArgument
from shardlib_ops.auth import Everybody, Role, Unauthenticated, Verifier, issue_token, verifier_for
from shardlib_ops.auth.keys import read_keys
from shardlib_ops.settings import AuthSettings, ServerSettings
from tests.support.tokens import OTHER_SECRET, SECRET, auth, b64, claims, forged, key_pair

NOW = 1_790_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def verifier(settings: AuthSettings | None = None, clock: Clock | None = None) -> Verifier:
    return Verifier.from_settings(settings or auth(), clock=clock or Clock())


async def refused(token: str, by: Verifier | None = None) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await (by or verifier()).verify(token)
    assert not token or token[:20] not in str(caught.value)
    return caught.value.reason_code


@pytest.mark.parametrize("role", Role)
async def test_a_token_tells_who_calls(role: Role) -> None:
    settings = auth(cluster="shop")
    token = issue_token(settings, subject="alice@example", role=role, ttl_s=60, now=NOW)
    found = await verifier(settings).verify(token)
    assert (found.subject, found.role, found.expires_at, found.cluster) == ("alice@example", role, NOW + 60, "shop")
    again = await verifier(settings).verify(issue_token(settings, subject="a", role=role, ttl_s=60, now=NOW))
    assert again.token_id != found.token_id


def test_each_role_may_what_the_one_before_may() -> None:
    assert [[one.allows(least) for least in Role] for one in Role] == [
        [True, False, False], [True, True, False], [True, True, True],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["RS256", "ES256", "EdDSA"])
async def test_a_server_needs_only_the_public_key(kind: str, tmp_path: Path) -> None:
    private, public, _ = key_pair(tmp_path, kind)
    token = issue_token(AuthSettings(key_file=private), subject="a", role="admin", ttl_s=60, now=NOW)
    assert jwt.get_unverified_header(token)["alg"] == kind
    settings = AuthSettings(key_file=public)
    assert (await verifier(settings).verify(token)).role is Role.ADMIN
    with pytest.raises(InvalidArgument, match="signed with"):
        issue_token(settings, subject="a", role="admin", ttl_s=60, now=NOW)


async def test_two_keys_live_while_one_takes_over_from_the_other(tmp_path: Path) -> None:
    old = issue_token(auth(secret=OTHER_SECRET), subject="a", role="viewer", ttl_s=60, now=NOW)
    both = auth(previous_secret=OTHER_SECRET)
    assert (await verifier(both).verify(old)).subject == "a"
    new = issue_token(both, subject="a", role="viewer", ttl_s=60, now=NOW)
    assert (await verifier(auth()).verify(new)).subject == "a"
    assert await refused(old) == "kid"

    keys = [key_pair(tmp_path, kind) for kind in ("RS256", "EdDSA")]
    together = tmp_path / "both.pem"
    together.write_bytes(keys[0][1].read_bytes() + b"\n" + keys[1][1].read_bytes())
    for private, _, _ in keys:
        token = issue_token(AuthSettings(key_file=private), subject="a", role="viewer", ttl_s=60, now=NOW)
        assert (await verifier(AuthSettings(key_file=together)).verify(token)).subject == "a"


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "", "HS384", "HS512", "RS256", "PS256", "ES256K", 5])
async def test_s07_01_another_algorithm_than_that_of_the_key(algorithm: Any) -> None:
    assert await refused(forged({"alg": algorithm}, claims(NOW))) == "alg"


async def test_s07_01_no_signature() -> None:
    head, body, _ = forged({"alg": "none"}, claims(NOW)).split(".")
    assert await refused(f"{head}.{body}.") == "alg"
    head, body, _ = forged({}, claims(NOW)).split(".")
    assert await refused(f"{head}.{body}.") == "signature"


async def test_s07_01_the_public_key_is_no_secret(tmp_path: Path) -> None:
    _, public, _ = key_pair(tmp_path, "RS256")
    settings = AuthSettings(key_file=public)
    kid = read_keys(settings)[0].kid
    for head in ({"kid": kid}, {}):
        assert await refused(forged(head, claims(NOW), public.read_bytes()), verifier(settings)) == "alg"
    both = AuthSettings(key_file=public, secret=SECRET)
    assert await refused(forged({}, claims(NOW), public.read_bytes()), verifier(both)) == "signature"


async def test_s07_01_the_list_of_algorithms_narrows(tmp_path: Path) -> None:
    private, _, _ = key_pair(tmp_path, "ES256")
    settings = AuthSettings(key_file=private, secret=SECRET, algorithms="ES256")
    assert await refused(forged({}, claims(NOW)), verifier(settings)) == "alg"
    with pytest.raises(InvalidArgument, match="HS256"):
        verifier(auth(algorithms="RS256"))


@pytest.mark.parametrize(
    "secret",
    [
        "", "short", "x" * 31, "x" * 64, "0123456789" * 6, "secret" * 8, "abcabcabcd" * 5, " " * 40,
        "please-changeme-please-changeme-1234567890", "your-256-bit-secret-and-some-more-of-it",
        "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A\n-----END PUBLIC KEY-----",
    ],
)  # fmt: skip
def test_s07_02_a_server_does_not_start_with_a_weak_secret(secret: str) -> None:
    for name in ("secret", "previous_secret"):
        with pytest.raises(InvalidArgument) as caught:
            verifier(auth(**{name: secret}))
        assert caught.value.name == f"auth.{name}"
        assert len(secret) < 5 or secret not in str(caught.value)


def test_s07_02_the_secret_may_be_a_reference_and_is_checked_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("short\n")
    with pytest.raises(InvalidArgument, match="32 bytes"):
        verifier(auth(secret=f"file:{path}"))
    path.write_text(SECRET + "\n")
    assert read_keys(auth(secret=f"file:{path}")) == read_keys(auth())


def test_without_a_key_nothing_starts_but_dev_on_loopback() -> None:
    with pytest.raises(InvalidArgument, match="SHARDLIB_JWT_SECRET"):
        verifier_for(AuthSettings(), ServerSettings())
    assert isinstance(verifier_for(AuthSettings(), ServerSettings(dev=True)), Everybody)
    assert isinstance(verifier_for(auth(), ServerSettings(dev=True)), Verifier)


@pytest.mark.parametrize("content", ["", "no key", "{}", '{"keys": []}', '{"keys": 1}', "{" * 5000])
def test_a_file_without_keys(content: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match="no key"):
        verifier(AuthSettings(key_file=path))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        verifier(AuthSettings(key_file=tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ({"jku": "http://127.0.0.1:1/jwks"}, "head"),
        ({"x5u": "http://127.0.0.1:1/cert"}, "head"),
        ({"jwk": {"kty": "oct", "k": b64(SECRET.encode())}}, "head"),
        ({"x5c": ["MII"]}, "head"),
        ({"crit": ["exp"]}, "malformed"),
        ({"b64": False}, "malformed"),
        ({"zip": "DEF"}, "head"),
        ({"kid": "nobody"}, "kid"),
        ({"kid": "../../etc/passwd"}, "kid"),
        ({"kid": "' OR 1=1 --"}, "kid"),
        ({"kid": ""}, "kid"),
        ({"kid": "k" * 500}, "kid"),
        ({"kid": 5}, "malformed"),
        ({"kid": ["a"]}, "malformed"),
    ],
)
async def test_s07_03_heads_that_bring_or_name_another_key(head: dict[str, Any], reason: str) -> None:
    assert await refused(forged(head, claims(NOW))) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": ...}, "iss"), ({"iss": "other"}, "iss"), ({"iss": ["shardlib"]}, "iss"), ({"iss": None}, "iss"),
        ({"aud": ...}, "aud"), ({"aud": "other"}, "aud"), ({"aud": []}, "aud"), ({"aud": ["other"]}, "aud"),
        ({"aud": "shardlib-other"}, "aud"), ({"aud": {"shardlib": 1}}, "aud"),
    ],
)  # fmt: skip
async def test_s07_04_issuer_and_audience(changes: dict[str, Any], reason: str) -> None:
    assert await refused(forged({}, claims(NOW, **changes))) == reason


async def test_s07_04_one_of_several_audiences() -> None:
    assert (await verifier().verify(forged({}, claims(NOW, aud=["x", "shardlib"])))).subject == "alice"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exp": ...}, "exp"), ({"exp": "9999999999"}, "exp"), ({"exp": True}, "exp"), ({"exp": None}, "exp"),
        ({"exp": float("inf")}, "exp"), ({"exp": float("nan")}, "exp"), ({"exp": NOW - 11}, "expired"),
        ({"exp": -1}, "expired"), ({"iat": ...}, "iat"), ({"iat": NOW + 11}, "not-yet"), ({"nbf": NOW + 11}, "not-yet"),
        ({"nbf": "now"}, "nbf"), ({"exp": NOW + 86_401}, "lifetime"), ({"iat": NOW - 86_000}, "lifetime"),
        ({"iat": -1e300}, "lifetime"), ({"nbf": -1e300}, "lifetime"),
    ],
)  # fmt: skip
async def test_s07_05_times(changes: dict[str, Any], reason: str) -> None:
    assert await refused(forged({}, claims(NOW, **changes))) == reason


async def test_s07_05_the_leeway_and_a_clock_that_jumps() -> None:
    clock = Clock()
    by = verifier(clock=clock)
    token = issue_token(auth(), subject="a", role="viewer", ttl_s=600, now=NOW)
    for jump, reason in [
        (0, None), (-10, None), (-11, "not-yet"), (-3600, "not-yet"), (609, None), (610, "expired"), (3600, "expired"),
        (0, None),
    ]:  # fmt: skip
        clock.now = NOW + jump
        if reason is None:
            assert (await by.verify(token)).subject == "a"
        else:
            assert await refused(token, by) == reason


@pytest.mark.parametrize("typ", [..., "JWT", "jwt", "id_token", "", None, ["at+jwt"], "at+jwt "])
async def test_s07_06_a_token_for_another_use(typ: Any) -> None:
    assert await refused(forged({"typ": typ}, claims(NOW))) == "typ"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"role": ...}, "role"), ({"role": "root"}, "role"), ({"role": "ADMIN"}, "role"), ({"role": ["admin"]}, "role"),
        ({"role": ""}, "role"), ({"sub": ...}, "sub"), ({"sub": ""}, "sub"), ({"sub": "a\nb"}, "sub"),
        ({"sub": "a" * 201}, "sub"), ({"sub": 7}, "sub"), ({"jti": ...}, "jti"), ({"jti": ""}, "jti"),
        ({"cluster": ""}, "cluster"), ({"cluster": None}, "cluster"), ({"cluster": ["shop"]}, "cluster"),
    ],
)  # fmt: skip
async def test_what_a_token_says(changes: dict[str, Any], reason: str) -> None:
    assert await refused(forged({}, claims(NOW, **changes))) == reason


@pytest.mark.parametrize(
    "token",
    ["", "x", "a.b", "a.b.c.d.e", "...", "é.é.é", "e30.e30.e30", "x" * 10_000, "[" * 4000, f"{b64([1])}.e30.e30"],
)
async def test_what_is_no_token(token: str) -> None:
    assert await refused(token) in ("malformed", "typ")


async def test_a_payload_that_is_no_object() -> None:
    for body in (b"[]", b"3", b"\xff", b"[" * 5000, b"null"):
        assert await refused(forged({}, body)) in ("claims", "malformed")


async def test_a_changed_token_is_not_believed() -> None:
    head, body, signature = issue_token(auth(), subject="a", role="viewer", ttl_s=60, now=NOW).split(".")
    said = json.loads(jwt.utils.base64url_decode(body))
    changed = f"{head}.{b64({**said, 'role': 'admin'})}.{signature}"
    assert await refused(changed) == "signature"
    other = issue_token(auth(secret=OTHER_SECRET), subject="a", role="viewer", ttl_s=60, now=NOW)
    assert await refused(other) == "kid"
    assert await refused(forged({}, claims(NOW), OTHER_SECRET.encode())) == "signature"


@pytest.mark.parametrize(
    "changes",
    [{"role": "root"}, {"ttl_s": 0}, {"ttl_s": 86_401}, {"subject": ""}, {"subject": "a\n"}, {"subject": "a" * 201}],
)
def test_a_token_that_would_not_be_believed_is_not_made(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        issue_token(auth(), **{"subject": "a", "role": "viewer", "ttl_s": 60, "now": NOW, **changes})


def test_s07_16_no_key_in_a_repr() -> None:
    settings = auth(secret=SecretStr(SECRET))
    shown = repr(read_keys(settings)) + repr(verifier(settings)) + repr(settings)
    assert SECRET not in shown
    assert asyncio.iscoroutinefunction(Everybody().verify)
