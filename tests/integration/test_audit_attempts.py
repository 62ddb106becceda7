"""Nothing is done without an entry of it: intents, outcomes, refusals, and logs that are away or full."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from shardlib.catalog import Catalog, open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument
from shardlib_ops import LocalCluster
from shardlib_ops.audit import (
    Actor,
    Audit,
    AuditStore,
    AuditUnavailable,
    Entry,
    find_heads,
    open_audit,
    verify,
    walk,
)
from tests.support.audits import ALICE
from tests.support.etcd_server import EtcdServer, etcd_server
from tests.support.eventually import eventually_async

ROOT = Path(__file__).parent.parent.parent
KEY = b"k" * 32


@pytest.fixture
def store(tmp_path: Path) -> AuditStore:
    return open_audit(f"file:{tmp_path / 'audit'}")


@pytest.fixture
async def audit(store: AuditStore) -> AsyncIterator[Audit]:
    async with Audit(store) as opened:
        yield opened


def entries(store: AuditStore) -> list[Entry]:
    found = [item for item in walk(store) if isinstance(item, Entry)]
    assert verify(found) == []
    return found


def file_of(store: AuditStore) -> Path:
    return Path(store.safe_url.removeprefix("file:"))


def keep_lines(path: Path, count: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:count]))


async def test_s07_22_the_intent_is_stored_before_the_body_and_the_outcome_after_it(
    audit: Audit, store: AuditStore
) -> None:
    async with audit.attempt(ALICE, "shard.create", "shard-04", {"vnode_count": 256}) as attempt:
        assert [entry.kind for entry in entries(store)] == ["intent"]
        attempt.result("made", shard_id="s4")
    intent, outcome = entries(store)
    assert (intent.kind, intent.of, intent.details, intent.result) == ("intent", None, {"vnode_count": "256"}, "")
    assert (outcome.kind, outcome.of, outcome.result) == ("outcome", intent.seq, "ok")
    assert outcome.details == {"result": "made", "shard_id": "s4"}


async def test_s07_23_an_entry_says_who_what_on_what_from_where_and_when(store: AuditStore) -> None:
    moments = iter([datetime(2026, 11, 24, 10, 30, tzinfo=timezone(timedelta(hours=2)))] * 3)
    async with Audit(store, clock=lambda: next(moments)) as audit:
        async with audit.attempt(ALICE, "shard.delete", "shard-01"):
            pass
        await audit.refused(Actor("mallory", address="203.0.113.9", request_id="r-2", via="http"),
                            "shard.delete", "shard-02", "forbidden: viewer")  # fmt: skip
    intent, outcome, refused = entries(store)
    for entry in (intent, outcome):
        assert (entry.subject, entry.role, entry.address, entry.request_id, entry.via) == (
            "alice", "admin", "192.0.2.7", "r-1", "http",
        )  # fmt: skip
        assert (entry.action, entry.target) == ("shard.delete", "shard-01")
        assert entry.at == "2026-11-24T08:30:00.000000Z"
    assert (refused.kind, refused.subject, refused.address) == ("refused", "mallory", "203.0.113.9")
    assert (refused.target, refused.result) == ("shard-02", "forbidden: viewer")


async def test_s07_23_a_line_end_makes_no_second_entry_and_no_secret_is_kept(audit: Audit, store: AuditStore) -> None:
    secret = "c4nary"
    target = f'shard\n{{"seq": 99}} postgresql://u:{secret}@h/d'
    endpoint = Dsn(f"postgresql://app:{secret}@db1/shop")
    with pytest.raises(InvalidArgument):  # noqa: PT012 - an attempt and its body
        async with audit.attempt(ALICE, "shard.create", target, {"endpoint": endpoint, "password": secret}) as attempt:
            attempt.result(endpoint=f"postgresql://app:{secret}@db1/shop")
            raise InvalidArgument("endpoint", f"postgresql://app:{secret}@db1/shop", "something else")
    intent, outcome = entries(store)
    assert intent.details == {"endpoint": "postgresql://app@db1/shop", "password": "***"}
    stored = file_of(store).read_bytes()
    assert secret.encode() not in stored
    assert stored.count(b"\n") == 2
    assert outcome.details == {"endpoint": "postgresql://app@db1/shop"}


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (InvalidArgument("name", "x y", "letters"), "InvalidArgument: name='x y' is not allowed: letters"),
        (RuntimeError("SELECT 'a secret'"), "RuntimeError"),
    ],
)
async def test_s07_22_a_body_that_fails_has_an_outcome(
    audit: Audit, store: AuditStore, error: Exception, result: str
) -> None:
    with pytest.raises(type(error)) as raised:
        async with audit.attempt(ALICE, "shard.create", "shard-04"):
            raise error
    assert raised.value is error
    assert [entry.result for entry in entries(store)] == ["", result]


async def test_s07_22_a_body_that_is_cancelled_has_an_outcome(audit: Audit, store: AuditStore) -> None:
    begun = asyncio.Event()

    async def work() -> None:
        async with audit.attempt(ALICE, "reshard.split", "shard-04"):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.wait_for(begun.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [entry.result for entry in entries(store)] == ["", "CancelledError"]


async def test_s07_22_an_outcome_that_is_being_written_is_not_cut_off(audit: Audit, store: AuditStore) -> None:
    """However often the task is cancelled meanwhile."""
    import threading

    held, free = threading.Event(), threading.Event()
    append = store.append

    async def work() -> None:
        async with audit.attempt(ALICE, "shard.create", "shard-04"):

            def slow(new: object) -> Entry:
                held.set()
                assert free.wait(20)
                return append(new)  # type: ignore[arg-type]

            store.append = slow  # type: ignore[method-assign]

    task = asyncio.create_task(work())
    assert await asyncio.to_thread(held.wait, 20)
    task.cancel()
    over, _ = await asyncio.wait([task], timeout=0.1)
    task.cancel()
    assert not over
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    assert [entry.kind for entry in entries(store)] == ["intent", "outcome"]


async def test_many_tasks_of_a_process_take_their_turns(audit: Audit, store: AuditStore) -> None:
    async def work(number: int) -> None:
        async with audit.attempt(ALICE, "shard.create", f"shard-{number}"):
            await asyncio.to_thread(int)

    async with asyncio.TaskGroup() as tasks:
        for number in range(40):
            tasks.create_task(work(number))
    found = entries(store)
    assert len(found) == 80
    intents = {entry.seq: entry.target for entry in found if entry.kind == "intent"}
    assert all(entry.target == intents[entry.of or 0] for entry in found if entry.kind == "outcome")


async def test_a_log_that_hangs_is_given_up_and_what_waits_behind_it_is_never_written(store: AuditStore) -> None:
    import threading

    free, append, taken = threading.Event(), store.append, []

    def hanging(new: object) -> Entry:
        taken.append(new)
        assert free.wait(20)
        return append(new)  # type: ignore[arg-type]

    store.append = hanging  # type: ignore[method-assign]
    ran = False
    async with Audit(store, timeout_s=0.2) as audit:
        for _ in range(3):
            with pytest.raises(AuditUnavailable, match=r"no answer within 0\.2 s"):
                async with audit.attempt(ALICE, "shard.create", "shard-04"):
                    ran = True
        free.set()
    assert not ran
    assert len(taken) == 1


async def test_a_log_that_is_closed_writes_what_it_was_given_before(store: AuditStore) -> None:
    audit = Audit(store)
    writing = [asyncio.create_task(audit.refused(ALICE, "login", str(number), "bad token")) for number in range(20)]
    await asyncio.sleep(0)
    await audit.close()
    written = await asyncio.gather(*writing)
    assert [entry.target for entry in entries(store)] == [entry.target for entry in written]


async def test_a_log_that_was_closed_takes_nothing(store: AuditStore) -> None:
    audit = Audit(store)
    await audit.close()
    await audit.close()
    with pytest.raises(AuditUnavailable, match="closed"):
        await audit.refused(ALICE, "login", "", "bad token")


@pytest.mark.parametrize("how", ["limit", "disk"])
def test_s07_22_nothing_is_done_while_the_disk_is_full(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.support.audit_full", str(folder / "audit"), how]
    if how == "disk":
        mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"', str(folder)]
        if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], check=False).returncode != 0:
            pytest.skip("no file system can be mounted here")
        command = [*mounted, *command]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["reason"] == ("File too large" if how == "limit" else "No space left on device")
    assert told["ran_while_full"] == 0
    assert told["again_done"] == [False] * 3
    assert told["ran"] == told["intents"] > 5
    assert told["outcomes"] == told["ran"] - told["first_done"]
    assert told["entries_at_the_end"] == told["entries_while_full"] + 2, "with room again it goes on"
    assert told["findings"] == []


@pytest.fixture
def full_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path / "etcd", "--quota-backend-bytes", "300000") as server:
        yield server


async def test_s07_22_nothing_is_done_while_etcd_has_no_room(full_etcd: EtcdServer) -> None:
    with closing(open_catalog(f"etcd://{full_etcd.endpoint}/shop")) as catalog:
        async with Audit(open_audit("catalog:", catalog, timeout_s=1)) as audit:
            ran = 0
            with pytest.raises(AuditUnavailable, match="space") as raised:  # noqa: PT012 - how far it comes matters
                for _ in range(1000):
                    async with audit.attempt(ALICE, "shard.create", "x", {f"n{i}": "x" * 900 for i in range(60)}):
                        ran += 1
            before = ran
            with pytest.raises(AuditUnavailable, match="space") as again:
                async with audit.attempt(ALICE, "shard.create", "x"):
                    ran += 1
            assert (ran, again.value.done) == (before, False)
            stored = await asyncio.to_thread(entries, audit.store)
            assert sum(entry.kind == "intent" for entry in stored) == before
            assert sum(entry.kind == "outcome" for entry in stored) == before - raised.value.done


@pytest.mark.parametrize("where", ["etcd", "PostgreSQL"])
async def test_s07_22_nothing_is_done_while_the_server_of_the_log_is_away(where: str) -> None:
    async with LocalCluster(shards=1, bootstrap=False) as cluster:
        catalog: Catalog | None = None
        if where == "etcd":
            catalog = open_catalog(f"etcd://127.0.0.1:{cluster.etcd[0].port}/shop", timeout_s=2)
        url = "catalog:" if catalog else cluster.servers[0].dsn
        async with Audit(open_audit(url, catalog, timeout_s=3)) as audit:
            ran = []
            async with audit.attempt(ALICE, "shard.create", "a"):
                ran.append("a")
            server = cluster.etcd[0] if catalog else cluster.servers[0]
            with pytest.raises(AuditUnavailable) as raised:  # noqa: PT012 - an attempt and its body
                async with audit.attempt(ALICE, "shard.create", "b"):
                    ran.append("b")
                    await asyncio.to_thread(server.kill)
            assert raised.value.done, "it is over, and nobody could write that"
            with pytest.raises(AuditUnavailable) as raised:
                async with audit.attempt(ALICE, "shard.create", "c"):
                    ran.append("c")
            assert not raised.value.done
            with pytest.raises(AuditUnavailable):
                await audit.refused(ALICE, "login", "", "bad token")
            assert ran == ["a", "b"]
            await asyncio.to_thread(server.start)
            async with audit.attempt(ALICE, "shard.create", "d"):
                ran.append("d")
            stored = await asyncio.to_thread(entries, audit.store)
            assert [(one.kind, one.target) for one in stored if one.target in ("a", "d")] == [
                ("intent", "a"), ("outcome", "a"), ("intent", "d"), ("outcome", "d"),
            ]  # fmt: skip
        if catalog is not None:
            await asyncio.to_thread(catalog.close)


async def test_s07_24_heads_are_published_at_a_beat_and_after_entries(
    audit: Audit, store: AuditStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shardlib.ops.audit.head")

    def published() -> list[int]:
        return [one.head.seq for one in find_heads(caplog.text) if one.signed_by(KEY)]

    async def until(numbers: list[int]) -> None:
        async def seen() -> bool:
            return published() == numbers

        await eventually_async(seen, 20, f"the heads {numbers} are in the log")

    await audit.refused(ALICE, "login", "", "bad token")
    publishing = asyncio.create_task(audit.publish_heads(KEY, every_s=1000, every_entries=4))
    await until([1])
    for _ in range(4):
        await audit.refused(ALICE, "login", "", "bad token")
    await until([1, 5])
    publishing.cancel()
    beating = asyncio.create_task(audit.publish_heads(KEY, every_s=0.05, every_entries=1000))
    await until([1, 5, 5])
    await audit.refused(ALICE, "login", "", "bad token")
    await until([1, 5, 5, 6])
    await asyncio.wait([beating], timeout=0.2)
    assert published() == [1, 5, 5, 6], "a head that was logged is not logged again"
    beating.cancel()
    # What was published finds the tail that is cut.
    keep_lines(file_of(store), 4)
    assert [(one.kind, one.seq) for one in verify(walk(store), [caplog.text], KEY)] == [("truncated", 5)] * 2


async def test_s07_24_publishing_goes_on_when_the_log_was_away(
    audit: Audit, store: AuditStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shardlib.ops.audit")
    await audit.refused(ALICE, "login", "", "bad token")
    head, failures = store.head, iter([True, True])

    def away() -> object:
        if next(failures, False):
            raise AuditUnavailable(store.safe_url, "away")
        return head()

    store.head = away  # type: ignore[method-assign, assignment]
    publishing = asyncio.create_task(audit.publish_heads(KEY, every_s=0.05))

    async def seen() -> bool:
        return any(find_heads(caplog.text))

    await eventually_async(seen, 20, "a head is in the log")
    assert caplog.text.count("no head of the audit log is published") == 2
    publishing.cancel()
    with pytest.raises(InvalidArgument):
        await audit.publish_heads(b"short")
