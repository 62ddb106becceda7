"""Keys that no row has are told before they are moved; a value that only looks alike is another key."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import UUID

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from typer.testing import CliRunner

from shardlib import ShardedEngine
from shardlib.errors import ShardUnavailable
from shardlib_ops import LocalCluster, Manager
from shardlib_ops.cli.main import app

pytestmark = pytest.mark.timeout(240)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    author: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})


class Meter(Base):
    __tablename__ = "meter"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, info={"shard_key": True})


class Device(Base):
    __tablename__ = "device"

    id: Mapped[UUID] = mapped_column(primary_key=True, info={"shard_key": True})
    seen: Mapped[bool]


class Reading(Base):
    __tablename__ = "reading"

    author: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, info={"shard_key": True})


class Tick(Base):
    __tablename__ = "tick"

    at: Mapped[bool] = mapped_column(primary_key=True, info={"shard_key": True})


DEVICE = UUID("0e984725-c51c-4bf4-9960-e1c80e27aba0")
ROWS = [Note(author="ann"), Note(author="b c"), Meter(number=7), Device(id=DEVICE, seen=True), Tick(at=True)]
ROWS += [Reading(author="ann", number=3)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as found:
        with ShardedEngine(found.url) as engine:
            engine.create_all(Base.metadata)
            for row in ROWS:
                with engine.session() as session:
                    session.add(row)
                    session.commit()
        yield found


async def test_what_has_rows_and_what_has_none(cluster: LocalCluster) -> None:
    there = ["ann", "b c", 7, "7", DEVICE, str(DEVICE), True, "t", ("ann", 3)]
    absent = ["anna", "Ann", "007", 8, "DEVICE", str(DEVICE).upper(), "true", ("ann", 4), ("ann", "x"), "'", "%s"]
    absent.append(datetime(2026, 1, 2, tzinfo=UTC))
    async with Manager(cluster.url) as manager:
        assert await manager.keys_without_rows([*there, *absent]) == absent
        assert await manager.keys_without_rows([]) == []


def run(cluster: LocalCluster, *arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, arguments, env={"SHARDLIB_CATALOG": cluster.url})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout, result.stderr


def test_the_plan_and_the_command_name_the_mistyped_key(cluster: LocalCluster) -> None:
    with ShardedEngine(cluster.url) as engine:
        home = engine.shard_for("ann").name
        # The mistyped key has to be on the same shard, for a move of both to move both.
        typo = next(key for key in (f"ann{number}" for number in range(99)) if engine.shard_for(key).name == home)
    target = "shard-02" if home == "shard-01" else "shard-01"
    move = ["reshard", "move-keys", "ann", typo, "--target", target]
    plan, _ = run(cluster, *move, "--dry-run")
    assert f"no row has the key '{typo}'" in plan
    assert "key 'ann'" not in plan
    made, warned = run(cluster, *move, "--json")
    assert f"warning: no row has the key '{typo}'" in warned
    assert "key 'ann'" not in warned
    assert '"status": "pending"' in made, "a tenant may be placed before its first row"
    with Manager.sync(cluster.url) as manager:
        (job,) = manager.list_jobs()
        manager.cancel(job.id)


async def test_a_shard_that_does_not_answer_is_an_error_of_its_own(cluster: LocalCluster) -> None:
    with ShardedEngine(cluster.url) as engine:
        home = cluster.primary(engine.shard_for("ann").name)
    home.kill()
    try:
        async with Manager(cluster.url) as manager:
            with pytest.raises(ShardUnavailable, match=str(home.shard)):
                await manager.keys_without_rows(["ann"])
    finally:
        home.start()
