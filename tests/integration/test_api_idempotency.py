"""`Idempotency-Key`: one effect and one answer, whatever becomes of the managers."""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from shardlib import ShardedEngine
from shardlib.catalog import Catalog, open_catalog
from shardlib_ops import LocalCluster
from shardlib_ops.api.idempotency import ENTRIES_MAX, IdempotencyKeys, Kept, Record, request_hash
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Status
from shardlib_ops.serving.problem import Problem
from tests.support.eventually import eventually_async
from tests.support.manager_runner import PAUSED, running
from tests.support.managers import Api, audit_entries, fill, serving, token
from tests.support.models import Base

SHARDS = "/api/v1/shards"
SPLIT = "/api/v1/reshard/split"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as made:
        with ShardedEngine(made.url) as engine:
            engine.create_all(Base.metadata)
        yield made


@pytest.fixture
async def api(cluster: LocalCluster) -> AsyncIterator[Api]:
    async with serving(cluster.url) as made:
        yield made


def fresh(cluster: LocalCluster) -> tuple[str, dict[str, Any]]:
    """A body that makes a shard on an empty server, and the shard's name."""
    name = f"shard-{uuid.uuid4().hex[:8]}"
    return name, {"name": name, "primary_endpoint": cluster.spare(name).dsn, "vnode_count": 16}


async def names(api: Api) -> list[str]:
    found = (await api.call("GET", SHARDS, role="viewer")).json()["items"]
    return [shard["name"] for shard in found]


async def test_s07_21_the_same_again_has_the_same_answer_and_no_second_effect(api: Api, cluster: LocalCluster) -> None:
    name, body = fresh(cluster)
    first = await api.call("POST", SHARDS, json=body, key="key-1")
    assert first.status_code == 201, first.text
    assert first.headers["Location"] == f"{SHARDS}/{first.json()['id']}"
    # Written otherwise, it is the same.
    again = await api.call("POST", SHARDS, json={**dict(reversed(body.items())), "replicas": []}, key="key-1")
    assert (again.status_code, again.content, again.headers["Location"]) == (
        201,
        first.content,
        first.headers["Location"],
    )
    assert (await names(api)).count(name) == 1
    # Without the key it would be refused.
    assert (await api.call("POST", SHARDS, json=body)).status_code == 422
    outcomes = [entry for entry in api.entries() if entry.kind == "outcome" and entry.target == name]
    assert [entry.result.partition(":")[0] for entry in outcomes] == ["ok", "ok", "InvalidArgument"]
    assert [entry.details.get("idempotency_key") for entry in outcomes] == [None, None, None]
    assert outcomes[1].details["result"] == "the answer of an earlier request"


async def test_s07_21_another_request_with_the_key_is_refused(api: Api, cluster: LocalCluster) -> None:
    name, body = fresh(cluster)
    assert (await api.call("POST", SHARDS, json=body, key="key-2")).status_code == 201
    for path, other in (
        (SHARDS, {**body, "name": "other-name"}),
        (SHARDS, {**body, "vnode_count": 17}),
        (SPLIT, {"source_shard_id": "s1", "target_shards": [{"shard_id": name}]}),
    ):
        answer = await api.call("POST", path, json=other, key="key-2")
        assert (answer.status_code, answer.json()["type"]) == (422, "urn:shardlib:problem:invalid")
    assert "other-name" not in await names(api)


async def test_s07_21_a_key_belongs_to_its_subject(api: Api, cluster: LocalCluster) -> None:
    (one, first), (two, second) = fresh(cluster), fresh(cluster)
    assert (await api.call("POST", SHARDS, json=first, key="key-3", subject="alice")).status_code == 201
    assert (await api.call("POST", SHARDS, json=second, key="key-3", subject="bob")).status_code == 201
    assert {one, two} <= set(await names(api))


async def test_s07_21_a_refusal_is_an_answer_too(api: Api) -> None:
    body = {"source_shard_id": "nobody", "target_shards": [{"shard_id": "s1"}]}
    answers = [await api.call("POST", SPLIT, json=body, key="key-4") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].json()["detail"] == answers[1].json()["detail"]


async def test_s07_21_two_managers_do_it_once(cluster: LocalCluster) -> None:
    """Ten requests at the same moment, at two managers: one shard, one answer."""
    name, body = fresh(cluster)
    async with serving(cluster.url) as one, serving(cluster.url) as other:
        answers = await asyncio.gather(
            *((one, other)[number % 2].call("POST", SHARDS, json=body, key="key-5") for number in range(10))
        )
        told = {answer.content for answer in answers if answer.status_code == 201}
        assert len(told) == 1
        # Who did not wait long enough is told to ask again, and gets it then.
        assert {answer.status_code for answer in answers} <= {201, 409}
        again = await other.call("POST", SHARDS, json=body, key="key-5")
        assert {again.content} == told
        assert (await names(one)).count(name) == 1


async def repeated(api: Api, path: str, body: dict[str, Any] | None, key: str) -> httpx.Response:
    """Ask until the dead manager is not believed to be at work any more."""

    async def asked() -> httpx.Response | None:
        answer = await api.call("POST", path, json=body, key=key, subject="the-caller")
        return None if answer.status_code == 409 and "still at work" in answer.text else answer

    found = await eventually_async(asked, 60, every_s=0.2)
    assert found is not None
    return found


def ask_and_lose(cluster: LocalCluster, die: str, path: str, body: dict[str, Any] | None, key: str) -> None:
    """Ask a manager that is killed before it answers."""
    with running(cluster.url, die=die) as (url, process):
        headers = {"Authorization": f"Bearer {token('admin', 'the-caller')}", "Idempotency-Key": key}
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{url}{path}", json=body, headers=headers, timeout=60)
        assert process.wait(20) == -9


@pytest.mark.parametrize("die", ["before the effect", "after the effect"])
async def test_s07_21_a_shard_is_made_once_though_its_manager_is_killed(
    api: Api, cluster: LocalCluster, die: str
) -> None:
    name, body = fresh(cluster)
    key = f"killed-{uuid.uuid4().hex}"
    await asyncio.to_thread(ask_and_lose, cluster, die, SHARDS, body, key)
    assert (name in await names(api)) == (die == "after the effect")
    answer = await repeated(api, SHARDS, body, key)
    assert answer.status_code == 201, answer.text
    assert answer.json()["name"] == name
    assert (await repeated(api, SHARDS, body, key)).content == answer.content
    assert (await names(api)).count(name) == 1
    # The intent of the killed manager stays without an outcome: nobody could say what became of it.
    kinds = [entry.kind for entry in api.entries() if entry.target == name]
    assert kinds[:3] == ["intent", "intent", "outcome"]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def test_s07_21_a_manager_that_was_paused_and_wakes_up_does_it_no_second_time(
    api: Api, cluster: LocalCluster
) -> None:
    name, body = fresh(cluster)
    key = f"paused-{uuid.uuid4().hex}"
    with running(cluster.url, die=PAUSED) as (url, process):
        headers = {"Authorization": f"Bearer {token('admin', 'the-caller')}", "Idempotency-Key": key}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=90) as client:
            first = asyncio.create_task(client.post(SHARDS, json=body))
            await eventually_async(lambda: asyncio.to_thread(is_stopped, process.pid), 60)
            answer = await repeated(api, SHARDS, body, key)
            assert answer.status_code == 201, answer.text
            process.send_signal(signal.SIGCONT)
            late = await first
            assert late.status_code in (201, 422), late.text
            # What it found is not kept instead of what was answered.
            again = await client.post(SHARDS, json=body)
            assert (again.status_code, again.content) == (201, answer.content)
    assert (await names(api)).count(name) == 1


@pytest.mark.parametrize("die", ["before the effect", "between shard and job", "after the effect"])
async def test_s07_21_a_job_is_made_once_though_its_manager_is_killed(
    api: Api, cluster: LocalCluster, die: str
) -> None:
    name, target = fresh(cluster)
    body = {"source_shard_id": "s1", "target_shards": [target]}
    key = f"killed-{uuid.uuid4().hex}"
    async with Manager(cluster.url) as manager:
        jobs = len(await manager.list_jobs())
        await asyncio.to_thread(ask_and_lose, cluster, die, SPLIT, body, key)
        assert (name in await names(api)) == (die != "before the effect")
        answer = await repeated(api, SPLIT, body, key)
        assert answer.status_code == 202, answer.text
        made = (await manager.list_jobs())[jobs:]
        assert [job.id for job in made] == [answer.json()["id"]]
        assert answer.json()["target_shards"] == [(await manager.get_shard(name)).id]
        assert (await repeated(api, SPLIT, body, key)).content == answer.content
        assert (await names(api)).count(name) == 1
        await over(manager, cluster, made[0].id)


async def over(manager: Manager, cluster: LocalCluster, job_id: int) -> None:
    """Take a job back, so that the next test may have the shard."""
    from shardlib_ops import Resharder

    await manager.cancel(job_id)
    async with Resharder(cluster.url) as resharder:
        assert (await resharder.run(job_id)).status is Status.CANCELLED


async def test_s07_21_a_step_is_not_asked_again_after_others_have_asked(api: Api, cluster: LocalCluster) -> None:
    name, target = fresh(cluster)
    assert name
    async with Manager(cluster.url) as manager:
        job = await manager.split("s2", targets=[target])
        path = f"/api/v1/reshard/jobs/{job.id}/pause"
        key = f"killed-{uuid.uuid4().hex}"
        await asyncio.to_thread(ask_and_lose, cluster, "after the effect", path, None, key)
        await manager.resume(job.id)
        answer = await repeated(api, path, None, key)
        assert answer.status_code == 409
        assert "was asked to run since" in answer.json()["detail"]
        assert (await api.call("GET", f"/api/v1/reshard/jobs/{job.id}", role="viewer")).json()["asked"] == "run"
        await over(manager, cluster, job.id)


async def test_s07_21_a_promotion_is_brought_to_its_end_and_not_begun_again() -> None:
    with LocalCluster(shards=1, replicas=2, synchronous=True) as cluster:
        async with serving(cluster.url) as api:
            path, body = f"{SHARDS}/s1/promote", {"budget_s": 20}
            before = (await api.call("GET", f"{SHARDS}/s1", role="viewer")).json()
            # Nothing had been promoted yet: it is undone, and that is the answer from now on.
            await asyncio.to_thread(ask_and_lose, cluster, "within the promotion", path, body, "one")
            for _ in range(2):
                answer = await resumed(api, path, body, "one")
                assert answer.status_code == 409
                assert "has been undone" in answer.json()["detail"]
            assert (await api.call("GET", f"{SHARDS}/s1", role="viewer")).json() == before
            # It was done: the answer tells that, and the other replica is not promoted too.
            await asyncio.to_thread(ask_and_lose, cluster, "after the effect", path, body, "two")
            after = (await api.call("GET", f"{SHARDS}/s1", role="viewer")).json()
            assert after["primary_endpoint"] in before["replicas"]
            answer = await resumed(api, path, body, "two")
            assert (answer.status_code, answer.json()) == (200, after)
            assert (await api.call("GET", f"{SHARDS}/s1", role="viewer")).json() == after


async def resumed(api: Api, path: str, body: dict[str, Any], key: str) -> httpx.Response:
    """Ask until nobody is believed to be at work on the servers any more."""

    async def asked() -> httpx.Response | None:
        answer = await repeated(api, path, body, key)
        return None if "another manager is at work" in answer.text else answer

    found = await eventually_async(asked, 60, every_s=0.5)
    assert found is not None
    return found


# The store alone, in memory.


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def memory() -> Iterator[Catalog]:
    url = f"memory://keys-{uuid.uuid4().hex}"
    fill(url)
    with closing(open_catalog(url)) as opened:
        yield opened


async def nothing() -> dict[str, Any]:
    return {}


async def used(keys: IdempotencyKeys, subject: str, key: str, request: str, body: str) -> str:
    async with keys.claim(subject, key, request, nothing) as claim:
        if claim.answer is not None:
            return claim.answer.body
        await claim.keep(Kept(status=200, body=body))
        return body


async def test_an_answer_is_kept_for_its_time(memory: Catalog) -> None:
    clock = Clock()
    keys = IdempotencyKeys(memory, ttl_s=100, clock=clock)
    assert await used(keys, "alice", "k", "r", "one") == "one"
    clock.now += 99
    assert await used(keys, "alice", "k", "r", "two") == "one"
    with pytest.raises(Problem, match="another request"):
        await used(keys, "alice", "k", "other", "three")
    clock.now += 2
    assert await used(keys, "alice", "k", "other", "four") == "four"
    assert sum(found.data.count(b'"request"') for found in memory.list_documents("idempotency").values()) == 1


async def test_what_has_expired_takes_no_room_and_what_has_not_is_never_dropped(
    memory: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    keys = IdempotencyKeys(memory, ttl_s=100, clock=clock)
    record = Record(request="r", before={}, expires_at=clock.now + 100, answer=Kept(status=200, body="{}"))
    for number in range(ENTRIES_MAX):
        keys.put(f"aa{number}", record, None)
    with pytest.raises(Problem, match="too many"):
        keys.put("aa-more", record, None)
    assert keys.get("aa0") == record
    clock.now += 101
    keys.put("aa-more", Record(request="r", before={}, expires_at=clock.now + 1), None)
    assert keys.get("aa0") is None
    assert keys.get("aa-more") is not None


async def test_a_repetition_waits_for_the_request_that_is_at_work(memory: Catalog) -> None:
    keys = IdempotencyKeys(memory, wait_s=20)
    entered, release = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with keys.claim("alice", "k", "r", nothing) as claim:
            entered.set()
            await release.wait()
            await claim.keep(Kept(status=200, body="done"))

    working = asyncio.create_task(first())
    await entered.wait()
    second = asyncio.create_task(used(keys, "alice", "k", "r", "again"))
    await asyncio.sleep(0.3)
    assert not second.done()
    release.set()
    assert await second == "done"
    await working


async def test_a_repetition_that_has_waited_for_long_is_told_to_ask_again(memory: Catalog) -> None:
    keys = IdempotencyKeys(memory, wait_s=0.1)
    async with keys.claim("alice", "k", "r", nothing):
        began = time.monotonic()
        with pytest.raises(Problem, match="still at work") as refused:
            await used(keys, "alice", "k", "r", "again")
        assert time.monotonic() - began < 10
    assert refused.value.headers["Retry-After"]


async def test_what_was_begun_and_not_answered_is_told_to_be_looked_up(memory: Catalog) -> None:
    keys = IdempotencyKeys(memory)

    async def before() -> dict[str, Any]:
        return {"next_shard": 4}

    async with keys.claim("alice", "k", "r", before) as claim:
        assert not claim.interrupted  # and its answer is not kept
    async with keys.claim("alice", "k", "r", nothing) as claim:
        assert claim.interrupted
        assert claim.before == {"next_shard": 4}


def test_two_requests_are_told_apart_by_all_that_is_in_them() -> None:
    def hashed(method: str = "POST", path: str = "/a", **content: Any) -> str:
        return request_hash(method, path, content)

    assert hashed(a=1, b=2) == hashed(b=2, a=1)
    different: list[Callable[[], str]] = [
        hashed,
        lambda: hashed(a=1),
        lambda: hashed(a="1"),
        lambda: hashed(a=[1]),
        lambda: hashed(path="/b"),
        lambda: hashed(method="DELETE"),
    ]
    assert len({each() for each in different}) == len(different)


def test_the_log_of_a_cluster_is_whole_after_all_that(cluster: LocalCluster) -> None:
    assert audit_entries(cluster.url)
