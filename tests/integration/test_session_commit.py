"""What a commit over several shards keeps, in which order, and what counts as written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import insert, select, text, update

from shardlib import errors
from tests.support.models import Order


def fill(facade: Any, keys: list[str]) -> None:
    for key in keys:
        facade.session(lambda s, key=key: (s.execute(insert(Order), [{"tenant_id": key, "id": 1}]), s.commit()))


def total(facade: Any, key: str) -> Any:
    return facade.session(lambda s: s.scalar(select(Order.total).where(Order.tenant_id == key)))


def terminate(session: Any, shard: Any) -> None:
    pid = session._unit.legs[shard.id].connection.driver.info.backend_pid
    with psycopg.connect(shard.primary.conninfo(), autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))


@contextmanager
def slow_commits(dsn: str) -> Iterator[None]:
    """A COMMIT of changed orders takes a second, as with a far synchronous replica."""
    with psycopg.connect(dsn) as admin:
        admin.execute(
            "CREATE OR REPLACE FUNCTION slow_commit() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_sleep(1); RETURN NULL; END'"
        )
        admin.execute(
            "CREATE CONSTRAINT TRIGGER slow_commit AFTER UPDATE ON orders DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION slow_commit()"
        )
    try:
        yield
    finally:
        with psycopg.connect(dsn) as admin:
            admin.execute("DROP FUNCTION slow_commit CASCADE")


@pytest.mark.parametrize("locked", [False, True])
def test_a_read_lost_before_the_commit_is_run_again(facade: Any, keys: list[str], locked: bool) -> None:
    written, read, _ = keys
    fill(facade, keys)
    attempts: list[int] = []

    def work(session: Any) -> None:
        attempts.append(1)
        session.execute(update(Order).where(Order.tenant_id == written).values(total=Order.total + 1))
        reads = select(Order).where(Order.tenant_id == read)
        session.execute(reads.with_for_update() if locked else reads).all()
        if len(attempts) == 1:
            terminate(session, facade.core.shard_for(read))

    before = total(facade, written)
    facade.run(work)
    assert len(attempts) == 2
    assert total(facade, written) == before + 1, "nothing was kept of the first attempt"


@pytest.mark.parametrize("twophase", [False, True])
def test_a_row_lock_lasts_until_the_writes_on_other_shards_are_there(
    facade: Any, keys: list[str], twophase: bool
) -> None:
    mutex, *written = keys if twophase else keys[:2]
    fill(facade, keys)
    mutex_at, written_at = (facade.core.shard_for(key).primary.conninfo() for key in (mutex, written[-1]))
    locked, seen = threading.Event(), []

    def wait_for_the_lock() -> None:
        assert locked.wait(10)
        with psycopg.connect(mutex_at) as conn:
            conn.execute("SELECT total FROM orders WHERE tenant_id = %s FOR UPDATE", (mutex,))
            with psycopg.connect(written_at) as other:
                seen.append(other.execute("SELECT total FROM orders WHERE tenant_id = %s", (written[-1],)).fetchone())

    def work(session: Any) -> None:
        session.execute(select(Order).where(Order.tenant_id == mutex).with_for_update()).all()
        locked.set()
        for key in written:
            session.execute(update(Order).where(Order.tenant_id == key).values(total=7))
        session.commit()

    waiter = threading.Thread(target=wait_for_the_lock)
    waiter.start()
    try:
        with slow_commits(written_at):
            facade.session(work, twophase=twophase)
            waiter.join(10)
    finally:
        locked.set()
        waiter.join(10)
    assert seen == [(7,)], "the lock was free before the write that it guards was there"


def test_a_lock_lost_after_the_decision_is_no_failure(facade: Any, keys: list[str]) -> None:
    written, mutex, _ = keys
    fill(facade, keys)
    dsn = facade.core.shard_for(written).primary.conninfo()
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = 'COMMIT'"

    def work(session: Any) -> None:
        session.execute(select(Order).where(Order.tenant_id == mutex).with_for_update()).all()
        session.execute(update(Order).where(Order.tenant_id == written).values(total=7))
        pid = session._unit.legs[facade.core.shard_for(mutex).id].connection.driver.info.backend_pid

        def cut() -> None:
            with psycopg.connect(dsn, autocommit=True) as admin:
                while admin.execute(sleeping).fetchone() == (0,):
                    pass
            with psycopg.connect(facade.core.shard_for(mutex).primary.conninfo(), autocommit=True) as admin:
                admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))

        cutter = threading.Thread(target=cut, daemon=True)
        cutter.start()
        session.commit()
        cutter.join(10)
        session.execute(select(Order).where(Order.tenant_id == mutex)).all()  # the session goes on

    with slow_commits(dsn):
        facade.session(work)
    assert total(facade, written) == 7


def test_a_write_undone_with_its_savepoint_is_none(facade: Any, keys: list[str]) -> None:
    one, other, _ = keys

    def work(session: Any) -> None:
        nested = session.begin_nested()
        session.add(Order(tenant_id=other, id=1))
        session.flush()
        nested.rollback()
        session.add(Order(tenant_id=one, id=1))
        session.commit()

    facade.session(work)
    assert facade.session(lambda s: [s.get(Order, (key, 1)) is not None for key in (one, other)]) == [True, False]


@pytest.mark.parametrize("way", ["released", "released inside", "before", "on its connection"])
def test_a_write_that_a_savepoint_does_not_undo_counts(facade: Any, keys: list[str], way: str) -> None:
    one, other, _ = keys

    def work(session: Any) -> None:
        if way == "before":
            session.execute(insert(Order), [{"tenant_id": other, "id": 2}])
        nested = session.begin_nested()
        if way == "released inside":
            with session.begin_nested():
                session.execute(insert(Order), [{"tenant_id": other, "id": 1}])
        else:
            session.execute(insert(Order), [{"tenant_id": other, "id": 1}])
        if way == "on its connection":
            session.connection()
        (nested.rollback if way in ("before", "on its connection") else nested.commit)()
        with pytest.raises(errors.CrossShardTransaction):
            session.execute(insert(Order), [{"tenant_id": one, "id": 1}])

    facade.session(work)


def test_a_connection_is_not_detached(facade: Any, keys: list[str]) -> None:
    def core(conn: Any) -> None:
        with pytest.raises(errors.UnsupportedOperation, match=r"shard\.primary"):
            conn.detach()
        with pytest.raises(errors.UnsupportedOperation, match=r"shard\.primary"):
            conn.connection.detach()
        assert conn.scalar(text("SELECT 2")) == 2

    facade.connect(core, keys[0])
    facade.session(lambda s: core(s.connection()), keys[0])
