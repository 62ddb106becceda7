"""P8: until a rollback is certain, the old side refuses whoever writes there without a gate."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from sqlalchemy import insert

from shardlib import ShardedEngine
from shardlib.topology import Topology
from shardlib.topology.model import MoveState
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Status
from shardlib_ops.reshard.resharder import Resharder
from shardlib_ops.reshard.servers import Servers
from tests.support.schedules.client import account, more

pytestmark = [pytest.mark.promise("P8"), pytest.mark.fault, pytest.mark.timeout(240)]


async def test_p8_a_write_to_the_old_side_just_before_a_rollback_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    publish = Servers.publish

    with LocalCluster(shards=2) as cluster:
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(more)
            moving = next(key for n in range(100) if engine.shard_for(key := f"key-{n}").name == "shard-01")
            with engine.session(moving) as session:
                session.execute(insert(account).values(key=moving, coins=0))
                session.commit()
        source = cluster.servers[0].dsn

        def write() -> None:
            with psycopg.connect(source) as conn:
                conn.execute("UPDATE account SET coins = coins + 1 WHERE key = %s", (moving,))

        async def outsider_first(self: Servers, after: Topology, *, expected: int) -> bool:
            before = await self.topology()
            if any(m.state is MoveState.SWITCHED for m in before.moves) and any(
                m.state is MoveState.COPYING for m in after.moves
            ):
                with pytest.raises(psycopg.Error) as error:
                    await asyncio.to_thread(write)
                refused.append(str(error.value.sqlstate))
            return await publish(self, after, expected=expected)

        monkeypatch.setattr(Servers, "publish", outsider_first)
        async with Manager(cluster.url) as manager, Resharder(cluster.url) as resharder, asyncio.timeout(120):
            job = await manager.move_keys([moving], target={"shard_id": "shard-02"})
            assert (await resharder.run(job.id)).status is Status.VALIDATION
            await manager.rollback(job.id)
            ended = await resharder.run(job.id)
        assert ended.status is Status.ROLLED_BACK, ended.error
        assert refused == ["SL002"]
        with ShardedEngine(cluster.url) as engine, engine.session(moving) as session:
            session.execute(account.update().where(account.c.key == moving).values(coins=account.c.coins + 1))
            session.commit()
        write()
        with psycopg.connect(source) as conn:
            assert conn.execute("SELECT coins FROM account").fetchall() == [(2,)]
