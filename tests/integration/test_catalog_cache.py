"""The topology cache: what it serves when the catalog changes, hangs, lies or is away."""

from __future__ import annotations

import os
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardlib.catalog import Catalog, Conflict, Lease, TopologyCache, Watch, open_catalog
from shardlib.catalog.disk import read_file, write_file
from shardlib.errors import CatalogUnavailable, InvalidTopology
from shardlib.topology import Topology
from tests.support.eventually import eventually
from tests.support.forks import in_child
from tests.support.topologies import PASSWORD, await_newer, changed, facts, make_topology


class Interrupted:
    """A real catalog behind a switch: while `away` it does not answer, while `slow` it waits before it does."""

    def __init__(self, inner: Catalog) -> None:
        self.inner, self.safe_url = inner, inner.safe_url
        self.away = False
        self.hears = True
        self.gate = threading.Event()
        self.gate.set()
        self.loads = 0
        self.replaced: Topology | None = None

    def load(self, known: Topology | None = None) -> Topology:
        self.loads += 1
        assert self.gate.wait(10)
        if self.away:
            raise CatalogUnavailable(self.safe_url, "away")
        return self.replaced or self.inner.load(known)

    def version(self) -> int | None:
        return self.inner.version()

    def publish(self, topology: Topology, *, expected: int | None, lease: Lease | None = None) -> None:
        self.inner.publish(topology, expected=expected, lease=lease)

    def watch(self, on_change: Callable[[int], None], on_alive: Callable[[bool], None]) -> Watch:
        return self.inner.watch(
            lambda version: on_change(version) if self.hears else None,
            lambda alive: on_alive(alive) if self.hears else None,
        )

    def acquire(self, name: str, *, ttl_s: float, holder: str, wait_s: float = 0.0) -> Lease | None:
        return self.inner.acquire(name, ttl_s=ttl_s, holder=holder, wait_s=wait_s)

    def after_fork(self) -> None:
        self.inner.after_fork()

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def catalog() -> Iterator[Interrupted]:
    opened = Interrupted(open_catalog(f"memory://{uuid.uuid4().hex}"))
    opened.publish(make_topology(), expected=None)
    yield opened
    opened.close()


@pytest.fixture
def cache(catalog: Interrupted) -> Iterator[TopologyCache]:
    made = TopologyCache(catalog)
    made.start()
    yield made
    made.close()


def publish_next(catalog: Catalog, **changes: object) -> Topology:
    current = catalog.load()
    following = changed(current, **changes)
    catalog.publish(following, expected=current.version)
    return following


class TestFollowing:
    def test_a_change_is_seen_and_told(self, catalog: Interrupted, cache: TopologyCache) -> None:
        told: list[Topology] = []
        cache.listen(told.append)
        assert cache.current.version == 1
        second = publish_next(catalog.inner)
        await_newer(cache, 1, 5)
        assert facts(cache.current) == facts(second)
        eventually(lambda: told == [cache.current], 2, "the listener is told")

    def test_a_fault_of_a_listener_stops_nobody(
        self, catalog: Interrupted, cache: TopologyCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        told: list[int] = []

        def bad(topology: Topology) -> None:
            raise ValueError(f"on purpose, at {topology.version}")

        cache.listen(bad)
        cache.listen(lambda topology: told.append(topology.version))
        publish_next(catalog.inner)
        publish_next(catalog.inner)
        eventually(lambda: told[-1:] == [3], 5, "the second listener is told of version 3")
        assert "on purpose" in caplog.text

    def test_without_a_watch_the_slow_poll_finds_a_change(self, catalog: Interrupted) -> None:
        catalog.hears = False
        cache = TopologyCache(catalog, poll_s=0.1)
        cache.start()
        publish_next(catalog.inner)
        await_newer(cache, 1, 5)
        cache.close()

    def test_staleness_counts_from_the_last_sign_of_life(self, catalog: Interrupted, cache: TopologyCache) -> None:
        assert cache.staleness() < 2
        catalog.hears, catalog.away = False, True
        before = cache.staleness()
        eventually(lambda: cache.staleness() > before + 0.2, 5, "it grows")
        catalog.away = False
        cache.refresh()
        assert cache.staleness() < 0.2


class TestRefusing:
    @pytest.mark.parametrize(
        ("what", "said"),
        [
            ({"version": 1}, "version 1 after 2"),
            ({"version": 2}, "version 2 came with other content"),
            ({"cluster_id": "other"}, "cluster 'other'"),
            ({"hash_function": "xxhash"}, "hash function became 'xxhash'"),
        ],
    )
    def test_what_must_not_follow_is_refused_and_logged_once(
        self,
        catalog: Interrupted,
        cache: TopologyCache,
        caplog: pytest.LogCaptureFixture,
        what: dict[str, object],
        said: str,
    ) -> None:
        publish_next(catalog.inner)
        await_newer(cache, 1, 5)
        seen = cache.current
        catalog.replaced = changed(seen, **what)
        for _ in range(2):
            with pytest.raises(InvalidTopology, match=said):
                cache.refresh()
        with pytest.raises(InvalidTopology, match=said):
            cache.newest()
        assert cache.current is seen
        assert caplog.text.count(said) == 1
        catalog.replaced = None
        publish_next(catalog.inner)
        await_newer(cache, 2, 5, "a right one is taken again")

    def test_another_fault_is_logged_and_so_is_one_that_comes_back(
        self, catalog: Interrupted, cache: TopologyCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        def meet(**what: object) -> None:
            catalog.replaced = changed(cache.current, **what)
            with pytest.raises(InvalidTopology):
                cache.refresh()

        meet(cluster_id="other")
        meet(hash_function="xxhash")
        assert "cluster 'other'" in caplog.text
        assert "hash function became 'xxhash'" in caplog.text
        catalog.replaced = None
        cache.refresh()
        meet(hash_function="xxhash")
        assert caplog.text.count("hash function became 'xxhash'") == 2

    def test_a_read_that_the_watch_overtook_is_no_fault(
        self, catalog: Interrupted, cache: TopologyCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = cache.current
        second, third = changed(first), changed(changed(first))
        assert cache._accept(third, first) is None
        assert cache._accept(second, first) is None, "it was read before the third came"
        assert cache._accept(second, third) is not None, "it was read after"
        assert cache.current is third
        assert caplog.text.count("version 2 after 3") == 1


class TestRefreshing:
    def test_it_returns_what_the_catalog_holds(self, catalog: Interrupted, cache: TopologyCache) -> None:
        catalog.hears = False
        second = publish_next(catalog.inner)
        assert facts(cache.refresh(newer_than=1)) == facts(second)
        assert cache.refresh(newer_than=2).version == 2, "the catalog says that there is nothing newer"

    def test_a_newer_one_at_hand_asks_nobody(self, catalog: Interrupted, cache: TopologyCache) -> None:
        loads = catalog.loads
        assert cache.refresh(newer_than=0).version == 1
        assert catalog.loads == loads

    def test_it_ends_in_time_when_the_catalog_does_not_answer(self, catalog: Interrupted, cache: TopologyCache) -> None:
        catalog.gate.clear()
        began = time.monotonic()
        with pytest.raises(CatalogUnavailable, match=r"no answer within 0\.3 s"):
            cache.refresh(timeout_s=0.3)
        assert time.monotonic() - began < 1
        assert cache.current.version == 1
        catalog.gate.set()

    def test_the_catalogs_error_reaches_the_caller(self, catalog: Interrupted, cache: TopologyCache) -> None:
        catalog.away = True
        with pytest.raises(CatalogUnavailable, match="away"):
            cache.refresh()
        catalog.away = False
        assert cache.refresh().version == 1

    def test_callers_share_a_read_that_began_after_they_asked(self, catalog: Interrupted, cache: TopologyCache) -> None:
        catalog.gate.clear()
        catalog.hears = False
        before = catalog.loads
        with ThreadPoolExecutor(20) as pool:
            first = pool.submit(cache.refresh, newer_than=1)
            eventually(lambda: catalog.loads == before + 1, 5, "the first read is under way")
            second = publish_next(catalog.inner)
            others = [pool.submit(cache.refresh, newer_than=2) for _ in range(15)]
            eventually(lambda: cache._asked >= 16, 5, "all have asked")
            catalog.gate.set()
            results = [one.result(10) for one in others]
            first.result(10)
        assert {result.version for result in results} == {second.version}
        assert catalog.loads == before + 2, "one read for the first caller, one for all later ones"

    def test_a_version_that_the_watch_brings_ends_the_wait(self, catalog: Interrupted, cache: TopologyCache) -> None:
        second = changed(cache.current)
        catalog.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(cache.refresh, newer_than=1, timeout_s=10)
            eventually(lambda: cache._asked == 1, 5, "it has asked")
            cache._accept(second, cache.current)
            assert waiting.result(5) is second
        catalog.gate.set()

    def test_after_close_it_says_so(self, cache: TopologyCache) -> None:
        cache.close()
        cache.close()
        with pytest.raises(CatalogUnavailable, match="not running"):
            cache.refresh()


class TestFile:
    def test_an_application_starts_from_its_file_while_the_catalog_is_away(
        self, catalog: Interrupted, tmp_path: Path
    ) -> None:
        path = tmp_path / "topology"
        first = TopologyCache(catalog, file=path)
        first.start()
        second = publish_next(catalog.inner)
        eventually(lambda: path.exists() and (read_file(path) or first.current).version == 2, 5, "saved")
        first.close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [entry.name for entry in tmp_path.iterdir()] == ["topology"]

        catalog.away, catalog.hears = True, False
        later = TopologyCache(catalog, file=path)
        assert facts(later.start(timeout_s=0.5)) == facts(second)
        with pytest.raises(CatalogUnavailable):
            later.refresh(newer_than=2, timeout_s=1)
        assert later.staleness() == float("inf"), "a file proves nothing"
        catalog.away, catalog.hears = False, True
        publish_next(catalog.inner)
        await_newer(later, 2, 5)
        eventually(lambda: later.staleness() < 5, 10, "the catalog is heard")
        later.close()

    def test_with_neither_catalog_nor_file_it_does_not_start(self, catalog: Interrupted, tmp_path: Path) -> None:
        catalog.away = True
        with pytest.raises(CatalogUnavailable):
            TopologyCache(catalog, file=tmp_path / "none").start(timeout_s=0.3)

    def test_it_waits_for_a_catalog_that_comes_back(self, catalog: Interrupted) -> None:
        catalog.away = True
        threading.Timer(0.4, lambda: setattr(catalog, "away", False)).start()
        cache = TopologyCache(catalog)
        assert cache.start(timeout_s=10).version == 1
        cache.close()

    def test_an_empty_catalog_is_no_reason_to_wait(self) -> None:
        empty = open_catalog(f"memory://{uuid.uuid4().hex}")
        with pytest.raises(InvalidTopology, match="holds no topology"):
            TopologyCache(empty).start()
        empty.close()

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
    def test_a_damaged_file_is_not_used(
        self, catalog: Interrupted, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "topology"
        write_file(path, make_topology())
        data = path.read_bytes()
        path.write_bytes(
            {
                "cut": data[:-5],
                "flipped": data[:60] + bytes([data[60] ^ 1]) + data[61:],
                "empty": b"",
                "text": b"postgresql://user:secret@host/db\n" * 3,
            }[damage]
        )
        catalog.away = True
        with pytest.raises(CatalogUnavailable) as raised:
            TopologyCache(catalog, file=path).start(timeout_s=0.3)
        assert any("was of no use" in note for note in raised.value.__notes__)
        catalog.away = False
        cache = TopologyCache(catalog, file=path)
        assert cache.start().version == 1
        eventually(lambda: _readable(path), 5, "the file is replaced by a good one")
        cache.close()
        assert PASSWORD not in caplog.text
        assert "secret" not in caplog.text

    def test_a_file_that_is_newer_than_the_catalog_wins(
        self, catalog: Interrupted, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "topology"
        seen = changed(catalog.inner.load(), version=9)
        write_file(path, seen)
        cache = TopologyCache(catalog, file=path)
        assert facts(cache.start()) == facts(seen)
        assert "version 1 after 9" in caplog.text
        cache.close()

    def test_a_file_of_another_cluster_is_an_error(self, catalog: Interrupted, tmp_path: Path) -> None:
        path = tmp_path / "topology"
        write_file(path, make_topology(cluster_id="elsewhere"))
        with pytest.raises(InvalidTopology, match="elsewhere"):
            TopologyCache(catalog, file=path).start()

    def test_a_file_that_cannot_be_written_is_said_and_stops_nothing(
        self, catalog: Interrupted, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = TopologyCache(catalog, file=tmp_path / "no" / "folder" / "topology")
        cache.start()
        eventually(lambda: "cannot be saved" in caplog.text, 5, "it is said")
        publish_next(catalog.inner)
        await_newer(cache, 1, 5)
        cache.close()


class TestFork:
    def test_a_forked_child_goes_on_from_the_topology_and_hears_of_changes(self, etcd_url: str) -> None:
        catalog = open_catalog(etcd_url)
        catalog.publish(make_topology(), expected=None)
        cache = TopologyCache(catalog)
        cache.start()
        ready_r, ready_w = os.pipe()

        def child() -> None:
            assert cache.current.version == 1
            cache.after_fork()
            assert cache.refresh(timeout_s=5).version == 1
            os.write(ready_w, b"1")
            await_newer(cache, 1, 10)
            cache.close()

        wait = in_child(child)
        assert os.read(ready_r, 1) == b"1"
        publish_next(catalog)
        await_newer(cache, 1, 5)
        wait()
        cache.close()
        catalog.close()
        os.close(ready_r)
        os.close(ready_w)


def _readable(path: Path) -> bool:
    try:
        return read_file(path) is not None
    except InvalidTopology:
        return False


def test_publish_next_never_overwrites(catalog: Interrupted) -> None:
    """The helper above is a compare-and-swap as well: a test cannot hide a lost update by it."""
    first = catalog.inner.load()
    publish_next(catalog.inner)
    with pytest.raises(Conflict):
        catalog.publish(changed(first), expected=1)
