"""etcd behind TLS and client certificates, made by `openssl` for the test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardlib.catalog import open_catalog
from shardlib.errors import CatalogUnavailable
from tests.support.etcd_server import EtcdServer, etcd_server
from tests.support.eventually import eventually
from tests.support.topologies import changed, facts, make_topology

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


def _authority(folder: Path, name: str) -> None:
    _openssl(
        folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
        "-keyout", f"{name}.key", "-out", f"{name}.pem",
    )  # fmt: skip


def _certificate(folder: Path, name: str, hosts: str) -> None:
    (folder / "san").write_text(f"subjectAltName={hosts}\nextendedKeyUsage=serverAuth,clientAuth\n")
    _openssl(
        folder, "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
        "-keyout", f"{name}.key", "-out", f"{name}.csr",
    )  # fmt: skip
    _openssl(
        folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", "2", "-extfile", "san", "-out", f"{name}.pem",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    _authority(folder, "ca")
    _authority(folder, "stranger")
    _certificate(folder, "server", "DNS:etcd.internal,DNS:localhost,IP:127.0.0.1")
    _certificate(folder, "client", "DNS:client")
    return folder


@pytest.fixture(scope="module")
def server(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    flags = (
        "--cert-file", str(pki / "server.pem"), "--key-file", str(pki / "server.key"),
        "--client-cert-auth", "--trusted-ca-file", str(pki / "ca.pem"),
    )  # fmt: skip
    ctl = ("--cacert", str(pki / "ca.pem"), "--cert", str(pki / "client.pem"), "--key", str(pki / "client.key"))
    with etcd_server(tmp_path_factory.mktemp("etcd"), *flags, tls=ctl) as started:
        yield started


@pytest.mark.parametrize("name", ["", "&server_name=etcd.internal"])
def test_both_sides_prove_who_they_are(server: EtcdServer, pki: Path, name: str) -> None:
    files = f"ca={pki}/ca.pem&cert={pki}/client.pem&key={pki}/client.key{name}"
    catalog = open_catalog(f"etcds://{server.endpoint}/tls{len(name)}?{files}")
    topology = make_topology()
    catalog.publish(topology, expected=None)
    heard: list[int] = []
    watch = catalog.watch(heard.append, lambda alive: None)
    catalog.publish(changed(topology), expected=1)
    eventually(lambda: heard[-1:] == [2], 5, "the watch tells of version 2")
    assert facts(catalog.load())["version"] == 2
    watch.close()
    catalog.close()


@pytest.mark.parametrize(
    ("scheme", "query"),
    [
        ("etcds", "?ca={pki}/ca.pem"),
        ("etcds", "?ca={pki}/stranger.pem&cert={pki}/client.pem&key={pki}/client.key"),
        ("etcds", "?ca={pki}/ca.pem&cert={pki}/stranger.pem&key={pki}/stranger.key"),
        ("etcds", "?ca={pki}/ca.pem&cert={pki}/client.pem&key={pki}/client.key&server_name=other.internal"),
        ("etcd", ""),
    ],
    ids=["no client certificate", "a server of a stranger", "a client of a stranger", "another name", "plain"],
)
def test_anything_less_is_refused(server: EtcdServer, pki: Path, scheme: str, query: str) -> None:
    catalog = open_catalog(f"{scheme}://{server.endpoint}/tls{query.format(pki=pki)}", timeout_s=1)
    with pytest.raises(CatalogUnavailable):
        catalog.version()
    catalog.close()
