"""Who is let in by the servers, what the others are told, and what is written of them."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from prometheus_client import generate_latest

from shardlib.errors import InvalidArgument
from shardlib_ops.audit import AuditUnavailable
from shardlib_ops.auth import Identity, Role, Unauthenticated, Verifier
from shardlib_ops.serving.identity import Guard, anybody, check_routes, needs
from shardlib_ops.settings import AuthSettings, LimitSettings, ServerSettings
from tests.support.served import Served, problem_in
from tests.support.tokens import OTHER_SECRET, auth, claims, forged

ROUTES = [("GET", "/view/1", "viewer"), ("POST", "/operate", "operator"), ("POST", "/create", "admin")]
BODY = {"name": "a"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("method", "path", "least"), ROUTES)
async def test_s07_08_each_route_by_each_role(method: str, path: str, least: str) -> None:
    served = Served()
    sent: dict[str, Any] = {"json": BODY} if method == "POST" else {}
    async with served.client() as client:
        for role in Role:
            response = await client.request(method, path, headers=served.headers(role.value), **sent)
            if role.allows(Role(least)):
                assert response.status_code in (200, 201)
            else:
                problem_in(response, 403, "forbidden")
        now = time.time()
        wrong = {
            "none": {},
            "empty": {"Authorization": ""},
            "basic": {"Authorization": "Basic YWxpY2U6YWRtaW4="},
            "rubbish": {"Authorization": "Bearer x.y.z"},
            "expired": served.headers("admin", now=now - 3600),
            "future": served.headers("admin", now=now + 3600),
            "forged": {"Authorization": "Bearer " + forged({}, claims(now, role="admin"), OTHER_SECRET.encode())},
            "unknown role": {"Authorization": "Bearer " + forged({}, claims(now, role="root"))},
        }
        for headers in wrong.values():
            response = await client.request(method, path, headers=headers, **sent)
            problem_in(response, 401, "unauthenticated")
            assert response.headers["www-authenticate"].startswith('Bearer realm="shardlib"')
    assert {why for *_, why in served.audit.entries} >= {
        "no-token", "malformed", "expired", "not-yet", "signature", "role",
    }  # fmt: skip


async def test_two_tokens_in_one_request_are_none() -> None:
    served = Served()
    async with served.client() as client:
        token = served.headers("admin")["Authorization"]
        response = await client.get("/view/1", headers=[("Authorization", token), ("Authorization", token)])
        problem_in(response, 401, "unauthenticated")


async def test_a_refusal_is_written_with_who_what_and_where_from() -> None:
    served = Served()
    async with served.client("203.0.113.9") as client:
        headers = served.headers("viewer", "bob") | {"X-Request-Id": "request-0815"}
        problem_in(await client.post("/create", headers=headers, json=BODY), 403, "forbidden")
        await client.get("/view/7", headers=served.headers("viewer", "old", now=time.time() - 3600))
        await client.get("/view/7")
        await client.get("/api/v1/things/7")
    (first, *what), (second, *_), (third, *other), (_, *under) = served.audit.entries
    assert (first.subject, first.role, first.address, first.via) == ("bob", "viewer", "203.0.113.9", "http")
    assert first.request_id == "request-0815"
    assert what == ["thing.create", "/create", "role"]
    assert (second.subject, second.role) == ("old", None)
    assert third.subject == "anonymous"
    assert other == ["GET /view/{item}", "/view/7", "no-token"]
    assert under == ["GET /api/v1/things/{thing}", "/api/v1/things/7", "no-token"]


async def test_s07_22_a_refusal_that_cannot_be_written_is_answered_with_503() -> None:
    served = Served()
    served.audit.fails = AuditUnavailable("file:/full", "no space left on device")
    async with served.client() as client:
        for headers in ({}, served.headers("viewer")):
            found = problem_in(await client.post("/create", headers=headers, json=BODY), 503, "audit-unavailable")
            assert "full" not in str(found)


async def test_s07_09_a_token_for_another_cluster_finds_nothing() -> None:
    served = Served(settings=auth(cluster="shop"))
    async with served.client() as client:
        ours = served.headers("admin")
        assert (await client.get("/view/1", headers=ours)).status_code == 200
        theirs = {"Authorization": "Bearer " + forged({}, claims(time.time(), role="admin", cluster="other"))}
        answers = [await client.get(path, headers=theirs) for path in ("/view/1", "/nothing")]
        bodies = []
        for answer in answers:
            found = problem_in(answer, 404, "not-found")
            del found["instance"]
            bodies.append((found, sorted(answer.headers)))
        assert bodies[0] == bodies[1]
        anywhere = {"Authorization": "Bearer " + forged({}, claims(time.time()))}
        assert (await client.get("/view/1", headers=anywhere)).status_code == 200


async def test_s07_09_a_server_that_knows_no_name_of_its_cluster_refuses_all_that_name_one() -> None:
    served = Served()
    async with served.client() as client:
        named = {"Authorization": "Bearer " + forged({}, claims(time.time(), cluster="shop"))}
        problem_in(await client.get("/view/1", headers=named), 404, "not-found")


async def test_s07_12_failed_logins_by_address() -> None:
    clock = Clock()
    served = Served(limits=LimitSettings(failed_auth_per_minute=3), monotonic=clock)
    async with served.client("203.0.113.9") as client:
        for _ in range(3):
            problem_in(await client.get("/view/1"), 401, "unauthenticated")
        refused = await client.get("/view/1")
        problem_in(refused, 429, "too-many-requests")
        assert refused.headers["retry-after"] == "20"
        assert len(served.audit.entries) == 3, "the log must not be filled by strangers"
        assert (await client.get("/view/1", headers=served.headers())).status_code == 200, "others go on"
        clock.now += 20
        problem_in(await client.get("/view/1"), 401, "unauthenticated")
    async with served.client("203.0.113.10") as other:
        problem_in(await other.get("/view/1"), 401, "unauthenticated")


async def test_s07_12_failed_logins_by_subject_from_many_addresses() -> None:
    served = Served(limits=LimitSettings(failed_auth_per_minute=3), monotonic=Clock())
    for number in range(5):
        async with served.client(f"203.0.113.{number}") as client:
            answer = await client.post("/create", headers=served.headers("viewer", "bob"), json=BODY)
            assert answer.status_code == (403 if number < 3 else 429)


async def test_s07_12_addresses_of_one_ipv6_network_are_one() -> None:
    served = Served(limits=LimitSettings(failed_auth_per_minute=1), monotonic=Clock())
    for number, status in enumerate((401, 429, 429)):
        async with served.client(f"2001:db8::{number}") as client:
            assert (await client.get("/view/1")).status_code == status
    async with served.client("2001:db8:0:1::1") as client:
        assert (await client.get("/view/1")).status_code == 401


async def test_s07_12_changes_by_subject_and_by_address() -> None:
    clock = Clock()
    served = Served(limits=LimitSettings(mutations_per_minute=2), monotonic=clock)
    async with served.client("203.0.113.9") as client:
        for status in (201, 201, 429):
            answer = await client.post("/create", headers=served.headers("admin", "a"), json=BODY)
            assert answer.status_code == status
        assert answer.headers["retry-after"] == "30"
        problem_in(
            await client.post("/create", headers=served.headers("admin", "b"), json=BODY), 429, "too-many-requests"
        )
        for _ in range(4):
            assert (await client.get("/view/1", headers=served.headers("admin", "a"))).status_code == 200
            assert (await client.post("/query", headers=served.headers("viewer", "a"), json=BODY)).status_code == 200
    async with served.client("203.0.113.10") as other:
        assert (await other.post("/create", headers=served.headers("admin", "a"), json=BODY)).status_code == 429
        assert (await other.post("/create", headers=served.headers("admin", "c"), json=BODY)).status_code == 201
    assert [why for *_, why in served.audit.entries] == ["rate"] * 3


async def test_s07_17_a_verifier_that_raises_lets_nobody_in() -> None:
    class Broken(Verifier):
        async def verify(self, token: str) -> Identity:
            raise ZeroDivisionError("a fault of ours")

    served = Served(verifier=Broken(auth(), ()))
    async with served.client() as client:
        found = problem_in(await client.get("/view/1", headers=served.headers("admin")), 500, "internal")
        assert "fault" not in str(found)


async def test_s07_17_a_route_without_a_guard_lets_nobody_in() -> None:
    served = Served()
    del served.app.state.shardlib_guard
    async with served.client() as client:
        problem_in(await client.get("/view/1", headers=served.headers("admin")), 500, "internal")


async def test_s07_25_a_denied_caller_gets_401_and_a_list_that_is_away_503() -> None:
    class Listed(Verifier):
        reason = Unauthenticated("denied", "alice")

        async def verify(self, token: str) -> Identity:
            raise self.reason

    verifier = Listed(auth(), ())
    served = Served(verifier=verifier)
    async with served.client() as client:
        problem_in(await client.get("/view/1", headers=served.headers()), 401, "unauthenticated")
        assert served.audit.entries[0][0].subject == "alice"
        verifier.reason = Unauthenticated("denied-list-unavailable", unavailable=True)
        answer = await client.get("/view/1", headers=served.headers())
        problem_in(answer, 503, "unavailable")
        assert answer.headers["retry-after"]


@pytest.mark.parametrize("ends", ["expires", "denied", "client"])
async def test_s07_25_a_long_answer_ends_with_its_token(ends: str) -> None:
    class Watched(Verifier):
        denied: bool = False

        async def still(self, identity: Identity) -> None:
            if self.denied:
                raise Unauthenticated("denied", identity.subject)
            await super().still(identity)

    now = [time.time()]
    base = Verifier.from_settings(auth(), clock=lambda: now[0])
    watched = Watched(auth(), base._keys, clock=lambda: now[0])
    served = Served(verifier=watched)
    async with served.client() as client:
        # The transport hands an answer over when it is whole: that it comes at all shows that it has ended.
        asked = asyncio.ensure_future(client.get("/stream", headers=served.headers(ttl_s=60)))
        await asyncio.wait_for(served.entered.wait(), 20)
        if ends == "expires":
            now[0] += 60
        elif ends == "denied":
            watched.denied = True
        else:
            asked.cancel()
            await asyncio.wait([asked], timeout=20)
        if ends != "client":
            assert (await asyncio.wait_for(asked, 20)).text == "first\n"
    assert served.closed


def test_s07_08_a_route_that_states_no_role_is_found() -> None:
    assert check_routes(Served().app) == {
        "GET /health": None,
        "GET /api/v1/things/{thing}": Role.VIEWER,
        "GET /view/{item}": Role.VIEWER,
        "POST /operate": Role.OPERATOR,
        "POST /create": Role.ADMIN,
        "POST /query": Role.VIEWER,
        "GET /raise": Role.VIEWER,
        "GET /wait": Role.VIEWER,
        "GET /stream": Role.VIEWER,
        "GET /broken": Role.VIEWER,
    }

    async def bare() -> None: ...

    async def twice(
        one: Annotated[Identity, Depends(needs(Role.ADMIN))], other: Annotated[None, Depends(anybody)]
    ) -> None: ...

    for endpoint in (bare, twice):
        app = FastAPI()
        app.get("/x")(endpoint)
        with pytest.raises(InvalidArgument, match="GET /x"):
            check_routes(app)
    assert check_routes(FastAPI()) == {}


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Host": "localhost:8081"}, True),
        ({"Host": "[::1]:8081", "Origin": "http://localhost:3000"}, True),
        ({"Host": "evil.example:8081"}, False),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Host": "[::1"}, False),
    ],
)
async def test_dev_serves_everybody_of_this_machine_and_no_page_of_another_site(
    headers: dict[str, str], allowed: bool
) -> None:
    served = Served(settings=AuthSettings(), server=ServerSettings(dev=True))
    async with served.client() as client:
        answer = await client.post("/create", headers=headers, json=BODY)
        if allowed:
            assert answer.status_code == 201
        else:
            problem_in(answer, 403, "forbidden")


async def test_s07_16_no_token_in_a_log_an_entry_or_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = Served(limits=LimitSettings(failed_auth_per_minute=3))
    served.raises = RuntimeError("a fault of ours")
    now = time.time()
    tokens = [
        served.token("admin"),
        served.token("viewer"),
        served.token("admin", now=now - 3600),
        forged({}, claims(now, role="root")),
        "canary-" + "77",
        served.token("admin", "name\u2028".strip()) + "x",
    ]
    seen = []
    async with served.client() as client:
        for token in tokens:
            for method, path in (("POST", "/create"), ("GET", "/raise"), ("GET", "/view/1"), ("PUT", "/x")):
                answer = await client.request(method, path, headers={"Authorization": f"Bearer {token}"}, json=BODY)
                seen.append(answer.text + str(answer.headers))
    seen += [caplog.text, repr(served.audit.entries), generate_latest(served.metrics.registry).decode()]
    assert len({text[:3] for text in seen}) > 1
    parts = [part for token in tokens for part in (token, token.rpartition(".")[2]) if len(part) > 6]
    assert not [part for part in parts if any(part in text for text in seen)]


def test_a_guard_shows_no_key() -> None:
    served = Served()
    secret = served.auth.secret
    assert secret is not None
    assert secret.get_secret_value() not in repr(served.guard) + repr(vars(served.guard)) + repr(Guard)
