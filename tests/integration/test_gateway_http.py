"""The gateway over real connections, on real shards."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psycopg
import pytest

from shardlib import ShardedEngine
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Status
from shardlib_ops.reshard.resharder import Resharder
from tests.integration.test_gateway_execute import metadata
from tests.support.eventually import eventually_async
from tests.support.gateways import Caller, gateway_of
from tests.support.served import problem_in
from tests.support.tokens import SECRET

WAIT_S = 60.0


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
    for server in cluster.servers:
        with server.connect() as conn:
            conn.execute("TRUNCATE item")


def running(cluster: LocalCluster, text: str) -> int:
    """How many statements with this text the servers run, or hold a transaction of."""
    count = 0
    for server in cluster.servers:
        with server.connect() as conn:
            found = conn.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE state <> 'idle' AND pid <> pg_backend_pid() "
                "AND position(%s in query) > 0",
                (text,),
            ).fetchone()
            count += 0 if found is None else int(found[0])
    return count


async def until_running(cluster: LocalCluster, text: str, wanted: int) -> None:
    async def there() -> bool:
        return running(cluster, text) == wanted

    await eventually_async(there, WAIT_S, f"{wanted} of {text}", every_s=0.05)


async def test_rows_go_to_the_shard_of_their_key_and_come_back(cluster: LocalCluster, caller: Caller) -> None:
    for number in range(20):
        key = f"k{number}"
        answer = await caller.execute("INSERT INTO item VALUES ($1, $2, $3)", key, number, "text", key=key)
        place = (await caller.get(f"/v1/shard-for-key?key={key}")).json()
        assert answer.json().items() >= {"shard_id": place["shard_id"], "rows": [], "row_count": 1}.items()
        assert answer.json()["latency_ms"] > 0
        (server,) = [one for one in cluster.servers if one.shard == place["shard_name"]]
        with server.connect() as conn:
            assert conn.execute("SELECT id FROM item WHERE owner = %s", (key,)).fetchall() == [(number,)]
    found = await caller.execute("SELECT id, note FROM item WHERE owner = $1", "k7", key="k7", consistency="eventual")
    assert found.json()["rows"] == [{"id": 7, "note": "text"}]
    assert found.headers["content-type"] == "application/json"


async def test_a_key_is_where_the_library_says(cluster: LocalCluster, caller: Caller) -> None:
    with ShardedEngine(cluster.url) as engine:
        for path, key in (
            ("key=a", "a"), ("key=42", 42), ("key=eu&key=7", ("eu", 7)), ("key=", ""), ("key=%C3%A4%20b", "ä b"),
        ):  # fmt: skip
            answer = (await caller.get(f"/v1/shard-for-key?{path}")).json()
            shard = engine.shard_for(key)
            assert answer == {
                "shard_id": shard.id, "shard_name": shard.name, "hash_value": str(engine.token(key)),
            }  # fmt: skip
    for key in (True, "t"):  # PostgreSQL writes a boolean as t
        assert (await caller.execute("SELECT 1 AS x", key=key)).json()["shard_id"] == (
            await caller.get("/v1/shard-for-key?key=t")
        ).json()["shard_id"]
    for wrong in ("", "?", "?key=a&shard=b", "?key=%ff", "?key=%00", "?a", "?" + "key=a&" * 40):
        problem_in(await caller.get(f"/v1/shard-for-key{wrong}"), 422, "invalid")


async def test_a_number_keeps_its_digits(caller: Caller) -> None:
    body = b'{"shard_key": "a", "query": "SELECT $1::numeric AS n, $2::bigint AS i", "params": [0.1000000000000000055, '
    answer = await caller.client.post(
        "/v1/execute", content=body + b"9007199254740993]}",
        headers={**caller.headers(), "Content-Type": "application/json"},
    )  # fmt: skip
    assert b'"n":"0.1000000000000000055","i":9007199254740993' in answer.content


@pytest.mark.parametrize(("body", "where"), [
    ({}, {"body.shard_key", "body.query"}),
    ({"shard_key": None, "query": 1, "params": {}, "stream": 1, "timeout_s": 0, "consistency": 3},
     {"body.shard_key", "body.query", "body.params", "body.stream", "body.timeout_s", "body.consistency"}),
    ({"shard_key": {}, "query": "", "consistency": "any", "timeout_s": 21},
     {"body.shard_key", "body.query", "body.consistency", "body.timeout_s"}),
    ({"shard_key": ["a"], "query": "SELECT 1\0"}, {"body.shard_key", "body.query"}),
    ({"shard_key": ["a", None], "query": "SELECT 1; SELECT 2"}, {"body.shard_key", "body.query"}),
    ({"shard_key": "a", "query": "SELECT 1", "shard_id": "s1"}, {"body.shard_id"}),
    ({"shard_key": "a\0", "query": "SELECT 1"}, {"body.shard_key"}),
    ({"shard_key": 1.5e400, "query": "SELECT 1", "params": [0] * 70_000}, {"body.params"}),
    ({"shard_key": "\ud800", "query": "SELECT '\ud800'"}, {"body.shard_key", "body.query"}),
])  # fmt: skip
async def test_each_field_is_checked(caller: Caller, body: dict[str, Any], where: set[str]) -> None:
    text = json.dumps(body).replace("Infinity", "1.5e40")
    headers = {**caller.headers(), "Content-Type": "application/json"}
    found = problem_in(await caller.client.post("/v1/execute", content=text, headers=headers), 422, "invalid")
    assert {fault["in"] for fault in found["errors"]} == where


async def test_half_a_surrogate_pair_is_no_text(caller: Caller) -> None:
    for params in (["\ud800"], [["\ud800"]], [{"a": "\ud800"}]):
        text = json.dumps({"shard_key": "a", "query": "SELECT $1::jsonb AS x", "params": params})
        headers = {**caller.headers(), "Content-Type": "application/json"}
        answer = await caller.client.post("/v1/execute", content=text, headers=headers)
        assert answer.status_code == 422, answer.text


@pytest.mark.parametrize(("query", "params", "status", "slug", "told"), [
    ("INSERT INTO item VALUES ('a', 1), ('a', 1)", (), 409, "constraint-violated",
     {"sqlstate": "23505", "constraint": "item_pkey", "table": "item"}),
    ("INSERT INTO item VALUES (NULL, 1)", (), 422, "statement-invalid",
     {"sqlstate": "23502", "table": "item", "column": "owner"}),
    ("SELECT * FROM nowhere", (), 422, "statement-invalid", {"sqlstate": "42P01"}),
    ("SELEC 1", (), 422, "invalid", {}),
    ("SELECT $1::int AS x", ("secret-value",), 422, "statement-invalid", {"sqlstate": "22P02"}),
    ("SELECT $1::int AS x", (), 422, "statement-invalid", {"sqlstate": "08P01"}),
    ("SELECT 1/0 AS x", (), 422, "statement-invalid", {"sqlstate": "22012"}),
    ("SELECT $1::jsonb AS x", ("\0",), 422, "invalid", {}),
])  # fmt: skip
async def test_what_postgresql_says_is_told_by_its_code(
    caller: Caller, query: str, params: tuple[object, ...], status: int, slug: str, told: dict[str, str]
) -> None:
    found = problem_in(await caller.execute(query, *params), status, slug)
    assert {name: found[name] for name in ("sqlstate", "constraint", "table", "column") if name in found} == told
    assert await caller.rows("SELECT count(*) AS n FROM item") == [{"n": 0}]


async def test_a_stream_tells_of_its_end_or_of_its_error(caller: Caller) -> None:
    query = "INSERT INTO item SELECT 'a', g FROM generate_series(1, 20000) AS g RETURNING id"
    answer = await caller.execute(query, stream=True)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [line["row"]["id"] for line in lines[:-1]] == list(range(1, 20001))
    assert lines[-1]["end"]["row_count"] == 20000
    answer = await caller.execute("SELECT 1 / (3000 - g) AS x FROM generate_series(1, 5000) AS g", stream=True)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.status_code == 200
    assert lines[0] == {"row": {"x": 0}}
    assert lines[-1]["error"].items() >= {"sqlstate": "22012", "status": 422, "detail": "division by zero"}.items()
    assert not any("end" in line for line in lines)
    problem_in(await caller.execute("SELECT 1/0 AS x", stream=True), 422, "statement-invalid")  # before the first line
    body = {"shard_key": "a", "query": "SELECT 1 AS x"}
    headers = {**caller.headers(), "Accept": "application/x-ndjson, application/json;q=0.1"}
    answer = await caller.client.post("/v1/execute", json=body, headers=headers)
    assert [next(iter(json.loads(line))) for line in answer.text.splitlines()] == ["row", "end"]
    answer = await caller.client.post("/v1/execute", json={**body, "stream": False}, headers=headers)
    assert answer.json()["rows"] == [{"x": 1}]


async def test_who_does_not_read_does_not_hold_a_transaction(cluster: LocalCluster) -> None:
    async with gateway_of(cluster.url, statement_timeout_s=2) as caller:
        query = "SELECT g, repeat('x', 1000) AS slow_reader FROM generate_series(1, 1000000) AS g"
        body = {"shard_key": "a", "query": query, "stream": True}
        request = caller.client.stream("POST", "/v1/execute", json=body, headers=caller.headers())
        async with asyncio.timeout(WAIT_S), request as answer:
            await until_running(cluster, "slow_reader", 1)
            began = time.monotonic()
            await until_running(cluster, "slow_reader", 0)
            assert time.monotonic() - began < 20
            last = b""
            async for part in answer.aiter_bytes():
                last = (last + part)[-4096:]
        assert json.loads(last.splitlines()[-1])["error"]["type"].endswith(":statement-timeout")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_statement(
    cluster: LocalCluster, caller: Caller, stream: bool
) -> None:
    query = "INSERT INTO item SELECT 'a', g + length(pg_sleep(30)::text) FROM generate_series(1, 2) AS g RETURNING id"
    body = json.dumps({"shard_key": "a", "query": query, "stream": stream}).encode()
    head = "POST /v1/execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in caller.headers().items())
    url = httpx.URL(caller.listening.url)
    with socket.create_connection((url.host, url.port), timeout=30) as raw:
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await until_running(cluster, "pg_sleep(30)", 1)
    await until_running(cluster, "pg_sleep(30)", 0)
    assert await caller.rows("SELECT count(*) AS n FROM item") == [{"n": 0}]


async def test_a_server_that_is_killed_is_told_of_and_comes_back(cluster: LocalCluster, caller: Caller) -> None:
    shard = (await caller.get("/v1/shard-for-key?key=a")).json()["shard_name"]
    (server,) = [one for one in cluster.servers if one.shard == shard]
    others = [key for key in map(str, range(100)) if await place(caller, key) != shard]
    await caller.rows("INSERT INTO item VALUES ('a', 1)")
    server.kill()
    try:
        answer = await caller.execute("SELECT id FROM item")
        found = problem_in(answer, 503, "shard-unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert str(server.port) not in json.dumps(found)
        assert await caller.rows("SELECT 1 AS x", key=others[0]) == [{"x": 1}]
        assert (await caller.get("/health")).status_code == 200
    finally:
        server.start()

    async def well() -> bool:
        answer = await caller.execute("SELECT id FROM item")
        assert answer.status_code in (200, 503), answer.text
        return bool(answer.status_code == 200)

    await eventually_async(well, WAIT_S, every_s=0.1)
    assert await caller.rows("SELECT id FROM item") == [{"id": 1}]


async def place(caller: Caller, key: str) -> str:
    return str((await caller.get(f"/v1/shard-for-key?key={key}")).json()["shard_name"])


async def test_an_answer_to_commit_that_does_not_come_is_told_as_such(cluster: LocalCluster, caller: Caller) -> None:
    """The backend dies in a deferred trigger, which runs inside COMMIT."""
    for server in cluster.servers:
        with server.connect() as conn:
            conn.execute(
                "CREATE OR REPLACE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
                "$$BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5); RETURN NULL; END$$"
            )
            conn.execute(
                "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW WHEN (NEW.note = 'die') EXECUTE FUNCTION die()"
            )
    try:
        answer = await caller.execute("INSERT INTO item VALUES ('a', 1, 'die')")
        found = problem_in(answer, 504, "commit-unknown")
        assert "read back" in found["detail"]
    finally:
        for server in cluster.servers:
            with server.connect() as conn:
                conn.execute("DROP TRIGGER die ON item")


async def test_metrics_are_on_their_own_port(caller: Caller) -> None:
    await caller.rows("SELECT 1 AS x")
    problem_in(await caller.get("/metrics", "admin"), 404, "not-found")
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{caller.listening.metrics_url}/metrics")).text
    assert 'shardlib_http_requests_total{method="POST",route="/v1/execute",server="gateway",status="200"} 1.0' in text
    assert "shard_router_requests_total" in text


@pytest.mark.timeout(300)
async def test_no_request_fails_while_a_shard_is_split() -> None:
    """A loop of writes and reads over many keys, all the way through a split."""
    with LocalCluster(shards=1) as cluster:
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(metadata)
        spare = await asyncio.to_thread(cluster.spare, "new")
        async with gateway_of(cluster.url) as caller:
            stop, counts, failed = asyncio.Event(), dict[str, int](), list[str]()

            async def work(number: int) -> None:
                key = f"key-{number}"
                while not stop.is_set():
                    counts[key] = count = counts.get(key, 0) + 1
                    write = await caller.execute("INSERT INTO item VALUES ($1, $2)", key, count, key=key)
                    read = await caller.execute("SELECT max(id) AS m FROM item WHERE owner = $1", key, key=key)
                    if write.status_code != 200 or read.status_code != 200 or read.json()["rows"] != [{"m": count}]:
                        failed.append(f"{key} {count}: {write.text} {read.text}")
                    await asyncio.sleep(0.02)

            workers = [asyncio.create_task(work(number)) for number in range(6)]
            try:
                async with asyncio.timeout(200), Manager(cluster.url) as manager:
                    job = await manager.split("s1", targets=[{"name": "second", "primary_endpoint": spare.dsn}])
                    async with Resharder(cluster.url) as resharder:
                        ended = await resharder.run(job.id, complete=True)
                    assert ended.status is Status.COMPLETED, ended.error
                    before = sum(counts.values())
                    while sum(counts.values()) < before + 60:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            finally:
                stop.set()
                await asyncio.gather(*workers)
            assert not failed
            shards = {await place(caller, key) for key in counts}
            assert len(shards) == 2
            for key, count in counts.items():
                found = await caller.rows("SELECT count(*) AS n FROM item WHERE owner = $1", key, key=key)
                assert found == [{"n": count}]


async def test_the_command_serves_and_finishes_what_runs(cluster: LocalCluster) -> None:
    environ = {**os.environ, "SHARDLIB_JWT_SECRET": SECRET, "SHARDLIB_CATALOG": cluster.url}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shardlib_ops.cli.main", "gateway", "serve", "--port", "0", "--metrics-port", "-1",
        "--dev", env=environ, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(WAIT_S):
            told = b""
            while b"serving on " not in told:
                told += await process.stderr.readline()
        url = told.partition(b"serving on ")[2].split()[0].rstrip(b";,").decode()
        async with gateway_of(cluster.url) as tokens, httpx.AsyncClient(base_url=url, timeout=60) as client:
            body = {"shard_key": "a", "query": "SELECT 7 AS x, pg_sleep(2)::text AS last_one"}
            asked = asyncio.create_task(client.post("/v1/execute", json=body, headers=tokens.headers("viewer")))
            await until_running(cluster, "last_one", 1)
            process.send_signal(signal.SIGTERM)
            answer = await asked
        assert answer.json()["rows"] == [{"x": 7, "last_one": ""}]
        async with asyncio.timeout(WAIT_S):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    with psycopg.connect(cluster.servers[0].dsn) as conn:
        assert conn.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shardlib-gateway'"
        ).fetchone() == (0,)
