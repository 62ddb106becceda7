"""What an application's type checker sees of the public API. Checked by mypy and pyright, never run.

`assert_type` fails when an annotation is lost (`Any`) or changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_type

from sqlalchemy import ScalarResult, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

import shardlib
from shardlib import (
    AsyncShardedEngine,
    AsyncShardedSession,
    Consistency,
    ShardedEngine,
    ShardedSession,
    errors,
)
from shardlib.route.retry import RetryPolicy
from shardlib.topology import Shard, Topology
from shardlib_ops import LocalCluster


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    tenant: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    id: Mapped[int] = mapped_column(primary_key=True)


def engine() -> None:
    assert_type(shardlib.__version__, str)
    with ShardedEngine(
        "etcd://127.0.0.1:2379/shop",
        consistency="session",
        topology_file="topology",
        retry=RetryPolicy(attempts_max=3),
        pool_size=5,
    ) as engine:
        assert_type(engine, ShardedEngine)
        assert_type(engine.topology, Topology)
        assert_type(engine.topology.version, int)
        assert_type(engine.topology.shards, tuple[Shard, ...])
        assert_type(engine.shard_for("a"), Shard)
        assert_type(engine.shard_for(("a", 1)).name, str)
        assert_type(engine.token("a"), int)
        assert_type(engine.refresh(), Topology)
        assert_type(engine.consistency, Consistency)
        engine.create_all(Base.metadata)
        engine.register(Base.metadata)
        with engine.connect("a") as connection:
            assert_type(connection.scalars(select(Order.id)), ScalarResult[int])


def session(engine: ShardedEngine) -> Sequence[Order]:
    with engine.session("a", expire_on_commit=False) as session:
        assert_type(session, ShardedSession)
        as_sqlalchemy: Session = session
        as_sqlalchemy.commit()
        assert_type(session.get(Order, ("a", 1)), Order | None)
    with engine.session(twophase=True, consistency=Consistency.EVENTUAL) as session:
        found = session.scalars(select(Order).where(Order.tenant == "a"))
        assert_type(found, ScalarResult[Order])
        return found.all()


def maker(engine: ShardedEngine) -> None:
    make = engine.sessionmaker(expire_on_commit=False)
    assert_type(make, sessionmaker[ShardedSession])
    with make.begin() as session:
        assert_type(session, ShardedSession)


def run(engine: ShardedEngine) -> None:
    def work(session: ShardedSession) -> int:
        return len(session.scalars(select(Order)).all())

    assert_type(engine.run(work, shard_key="a"), int)
    assert_type(engine.run(lambda session: session.get_one(Order, ("a", 1)), shard_key="a"), Order)


async def asynchronous() -> None:
    async with await AsyncShardedEngine.open("etcd://127.0.0.1:2379/shop") as engine:
        assert_type(engine, AsyncShardedEngine)
        assert_type(engine.topology, Topology)
        assert_type(engine.shard_for("a"), Shard)
        assert_type(await engine.refresh(), Topology)
        await engine.create_all(Base.metadata)

        async with engine.session("a") as session:
            assert_type(session, AsyncShardedSession)
            as_sqlalchemy: AsyncSession = session
            await as_sqlalchemy.commit()
            assert_type(await session.scalars(select(Order)), ScalarResult[Order])

        make = engine.sessionmaker()
        assert_type(make, async_sessionmaker[AsyncShardedSession])
        async with engine.connect("a") as connection:
            assert_type(connection, AsyncConnection)

        async def work(session: AsyncShardedSession) -> int:
            return len((await session.scalars(select(Order))).all())

        assert_type(await engine.run(work, shard_key="a"), int)


def error_values(error: Exception) -> tuple[Any, ...]:
    match error:
        case errors.StaleTopology():
            assert_type(error.shard, str)
            assert_type(error.gate, int)
            assert_type(error.version, int)
        case errors.RetryableError():
            assert_type(error, errors.RetryableError)
        case errors.CrossShardTransaction():
            assert_type(error.shards, tuple[str, ...])
        case errors.InvalidArgument():
            value_error: ValueError = error
            return value_error.args
        case _:
            pass
    return ()


def cluster() -> None:
    with LocalCluster(shards=3, replicas=1, synchronous=True) as cluster:
        assert_type(cluster, LocalCluster)
        assert_type(cluster.url, str)
        cluster.servers[0].kill()


async def cluster_asynchronously() -> None:
    async with LocalCluster(shards=1) as cluster:
        assert_type(cluster.url, str)
