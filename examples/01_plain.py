"""A small shop on three shards, with plain (blocking) code.

    python examples/01_plain.py                      # starts a cluster of its own
    python examples/01_plain.py etcd://host:2379/shop

Everything that it prints it has also checked.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections import Counter

from sqlalchemy import ForeignKeyConstraint, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from shardlib import ShardedEngine, ShardedSession, errors


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "example_orders"

    # The shard key decides where a row lives. It is part of the primary key.
    tenant: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    total: Mapped[int] = mapped_column(default=0)  # cents
    lines: Mapped[list[Line]] = relationship(order_by="Line.number", cascade="all, delete-orphan")


class Line(Base):
    __tablename__ = "example_lines"
    __table_args__ = (ForeignKeyConstraint(["tenant", "order_id"], [Order.tenant, Order.id]),)

    # The same shard key: an order and its lines are on one shard, so a foreign key can hold them together.
    tenant: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    order_id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]


def main(url: str) -> None:
    tenants = [f"tenant-{uuid.uuid4().hex[:8]}" for _ in range(30)]
    with ShardedEngine(url, pool_size=2) as engine:
        engine.create_all(Base.metadata)  # on every shard
        write(engine, tenants)
        read(engine, tenants)
        run_again_when_safe(engine, tenants[0])
        one = tenants[0]
        other = next(tenant for tenant in tenants if engine.shard_for(tenant) != engine.shard_for(one))
        write_on_two_shards(engine, one, other)
        write_on_all_shards(engine)


def write(engine: ShardedEngine, tenants: list[str]) -> None:
    print("One shard, one ordinary transaction")
    for number, tenant in enumerate(tenants):
        with engine.session(tenant) as session:
            lines = [Line(number=i, article=f"article {i}") for i in range(3)]
            session.add(Order(tenant=tenant, id=1, total=100 * number, lines=lines))
            session.commit()
    homes = Counter(engine.shard_for(tenant).name for tenant in tenants)
    for shard, count in sorted(homes.items()):
        print(f"   {shard} keeps {count} tenants")
    assert homes.total() == 30


def read(engine: ShardedEngine, tenants: list[str]) -> None:
    print("The shard is found from the statement")
    with engine.session() as session:
        query = select(Order).where(Order.tenant == tenants[7]).options(selectinload(Order.lines))
        order = session.scalars(query).one()
        assert (order.total, len(order.lines)) == (700, 3)

    print("Several keys: only the shards that hold them are asked, side by side")
    with engine.session() as session:
        some = session.scalars(select(Order).where(Order.tenant.in_(tenants[:5]))).all()
        assert sorted(order.total for order in some) == [0, 100, 200, 300, 400]


def run_again_when_safe(engine: ShardedEngine, tenant: str) -> None:
    print("A unit of work that is run again when that is safe")

    def raise_total(session: ShardedSession) -> int:
        order = session.get_one(Order, (tenant, 1), with_for_update=True)
        order.total += 50
        return order.total

    assert engine.run(raise_total, shard_key=tenant) == 50


def write_on_two_shards(engine: ShardedEngine, one: str, other: str) -> None:
    print("Two shards in one transaction: refused, unless two-phase commit is asked for")
    try:
        with engine.session() as session:
            move_money(session, one, other)
    except errors.CrossShardTransaction as error:
        print(f"   {error}")
    else:
        raise AssertionError("it should have been refused")

    before = total_of(engine, one) + total_of(engine, other)
    with engine.session(twophase=True) as session:
        move_money(session, one, other)
    assert total_of(engine, one) == 25
    assert total_of(engine, one) + total_of(engine, other) == before


def move_money(session: ShardedSession, one: str, other: str) -> None:
    session.get_one(Order, (one, 1)).total -= 25
    session.get_one(Order, (other, 1)).total += 25
    session.commit()


def total_of(engine: ShardedEngine, tenant: str) -> int:
    with engine.session(tenant) as session:
        return session.get_one(Order, (tenant, 1)).total


def write_on_all_shards(engine: ShardedEngine) -> None:
    print("A change on every shard has to be meant")
    change = update(Order).where(Order.total > 1_000_000).values(total=0)
    try:
        with engine.session() as session:
            session.execute(change)
    except errors.ShardKeyRequired as error:
        print(f"   {error}")
    else:
        raise AssertionError("it should have been refused")

    with engine.session(twophase=True) as session:
        session.execute(change, execution_options={"all_shards": True})
        session.commit()


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("SHARDLIB_CATALOG")
    if url:
        main(url)
    else:
        from shardlib_ops import LocalCluster

        with LocalCluster(shards=3) as cluster:
            main(cluster.url)
