"""Transactions that the application ends past its session: what it hears of them is true, and nothing runs twice."""

from __future__ import annotations

from inspect import isawaitable
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from shardlib import errors
from shardlib_ops import LocalCluster
from tests.support.models import Order


def kept(shop: LocalCluster) -> int:
    count = 0
    for server in shop.servers:
        with psycopg.connect(server.dsn) as conn:
            found = conn.execute("SELECT count(*) FROM orders").fetchone()
            count += 0 if found is None else found[0]
    return count


def driver_does(session: Any, what: str) -> None:
    answer = getattr(session.connection().connection.driver_connection, what)()
    if isawaitable(answer):
        await_only(answer)


@pytest.mark.parametrize("how", ["connection", "transaction", "driver"])
def test_work_that_commits_past_its_session_is_not_run_again(
    facade: Any, shop: LocalCluster, keys: list[str], how: str
) -> None:
    attempts: list[int] = []

    def work(s: Any) -> None:
        attempts.append(1)
        s.add(Order(tenant_id=keys[0], id=len(attempts)))
        s.flush()
        if how == "connection":
            s.connection().commit()
        elif how == "transaction":
            s.connection().get_transaction().commit()
        else:
            driver_does(s, "commit")
        raise errors.ShardUnavailable("another", "once")

    with pytest.raises(errors.ShardUnavailable):
        facade.run(work, shard_key=keys[0])
    assert attempts == [1]
    assert kept(shop) == 1


def test_a_listener_that_fails_after_the_commit_runs_nothing_again(
    facade: Any, shop: LocalCluster, keys: list[str]
) -> None:
    attempts: list[int] = []

    def publish(session: Any) -> None:
        raise errors.ShardUnavailable("another", "the listener writes there")

    def work(s: Any) -> None:
        attempts.append(1)
        s.add(Order(tenant_id=keys[0], id=len(attempts)))

    event.listen(Session, "after_commit", publish, insert=True)
    try:
        with pytest.raises(errors.ShardUnavailable):
            facade.run(work)
    finally:
        event.remove(Session, "after_commit", publish)
    assert attempts == [1]
    assert kept(shop) == 1


def test_work_that_rolled_back_past_its_session_is_run_again(facade: Any, shop: LocalCluster, keys: list[str]) -> None:
    attempts: list[int] = []

    def work(s: Any) -> None:
        attempts.append(1)
        s.add(Order(tenant_id=keys[0], id=len(attempts)))
        s.flush()
        if len(attempts) == 1:
            s.connection().rollback()
            raise errors.ShardUnavailable("another", "once")

    facade.run(work, shard_key=keys[0])
    assert attempts == [1, 1]
    assert kept(shop) == 1


@pytest.mark.parametrize("how", ["driver", "text"])
def test_a_commit_of_what_has_ended_is_refused(facade: Any, shop: LocalCluster, keys: list[str], how: str) -> None:
    def body(s: Any) -> None:
        s.add(Order(tenant_id=keys[0], id=1))
        s.flush()
        if how == "driver":
            driver_does(s, "rollback")
        else:
            s.execute(text("PREPARE TRANSACTION 'by the application'"))
        s.commit()

    try:
        with pytest.raises(errors.UnsupportedOperation, match="has ended already"):
            facade.session(body, keys[0])
    finally:
        if how == "text":
            with psycopg.connect(facade.core.shard_for(keys[0]).primary.conninfo(), autocommit=True) as conn:
                conn.execute("ROLLBACK PREPARED 'by the application'")
    assert kept(shop) == 0


def test_what_the_driver_has_committed_is_committed(facade: Any, shop: LocalCluster, keys: list[str]) -> None:
    def body(s: Any) -> None:
        s.add(Order(tenant_id=keys[0], id=1))
        s.flush()
        driver_does(s, "commit")
        s.commit()
        s.add(Order(tenant_id=keys[0], id=2))
        s.commit()

    facade.session(body, keys[0])
    assert kept(shop) == 2


def test_a_core_connection_that_has_ended_goes_on_after_a_rollback(
    facade: Any, shop: LocalCluster, keys: list[str]
) -> None:
    def body(conn: Any) -> None:
        insert = text("INSERT INTO orders (tenant_id, id, total) VALUES (:key, 1, 1)")
        conn.execute(insert, {"key": keys[0]})
        answer = conn.connection.driver_connection.rollback()
        if isawaitable(answer):
            await_only(answer)
        with pytest.raises(errors.UnsupportedOperation, match="has ended already"):
            conn.commit()
        conn.rollback()
        conn.execute(insert, {"key": keys[0]})
        conn.commit()

    facade.connect(body, keys[0])
    assert kept(shop) == 1
