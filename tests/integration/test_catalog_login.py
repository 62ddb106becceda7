"""A catalog that refuses the login or a right: told at once, with who and where; and a watch that outlives it."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.catalog import Catalog, TopologyCache, open_catalog
from shardlib.catalog.etcd_channel import Channels, EtcdTarget
from shardlib.catalog.etcd_proto import new
from shardlib.catalog.store import Deadline
from shardlib.dsn import Dsn
from shardlib.errors import CatalogUnavailable
from shardlib.route.retry import RetryPolicy, next_wait
from tests.support.etcd_server import EtcdServer, etcd_server
from tests.support.eventually import eventually
from tests.support.topologies import changed, make_topology

SECRET, WRONG = "s3cret-canary", "wr0ng-canary"


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    folder = tmp_path_factory.mktemp("etcd")
    with etcd_server(folder, "--auth-token", "simple", "--auth-token-ttl", "1") as started:
        for user in ("root", "app", "stranger"):
            started.ctl("user", "add", f"{user}:{SECRET}")
        started.ctl("role", "add", "shop")
        started.ctl("role", "grant-permission", "shop", "readwrite", "/shardlib/shop/", "--prefix=true")
        started.ctl("user", "grant-role", "app", "shop")
        started.ctl("user", "grant-role", "root", "root")
        started.ctl("auth", "enable")
        with closing(open_catalog(f"etcd://app:{SECRET}@{started.endpoint}/shop")) as catalog:
            catalog.publish(make_topology(), expected=None)
        yield started


@pytest.fixture
def postgres(database: str) -> Iterator[Callable[[str, str], str]]:
    """A catalog in a database, and the URL of it for a role and password; `stranger` has no rights there."""
    dsn, role = Dsn(database), f"stranger_{uuid.uuid4().hex[:8]}"
    with closing(open_catalog(f"{database}?catalog=shop")) as catalog:
        catalog.publish(make_topology(), expected=None)
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'".encode())
        owner, password = dsn.user, str(conninfo_to_dict(database)["password"])

        def url(user: str, given: str) -> str:
            name = owner if user == "owner" else role if user == "stranger" else user
            shown = quote(password if given == SECRET and user == "owner" else given, safe="")
            return f"postgresql://{name}:{shown}@{dsn.host}:{dsn.port}/{dsn.dbname}?catalog=shop"

        yield url
        conn.execute(f"DROP OWNED BY {role}".encode())
        conn.execute(f"DROP ROLE {role}".encode())


def refused(url: str, *says: str, uses: Callable[[Catalog], object] = lambda catalog: catalog.load()) -> None:
    with closing(open_catalog(url, timeout_s=20)) as catalog:
        began = time.monotonic()
        with pytest.raises(CatalogUnavailable) as caught:
            uses(catalog)
        assert time.monotonic() - began < 5, "the answer is not waited for again and again"
        error = caught.value
        assert error.final
        assert next_wait(error, 1, RetryPolicy(), 1.0) is None
        assert "refuses this client" in str(error)
        assert "not reachable" not in str(error)
        for text in (catalog.safe_url, *says):
            assert text in str(error)
        for secret in (SECRET, WRONG):
            assert secret not in f"{error} {error!r}"


@pytest.mark.parametrize(
    ("login", "says"),
    [
        (f"app:{WRONG}@", ("user 'app'", "password")),
        (f"nobody:{SECRET}@", ("user 'nobody'", "password")),
        ("", ("asks for a user",)),
        (f"stranger:{SECRET}@", ("user 'stranger'", "permission denied", "/shardlib/shop/ --prefix=true")),
    ],
)
def test_etcd_says_who_is_refused_and_the_way_out(etcd: EtcdServer, login: str, says: tuple[str, ...]) -> None:
    refused(f"etcd://{login}{etcd.endpoint}/shop", *says)


def test_etcd_refuses_a_write_to_who_may_only_read(etcd: EtcdServer) -> None:
    root = ("--user", f"root:{SECRET}")
    etcd.ctl(*root, "user", "add", f"reader:{SECRET}")
    etcd.ctl(*root, "role", "add", "reads")
    etcd.ctl(*root, "role", "grant-permission", "reads", "read", "/shardlib/shop/", "--prefix=true")
    etcd.ctl(*root, "user", "grant-role", "reader", "reads")
    url = f"etcd://reader:{SECRET}@{etcd.endpoint}/shop"
    with closing(open_catalog(url)) as catalog:
        now = catalog.load()
    refused(url, "'reader'", uses=lambda catalog: catalog.publish(changed(now), expected=now.version))
    refused(url, "'reader'", uses=lambda catalog: catalog.write_document("job", b"1", expected=None))


@pytest.mark.parametrize(
    ("user", "password", "says"),
    [
        ("owner", WRONG, ("password authentication failed",)),
        ("nobody_at_all", SECRET, ("nobody_at_all",)),
        ("stranger", SECRET, ("permission denied", "GRANT USAGE ON SCHEMA shardlib_catalog")),
    ],
)
def test_postgres_says_who_is_refused_and_the_way_out(
    postgres: Callable[[str, str], str], user: str, password: str, says: tuple[str, ...]
) -> None:
    refused(postgres(user, password), *says)


def test_postgres_tells_of_a_right_that_the_tables_need(postgres: Callable[[str, str], str], database: str) -> None:
    url = postgres("stranger", SECRET)
    role = Dsn(url.partition("?")[0]).user
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(f"GRANT USAGE ON SCHEMA shardlib_catalog TO {role}".encode())
        refused(url, "permission denied for table head", "GRANT SELECT ON ALL TABLES")
        conn.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA shardlib_catalog TO {role}".encode())
        with closing(open_catalog(url)) as catalog:
            now = catalog.load()
        refused(url, "permission denied", uses=lambda catalog: catalog.publish(changed(now), expected=now.version))
        conn.execute(b"DROP SCHEMA shardlib_catalog CASCADE")
        refused(url, "GRANT CREATE ON DATABASE", uses=lambda catalog: catalog.publish(make_topology(), expected=None))


@pytest.mark.parametrize("engine_class", [ShardedEngine, AsyncShardedEngine])
def test_an_engine_does_not_start_and_does_not_wait(etcd: EtcdServer, engine_class: Any) -> None:
    began = time.monotonic()
    with pytest.raises(CatalogUnavailable, match="refuses this client"):
        engine_class(f"etcd://app:{WRONG}@{etcd.endpoint}/shop", catalog_timeout_s=20.0)
    assert time.monotonic() - began < 5


@pytest.fixture
def referring(etcd: EtcdServer, database: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[str, str]]:
    """The URL of a filled catalog whose password is in the variable CATALOG_PASSWORD, and that password."""
    dsn = Dsn(database)

    def prepared(kind: str) -> tuple[str, str]:
        if kind == "etcd":
            monkeypatch.setenv("CATALOG_PASSWORD", SECRET)
            return f"etcd://app:env:CATALOG_PASSWORD@{etcd.endpoint}/shop", SECRET
        with closing(open_catalog(f"{database}?catalog=shop")) as catalog:
            catalog.publish(make_topology(), expected=None)
        good = str(conninfo_to_dict(database)["password"])
        monkeypatch.setenv("CATALOG_PASSWORD", good)
        place = f"{dsn.host}:{dsn.port}/{dsn.dbname}"
        return f"postgresql://{dsn.user}:env%3ACATALOG_PASSWORD@{place}?catalog=shop", good

    return prepared


@pytest.mark.parametrize("kind", ["etcd", "postgres"])
def test_a_password_that_is_nowhere_is_told_at_once(
    referring: Callable[[str], tuple[str, str]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = referring(kind)
    monkeypatch.delenv("CATALOG_PASSWORD")
    refused(url, "env:CATALOG_PASSWORD", "no variable")
    refused(url, "env:CATALOG_PASSWORD", uses=lambda catalog: catalog.watch(print, print) and catalog.version())


@pytest.mark.parametrize("kind", ["etcd", "postgres"])
def test_an_application_starts_from_its_file_while_the_password_is_nowhere(
    referring: Callable[[str], tuple[str, str]], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (url, good), file = referring(kind), tmp_path / "topology"
    with ShardedEngine(url, topology_file=file) as engine:
        version = engine.topology.version
    monkeypatch.delenv("CATALOG_PASSWORD")
    with ShardedEngine(url, topology_file=file) as engine:
        assert engine.topology.version == version
        monkeypatch.setenv("CATALOG_PASSWORD", good)
        assert engine.refresh().version == version


@pytest.mark.parametrize("kind", ["etcd", "postgres"])
@pytest.mark.parametrize("password", [WRONG, None])
def test_the_watch_outlives_a_password_that_is_wrong_or_nowhere_for_a_while(
    referring: Callable[[str], tuple[str, str]],
    database: str,
    kind: str,
    password: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "shardlib")
    url, good = referring(kind)
    with closing(open_catalog(url)) as catalog, closing(open_catalog(url)) as other:
        cache = TopologyCache(catalog)
        try:
            version, read_at = cache.start().version, cache._proved_at
            other.version()  # it is logged in: what it publishes needs no login
            eventually(lambda: cache._proved_at != read_at, 10, "the watch is logged in too")
            if password is None:
                monkeypatch.delenv("CATALOG_PASSWORD")
            else:
                monkeypatch.setenv("CATALOG_PASSWORD", password)
            if kind == "postgres":
                with psycopg.connect(database, autocommit=True) as conn:
                    conn.execute(
                        b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                        b" AND application_name = 'shardlib-catalog'"
                    )
            else:
                catalog._store._client._channels.hang_up()  # type: ignore[attr-defined]
                catalog._store._client._channels.forget_token()  # type: ignore[attr-defined]
            eventually(lambda: "refuses this client" in caplog.text, 15, "the refusal is logged")
            with pytest.raises(CatalogUnavailable) as caught:
                cache.refresh()
            assert caught.value.final
            assert cache.current.version == version
            monkeypatch.setenv("CATALOG_PASSWORD", good)
            now = other.load()
            other.publish(changed(now), expected=now.version)
            eventually(lambda: cache.current.version > version, 20, "the watch goes on")
        finally:
            cache.close()
    assert caplog.text.count("the watch tries again until it is let in") == 1
    assert "Traceback" not in caplog.text
    assert WRONG not in caplog.text
    assert good not in caplog.text


def put(key: bytes) -> Any:
    return new("TxnRequest", success=[new("RequestOp", request_put=new("PutRequest", key=key, value=b"1"))])


@pytest.mark.parametrize("asked", [1, 2])
def test_a_write_whose_channel_is_closed_before_it_is_sent_is_sent_after_all(
    etcd: EtcdServer, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first use of a channel is the login, the second the write: a fork closes it there."""
    name = f"/shardlib/shop/{uuid.uuid4().hex}".encode()
    target = EtcdTarget((etcd.endpoint,), "shop", user="app", password=SECRET)
    with closing(Channels(target)) as channels:
        opened, channel = [], channels._channel

        def closed_by_a_fork(at: int) -> Any:
            opened.append(channel(at))
            if len(opened) == asked:
                channels.hang_up()
            return opened[-1]

        monkeypatch.setattr(channels, "_channel", closed_by_a_fork)
        assert channels.call("Txn", put(name), Deadline(10), again=False).succeeded
        assert len(opened) == 3


def test_a_login_that_fails_does_not_lose_a_write(etcd: EtcdServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dead = f"127.0.0.1:{silent.getsockname()[1]}"
        target = EtcdTarget((dead, etcd.endpoint), "shop", user="app", password=SECRET)
        with closing(Channels(target)) as channels:
            channels._at = 0
            assert channels.call("Txn", put(b"/shardlib/shop/login"), Deadline(5), again=False).succeeded


def test_a_login_under_way_is_waited_for_by_a_fork() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        target = EtcdTarget((f"127.0.0.1:{silent.getsockname()[1]}",), "shop", user="app", password=SECRET)
        with closing(Channels(target)) as channels:
            assert not channels.busy
            call = pool.submit(channels.call, "Range", new("RangeRequest", key=b"x"), Deadline(10))
            eventually(lambda: channels.busy, 5, "the login is under way")
            channels.close()
            with pytest.raises(CatalogUnavailable):
                call.result(10)
            assert not channels.busy


@pytest.fixture
def silent_hosts() -> Iterator[list[str]]:
    """Two ports that take a connection and say nothing."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        yield [f"127.0.0.1:{each.getsockname()[1]}" for each in (one, other)]


def test_hosts_that_are_silent_take_no_longer_than_a_call_may(silent_hosts: list[str]) -> None:
    with closing(open_catalog(f"postgresql://u@{','.join(silent_hosts)}/d", timeout_s=0.5)) as catalog:
        began = time.monotonic()
        with pytest.raises(CatalogUnavailable, match="no answer in time"):
            catalog.load()
        assert time.monotonic() - began < 1.5


def test_a_silent_host_leaves_time_for_the_next_one(database: str, silent_hosts: list[str]) -> None:
    dsn = Dsn(database)
    with closing(
        open_catalog(database.replace(dsn.host, f"{silent_hosts[0]},{dsn.host}", 1), timeout_s=2.0)
    ) as catalog:
        assert catalog.version() is None
