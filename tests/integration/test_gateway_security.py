"""Security of the gateway, by the lines of the list that is checked."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument
from shardlib_ops import LocalCluster
from shardlib_ops.auth import Identity, Role, Unauthenticated, deny
from shardlib_ops.auth.remembered import Remembered
from shardlib_ops.gateway import create_gateway
from shardlib_ops.serving.server import listen
from shardlib_ops.settings import LimitSettings
from tests.integration.test_gateway_execute import metadata
from tests.support.eventually import eventually_async
from tests.support.gateways import Caller, gateway_of, gateway_settings
from tests.support.served import problem_in
from tests.support.tokens import OTHER_SECRET, claims, forged

PASSWORD = "canary-7f3a91"
CALLS = {"POST /v1/execute": "viewer", "GET /v1/shard-for-key": "viewer", "GET /health": "none"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as made:
        with ShardedEngine(made.url) as engine:
            engine.create_all(metadata)
        yield made


@pytest.fixture
async def caller(cluster: LocalCluster) -> AsyncIterator[Caller]:
    async with gateway_of(cluster.url, statement_timeout_s=20) as made:
        yield made


def run_on_all(cluster: LocalCluster, *statements: str) -> None:
    for server in cluster.servers:
        with server.connect() as conn:
            for statement in statements:
                conn.execute(statement.encode())


def come_as(cluster: LocalCluster, role: str) -> None:
    """Let the catalog's DSNs name this role: the gateway comes as it."""
    catalog = open_catalog(cluster.url)
    try:
        topology = catalog.load()
        shards = tuple(
            replace(shard, primary=Dsn(shard.primary.conninfo(user=role, password=PASSWORD)))
            for shard in topology.shards
        )
        catalog.publish(replace(topology, version=topology.version + 1, shards=shards), expected=topology.version)
    finally:
        catalog.close()


@pytest.fixture(scope="module")
def guarded() -> Iterator[LocalCluster]:
    """A cluster whose DSNs name a role that can do no more than the gateway needs."""
    with LocalCluster(shards=2) as made:
        run_on_all(made, f"CREATE ROLE app LOGIN PASSWORD '{PASSWORD}'")
        with ShardedEngine(made.url) as engine:
            engine.create_all(metadata, app_roles=["app"])
        run_on_all(made, "GRANT SELECT, INSERT, UPDATE, DELETE ON item TO app")
        come_as(made, "app")
        yield made


async def test_s07_08_each_call_lets_in_its_role_and_nobody_else(caller: Caller) -> None:
    paths = caller.gateway.openapi()["paths"]
    stated = {f"{method.upper()} {path}": call for path, calls in paths.items() for method, call in calls.items()}
    assert {name: call["x-least-role"] for name, call in stated.items()} == CALLS
    assert {name: "security" in call for name, call in stated.items()} == {
        name: role != "none" for name, role in CALLS.items()
    }
    now = time.time()
    tokens = {
        "none": {},
        "expired": caller.headers("admin", now=now - 3600, ttl_s=60),
        "forged": {"Authorization": f"Bearer {forged({}, claims(now, role='admin'), OTHER_SECRET.encode())}"},
        "unsigned": {"Authorization": f"Bearer {forged({'alg': 'none'}, claims(now, role='admin'))}"},
        "rubbish": {"Authorization": "Bearer a.b.c"},
    }
    before = len(caller.refused())
    for headers in tokens.values():
        for ask in (("POST", "/v1/execute"), ("GET", "/v1/shard-for-key?key=a")):
            problem_in(await caller.client.request(*ask, headers=headers, json={}), 401, "unauthenticated")
    entries = caller.refused()[before:]
    assert len(entries) == 2 * len(tokens)
    assert {entry.action for entry in entries} == {"execute", "shard-for-key"}
    for role in ("viewer", "operator", "admin"):
        assert (await caller.execute("SELECT 1 AS x", role=role)).status_code == 200
        assert (await caller.get("/v1/shard-for-key?key=a", role)).status_code == 200
    assert len(caller.refused()) == before + len(entries)  # statements that run are not in the audit log


async def test_s07_11_bodies_rows_bytes_and_times_have_bounds(cluster: LocalCluster) -> None:
    limits = LimitSettings(body_bytes=4096, failed_auth_per_minute=100_000)
    async with gateway_of(
        cluster.url, limits=limits, rows_max=100, bytes_max=10_000, statement_timeout_s=1
    ) as caller:  # fmt: skip
        problem_in(await caller.execute("SELECT 1 AS x", "x" * 5000), 413, "body-too-large")
        deep: Any = 1
        for _ in range(40):
            deep = [deep]
        problem_in(await caller.execute("SELECT $1::jsonb AS x", deep), 422, "invalid")
        for query in (
            "SELECT g FROM generate_series(1, 101) AS g",
            "SELECT repeat('x', 3000) AS x FROM generate_series(1, 4)",
            "SELECT repeat('x', 10001) AS x",
            "INSERT INTO item SELECT 'a', g FROM generate_series(1, 101) AS g RETURNING id",
        ):
            problem_in(await caller.execute(query), 422, "result-too-large")
        assert len(await caller.rows("SELECT g FROM generate_series(1, 100) AS g")) == 100
        for more in ({}, {"stream": True}, {"timeout_s": 0.2}):
            found = problem_in(await caller.execute("SELECT pg_sleep(30)", **more), 504, "statement-timeout")
            assert found["detail"]
        problem_in(await caller.execute("SELECT 1 AS x", timeout_s=1.5), 422, "invalid")
        # PostgreSQL has the bound too, for a gateway that can cancel nothing any more.
        assert await caller.rows("SELECT current_setting('statement_timeout') AS s") == [{"s": "1s"}]
        assert await caller.rows("SELECT count(*) AS n FROM item") == [{"n": 0}]


@pytest.mark.parametrize("query", [
    "COPY item TO PROGRAM 'id'", "COPY (SELECT 1) TO '/tmp/x'", "SET ROLE postgres", "RESET ROLE", "SELECT 1; SELECT 2",
    "SET SESSION AUTHORIZATION postgres", "DO $$BEGIN END$$", "COMMIT", "BEGIN", "ROLLBACK", "LOCK TABLE item",
    "CREATE TABLE t (x int)", "DROP TABLE item", "TRUNCATE item", "VACUUM", "LISTEN x", "NOTIFY x", "CALL p()",
    "PREPARE p AS SELECT 1", "EXECUTE p", "/* SELECT */ SET ROLE postgres", "SELECT 1;COMMIT;SELECT 2",
    "ALTER SYSTEM SET log_statement = 'all'", "GRANT pg_read_server_files TO app", "-- SELECT", "", ";",
])  # fmt: skip
async def test_s07_14_one_statement_that_reads_or_writes_rows_runs_and_nothing_else(caller: Caller, query: str) -> None:
    problem_in(await caller.execute(query), 422, "invalid")


async def test_s07_14_parameters_are_bound(caller: Caller) -> None:
    """Whatever stands in them is a value."""
    for text in ("'; DROP TABLE item; --", "$1", "%s", "{}", "\\", "a\nb", "E'\\''", '"'):
        assert await caller.rows("SELECT $1::text AS x, $1 = $2 AS same", text, text) == [{"x": text, "same": True}]
    assert await caller.rows("SELECT count(*) AS n FROM item") == [{"n": 0}]


async def test_s07_14_a_viewer_reads_and_every_try_to_write_is_in_the_audit_log(caller: Caller) -> None:
    before = len(caller.refused())
    tried = (
        "INSERT INTO item VALUES ('a', 1)",
        "WITH w AS (DELETE FROM item RETURNING id) SELECT * FROM w",
        "EXPLAIN ANALYZE UPDATE item SET note = 'x'",
        "SELECT * INTO other FROM item",
        "MERGE INTO item USING (VALUES (1)) AS v (id) ON false WHEN NOT MATCHED THEN INSERT VALUES ('a', v.id)",
    )
    for query in tried:
        for stream in (False, True):
            found = problem_in(await caller.execute(query, role="viewer", stream=stream), 403, "read-only")
            assert found["sqlstate"] == "25006"
    entries = caller.refused()[before:]
    assert [(entry.action, entry.subject, entry.result) for entry in entries] == [
        ("execute", "the-viewer", "role")
    ] * (2 * len(tried))  # fmt: skip
    # Not even by making its own transaction a writing one.
    query = "SELECT set_config('transaction_read_only', 'off', true) AS x"
    assert (await caller.execute(query, role="viewer")).status_code == 422
    assert await caller.rows("SELECT count(*) AS n FROM item", role="viewer") == [{"n": 0}]
    await caller.rows("INSERT INTO item VALUES ('a', 1)", role="operator")
    await caller.rows("DELETE FROM item", role="operator")


@pytest.mark.parametrize(("name", "options"), [
    ("root", "SUPERUSER"),
    ("seer", "BYPASSRLS"),
    ("runner", "IN ROLE pg_execute_server_program"),
    ("reader", "IN ROLE pg_read_server_files"),
    ("writer", "NOINHERIT IN ROLE pg_write_server_files"),
    ("heir", "NOINHERIT IN ROLE root"),
])  # fmt: skip
async def test_s07_14_a_gateway_with_a_role_that_may_too_much_does_not_start(
    guarded: LocalCluster, name: str, options: str
) -> None:
    role = f"{name}_{uuid.uuid4().hex[:6]}"
    try:
        if name == "heir":
            run_on_all(guarded, "CREATE ROLE root SUPERUSER")
        run_on_all(
            guarded,
            f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}' {options}",
            f"GRANT USAGE ON SCHEMA shardlib TO {role}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA shardlib TO {role}",
        )
        come_as(guarded, role)
        with pytest.raises(InvalidArgument) as caught:
            async with gateway_of(guarded.url, dev=False):
                raise AssertionError("it serves")
        assert role in str(caught.value)
        assert PASSWORD not in str(caught.value)
        async with gateway_of(guarded.url, dev=True) as caller:
            assert await caller.rows("SELECT current_user AS me") == [{"me": role}]
    finally:
        come_as(guarded, "app")
        run_on_all(guarded, f"DROP OWNED BY {role}", f"DROP ROLE {role}", "DROP ROLE IF EXISTS root")


async def test_s07_14_a_role_that_may_too_much_later_gets_no_statement(guarded: LocalCluster) -> None:
    """A gateway that has started looks at each new connection."""
    async with gateway_of(guarded.url, dev=False) as caller:
        assert await caller.rows("SELECT current_user AS me") == [{"me": "app"}]
        await caller.rows("INSERT INTO item VALUES ('a', 1)")
        await caller.rows("DELETE FROM item WHERE owner = 'a'")
        run_on_all(guarded, "ALTER ROLE app BYPASSRLS")
        try:
            run_on_all(
                guarded, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
            )  # fmt: skip
            answer = await caller.execute("SELECT 1 AS x")
            found = problem_in(answer, 503, "shard-unavailable")
            assert answer.headers["Retry-After"]
            assert "app" not in json.dumps(found)
        finally:
            run_on_all(guarded, "ALTER ROLE app NOBYPASSRLS")
        assert await caller.rows("SELECT 1 AS x") == [{"x": 1}]


async def test_s07_15_a_problem_tells_nothing_of_what_is_behind(guarded: LocalCluster) -> None:
    """No host, no DSN, no text of SQL, no values of other rows."""
    async with gateway_of(guarded.url, dev=False) as caller:
        await caller.rows("INSERT INTO item VALUES ('a', 77123, 'hidden-note')")
        ports = [str(server.port) for server in guarded.servers]
        for query in (
            "INSERT INTO item VALUES ('a', 77123, 'hidden-note')",
            "SELECT hidden_column FROM item WHERE note = 'secret-literal'",
            "SELECT 'secret-literal'::int AS x FROM item WHERE 1 = 'x1'",
            "SELEC 'secret-literal'",
            "SELECT * FROM pg_authid",
            "SELECT pg_read_file('/etc/passwd') AS x",
        ):
            answer = await caller.execute(query)
            assert answer.status_code in (409, 422), answer.text
            told = answer.text + str(answer.headers)
            for word in (PASSWORD, "secret-literal' ", "hidden-note", "77123", "127.0.0.1", "postgresql://", *ports):
                assert word not in told
        await caller.rows("DELETE FROM item")


async def test_s07_17_what_nobody_expected_is_a_500_with_an_id_and_the_gateway_lives(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(query: str) -> bool:
        raise ZeroDivisionError("canary-text")

    with monkeypatch.context() as patch:
        patch.setattr("shardlib_ops.gateway.execute.leaves_traces", broken)
        for stream in (False, True):
            answer = await caller.execute("SELECT 1 AS x", stream=stream)
            if stream:  # the row was sent by then
                found = json.loads(answer.text.splitlines()[-1])["error"]
            else:
                found = problem_in(answer, 500, "internal")
            assert "canary-text" not in answer.text
            assert found["error_id"] in caplog.text
    assert await caller.rows("SELECT 1 AS x") == [{"x": 1}]


async def test_s07_17_a_guard_that_raises_lets_nobody_in(cluster: LocalCluster) -> None:
    class Broken:
        cluster = None
        open_to_all = False

        async def verify(self, token: str) -> Identity:
            raise RuntimeError("no policy")

        async def still(self, identity: Identity) -> None:
            raise RuntimeError("no policy")

        async def aclose(self) -> None: ...

    settings = gateway_settings(cluster.url)
    gateway = create_gateway(settings, verifier=Broken())
    async with (
        listen(gateway, settings.gateway, limits=settings.limits) as (listening, _),
        httpx.AsyncClient(base_url=listening.url) as client,
    ):
        answer = await client.post("/v1/execute", json={}, headers={"Authorization": "Bearer x"})
        assert answer.status_code == 500


async def test_s07_20_other_methods_and_pages_are_not_there(cluster: LocalCluster, caller: Caller) -> None:
    for method, path, allowed in (
        ("GET", "/v1/execute", "POST"), ("PUT", "/v1/execute", "POST"), ("OPTIONS", "/v1/execute", "POST"),
        ("POST", "/v1/shard-for-key", "GET"), ("DELETE", "/health", "GET"), ("PATCH", "/v1/execute", "POST"),
    ):  # fmt: skip
        answer = await caller.client.request(method, path, headers=caller.headers())
        problem_in(answer, 405, "method-not-allowed")
        assert answer.headers["Allow"] == allowed
    problem_in(await caller.client.request("TRACE", "/v1/execute"), 405, "method-not-allowed")
    for path in ("/docs", "/redoc", "/metrics", "/v1", "/v1/execute/", "//health", "/"):
        problem_in(await caller.get(path, "admin"), 404, "not-found")
    health = (await caller.get("/health", None)).json()
    assert set(health) == {"status", "version", "uptime_seconds", "checks"}
    assert health["checks"] == {"topology": True}
    assert (await caller.get("/openapi.json", None)).status_code == 200
    async with gateway_of(cluster.url, docs=False, metrics_port=None) as other:
        assert (await other.get("/openapi.json", "admin")).status_code == 404
        assert other.listening.metrics_url is None


async def test_s07_25_a_remembered_token_is_denied_within_seconds(cluster: LocalCluster, caller: Caller) -> None:
    headers = caller.headers("viewer", subject="mallory")

    async def status() -> int:
        found = await caller.client.get("/v1/shard-for-key?key=a", headers=headers)
        return found.status_code

    assert await status() == 200
    catalog = open_catalog(cluster.url)
    try:
        await asyncio.to_thread(deny, catalog, subject="mallory", now=time.time())
    finally:
        catalog.close()

    async def refused() -> bool:
        return await status() == 401

    await eventually_async(refused, 10)
    assert await caller.rows("SELECT 1 AS x") == [{"x": 1}]


async def test_s07_25_what_is_remembered_of_a_token_ends_with_it() -> None:
    class Counted:
        cluster = None
        open_to_all = False

        def __init__(self) -> None:
            self.asked = 0
            self.refuses: str | None = None

        async def verify(self, token: str) -> Identity:
            self.asked += 1
            if token != "good" or self.refuses:
                raise Unauthenticated(self.refuses or "signature")
            return Identity("alice", Role.VIEWER, "1", 100.0)

        async def still(self, identity: Identity) -> None:
            if self.refuses:
                raise Unauthenticated(self.refuses, unavailable=self.refuses == "away")

        async def aclose(self) -> None: ...

    inner, now = Counted(), [0.0]
    remembered = Remembered(inner, keep_s=60, monotonic=lambda: now[0])
    for _ in range(3):
        assert (await remembered.verify("good")).subject == "alice"
        with pytest.raises(Unauthenticated):
            await remembered.verify("bad")
    assert inner.asked == 1 + 3  # what is not believed is not remembered
    now[0] = 61.0
    await remembered.verify("good")
    assert inner.asked == 5
    for reason, asked in (("away", 5), ("denied", 6), ("denied", 7)):
        inner.refuses = reason
        with pytest.raises(Unauthenticated, match=reason):
            await remembered.verify("good")
        assert inner.asked == asked
    inner.refuses = None
    assert (await remembered.verify("good")).subject == "alice"


async def test_a_gateway_without_a_key_or_a_catalog_is_not_made(cluster: LocalCluster) -> None:
    settings = gateway_settings(cluster.url, dev=False)
    with pytest.raises(InvalidArgument, match="no key"):
        create_gateway(settings.model_copy(update={"auth": type(settings.auth)()}))
    with pytest.raises(InvalidArgument, match="catalog"):
        create_gateway(settings.model_copy(update={"catalog": ""}))
