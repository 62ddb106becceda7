"""The whole life of shards by HTTP, at a real server: made, split, watched, promoted, deleted."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import select
from typer.testing import CliRunner

from shardlib import ShardedEngine
from shardlib_ops import LocalCluster, Resharder
from shardlib_ops.api import create_app
from shardlib_ops.cli.main import app as cli
from shardlib_ops.serving.server import listen
from shardlib_ops.settings import ServerSettings
from tests.support.eventually import eventually_async
from tests.support.manager_runner import running, started
from tests.support.managers import audit_entries, fill, fill_job, manager_settings, serving, token
from tests.support.models import Base, Customer
from tests.support.tokens import SECRET

ROWS = 300


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=1, replicas=1, synchronous=True) as made:
        yield made


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[httpx.AsyncClient]:
    """Of an admin, at a manager that listens on a port of its own."""
    settings = manager_settings(cluster.url, manager=ServerSettings(port=0, metrics_port=0))
    api = create_app(settings)
    headers = {"Authorization": f"Bearer {token('admin')}"}
    async with (
        listen(api, settings.manager, limits=settings.limits, metrics=api.state.registry) as (listening, _),
        httpx.AsyncClient(base_url=f"{listening.url}/api/v1", headers=headers, timeout=60) as made,
    ):
        assert listening.metrics_url is not None
        made.headers["X-Metrics"] = listening.metrics_url
        yield made


def ok(answer: httpx.Response, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json() if answer.content else None


async def follow(client: httpx.AsyncClient, job_id: int, done: Callable[[Any], bool]) -> list[Any]:
    """Every state of a job that a caller sees who waits for changes, until it is as it should be."""
    seen: list[Any] = []
    headers: dict[str, str] = {}
    async with asyncio.timeout(110):
        while not seen or not done(seen[-1]):
            answer = await client.get(f"/reshard/jobs/{job_id}", params={"wait_s": 5}, headers=headers)
            if answer.status_code == 304:
                continue
            seen.append(ok(answer))
            headers = {"If-None-Match": answer.headers["ETag"]}
    return seen


async def test_shards_are_made_split_watched_promoted_and_deleted_by_http(
    cluster: LocalCluster, client: httpx.AsyncClient
) -> None:
    with ShardedEngine(cluster.url) as engine:
        engine.create_all(Base.metadata)
        with engine.session() as session:
            for number in range(ROWS):
                session.add(Customer(tenant_id=f"customer-{number}", id=1, name="x"))
                session.commit()

    made = []
    for name in ("second", "third"):
        body = {"name": name, "primary_endpoint": cluster.spare(name).dsn, "vnode_count": 256}
        answer = await client.post("/shards", json=body, headers={"Idempotency-Key": str(uuid.uuid4())})
        made.append(ok(answer, 201))
        assert ok(await client.get(answer.headers["Location"].removeprefix("/api/v1"))) == made[-1]
    assert [shard["vnodes_owned"] for shard in made] == [0, 0]
    first = ok(await client.get("/shards"))["items"][0]

    body = {"source_shard_id": first["name"], "target_shards": [{"shard_id": shard["id"]} for shard in made]}
    plan = ok(await client.post("/reshard/split", json={**body, "dry_run": True}))
    assert (plan["in_the_way"], len(plan["legs"])) == ([], 2)
    assert ok(await client.get("/reshard/jobs"))["items"] == []
    answer = await client.post("/reshard/split", json=body)
    job = ok(answer, 202)
    assert answer.headers["Location"] == f"/api/v1/reshard/jobs/{job['id']}"
    assert (job["status"], job["progress"], job["source_shards"]) == ("pending", 0.0, [first["id"]])
    assert ok(await client.post("/reshard/drain", json={"source_shard_id": first["id"]}), 409)["title"]
    ok(await client.delete(f"/shards/{made[0]['id']}"), 409)

    async with Resharder(cluster.url) as resharder:
        moving = asyncio.create_task(resharder.run(job["id"]))
        seen = await follow(client, job["id"], lambda each: each["status"] == "validation")
        assert [each["progress"] for each in seen] == sorted(each["progress"] for each in seen)
        await moving
    ok(await client.post(f"/reshard/jobs/{job['id']}/complete"))
    async with Resharder(cluster.url) as resharder:
        await resharder.run(job["id"])
    over = (await follow(client, job["id"], lambda each: each["status"] == "completed"))[-1]
    assert over["progress"] == 1.0
    assert 0 < over["keys_migrated"] == over["total_keys"] < ROWS
    assert over["completed_at"]
    assert over["error_message"] is None
    ok(await client.post(f"/reshard/jobs/{job['id']}/pause"), 409)
    shares = [shard["share_of_all"] for shard in ok(await client.get("/shards"))["items"]]
    assert sum(shares) == pytest.approx(1)
    assert all(share > 0.2 for share in shares)

    before = ok(await client.get(f"/shards/{first['id']}"))
    promoted = ok(await client.post(f"/shards/{first['name']}/promote", json={"budget_s": 20}))
    assert promoted["primary_endpoint"] == before["replicas"][0]
    ok(await client.post(f"/shards/{first['name']}/promote", json={}), 409)  # it has no replica now

    drained = ok(await client.post("/reshard/drain", json={"source_shard_id": "third", "retention_s": 0}), 202)
    async with Resharder(cluster.url) as resharder:
        await resharder.run(drained["id"])
    assert ok(await client.get(f"/reshard/jobs/{drained['id']}"))["status"] == "completed"
    assert ok(await client.delete("/shards/third"), 204) is None
    ok(await client.get("/shards/third"), 404)
    assert [job["id"] for job in ok(await client.get("/reshard/jobs?status=completed&limit=1"))["items"]] == [job["id"]]

    with ShardedEngine(cluster.url) as engine, engine.session() as session:
        assert len(session.scalars(select(Customer)).all()) == ROWS

    metrics = (await client.get(f"{client.headers['X-Metrics']}/metrics")).text
    assert 'shard_manager_operations_total{operation="shard.create",result="ok"} 2.0' in metrics
    assert 'route="/api/v1/shards/{shard_id}/promote"' in metrics
    told = [
        (entry.action, entry.result.partition(":")[0])
        for entry in audit_entries(cluster.url)
        if entry.kind == "outcome"
    ]
    assert told == [
        ("shard.create", "ok"),
        ("shard.create", "ok"),
        ("reshard.split.plan", "ok"),
        ("reshard.split", "ok"),
        ("reshard.drain", "InvalidTopology"),
        ("shard.delete", "InvalidTopology"),
        ("job.complete", "ok"),
        ("job.pause", "InvalidTopology"),
        ("shard.promote", "ok"),
        ("shard.promote", "InvalidTopology"),
        ("reshard.drain", "ok"),
        ("shard.delete", "ok"),
    ]


async def test_a_wait_ends_when_the_job_changes_and_with_the_token(cluster: LocalCluster) -> None:
    url = f"memory://wait-{uuid.uuid4().hex}"
    fill(url)
    fill_job(url)
    async with serving(url) as api:
        path = "/api/v1/reshard/jobs/1"
        seen = (await api.call("GET", path, role="viewer")).headers["ETag"]
        loop = asyncio.get_running_loop()

        async def wait(**more: Any) -> tuple[httpx.Response, float]:
            began = loop.time()
            answer = await api.call(
                "GET", path, params={"wait_s": 50}, headers={"If-None-Match": seen, **more}, role="viewer"
            )
            return answer, loop.time() - began

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await api.call("POST", f"{path}/pause")
        answer, _ = await asyncio.wait_for(waiting, 20)
        assert (answer.status_code, answer.json()["asked"]) == (200, "pause")
        seen = answer.headers["ETag"]
        answer, seconds = await wait(Authorization=f"Bearer {token('viewer', ttl_s=2)}")
        assert answer.status_code in (304, 401)
        assert seconds < 20
        assert (await api.call("GET", path, params={"wait_s": 61}, role="viewer")).status_code == 422


def test_a_manager_that_is_told_to_stop_finishes_what_it_was_asked_for() -> None:
    with LocalCluster(shards=1, replicas=0) as cluster, running(cluster.url) as (url, process):
        headers = {"Authorization": f"Bearer {token('admin')}"}
        spare = cluster.spare("spare")

        async def both() -> httpx.Response:
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
                body = {"name": "new", "primary_endpoint": spare.dsn}
                asking = asyncio.create_task(client.post("/api/v1/shards", json=body))
                await eventually_async(lambda: asyncio.to_thread(audit_entries, cluster.url), 30)
                process.send_signal(signal.SIGTERM)
                return await asking

        answer = asyncio.run(both())
        assert answer.status_code == 201, answer.text
        assert process.wait(40) == 0
        assert [entry.kind for entry in audit_entries(cluster.url)] == ["intent", "outcome"]


async def test_the_api_can_be_mounted_in_another_application() -> None:
    url = f"memory://mounted-{uuid.uuid4().hex}"
    fill(url)
    api = create_app(manager_settings(url))
    outer = FastAPI(lifespan=lambda _: api.router.lifespan_context(api))
    outer.mount("/control", api)
    headers = {"Authorization": f"Bearer {token('admin')}"}
    async with (
        outer.router.lifespan_context(outer),
        httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://outer", headers=headers) as client,
    ):
        assert ok(await client.get("/control/api/v1/shards/s1"))["id"] == "s1"
        ok(await client.get("/control/api/v1/shards/s9"), 404)
        assert (await client.get("/control/api/v1/shards", headers={"Authorization": ""})).status_code == 401


def test_the_command_refuses_to_serve_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHARDLIB_JWT_SECRET", "SHARDLIB_JWT_KEY_FILE", "SHARDLIB_JWKS_URL", "SHARDLIB_CATALOG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    command = ["manager", "serve", "--port", "0", "--metrics-port", "-1"]
    refused = CliRunner().invoke(cli, [*command, "--catalog", "etcd://127.0.0.1:1/shop"])
    assert "no key" in str(refused.exception)
    nowhere = CliRunner().invoke(cli, command)
    assert "catalog" in str(nowhere.exception)
    dev = CliRunner().invoke(cli, [*command, "--catalog", "etcd://127.0.0.1:1/shop", "--dev", "--host", "0.0.0.0"])
    assert "loopback" in str(dev.exception)
    shown = CliRunner().invoke(cli, [*command, "--catalog", "etcd://u:secret@h:1/shop", "--print-config"])
    assert shown.exit_code == 0
    assert "secret@" not in shown.output


async def test_servers_that_hang_keep_nobody_from_reading(etcd_url: str) -> None:
    fill(etcd_url)
    environment = {**os.environ, "SHARDLIB_CATALOG": etcd_url, "SHARDLIB_JWT_SECRET": SECRET}
    silent = socket.create_server(("127.0.0.1", 0), backlog=64)  # takes connections and says nothing
    headers = {"Authorization": f"Bearer {token('admin')}"}
    loop = asyncio.get_running_loop()
    with silent, started(environment) as url:
        async with httpx.AsyncClient(base_url=f"{url}/api/v1", headers=headers, timeout=60) as client:
            endpoint = f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/d"
            asking = [
                asyncio.create_task(
                    client.post("/shards", json={"name": f"new-{number}", "primary_endpoint": f"{endpoint}{number}"})
                )
                for number in range(24)
            ]
            await asyncio.sleep(1)
            began = loop.time()
            ok(await client.get("/shards"))
            seconds = loop.time() - began
            assert not any(each.done() for each in asking)
            assert seconds < 5
            for answer in await asyncio.gather(*asking):
                assert ok(answer, 503)["type"] == "urn:shardlib:problem:shard-unavailable"
