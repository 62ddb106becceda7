"""A catalog that refuses the login or a right: told at once, with who and where; and a watch that outlives it."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.catalog import Catalog, TopologyCache, open_catalog
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


@pytest.mark.parametrize("kind", ["etcd", "postgres"])
def test_the_watch_outlives_a_password_that_is_wrong_for_a_while(
    etcd: EtcdServer,
    database: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "shardlib")
    dsn = Dsn(database)
    good = SECRET if kind == "etcd" else str(conninfo_to_dict(database)["password"])
    urls = {
        "etcd": f"etcd://app:env:CATALOG_PASSWORD@{etcd.endpoint}/shop",
        "postgres": f"postgresql://{dsn.user}:env%3ACATALOG_PASSWORD@{dsn.host}:{dsn.port}/{dsn.dbname}?catalog=shop",
    }
    monkeypatch.setenv("CATALOG_PASSWORD", good)
    with closing(open_catalog(urls[kind])) as catalog, closing(open_catalog(urls[kind])) as other:
        if kind == "postgres":
            catalog.publish(make_topology(), expected=None)
        cache = TopologyCache(catalog)
        try:
            version = cache.start().version
            other.version()  # it is logged in: what it publishes needs no login
            monkeypatch.setenv("CATALOG_PASSWORD", WRONG)
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
    assert WRONG not in caplog.text
    assert good not in caplog.text
