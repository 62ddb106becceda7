"""etcd killed, hung, compacted, restored from a backup, with expired tokens: each time the newest topology arrives."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardlib.catalog import Conflict, TopologyCache, open_catalog
from shardlib.catalog.store import Deadline, Record
from shardlib.catalog.stored import StoredCatalog
from shardlib.catalog.watching import StopFlag
from shardlib.errors import CatalogUnavailable, InvalidTopology
from shardlib_ops import LocalCluster
from tests.support.etcd_server import EtcdServer, etcd_server
from tests.support.eventually import eventually
from tests.support.topologies import await_newer, changed, facts, make_topology

pytestmark = pytest.mark.fault

BACK_S = 20.0
"""After a server answers again, a watch tells of the newest version within this time."""
HUNG_S = 20.0
"""A member that hangs is left by a watch within this time: 7 s of silence, and what it takes to connect
anew on a busy machine. It is less than the time between two polls, which would tell of it as well.
"""
SECRET = "canary-77aa"


def opened(url: str, **options: float) -> StoredCatalog:
    catalog = open_catalog(url, **options)
    assert isinstance(catalog, StoredCatalog)
    return catalog


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path / "etcd") as started:
        yield started


@pytest.fixture
def catalog(server: EtcdServer) -> Iterator[StoredCatalog]:
    made = opened(f"etcd://{server.endpoint}/shop", timeout_s=2)
    made.publish(make_topology(), expected=None)
    yield made
    made.close()


class Watcher:
    """A watch that remembers what it was told."""

    def __init__(self, catalog: StoredCatalog) -> None:
        self.versions: list[int] = []
        self.alive: list[bool] = []
        self.watch = catalog.watch(self.versions.append, self.alive.append)
        eventually(lambda: self.versions and self.alive, 20, "the watch begins")

    def told_within(self, version: int, within_s: float) -> None:
        eventually(lambda: self.versions[-1] == version, within_s, f"the watch tells of version {version}")


def publish_next(catalog: StoredCatalog) -> int:
    current = catalog.load()
    catalog.publish(changed(current), expected=current.version)
    return current.version + 1


class TestOneMember:
    def test_killed_and_started_again(self, server: EtcdServer, catalog: StoredCatalog) -> None:
        writer = opened(f"etcd://{server.endpoint}/shop", timeout_s=2)
        watcher = Watcher(catalog)
        for _ in range(2):
            server.kill()
            with pytest.raises(CatalogUnavailable, match=server.endpoint):
                writer.version()
            eventually(lambda: not watcher.alive[-1], 20, "the loss is told")
            server.start()
            newest = eventually(lambda: publish_next(writer), 20, "it answers", ignore=CatalogUnavailable)
            watcher.told_within(newest, BACK_S)
            eventually(lambda: watcher.alive[-1], 20, "the watch is alive")
        watcher.watch.close()
        writer.close()

    def test_hung_and_woken(self, server: EtcdServer, catalog: StoredCatalog) -> None:
        writer = opened(f"etcd://{server.endpoint}/shop", timeout_s=2)
        watcher = Watcher(catalog)
        server.pause()
        began = time.monotonic()
        with pytest.raises(CatalogUnavailable):
            writer.version()
        assert time.monotonic() - began < 6, "its limit is 2 s; silence is noticed after 7 s"
        eventually(lambda: not watcher.alive[-1], HUNG_S, "silence is noticed")
        server.resume()
        newest = eventually(lambda: publish_next(writer), 20, "it answers", ignore=CatalogUnavailable)
        watcher.told_within(newest, BACK_S)
        watcher.watch.close()
        writer.close()

    def test_closing_a_watch_of_a_hung_server_does_not_hang(self, server: EtcdServer, catalog: StoredCatalog) -> None:
        watcher = Watcher(catalog)
        server.pause()
        began = time.monotonic()
        watcher.watch.close()
        assert time.monotonic() - began < 6.5, "it is not waited for until its silence is noticed"
        server.resume()

    def test_a_publish_that_was_cut_short_is_settled_by_its_nonce(
        self, server: EtcdServer, catalog: StoredCatalog
    ) -> None:
        following = changed(catalog.load())
        server.pause()
        with pytest.raises(CatalogUnavailable):
            catalog.publish(following, expected=1)
        server.resume()
        # The first one may arrive now, before the second, or never: it is one write in any case.
        eventually(catalog.version, 20, "it answers", ignore=CatalogUnavailable)
        catalog.publish(following, expected=1)
        assert facts(catalog.load()) == facts(following)
        head = catalog._store.read_head(Deadline(2))
        assert head is not None
        writes = server.ctl("get", "/shardlib/shop/head", "-w", "fields").stdout
        assert '"Version" : 2' in writes, "the head was written twice in all"

    def test_compacted_past_what_a_watch_has_seen(self, server: EtcdServer, catalog: StoredCatalog) -> None:
        first = catalog._store.read_head(Deadline(2))
        assert first is not None
        for _ in range(4):
            publish_next(catalog)
        newest = catalog._store.read_head(Deadline(2))
        assert newest is not None
        server.ctl("compaction", str(newest.revision))
        with pytest.raises(CatalogUnavailable, match="compacted"):
            catalog._store.follow(first.revision - 1, StopFlag(), lambda record: None, lambda: None)
        # A watch that slept through all of it: the first head that it believes in is the old one.
        late = opened(f"etcd://{server.endpoint}/shop", timeout_s=2)
        read = late._store.read_head
        stale: list[Record] = [first]

        def once_stale(deadline: Deadline) -> Record | None:
            return stale.pop() if stale else read(deadline)

        late._store.read_head = once_stale  # type: ignore[method-assign]
        versions: list[int] = []
        watch = late.watch(versions.append, lambda alive: None)
        eventually(lambda: versions[-1:] == [5], BACK_S, "the newest version is told")
        newer = publish_next(catalog)
        eventually(lambda: versions[-1] == newer, 20, "the watch goes on")
        watch.close()
        late.close()

    def test_a_lease_is_lost_for_good_while_etcd_hangs(self, server: EtcdServer, catalog: StoredCatalog) -> None:
        lease = catalog.acquire("job", ttl_s=1, holder="a")
        assert lease is not None
        server.pause()
        eventually(lambda: not lease.alive(), 3, "the holder knows by its own clock")
        server.resume()
        successor = eventually(
            lambda: catalog.acquire("job", ttl_s=5, holder="b", wait_s=5), 15, "taken", ignore=CatalogUnavailable
        )
        assert successor.token > lease.token
        assert not lease.alive()
        with pytest.raises(Conflict):
            catalog.publish(changed(catalog.load()), expected=catalog.version(), lease=lease)
        successor.release()

    def test_restored_from_a_backup(
        self, server: EtcdServer, catalog: StoredCatalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The version falls, and so do revisions: who has seen more refuses, and goes on when it is overtaken."""
        server.kill()
        shutil.copytree(tmp_path / "etcd" / "data", tmp_path / "backup")
        server.start()
        client = opened(f"etcd://{server.endpoint}/shop", timeout_s=2, poll_s=1)
        cache = TopologyCache(client)
        cache.start()
        for _ in range(5):
            publish_next(catalog)
        await_newer(cache, 5, 5)
        server.kill()
        shutil.rmtree(tmp_path / "etcd" / "data")
        shutil.move(tmp_path / "backup", tmp_path / "etcd" / "data")
        server.start()
        assert eventually(catalog.version, 20, "it answers", ignore=CatalogUnavailable) == 1
        eventually(lambda: "version 1 after 6" in caplog.text, BACK_S, "it is refused and said")
        assert cache.current.version == 6
        with pytest.raises(InvalidTopology, match="version 1 after 6"):
            cache.refresh(timeout_s=3)
        current = catalog.load()
        catalog.publish(changed(current, version=7), expected=1)
        await_newer(cache, 6, BACK_S)
        cache.close()
        client.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=1, etcd_members=3, bootstrap=False) as started:
        yield started


class TestThreeMembers:
    @pytest.mark.parametrize("fault", ["kill", "pause"])
    def test_any_one_member_may_fail(self, cluster: LocalCluster, fault: str) -> None:
        url = cluster.url + f"-{fault}"
        writer, reader = opened(url), opened(url, poll_s=60)
        writer.publish(make_topology(), expected=None)
        watcher = Watcher(reader)
        newest = 1
        for member in cluster.etcd:
            getattr(member, fault)()
            newest = eventually(
                lambda: publish_next(writer), 30, f"published without {member.name}", ignore=CatalogUnavailable
            )
            watcher.told_within(newest, HUNG_S)
            began = time.monotonic()
            assert eventually(reader.version, 20, "read", ignore=CatalogUnavailable) == newest
            assert time.monotonic() - began < 15
            if fault == "kill":
                member.start()
            else:
                member.resume()
            eventually(member.healthy, 30, f"{member.name} is healthy")
        watcher.watch.close()
        writer.close()
        reader.close()

    def test_a_host_name_that_does_not_resolve_is_passed_over(self, cluster: LocalCluster) -> None:
        port = cluster.etcd[0].port
        catalog = opened(f"etcd://no-such-host.invalid:2379,localhost:{port}/names")
        for _ in range(3):
            assert catalog.version() is None
        catalog.close()


class TestUsers:
    @pytest.fixture
    def guarded(self, tmp_path: Path) -> Iterator[EtcdServer]:
        with etcd_server(tmp_path / "etcd", "--auth-token", "simple", "--auth-token-ttl", "1") as started:
            started.ctl("user", "add", f"root:{SECRET}")
            started.ctl("user", "grant-role", "root", "root")
            started.ctl("auth", "enable")
            yield started

    def test_an_expired_token_is_renewed(self, guarded: EtcdServer) -> None:
        catalog = opened(f"etcd://root:{SECRET}@{guarded.endpoint}/shop")
        topology = make_topology()
        catalog.publish(topology, expected=None)
        for expected in (1, 2):
            threading.Event().wait(2.5)  # what is waited for is the end of the token's life
            topology = changed(topology)
            if expected == 1:
                catalog.publish(topology, expected=expected)
            else:
                watcher = Watcher(catalog)
                catalog.publish(topology, expected=expected)
                watcher.told_within(3, 5)
                watcher.watch.close()
        lease = catalog.acquire("job", ttl_s=6, holder="a")
        assert lease is not None
        threading.Event().wait(5)
        assert lease.alive(), "the keepalive renews the token as well"
        lease.release()
        catalog.close()

    @pytest.mark.parametrize("kind", ["env", "file"])
    def test_a_password_may_be_a_reference_that_is_read_for_each_login(
        self, guarded: EtcdServer, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "secret"

        def rotate(password: str) -> None:
            monkeypatch.setenv("ETCD_TEST_PASSWORD", password)
            file.write_text(f"{password}\n")

        reference = "env:ETCD_TEST_PASSWORD" if kind == "env" else f"file:{str(file).replace('/', '%2F')}"
        catalog = opened(f"etcd://root:{reference}@{guarded.endpoint}/shop")
        with pytest.raises(CatalogUnavailable, match=r"no variable ETCD_TEST_PASSWORD|cannot be read") as nowhere:
            catalog.version()
        assert nowhere.value.final
        rotate(SECRET)
        assert catalog.version() is None
        guarded.ctl("--user", f"root:{SECRET}", "user", "passwd", "root", "--interactive=false", stdin="n3w-one")
        rotate("n3w-one")
        catalog.publish(make_topology(), expected=None)
        assert catalog.version() == 1
        catalog.close()

    def test_a_watch_that_is_refused_for_its_token_begins_again(self, guarded: EtcdServer) -> None:
        catalog = opened(f"etcd://root:{SECRET}@{guarded.endpoint}/shop", poll_s=60)
        catalog.publish(make_topology(), expected=None)
        heard: list[Record] = []
        threading.Event().wait(2.5)
        stop = StopFlag()
        with pytest.raises(CatalogUnavailable, match="refused"):
            catalog._store.follow(0, stop, heard.append, lambda: None)
        thread = threading.Thread(target=catalog._store.follow, args=(0, stop, heard.append, lambda: None))
        thread.start()
        eventually(lambda: heard, 20, "the next one is served")
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
        catalog.close()

    @pytest.mark.parametrize("login", ["", "root:wrong-canary@", "nobody:wrong-canary@"])
    def test_wrong_credentials_say_so_without_showing_them(
        self, guarded: EtcdServer, login: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        catalog = opened(f"etcd://{login}{guarded.endpoint}/shop", timeout_s=20)
        began = time.monotonic()
        with pytest.raises(CatalogUnavailable, match=r"(?i)password|user name is empty|permission") as raised:
            catalog.version()
        assert time.monotonic() - began < 10, "an answer is not waited for again and again"
        text = f"{raised.value} {raised.value!r} {catalog.safe_url} {caplog.text}"
        assert "wrong-canary" not in text
        catalog.close()

    def test_credentials_that_are_not_asked_for_do_no_harm(self, server: EtcdServer) -> None:
        catalog = opened(f"etcd://root:{SECRET}@{server.endpoint}/shop")
        assert catalog.version() is None
        catalog.close()
