"""Catalog URLs: what is understood, and what is refused without showing a password."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from shardlib.catalog import open_catalog
from shardlib.catalog.postgres import PostgresStore
from shardlib.catalog.store import Deadline
from shardlib.catalog.stored import StoredCatalog
from shardlib.errors import InvalidArgument
from tests.support.topologies import make_topology

SECRET = "canary-0d1e"


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("memory://tests", "memory://tests"),
        ("etcd://127.0.0.1:2379/shop", "etcd://127.0.0.1:2379/shop"),
        ("etcd://a:1,b.example:2,[::1]:3/shop", "etcd://a:1,b.example:2,[::1]:3/shop"),
        (f"etcd://root:{SECRET}%40%2F@a:1/x", "etcd://root@a:1/x"),
        (f"postgresql://u:{SECRET}@h:5/d", "postgresql://u@h:5/d?catalog=default"),
        (f"postgres://u:{SECRET}@h/d?catalog=x&sslmode=disable", "postgresql://u@h/d?catalog=x"),
        ("postgresql://h/d?catalog=a%26b", "postgresql://h/d?catalog=a&b"),
        ("postgresql://h/d?%63atalog=a+b", "postgresql://h/d?catalog=a+b"),
        ("etcds://a:1/x", "etcds://a:1/x"),
    ],
)
def test_a_url_is_shown_without_its_secret(url: str, safe: str) -> None:
    catalog = open_catalog(url)
    assert catalog.safe_url == safe
    catalog.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "shop",
        f"redis://u:{SECRET}@h/d",
        f"u:{SECRET}@h/d",
        f"etcd://u:{SECRET}@h/d",
        f"etcd://u:{SECRET}@h:1/",
        f"etcd://u:{SECRET}",
        f"etcd://u:a/{SECRET}@h:1/",
        f"etcd://h:1,u%40{SECRET}:x",
        f"etcd://u:{SECRET}@h:99999/x",
        f"etcd://u:{SECRET}@h:1,/x",
        f"etcd://:{SECRET}@h:1/x",
        f"etcd://u:{SECRET}@h:1/x?tls=1",
        f"etcd://u:{SECRET}@[::1/x",
        f"etcd://u:{SECRET}@h:1/x?ca=/no/such/file",
        f"etcds://u:{SECRET}@h:1/x?ca=/no/such/file",
        f"etcds://u:{SECRET}@h:1/x?cert=/etc/hostname",
        f"postgresql://u:{SECRET}@h/d?nonsense=1",
        f"postgresql://u:{SECRET}@h/d?catalog=",
        "memory://",
        f"memory://u:{SECRET}@x",
        17,
    ],
)
def test_a_bad_url_is_refused_without_showing_its_secret(url: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        open_catalog(url)
    assert SECRET not in f"{raised.value} {raised.value!r}"


@pytest.mark.parametrize("url", [None, "etcd://127.0.0.1:2379", "etcd://h:1,k:2/", "etcd://h/shop", "memory://a/b"])
def test_a_bad_url_without_a_login_is_shown(url: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        open_catalog(url)
    assert str(raised.value).startswith(f"url={url!r} is not allowed")


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"timeout_s": -1.0}, {"poll_s": 0}, {"timeout_s": float("nan")}])
def test_a_bad_limit_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        open_catalog("memory://tests", **options)


def test_a_tls_file_is_read_when_the_catalog_is_opened(tmp_path: Path) -> None:
    pem = tmp_path / "ca.pem"
    pem.write_text("not a certificate")
    url = f"etcds://127.0.0.1:1/x?ca={pem}&server_name=etcd.internal"
    with closing(open_catalog(url)) as catalog:
        assert catalog.safe_url == "etcds://127.0.0.1:1/x"
    pem.unlink()
    with pytest.raises(InvalidArgument, match="cannot be read"):
        open_catalog(url)


@pytest.mark.parametrize("place", ["catalog=x&{}", "{}&catalog=x", "catalog=y&{}&catalog=x"])
def test_what_postgres_is_to_get_stays_as_it_is_written(database: str, place: str) -> None:
    base, _, given = database.partition("?")
    query = place.format("&".join(filter(None, [given, "options=-c%20statement_timeout%3D5s"])))
    with closing(open_catalog(f"{base}?{query}")) as catalog:
        assert catalog.safe_url.endswith("?catalog=x")
        catalog.publish(make_topology(), expected=None)
        assert isinstance(catalog, StoredCatalog)
        assert isinstance(catalog._store, PostgresStore)
        assert catalog._store._door.run("SHOW statement_timeout", (), Deadline(3)) == [("5s",)]
