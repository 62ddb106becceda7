"""The pytest plugin, as an application's tests see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODELS = """
from sqlalchemy import func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Order(Base):
    __tablename__ = "orders"
    tenant: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    id: Mapped[int] = mapped_column(primary_key=True)

class Currency(Base):
    __tablename__ = "currencies"
    __table_args__ = {"info": {"reference": True}}
    code: Mapped[str] = mapped_column(primary_key=True)
"""


INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
pythonpath = .
"""


def run(folder: Path, body: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "models.py").write_text(MODELS)
    (folder / "test_app.py").write_text("from models import *\nimport pytest\n" + body)
    (folder / "pytest.ini").write_text(INI)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110, check=False)


def test_each_test_finds_clean_shards(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
@pytest.fixture(scope="session", autouse=True)
def schema(sharded_cluster):
    from shardlib import ShardedEngine
    with ShardedEngine(sharded_cluster.url) as engine:
        engine.create_all(Base.metadata)
        for shard in engine.topology.shards:
            import psycopg
            with psycopg.connect(shard.primary.conninfo()) as connection:
                connection.execute("INSERT INTO currencies VALUES ('EUR')")

@pytest.mark.parametrize("run", range(2))
def test_orders(sharded_engine, run):
    assert len(sharded_engine.topology.shards) == 3
    for n in range(20):
        with sharded_engine.session(f"tenant-{n}") as session:
            assert session.scalars(select(Order).where(Order.tenant == f"tenant-{n}")).all() == []
            assert session.scalars(select(Currency)).one().code == "EUR"
            session.add(Order(tenant=f"tenant-{n}", id=n))
            session.commit()

@pytest.mark.parametrize("run", range(2))
async def test_orders_async(async_sharded_engine, run):
    async with async_sharded_engine.session("tenant-1") as session:
        assert (await session.scalars(select(Order).where(Order.tenant == "tenant-1"))).all() == []
        session.add(Order(tenant="tenant-1", id=1))
        await session.commit()
""",
        "--shardlib-shards=3",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_tables_of_a_test_are_gone_and_may_come_back_with_another_key(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
from sqlalchemy import Column, Integer, MetaData, Table

@pytest.mark.parametrize("key", ["a", "b"])
def test_key(sharded_engine, key):
    metadata = MetaData()
    columns = [Column(c, Integer, primary_key=True, info={"shard_key": True} if c == key else {}) for c in "ab"]
    table = Table("things", metadata, *columns)
    assert sharded_engine.topology.tables == ()
    sharded_engine.create_all(metadata)
    assert sharded_engine.topology.table("things").key == (key,)
    with sharded_engine.session(7) as session:
        assert session.execute(select(table).where(table.c[key] == 7)).all() == []
        session.execute(table.insert().values(a=7, b=7))
        session.commit()
""",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_cluster_that_runs_already(tmp_path: Path) -> None:
    from shardlib_ops import LocalCluster

    with LocalCluster(shards=1) as cluster:
        done = run(
            tmp_path,
            f"def test_url(sharded_cluster, sharded_engine): assert sharded_cluster.url == {cluster.url!r}\n",
            f"--shardlib-url={cluster.url}",
        )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("option", ["--shardlib-shards=many", "--shardlib-replicas=-1"])
def test_wrong_option_is_named(tmp_path: Path, option: str) -> None:
    done = run(tmp_path, "def test_it(sharded_cluster): pass\n", option)
    assert done.returncode != 0
    assert option.partition("=")[2] in done.stdout + done.stderr
    assert "a whole number is expected" in done.stdout + done.stderr


def test_loading_the_plugin_costs_nothing() -> None:
    code = (
        "import pytest, sys\n"
        "import shardlib_ops.testing.plugin\n"
        "heavy = {'sqlalchemy', 'psycopg', 'grpc', 'shardlib', 'typer', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
