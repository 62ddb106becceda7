"""Catalog URLs: what is understood, and what is refused without showing a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlib.catalog import open_catalog
from shardlib.errors import InvalidArgument

SECRET = "canary-0d1e"


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("memory://tests", "memory://tests"),
        ("etcd://127.0.0.1:2379/shop", "etcd://127.0.0.1:2379/shop"),
        ("etcd://a:1,b.example:2,[::1]:3/shop", "etcd://a:1,b.example:2,[::1]:3/shop"),
        (f"etcd://root:{SECRET}%40%2F@a:1/x", "etcd://root@a:1/x"),
        (f"postgresql://u:{SECRET}@h:5/d", "postgresql://u@h:5/d?catalog=default"),
        (f"postgres://u:{SECRET}@h/d?catalog=x&sslmode=disable", "postgresql://u@h:5432/d?catalog=x"),
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


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"timeout_s": -1.0}, {"poll_s": 0}, {"timeout_s": float("nan")}])
def test_a_bad_limit_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        open_catalog("memory://tests", **options)


def test_a_tls_file_is_read_when_the_catalog_is_opened(tmp_path: Path) -> None:
    pem = tmp_path / "ca.pem"
    pem.write_text("not a certificate")
    catalog = open_catalog(f"etcds://127.0.0.1:1/x?ca={pem}&server_name=etcd.internal")
    catalog.close()
