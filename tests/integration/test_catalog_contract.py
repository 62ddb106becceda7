"""What every catalog does alike: memory, etcd, PostgreSQL."""

from __future__ import annotations

import gc
import pickle
import random
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardlib.catalog import Catalog, Conflict, open_catalog
from shardlib.catalog.decoded import find
from shardlib.catalog.store import Deadline
from shardlib.catalog.stored import StoredCatalog
from shardlib.errors import CatalogUnavailable, InvalidArgument, InvalidTopology
from shardlib.topology.codec import RETIRED_VERSIONS, ChunkKey
from tests.support.eventually import eventually
from tests.support.forks import in_child
from tests.support.topologies import PASSWORD, changed, facts, make_topology, one_range_moved, scattered_topology

BIG = 60
"""Shards whose topology does not fit into a head."""


@pytest.fixture(params=["memory", "etcd", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    found: str = request.getfixturevalue("etcd_url" if request.param == "etcd" else "database")
    return found


@pytest.fixture
def catalog(url: str) -> Iterator[StoredCatalog]:
    opened = open_catalog(url)
    assert isinstance(opened, StoredCatalog)
    yield opened
    opened.close()


@pytest.fixture
def other(url: str) -> Iterator[Catalog]:
    """A second client of the same catalog."""
    opened = open_catalog(url)
    yield opened
    opened.close()


def stored_chunks(catalog: StoredCatalog) -> set[ChunkKey]:
    return catalog._store.list_chunks(Deadline(5))


class TestPublishAndLoad:
    def test_an_empty_catalog_says_so(self, catalog: StoredCatalog) -> None:
        assert catalog.version() is None
        with pytest.raises(InvalidTopology, match="holds no topology"):
            catalog.load()

    @pytest.mark.parametrize("shards", [1, 3, BIG])
    def test_another_client_reads_what_was_published(self, catalog: StoredCatalog, other: Catalog, shards: int) -> None:
        topology = make_topology(shards)
        catalog.publish(topology, expected=None)
        assert other.version() == 1
        assert facts(other.load()) == facts(topology)

    def test_versions_follow_each_other(self, catalog: StoredCatalog, other: Catalog) -> None:
        topology = make_topology()
        catalog.publish(topology, expected=None)
        seen = other.load()
        for _ in range(5):
            topology = one_range_moved(topology)
            catalog.publish(topology, expected=topology.version - 1)
            seen = other.load(seen)
            assert facts(seen) == facts(topology)
        assert other.load(seen) is seen

    @pytest.mark.parametrize("expected", [None, 1, 3])
    def test_another_expected_version_is_a_conflict(self, catalog: StoredCatalog, expected: int | None) -> None:
        first = make_topology()
        catalog.publish(first, expected=None)
        second = changed(first)
        catalog.publish(second, expected=1)
        with pytest.raises(Conflict) as raised:
            catalog.publish(changed(first, version=9), expected=expected)
        assert (raised.value.expected, raised.value.found) == (expected, 2)
        assert facts(catalog.load()) == facts(second)

    def test_publishing_into_an_empty_catalog_needs_none_expected(self, catalog: StoredCatalog) -> None:
        with pytest.raises(Conflict) as raised:
            catalog.publish(make_topology(version=4), expected=3)
        assert raised.value.found is None

    def test_publishing_the_stored_topology_again_is_no_conflict(self, catalog: StoredCatalog) -> None:
        topology = make_topology()
        catalog.publish(topology, expected=None)
        catalog.publish(topology, expected=None)
        assert catalog.version() == 1

    def test_of_many_writers_one_wins_each_version(self, url: str) -> None:
        clients = [open_catalog(url) for _ in range(6)]
        base = make_topology(BIG)
        clients[0].publish(base, expected=None)
        wins: list[str] = []

        def write(client: Catalog) -> int:
            won = 0
            for _ in range(8):
                current = client.load()
                following = changed(current, moves=(), next_gate=current.next_gate + 1)
                try:
                    client.publish(following, expected=current.version)
                except Conflict:
                    continue
                wins.append(following.nonce)
                won += 1
            return won

        with ThreadPoolExecutor(len(clients)) as pool:
            total = sum(pool.map(write, clients))
        final = clients[0].load()
        assert total == len(set(wins)) == final.version - 1
        assert final.next_gate == base.next_gate + total, "a lost update"
        for client in clients:
            client.close()

    @pytest.mark.parametrize(("field", "value"), [("cluster_id", "other"), ("hash_function", "xxhash")])
    def test_a_cluster_keeps_its_id_and_hash_function(self, catalog: StoredCatalog, field: str, value: str) -> None:
        topology = make_topology()
        catalog.publish(topology, expected=None)
        with pytest.raises(InvalidTopology, match=value):
            catalog.publish(changed(topology, **{field: value}), expected=1)

    def test_what_cannot_follow_is_refused(self, catalog: StoredCatalog) -> None:
        topology = make_topology(version=3)
        with pytest.raises(InvalidArgument, match=r"topology\.version=3"):
            catalog.publish(topology, expected=3)
        with pytest.raises(InvalidArgument, match=r"topology\.nonce"):
            catalog.publish(topology.evolve(nonce=""), expected=None)


class TestSharing:
    def test_catalogs_of_a_process_hold_one_topology_of_each_content(self, url: str, catalog: StoredCatalog) -> None:
        first = make_topology(BIG)
        catalog.publish(first, expected=None)
        readers = [open_catalog(url) for _ in range(3)]
        seen = [reader.load() for reader in readers]
        assert seen[0] is seen[1] is seen[2] is not first
        assert facts(seen[0]) == facts(first)
        catalog.publish(changed(first), expected=1)
        newer = readers[0].load(seen[0])
        assert newer.version == 2
        assert newer is not seen[0]
        assert readers[1].load(seen[1]) is newer
        for reader in readers:
            reader.close()

    def test_a_topology_that_nobody_holds_is_let_go(self, url: str, catalog: StoredCatalog) -> None:
        catalog.publish(make_topology(), expected=None)
        reader = open_catalog(url)
        reader.load()
        record = catalog._store.read_head(Deadline(5))
        assert record is not None
        assert find(record.data) is not None
        reader.close()
        del reader
        gc.collect()
        assert find(record.data) is None


class TestChunks:
    def test_moving_one_range_writes_and_reads_one_chunk(
        self, catalog: StoredCatalog, other: Catalog, rng: random.Random
    ) -> None:
        first = scattered_topology(rng, 200, 256)
        catalog.publish(first, expected=None)
        before = stored_chunks(catalog)
        known = other.load()
        second = one_range_moved(first)
        catalog.publish(second, expected=1)
        assert len(stored_chunks(catalog) - before) == 1
        assert isinstance(other, StoredCatalog)
        read: list[ChunkKey] = []
        get = other._store.get_chunks

        def counted(keys: set[ChunkKey], deadline: Deadline) -> dict[ChunkKey, bytes]:
            read.extend(keys)
            return get(keys, deadline)

        other._store.get_chunks = counted  # type: ignore[method-assign, assignment]
        assert facts(other.load(known)) == facts(second)
        assert len(read) == 1

    def test_old_chunks_are_deleted_after_some_versions(self, catalog: StoredCatalog, rng: random.Random) -> None:
        topology = scattered_topology(rng, 200, 256)
        catalog.publish(topology, expected=None)
        first = stored_chunks(catalog)
        for turn in range(RETIRED_VERSIONS + 2):
            source, target = ("s1", "s2") if turn % 2 == 0 else ("s2", "s1")
            topology = one_range_moved(topology, source, target)
            catalog.publish(topology, expected=topology.version - 1)
        kept = stored_chunks(catalog)
        assert first - kept, "nothing was deleted"
        assert len(kept) <= len(first) + RETIRED_VERSIONS + 2
        assert facts(catalog.load()) == facts(topology)

    def test_what_a_dead_publisher_left_is_swept(self, catalog: StoredCatalog) -> None:
        topology = make_topology(BIG)
        orphan = ChunkKey((5).to_bytes(8, "big") + b"12345678", b"0123456789abcdef")
        coming = ChunkKey((99).to_bytes(8, "big") + b"12345678", b"0123456789abcdef")
        catalog._store.put_chunks({orphan: b"left behind", coming: b"may yet be published"}, Deadline(5))
        catalog.publish(topology, expected=None)
        assert orphan in stored_chunks(catalog)
        catalog.publish(changed(topology, version=16), expected=1)
        assert stored_chunks(catalog) & {orphan, coming} == {coming}
        assert facts(catalog.load())["version"] == 16

    def test_who_lost_a_race_takes_its_chunks_away(self, url: str, catalog: StoredCatalog, other: Catalog) -> None:
        first = make_topology(BIG)
        catalog.publish(first, expected=None)
        winner, loser = changed(first), one_range_moved(first)
        store = catalog._store
        swap = store.swap_head

        def late(*arguments: object) -> bool:
            other.publish(winner, expected=1)
            return swap(*arguments)  # type: ignore[arg-type]

        store.swap_head = late  # type: ignore[method-assign]
        before = stored_chunks(catalog)
        with pytest.raises(Conflict):
            catalog.publish(loser, expected=1)
        assert stored_chunks(catalog) == before
        assert facts(other.load()) == facts(winner)

    def test_a_reader_of_an_old_head_reads_the_new_one(self, catalog: StoredCatalog, other: Catalog) -> None:
        first, second = make_topology(BIG), make_topology(BIG + 1)
        catalog.publish(first, expected=None)
        assert isinstance(other, StoredCatalog)
        store = other._store
        get = store.get_chunks

        def overtaken(keys: set[ChunkKey], deadline: Deadline) -> dict[ChunkKey, bytes]:
            store.get_chunks = get  # type: ignore[method-assign]
            catalog.publish(second.evolve(nonce="two"), expected=1)
            store.drop_chunks(keys, deadline)
            return get(keys, deadline)

        store.get_chunks = overtaken  # type: ignore[method-assign, assignment]
        assert other.load().nonce == "two"

    def test_a_missing_chunk_is_damage(self, catalog: StoredCatalog, other: Catalog) -> None:
        catalog.publish(make_topology(BIG), expected=None)
        catalog._store.drop_chunks(list(stored_chunks(catalog))[:1], Deadline(5))
        with pytest.raises(InvalidTopology, match="lacks a chunk"):
            other.load()


class TestWatch:
    def test_every_client_hears_of_the_newest_version(self, catalog: StoredCatalog, other: Catalog) -> None:
        topology = make_topology()
        catalog.publish(topology, expected=None)
        heard: list[int] = []
        alive: list[bool] = []
        watch = other.watch(heard.append, alive.append)
        eventually(lambda: alive and heard, 5, "the watch begins")
        for _ in range(20):
            topology = changed(topology)
            catalog.publish(topology, expected=topology.version - 1)
        eventually(lambda: heard[-1] == topology.version, 2, "the last version is heard")
        assert heard == sorted(set(heard))
        assert all(alive)
        began = time.monotonic()
        watch.close()
        watch.close()
        assert time.monotonic() - began < 5, "the threads are told to end, and not left to their next poll"
        catalog.publish(changed(topology), expected=topology.version)
        assert catalog.version() == topology.version + 1
        assert heard[-1] == topology.version, "a callback after close()"

    def test_a_watch_of_an_empty_catalog_hears_of_the_first_version(
        self, catalog: StoredCatalog, other: Catalog
    ) -> None:
        heard: list[int] = []
        alive: list[bool] = []
        watch = other.watch(heard.append, alive.append)
        eventually(lambda: alive, 5, "the watch is alive")
        catalog.publish(make_topology(), expected=None)
        eventually(lambda: heard == [1], 5, "version 1 is heard")
        watch.close()

    def test_a_change_is_loaded_without_reading_the_head_again(self, catalog: StoredCatalog, other: Catalog) -> None:
        topology = make_topology()
        catalog.publish(topology, expected=None)
        loaded: list[int] = []
        reads = 0
        assert isinstance(other, StoredCatalog)
        alive = threading.Event()
        watch = other.watch(lambda version: loaded.append(other.load().version), lambda on: alive.set())
        eventually(lambda: loaded == [1] and alive.is_set(), 5, "the first is loaded")
        read = other._store.read_head

        def counted(deadline: Deadline) -> object:
            nonlocal reads
            reads += 1
            return read(deadline)

        other._store.read_head = counted  # type: ignore[method-assign, assignment]
        catalog.publish(changed(topology), expected=1)
        eventually(lambda: loaded[-1] == 2, 5, "the second is loaded")
        assert reads == 0
        watch.close()

    def test_a_fault_of_a_callback_is_logged_and_the_watch_goes_on(
        self, catalog: StoredCatalog, caplog: pytest.LogCaptureFixture
    ) -> None:
        topology = make_topology()
        catalog.publish(topology, expected=None)
        heard: list[int] = []

        def bad(version: int) -> None:
            heard.append(version)
            raise ValueError("on purpose")

        watch = catalog.watch(bad, lambda alive: None)
        eventually(lambda: heard == [1], 5, "the first is heard")
        catalog.publish(changed(topology), expected=1)
        eventually(lambda: heard == [1, 2], 5, "the second is heard")
        watch.close()
        assert "on purpose" in caplog.text

    def test_the_poll_finds_what_the_stream_does_not_tell(self, url: str, catalog: StoredCatalog) -> None:
        topology = make_topology()
        catalog.publish(topology, expected=None)
        deaf = open_catalog(url, poll_s=0.2)
        assert isinstance(deaf, StoredCatalog)

        def silent(after: int, stop: threading.Event, *_: object) -> None:
            stop.wait(60)

        deaf._store.follow = silent  # type: ignore[method-assign, assignment]
        heard: list[int] = []
        watch = deaf.watch(heard.append, lambda alive: None)
        catalog.publish(changed(topology), expected=1)
        eventually(lambda: heard[-1:] == [2], 5, "the poll tells of version 2")
        watch.close()
        deaf.close()


class TestLease:
    def test_one_holder_at_a_time(self, catalog: StoredCatalog, other: Catalog) -> None:
        first = catalog.acquire("job", ttl_s=5, holder="a")
        assert first is not None
        assert first.alive()
        assert other.acquire("job", ttl_s=5, holder="b") is None
        another = other.acquire("another", ttl_s=5, holder="b")
        assert another is not None
        another.release()
        first.release()
        first.release()
        assert not first.alive()
        second = other.acquire("job", ttl_s=5, holder="b")
        assert second is not None
        assert second.token > first.token
        second.release()

    def test_waiting_for_a_lease(self, catalog: StoredCatalog, other: Catalog) -> None:
        held = catalog.acquire("job", ttl_s=5, holder="a")
        assert held is not None
        threading.Timer(0.5, held.release).start()
        began = time.monotonic()
        taken = other.acquire("job", ttl_s=5, holder="b", wait_s=10)
        assert taken is not None
        assert 0.3 < time.monotonic() - began < 5
        taken.release()

    def test_a_lease_is_kept_alive(self, catalog: StoredCatalog, other: Catalog) -> None:
        with catalog.acquire("job", ttl_s=1, holder="a") as lease:  # type: ignore[union-attr]
            assert other.acquire("job", ttl_s=1, holder="b", wait_s=2.5) is None
            assert lease.alive()
        taken = other.acquire("job", ttl_s=1, holder="b", wait_s=3)
        assert taken is not None
        taken.release()

    def test_a_lease_that_is_not_renewed_is_lost_and_its_holder_cannot_publish(
        self, catalog: StoredCatalog, other: Catalog
    ) -> None:
        topology = make_topology()
        catalog.publish(topology, expected=None)
        lease = catalog.acquire("job", ttl_s=1, holder="a")
        assert lease is not None
        catalog.publish(changed(topology), expected=1, lease=lease)

        def stopped(*_: object) -> bool:
            raise CatalogUnavailable("test", "the holder is cut off")

        catalog._store.renew = stopped  # type: ignore[method-assign]
        successor = other.acquire("job", ttl_s=5, holder="b", wait_s=10)
        assert successor is not None
        assert not lease.alive(), "it believed to hold the lease longer than the catalog did"
        assert successor.token > lease.token
        with pytest.raises(Conflict):
            catalog.publish(changed(catalog.load()), expected=2, lease=lease)
        lease.alive = lambda: True  # type: ignore[method-assign] # a holder whose clock stood still
        with pytest.raises(Conflict):
            catalog.publish(changed(catalog.load()), expected=2, lease=lease)
        other.publish(changed(catalog.load()), expected=2, lease=successor)
        successor.release()

    @pytest.mark.parametrize(("name", "ttl_s"), [("", 5.0), ("x" * 201, 5.0), ("job", 0.1), ("job", 1e9)])
    def test_a_bad_argument_is_named(self, catalog: StoredCatalog, name: str, ttl_s: float) -> None:
        with pytest.raises(InvalidArgument):
            catalog.acquire(name, ttl_s=ttl_s, holder="a")


class TestLife:
    def test_after_close_every_call_says_so(self, catalog: StoredCatalog) -> None:
        catalog.publish(make_topology(), expected=None)
        catalog.close()
        catalog.close()
        for call in (catalog.version, catalog.load, lambda: catalog.acquire("job", ttl_s=5, holder="a")):
            with pytest.raises(CatalogUnavailable, match="closed"):
                call()

    def test_a_client_serves_many_threads(self, catalog: StoredCatalog) -> None:
        catalog.publish(make_topology(BIG), expected=None)
        with ThreadPoolExecutor(8) as pool:
            versions = list(pool.map(lambda _: (catalog.load().version, catalog.version()), range(100)))
        assert set(versions) == {(1, 1)}

    def test_nothing_shows_the_password(
        self, catalog: StoredCatalog, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("DEBUG")
        topology = make_topology()
        catalog.publish(topology, expected=None)
        texts = [repr(catalog), str(catalog), catalog.safe_url, repr(catalog.load()), caplog.text]
        with pytest.raises(Conflict) as raised:
            catalog.publish(changed(topology, version=9), expected=7)
        texts += [repr(raised.value), str(pickle.loads(pickle.dumps(raised.value)).found)]
        assert not any(PASSWORD in text for text in texts)

    def test_a_forked_child_uses_the_catalog_anew(self, catalog: StoredCatalog, url: str) -> None:
        topology = make_topology(BIG)
        catalog.publish(topology, expected=None)
        heard: list[int] = []
        watch = catalog.watch(heard.append, lambda alive: None)
        eventually(lambda: heard, 5, "the watch of the parent")
        for _ in range(3):
            in_child(lambda: _in_child(catalog))()
            before = heard[-1]
            current = catalog.load()
            catalog.publish(changed(current), expected=current.version)
            eventually(lambda at=before: heard[-1] > at, 5, "the parent's watch goes on")  # type: ignore[misc]
        watch.close()
        shared = not url.startswith("memory:")
        assert catalog.version() == (7 if shared else 4), "the children published too" if shared else ""


def _in_child(catalog: StoredCatalog) -> None:
    """Load, watch, publish, take a lease."""
    catalog.after_fork()
    current = catalog.load()
    heard: list[int] = []
    watch = catalog.watch(heard.append, lambda alive: None)
    eventually(lambda: heard, 5, "the watch of the child")
    catalog.publish(changed(current), expected=current.version)
    eventually(lambda: heard[-1] == current.version + 1, 5, "the child hears")
    lease = catalog.acquire("child", ttl_s=5, holder="child", wait_s=3)
    assert lease is not None
    lease.release()
    watch.close()
    catalog.close()


class TestLostReplies:
    """The store did what it was asked, or did not, and its answer never came."""

    def test_a_swap_that_happened_is_found_by_its_nonce(self, catalog: StoredCatalog, other: Catalog) -> None:
        first = make_topology()
        catalog.publish(first, expected=None)
        store = catalog._store
        swap, sent = store.swap_head, []

        def lost(*arguments: object) -> bool:
            sent.append(swap(*arguments))  # type: ignore[arg-type]
            raise CatalogUnavailable("test", "the reply is lost")

        store.swap_head = lost  # type: ignore[method-assign]
        second = changed(first)
        catalog.publish(second, expected=1)
        assert sent == [True], "sent once"
        assert facts(other.load()) == facts(second)

    def test_a_swap_that_another_overtook_is_a_conflict(self, catalog: StoredCatalog, other: Catalog) -> None:
        first = make_topology()
        catalog.publish(first, expected=None)
        winner = changed(first)

        def lost(*_: object) -> bool:
            other.publish(winner, expected=1)
            raise CatalogUnavailable("test", "the request is lost")

        catalog._store.swap_head = lost  # type: ignore[method-assign]
        with pytest.raises(Conflict) as raised:
            catalog.publish(changed(first), expected=1)
        assert raised.value.found == 2
        assert facts(other.load()) == facts(winner)

    def test_what_cannot_be_settled_is_said_and_not_sent_again(self, url: str) -> None:
        catalog = open_catalog(url, timeout_s=0.5)
        assert isinstance(catalog, StoredCatalog)
        first = make_topology()
        catalog.publish(first, expected=None)
        sent: list[object] = []

        def lost(*arguments: object) -> bool:
            sent.append(arguments)
            raise CatalogUnavailable("test", "the request is lost")

        swap, catalog._store.swap_head = catalog._store.swap_head, lost  # type: ignore[method-assign]
        second = changed(first)
        began = time.monotonic()
        with pytest.raises(CatalogUnavailable, match="publishing version 2 was not answered"):
            catalog.publish(second, expected=1)
        assert time.monotonic() - began < 5, "half a second is the limit"
        assert len(sent) == 1
        catalog._store.swap_head = swap  # type: ignore[method-assign]
        catalog.publish(second, expected=1)
        assert facts(catalog.load()) == facts(second)
        catalog.close()
