"""Tokens that are denied: at once for every process, and what happens while the catalog is away (line 25)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from shardlib.catalog import Catalog, open_catalog
from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib_ops.auth import (
    Denied,
    Identity,
    Role,
    Unauthenticated,
    Verifier,
    allow,
    denied_entries,
    deny,
    issue_token,
)
from shardlib_ops.auth.denied import DOCUMENT, ENTRIES_MAX
from tests.support.etcd_server import EtcdServer, etcd_server
from tests.support.eventually import eventually_async
from tests.support.tokens import auth

ALICE = Identity("alice", Role.ADMIN, "token-1", 0.0)
BOB = Identity("bob", Role.ADMIN, "token-2", 0.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def catalog(etcd_url: str) -> Iterator[Catalog]:
    found = open_catalog(etcd_url)
    yield found
    found.close()


async def refused(denied: Denied, identity: Identity) -> str | None:
    found = None
    try:
        await denied.check(identity)
    except Unauthenticated as error:
        found = error
    if found is None:
        return None
    assert found.unavailable == (found.reason_code != "denied")
    return found.reason_code


async def test_s07_25_a_denied_token_counts_no_more_in_another_process(etcd_url: str, catalog: Catalog) -> None:
    """Within seconds by the real clock; the other catalog is a client of its own, as another process has it."""
    other = open_catalog(etcd_url)
    denied = Denied(other, refresh_s=0.5)
    verifier = Verifier.from_settings(auth(), denied=denied)
    tokens = [issue_token(auth(), subject=name, role="admin", ttl_s=60, now=time.time()) for name in ("a", "a", "b")]
    identities = [await verifier.verify(token) for token in tokens]

    async def out(token: str) -> bool:
        try:
            await verifier.verify(token)
        except Unauthenticated as error:
            return error.reason_code == "denied"
        return False

    await asyncio.to_thread(deny, catalog, token_id=identities[0].token_id, now=time.time())
    await eventually_async(lambda: out(tokens[0]), 10, "the token is denied")
    with pytest.raises(Unauthenticated):
        await verifier.still(identities[0])
    assert not await out(tokens[1])
    assert not await out(tokens[2])
    await asyncio.to_thread(deny, catalog, subject="a", now=time.time())
    await eventually_async(lambda: out(tokens[1]), 10, "the subject is denied")
    assert not await out(tokens[2])
    assert await asyncio.to_thread(allow, catalog, subject="a")
    await eventually_async(lambda: refused_no_more(verifier, tokens[1]), 10, "the subject may come again")
    await verifier.aclose()
    other.close()


async def refused_no_more(verifier: Verifier, token: str) -> bool:
    try:
        await verifier.verify(token)
    except Unauthenticated:
        return False
    return True


def test_entries_go_when_no_such_token_can_be_valid(catalog: Catalog) -> None:
    deny(catalog, token_id="short", now=100.0, until=200.0)
    deny(catalog, subject="bob", now=100.0, until=200.0)
    deny(catalog, token_id="long", now=150.0)
    deny(catalog, token_id="long", now=201.0)
    found = denied_entries(catalog)
    assert [(each.token_id, each.subject, each.at) for each in found] == [
        (None, "bob", 100.0), ("long", None, 201.0),
    ]  # fmt: skip
    assert not allow(catalog, token_id="short")
    assert allow(catalog, token_id="long")
    assert len(denied_entries(catalog)) == 1


def test_many_at_one_time_lose_nothing(catalog: Catalog) -> None:
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda number: deny(catalog, token_id=f"t{number}", now=1.0), range(12)))
    assert {each.token_id for each in denied_entries(catalog)} == {f"t{number}" for number in range(12)}


@pytest.mark.parametrize(
    ("token_id", "subject"), [(None, None), ("a", "b"), ("", None), (None, ""), ("a\n", None), (None, "x" * 201)]
)
def test_what_cannot_be_denied(token_id: str | None, subject: str | None, catalog: Catalog) -> None:
    for call in (deny, allow):
        with pytest.raises(InvalidArgument):
            call(catalog, token_id=token_id, subject=subject, **({"now": 1.0} if call is deny else {}))
    assert denied_entries(catalog) == ()


def test_the_list_has_a_bound() -> None:
    catalog = open_catalog("memory://denied-bound")
    deny(catalog, subject="first", now=1.0)
    entries = [{"token_id": f"t{number}", "at": 1.0} for number in range(ENTRIES_MAX)]
    found = catalog.read_document(DOCUMENT)
    assert found is not None
    data = msgspec.json.encode({"format": 1, "denied": entries})
    assert len(data) < 1_000_000
    catalog.write_document(DOCUMENT, data, expected=found.revision)
    with pytest.raises(InvalidArgument, match="at most"):
        deny(catalog, subject="one more", now=1.0)
    deny(catalog, token_id="t7", now=2.0)
    catalog.close()


@pytest.mark.parametrize(
    "data", [b"rubbish", b"{}x", b'{"format": 2}', b'{"format": 1, "denied": [{"at": 1, "x": 1}]}']
)
async def test_s07_17_a_list_that_cannot_be_read_lets_nobody_in(data: bytes, catalog: Catalog) -> None:
    catalog.write_document(DOCUMENT, data, expected=None)
    with pytest.raises(InvalidTopology):
        denied_entries(catalog)
    denied = Denied(catalog)
    assert await refused(denied, ALICE) == "denied-list-unavailable"
    await denied.aclose()


async def test_s07_25_while_the_catalog_is_away_the_last_list_counts_for_its_time(tmp_path: Path) -> None:
    with etcd_server(tmp_path / "etcd") as server:
        await _away(server)


async def _away(server: EtcdServer) -> None:
    catalog = open_catalog(f"etcd://{server.endpoint}/denied", timeout_s=1)
    clock = Clock()
    denied = Denied(catalog, refresh_s=2, stale_max_s=600, monotonic=clock)
    unread = Denied(catalog, refresh_s=2, stale_max_s=600, monotonic=clock)
    try:
        deny(catalog, subject="bob", now=1.0)
        assert [await refused(denied, each) for each in (ALICE, BOB)] == [None, "denied"]
        server.pause()
        clock.now += 100
        assert [await refused(denied, each) for each in (ALICE, BOB)] == [None, "denied"]
        started = time.monotonic()
        for _ in range(50):
            assert await refused(denied, ALICE) is None
        assert time.monotonic() - started < 10, "a catalog that is known to be away slows nobody down"
        assert await refused(unread, ALICE) == "denied-list-unavailable", "without any list nobody comes in"
        clock.now += 501
        assert await refused(denied, ALICE) == "denied-list-unavailable"
        server.resume()
        clock.now += 100

        async def back() -> bool:
            clock.now += 2
            return [await refused(denied, each) for each in (ALICE, BOB)] == [None, "denied"]

        await eventually_async(back, 30, "the list is read again")
    finally:
        server.resume()
        await denied.aclose()
        await unread.aclose()
        catalog.close()
