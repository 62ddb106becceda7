"""Shared by all tests: a seed that gives a run back, and real servers."""

from __future__ import annotations

import os
import random
import signal
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from shardlib_ops import LocalCluster
    from shardlib_ops.local import LocalEtcd, LocalServer

SEED = int(os.environ.get("SHARDLIB_TEST_SEED") or random.SystemRandom().randrange(2**32))
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored, and the tests of Ctrl-C would wait for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"shardlib: SHARDLIB_TEST_SEED={SEED}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and "rng" in getattr(item, "fixturenames", ()):
        report.sections.append(("seed", f"run it again with SHARDLIB_TEST_SEED={SEED}"))
    return report


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """The source of whatever is random in a test; other for each test, given back by the seed of the run."""
    return random.Random(f"{SEED}:{request.node.nodeid}")


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(None, id="pg18"),
        pytest.param(
            DEBIAN_15,
            id="pg15",
            marks=pytest.mark.skipif(not DEBIAN_15.exists(), reason=f"no PostgreSQL 15 in {DEBIAN_15}"),
        ),
    ],
)
def pg_bin(request: pytest.FixtureRequest) -> Path | None:
    """For tests that must hold on the oldest and on the newest PostgreSQL: `LocalCluster(pg_bin=pg_bin)`."""
    found: Path | None = request.param
    return found


@pytest.fixture(scope="session")
def bare_cluster() -> Iterator[LocalCluster]:
    """Two servers and an etcd without a topology, shared by all tests: none may stop or kill them."""
    from shardlib_ops import LocalCluster

    with LocalCluster(shards=2, bootstrap=False) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def server(bare_cluster: LocalCluster) -> LocalServer:
    """A PostgreSQL server that tests share and leave running."""
    return bare_cluster.servers[0]


@pytest.fixture(scope="session")
def etcd(bare_cluster: LocalCluster) -> LocalEtcd:
    """An etcd that tests share and leave running."""
    return bare_cluster.etcd[0]


@pytest.fixture
def etcd_url(etcd: LocalEtcd) -> str:
    """A catalog URL of an etcd, under a name that no other test uses."""
    return f"etcd://127.0.0.1:{etcd.port}/test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def database(server: LocalServer) -> Iterator[str]:
    """The DSN of a new, empty database on a shared server."""
    yield from _database(server)


@pytest.fixture
def second_database(bare_cluster: LocalCluster) -> Iterator[str]:
    """The DSN of a new, empty database on another shared server than that of `database`."""
    yield from _database(bare_cluster.servers[1])


def _database(server: LocalServer) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    with server.connect() as admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            yield server.dsn.rsplit("/", 1)[0] + f"/{name}"
        finally:
            # FORCE does not end prepared transactions, which keep a database from being dropped.
            with server.connect(dbname=name) as inside:
                for (gid,) in inside.execute(
                    "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
                ).fetchall():
                    inside.execute(f"ROLLBACK PREPARED '{gid}'")
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
