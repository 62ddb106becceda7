"""The proxy that other tests break connections with does what it says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
import pytest

from tests.support.eventually import eventually
from tests.support.faults import Proxy


@pytest.fixture
def proxy(database: str) -> Iterator[Proxy]:
    with psycopg.connect(database, autocommit=True) as direct:
        direct.execute("CREATE TABLE t (n int)")
    with Proxy(database) as proxy:
        yield proxy


def rows(database: str) -> list[int]:
    with psycopg.connect(database, autocommit=True) as direct:
        return [n for (n,) in direct.execute("SELECT n FROM t ORDER BY n")]


def test_forwards_whatever_passes(proxy: Proxy, database: str) -> None:
    with psycopg.connect(proxy.dsn) as connection, connection.cursor() as cursor:
        with cursor.copy("COPY t FROM STDIN") as copy:
            for n in range(20_000):
                copy.write_row((n,))
        cursor.execute("SELECT n FROM t WHERE n < %s", (3,), prepare=True)
        assert cursor.fetchall() == [(0,), (1,), (2,)]
    assert len(rows(database)) == 20_000
    assert proxy.connections == 1


def test_reply_of_commit_is_lost(proxy: Proxy, database: str) -> None:
    connection = psycopg.connect(proxy.dsn)
    connection.execute("INSERT INTO t VALUES (1)")
    proxy.cut_at("COMMIT")
    with pytest.raises(psycopg.OperationalError):
        connection.commit()
    assert rows(database) == [1], "the server committed"
    assert (proxy.cuts, proxy.replies_lost) == (1, 1)


def test_commit_does_not_arrive(proxy: Proxy, database: str) -> None:
    connection = psycopg.connect(proxy.dsn)
    connection.execute("INSERT INTO t VALUES (1)")
    proxy.cut_at("COMMIT", forwarded=False)
    with pytest.raises(psycopg.OperationalError):
        connection.commit()
    assert rows(database) == []
    assert (proxy.cuts, proxy.replies_lost) == (1, 0)


def test_pipelined_commit_is_seen(proxy: Proxy, database: str) -> None:
    connection = psycopg.connect(proxy.dsn)
    proxy.cut_at("COMMIT")

    def insert() -> None:
        with connection.pipeline():
            connection.execute("INSERT INTO t VALUES (1)")
            connection.commit()

    with pytest.raises(psycopg.OperationalError):
        insert()
    assert proxy.replies_lost == 1
    assert rows(database) == [1]


def test_rule_counts(proxy: Proxy, database: str) -> None:
    proxy.cut_at("COMMIT", times=2)
    for _ in range(2):
        connection = psycopg.connect(proxy.dsn)
        connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
    with psycopg.connect(proxy.dsn) as connection:
        connection.execute("INSERT INTO t VALUES (2)")
    assert rows(database) == [1, 1, 2]


def test_cut_breaks_the_live_and_the_server_notices(proxy: Proxy, database: str) -> None:
    connection = psycopg.connect(proxy.dsn, application_name="victim")
    connection.execute("INSERT INTO t VALUES (1)")
    assert proxy.cut() == 1
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    with psycopg.connect(database, autocommit=True) as direct:
        query = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'victim'"
        eventually(lambda: direct.execute(query).fetchone() == (True,), 5, "the backend has ended")
    assert rows(database) == []


def test_refuse_then_accept(proxy: Proxy) -> None:
    live = psycopg.connect(proxy.dsn, autocommit=True)
    proxy.refuse()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(proxy.dsn, connect_timeout=2)
    assert live.execute("SELECT 1").fetchone() == (1,)
    live.close()
    proxy.accept()
    psycopg.connect(proxy.dsn).close()


def test_stall_hangs_old_and_new_until_healed(proxy: Proxy) -> None:
    live = psycopg.connect(proxy.dsn, autocommit=True)
    proxy.stall()
    began = time.monotonic()
    with pytest.raises(psycopg.OperationalError, match="timeout"):
        psycopg.connect(proxy.dsn, connect_timeout=2)
    assert time.monotonic() - began >= 1.5
    live.pgconn.send_query(b"SELECT 42")
    live.pgconn.consume_input()
    assert live.pgconn.is_busy()
    proxy.heal()

    def answered() -> bool:
        live.pgconn.consume_input()
        return not live.pgconn.is_busy()

    eventually(answered, 5)
    result = live.pgconn.get_result()
    assert result is not None
    assert result.get_value(0, 0) == b"42"
    live.close()
