"""What the servers say of errors, requests and themselves: problems, ids, addresses, health, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from shardlib import errors
from shardlib.catalog import Conflict
from shardlib_ops.audit import AuditUnavailable
from shardlib_ops.serving.problem import KINDS, Problem, problem, problem_of, public_text
from shardlib_ops.serving.requests import client_address, request_id_of
from shardlib_ops.settings import ServerSettings
from tests.support.served import Served, problem_in
from tests.test_public_api import SAMPLES

HIDDEN = ["canary-77", "db7.internal", "10.9.8.7", "etcd://", "SELECT"]
WORDS = 'connection to server at "10.9.8.7", port 5432 failed: FATAL: password=canary-77 at db7.internal:5432'

CASES: list[tuple[Exception, int, str]] = [
    (errors.CatalogUnavailable("etcd://u@db7.internal:2379/shop", WORDS), 503, "catalog-unavailable"),
    (errors.ShardUnavailable("shard-01", WORDS), 503, "shard-unavailable"),
    (errors.ShardUnavailable("shard-01", WORDS, True), 503, "shard-unavailable"),
    (errors.StaleTopology("shard-01", 17, 4), 503, "shard-unavailable"),
    (errors.PoolTimeout("shard-01", 30.0, WORDS), 503, "shard-unavailable"),
    (errors.LockTimeout("shard-01", 10.0, "process 4 runs SELECT"), 503, "shard-unavailable"),
    (errors.RetryableError(WORDS), 503, "unavailable"),
    (AuditUnavailable("postgresql://db7.internal/audit", WORDS), 503, "audit-unavailable"),
    (AuditUnavailable("postgresql://db7.internal/audit", WORDS, True), 500, "audit-incomplete"),
    (errors.CommitOutcomeUnknown("shard-01", WORDS), 500, "outcome-unknown"),
    (errors.InvalidTopology("there is no shard 'x'", "the shards are: a, b"), 404, "not-found"),
    (errors.InvalidTopology("there is no job 7", "`list_jobs` shows them"), 404, "not-found"),
    (errors.InvalidTopology("shard 'x' owns ranges", "drain it first"), 409, "conflict"),
    (errors.InvalidTopology(f"db7.internal:5432/x: {WORDS}", "look"), 409, "conflict"),
    (
        errors.InvalidTopology("the head of a stored topology does not match its digest", "x"),
        503,
        "catalog-unavailable",
    ),
    (errors.InvalidArgument("name", "canary-77", "at most 80 characters"), 422, "invalid"),
    (errors.InvalidArgument("primary_endpoint", "***", "host db7.internal:5432 is taken"), 422, "invalid"),
    (errors.InvalidShardKey("canary-77", "it is empty"), 422, "invalid"),
    (errors.ShardKeyMismatch("canary-77", "b", "SELECT"), 422, "invalid"),
    (errors.ShardKeyRequired("the statement names no shard key", "add one"), 422, "invalid"),
    (Conflict(1, 2), 409, "conflict"),
    (errors.ShardlibError(WORDS), 500, "internal"),
    (ValueError(WORDS), 500, "internal"),
    (problem("conflict", "as it is"), 409, "conflict"),
]


@pytest.mark.parametrize(("error", "status", "slug"), CASES)
def test_s07_15_each_error_of_the_library_is_a_problem_that_tells_no_place(
    error: Exception, status: int, slug: str
) -> None:
    found = problem_of(error)
    content = found.content("request-1")
    assert (found.status, content["type"]) == (status, f"urn:shardlib:problem:{slug}")
    assert set(content) == {"type", "title", "status", "detail", "instance"}
    assert not [word for word in HIDDEN if word in json.dumps(content)]
    assert (status == 503) == ("Retry-After" in found.headers)


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - {"ShardlibError", "BulkLoadIncomplete"}))
def test_s07_15_no_error_of_the_library_is_unforeseen(name: str) -> None:
    assert problem_of(SAMPLES[name]).slug != "internal"


def test_every_kind_has_a_title_of_its_own() -> None:
    assert len({title for _, title in KINDS.values()}) == len(KINDS)
    assert str(Problem(418, "I am a teapot")) == "418 bad-request: I am a teapot"


@pytest.mark.parametrize(
    "text",
    [
        "at postgresql://u:canary-77@db7.internal:5432/x?sslmode=require, then",
        "db7.internal:5432 refuses",
        "10.9.8.7 refuses",
        "10.9.8.7:5432 refuses",
        "[fe80::10.9.8.7]:5432",
        'could not translate host name "db7.internal" to address',
        'connection to server at "db7.internal" (10.9.8.7), port 5432 failed',
        "password=canary-77",
    ],
)
def test_places_and_secrets_are_taken_out_of_texts(text: str) -> None:
    found = public_text(text)
    assert not [word for word in HIDDEN if word in found]
    assert "***" in found


def test_what_is_no_place_stays() -> None:
    text = "shard 's1' takes part in job 12, which is 'copying'; wait 10:30 min, ratio 3:1"
    assert public_text("shard 's1' takes part in job 12, which is 'copying'") in text
    assert "line" in public_text("line\nline")
    assert "\n" not in public_text("line\nline")
    assert len(public_text("x" * 5000)) == 600


async def test_s07_15_what_the_framework_refuses_is_a_problem_too() -> None:
    served = Served()
    admin = served.headers("admin")
    json_head = {**admin, "Content-Type": "application/json"}
    async with served.client() as client:
        problem_in(await client.get("/nothing"), 404, "not-found")
        found = await client.get("/create", headers=admin)
        problem_in(found, 405, "method-not-allowed")
        assert found.headers["allow"] == "POST"
        for body in (
            "",
            "{",
            "[]",
            '"x"',
            "null",
            '{"name": 3}',
            '{"name": ["canary-77"]}',
            '{"name": "' + "x" * 99 + '"}',
        ):
            found = problem_in(await client.post("/create", headers=json_head, content=body), 422, "invalid")
            assert "canary-77" not in json.dumps(found)
            assert found["errors"][0]["in"].startswith("body")


@pytest.mark.parametrize("name", ["status", "id", "progress", "canary-77", "", "x" * 500, "a\nb"])
async def test_s07_10_fields_that_are_not_known_are_refused(name: str) -> None:
    served = Served()
    async with served.client() as client:
        answer = await client.post("/create", headers=served.headers("admin"), json={"name": "a", name: "canary-99"})
        found = problem_in(answer, 422, "invalid")
        assert "canary-99" not in json.dumps(found)
        assert len(answer.content) < 1000


async def test_s07_17_an_error_that_nobody_expected(caplog: pytest.LogCaptureFixture) -> None:
    served = Served()
    secret = "canary-" + "77"
    served.raises = RuntimeError(f"no answer of postgresql://u:{secret}@db7.internal/x")
    served.raises.__cause__ = KeyError(f"password={secret}")
    async with served.client() as client:
        with caplog.at_level(logging.DEBUG):
            found = problem_in(await client.get("/raise", headers=served.headers()), 500, "internal")
        assert found["detail"] == "Something went wrong here"
        logged = [record.getMessage() for record in caplog.records if found["error_id"] in record.getMessage()]
        assert len(logged) == 1
        assert "RuntimeError" in logged[0]
        assert "KeyError" in logged[0]
        assert "in raising" in logged[0]
        assert secret not in caplog.text
        assert (await client.get("/view/1", headers=served.headers())).status_code == 200, "the process goes on"


async def test_an_error_of_the_library_in_a_route() -> None:
    served = Served()
    served.raises = errors.InvalidTopology("there is no shard 'x'", "the shards are: a")
    async with served.client() as client:
        found = problem_in(await client.get("/raise", headers=served.headers()), 404, "not-found")
        assert found["detail"] == "there is no shard 'x'; the shards are: a"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"0123456789abcdef", True),
        (b"A.b_c-1234", True),
        (b"short", False),
        (b"x" * 65, False),
        (b"with space here", False),
        (b"line\nbreak-12", False),
        ("größer-als".encode(), False),
    ],
)
def test_a_request_id_is_kept_if_it_is_sane(given: bytes, kept: bool) -> None:
    found = request_id_of({"headers": [(b"x-request-id", given)]})
    assert (found.encode() == given) == kept
    assert found.isascii()
    assert request_id_of({"headers": []}) != request_id_of({"headers": []})


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["1.2.3.4, rubbish"], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4:5555"], "1.2.3.4"),
        ("10.0.0.1", ["[2001:db8::1]:5555"], "2001:db8::1"),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", [",".join(["10.0.0.2"] * 100)], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
    ],
)
def test_s07_19_only_trusted_proxies_tell_the_address(peer: str, forwarded: list[str], address: str) -> None:
    trusted = ServerSettings(trusted_proxies="10.0.0.0/24").trusted_proxies
    headers = [(b"x-forwarded-for", each.encode()) for each in forwarded]
    headers += [(b"x-real-ip", b"9.9.9.9"), (b"forwarded", b"for=9.9.9.9")]
    assert client_address({"client": (peer, 1), "headers": headers}, trusted) == address


async def test_s07_19_the_address_in_the_log_cannot_be_forged() -> None:
    served = Served()
    async with served.client("203.0.113.9") as client:
        await client.get("/view/1", headers={"X-Forwarded-For": "1.2.3.4", "X-Real-IP": "1.2.3.4"})
    assert served.audit.entries[0][0].address == "203.0.113.9"


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "get", "X"])
@pytest.mark.parametrize("path", ["/view/1", "/health", "/nothing"])
async def test_s07_20_other_methods_are_refused(method: str, path: str) -> None:
    served = Served()
    async with served.client() as client:
        # httpx writes methods in capitals: the application is asked as a server would ask it.
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {"type": "http", "method": method, "path": path, "headers": [], "client": None, "query_string": b""}
        await served.asgi(scope, receive, send)
        assert sent[0]["status"] == 405
        assert (await client.request("PUT", "/health")).status_code == 405


async def test_s07_20_health_is_open_and_tells_little() -> None:
    parts = {"catalog": True}

    async def catalog() -> bool:
        return parts["catalog"]

    async def broken() -> bool:
        raise errors.CatalogUnavailable("etcd://db7.internal:2379/x", "canary-77")

    served = Served(checks={"catalog": catalog})
    async with served.client() as client:
        answer = await client.get("/health")
        found = answer.json()
        assert answer.status_code == 200
        assert set(found) == {"status", "version", "uptime_seconds", "checks"}
        assert (found["status"], found["checks"]) == ("ok", {"catalog": True})
    served = Served(checks={"catalog": broken})
    async with served.client() as client:
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "degraded")
        assert not [word for word in HIDDEN if word in answer.text]


async def test_health_is_asked_once_a_second_however_many_ask() -> None:
    asked = 0

    async def catalog() -> bool:
        nonlocal asked
        asked += 1
        return True

    served = Served(checks={"catalog": catalog})
    async with served.client() as client:
        await asyncio.gather(*(client.get("/health") for _ in range(20)))
    assert asked == 1


async def test_metrics_are_by_route_and_not_by_path() -> None:
    served = Served()
    async with served.client() as client:
        for item in ("1", "2", "canary-77"):
            await client.get(f"/view/{item}", headers=served.headers())
        await client.get("/view/1")
        await client.get("/canary-77")
        await client.get("/api/v1/things/1", headers=served.headers())

    def count(**labels: str) -> float | None:
        return served.metrics.registry.get_sample_value("shardlib_http_requests_total", {"server": "test", **labels})

    assert count(method="GET", route="/view/{item}", status="200") == 3
    assert count(method="GET", route="/view/{item}", status="401") == 1
    assert count(method="GET", route="unmatched", status="404") == 1
    assert count(method="GET", route="/api/v1/things/{thing}", status="200") == 1
    assert served.metrics.registry.get_sample_value("shardlib_http_requests_running", {"server": "test"}) == 0
