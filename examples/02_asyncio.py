"""The same from asyncio: many tasks at once over one engine.

python examples/02_asyncio.py                    # starts a cluster of its own
python examples/02_asyncio.py etcd://host:2379/shop
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections import Counter

from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import AsyncShardedEngine, AsyncShardedSession


class Base(DeclarativeBase):
    pass


class Visit(Base):
    __tablename__ = "example_visits"

    visitor: Mapped[uuid.UUID] = mapped_column(primary_key=True, info={"shard_key": True})
    page: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


async def main(url: str) -> None:
    visitors = [uuid.uuid4() for _ in range(40)]

    # `open` reads the first topology without blocking the event loop.
    async with await AsyncShardedEngine.open(url, pool_size=4) as engine:
        await engine.create_all(Base.metadata)

        async def visit(visitor: uuid.UUID, page: str) -> None:
            async def work(session: AsyncShardedSession) -> None:
                found = await session.get(Visit, (visitor, page), with_for_update=True)
                if found is None:
                    session.add(Visit(visitor=visitor, page=page, count=1))
                else:
                    found.count += 1

            await engine.run(work, shard_key=visitor)

        # 40 tasks at a time; each holds a connection only while its transaction runs.
        async with asyncio.TaskGroup() as tasks:
            for visitor in visitors:
                tasks.create_task(visit(visitor, "/"))
        async with asyncio.TaskGroup() as tasks:
            for visitor in visitors:
                tasks.create_task(visit(visitor, "/" if visitor.int % 2 else "/help"))

        async with engine.session() as session:
            rows = (await session.scalars(select(Visit).where(Visit.visitor.in_(visitors)))).all()
        seen = Counter[str]()
        for row in rows:
            seen[row.page] += row.count
        print(f"{seen.total()} visits of {len(visitors)} visitors: {dict(seen)}")
        assert seen.total() == 80

        homes = Counter(engine.shard_for(visitor).name for visitor in visitors)
        print(f"they live on {dict(homes)}")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("SHARDLIB_CATALOG")
    if url:
        asyncio.run(main(url))
    else:
        from shardlib_ops import LocalCluster

        with LocalCluster(shards=3) as cluster:
            asyncio.run(main(cluster.url))
