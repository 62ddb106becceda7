"""`bulk_load` on real servers: what arrives, where, and what is left when it fails."""

from __future__ import annotations

import asyncio
import enum
import random
import re
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Time,
    TypeDecorator,
    Uuid,
    event,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import INT4RANGE, JSONB, Range
from sqlalchemy.exc import DataError, IntegrityError, OperationalError

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.engine import bulk_copy
from shardlib.engine.bulk import BulkProgress
from shardlib.errors import (
    BulkLoadIncomplete,
    CommitOutcomeUnknown,
    InvalidArgument,
    InvalidShardKey,
    InvalidTopology,
    ShardKeyRequired,
    ShardUnavailable,
    StaleTopology,
    UnsupportedOperation,
)
from shardlib.fence.gate import close_gate, open_gate
from shardlib.ring import TokenRange
from shardlib.topology import Status
from shardlib.topology.change import renew_gates
from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from shardlib_ops.manager.bootstrap import NewShard, create_cluster
from tests.support.eventually import eventually
from tests.support.faults import Proxy
from tests.support.gates import give_gate
from tests.support.models import Base, CardPayment, Currency, Order, Payment

KEY = {"shard_key": True}
SHARDS = 3


class Color(enum.Enum):
    RED = "r"
    GREEN = "g"


class Upper(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: object) -> str | None:
        return None if value is None else value.upper()


metadata = MetaData()
item = Table(
    "item",
    metadata,
    Column("tenant", String, primary_key=True, info=KEY),
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("price", Integer, nullable=False, server_default="7"),
)
everything = Table(
    "Every thing",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False, info=KEY),
    Column("a text", String),
    Column("small", Integer),
    Column("ratio", Float),
    Column("price", Numeric(20, 6)),
    Column("yes", Boolean),
    Column("day", Date),
    Column("moment", DateTime),
    Column("instant", DateTime(timezone=True)),
    Column("hour", Time),
    Column("span", Interval),
    Column("uid", Uuid),
    Column("uid_text", Uuid(as_uuid=False)),
    Column("data", LargeBinary),
    Column("doc", JSON),
    Column("docb", JSONB(none_as_null=True)),
    Column("tags", ARRAY(String)),
    Column("blobs", ARRAY(LargeBinary)),
    Column("color", Enum(Color)),
    Column("loud", Upper),
    Column("between", INT4RANGE),
)
country = Table(
    "country", metadata, Column("code", String, primary_key=True), Column("name", String),
    info={"reference": True},
)  # fmt: skip
late = Table(
    "late", metadata,
    Column("tenant", String, primary_key=True, info=KEY),
    Column("id", Integer, primary_key=True, autoincrement=False),
)  # fmt: skip
filled = Table(
    "filled",
    metadata,
    Column("id", Uuid, primary_key=True, info=KEY, default=uuid.uuid4),
    Column("n", Integer, nullable=False),
    Column("scalar", String, default="x"),
    Column("double", Integer, default=lambda context: context.get_current_parameters()["n"] * 2),
    Column("server", Integer, server_default="5"),
)


@dataclass
class Shop:
    """A cluster of three servers, each behind a proxy, and engines on it."""

    servers: list[LocalServer]
    proxies: list[Proxy]
    url: str
    engine: ShardedEngine
    other: AsyncShardedEngine
    loop: asyncio.Runner

    def count(self, table: str) -> dict[str, int]:
        """Rows by shard name, asked of the servers themselves."""
        found = {}
        for number, server in enumerate(self.servers):
            if server.running:
                with server.connect() as conn:
                    row = conn.execute(f'SELECT count(*) FROM "{table}"').fetchone()
                assert row is not None
                found[f"n{number}"] = row[0]
        return found

    def server_of(self, key: object) -> LocalServer:
        return self.servers[int(self.engine.shard_for(key).name[1:])]

    def gates_free(self) -> None:
        """No transaction of a load is left on any server."""
        query = (
            "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'shardlib' AND xact_start IS NOT NULL"
        )
        for server in self.servers:
            if server.running:
                with server.connect() as conn:
                    eventually(partial(_yes, conn, query), 5, "no transaction is open")


def _yes(conn: psycopg.Connection[Any], query: str) -> bool:
    return conn.execute(query.encode()).fetchone() == (True,)


Load = Callable[..., Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=SHARDS, bootstrap=False) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shop(cluster: LocalCluster) -> Iterator[Shop]:
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(server.dsn)) for server in cluster.servers]
        url = f"memory://bulk-{uuid.uuid4().hex}"
        catalog = open_catalog(url)
        create_cluster(catalog, [NewShard(f"n{i}", Dsn(proxy.dsn)) for i, proxy in enumerate(proxies)])
        engine = stack.enter_context(ShardedEngine(url, reroute_timeout_s=3.0))
        engine.create_all(metadata)
        engine.create_all(Base.metadata)
        loop = stack.enter_context(asyncio.Runner())

        async def opened() -> AsyncShardedEngine:
            return AsyncShardedEngine(url, reroute_timeout_s=3.0)

        other = loop.run(opened())
        stack.callback(lambda: loop.run(other.dispose()))
        yield Shop(list(cluster.servers), proxies, url, engine, other, loop)


@pytest.fixture(autouse=True)
def clean(shop: Shop) -> None:
    tables = ", ".join(f'"{t.name}"' for t in [*metadata.sorted_tables, *Base.metadata.sorted_tables])
    for server, proxy in zip(shop.servers, shop.proxies, strict=True):
        proxy.heal()
        server.start()
        with server.connect() as conn:
            conn.execute(f"TRUNCATE {tables} CASCADE")
            conn.execute("ALTER TABLE late DROP CONSTRAINT IF EXISTS later")


@pytest.fixture(params=["threads", "asyncio"])
def load(request: pytest.FixtureRequest, shop: Shop) -> Load:
    """`bulk_load` of the blocking engine, or of the one for asyncio: one body tests both."""
    if request.param == "threads":
        return shop.engine.bulk_load
    return lambda *args, **kw: shop.loop.run(shop.other.bulk_load(*args, **kw))


def items(count: int, tenants: int = 50) -> Iterator[dict[str, Any]]:
    return ({"tenant": f"t{i % tenants}", "id": i, "price": i * 2} for i in range(count))


def stored(shop: Shop, table: Table, key: object) -> dict[str, Any]:
    with shop.engine.connect(key) as conn:
        (column,) = [c for c in table.columns if c.info.get("shard_key")]
        return dict(conn.execute(select(table).where(column == key)).mappings().one())


# -- what arrives -------------------------------------------------------------------------------------------------


def test_each_row_is_on_the_shard_of_its_key(shop: Shop, load: Load) -> None:
    result = load(item, items(5000))
    assert result.rows == 5000
    wanted: dict[str, set[int]] = {f"n{i}": set() for i in range(SHARDS)}
    for row in items(5000):
        wanted[shop.engine.shard_for(row["tenant"]).name].add(row["id"])
    for number, server in enumerate(shop.servers):
        with server.connect() as conn:
            found = {i for (i,) in conn.execute("SELECT id FROM item")}
            assert conn.execute("SELECT count(*) FROM item WHERE price <> id * 2").fetchone() == (0,)
        assert found == wanted[f"n{number}"]
    assert result.rows_by_shard == {name: len(ids) for name, ids in wanted.items() if ids}
    shop.gates_free()


NASTY = ["", "\\", "\\N", "\\.", "tab\there", "line\nfeed", "cr\r\n", "naïve ☃ 🐘", "NULL", "\x01\x0b\x0c\x08", "'\""]


def test_every_type_comes_back_as_it_was_given(shop: Shop, load: Load) -> None:
    uid = uuid.uuid4()
    aware = datetime(2024, 5, 6, 7, 8, 9, 123456, UTC)
    rows: list[dict[str, Any]] = [
        {
            "id": i,
            "a text": nasty,
            "small": -i,
            "ratio": [0.1, 1e300, -1e-300, float("inf")][i % 4],
            "price": [Decimal("12.5"), Decimal("-0.000001"), Decimal("1E+3"), 7][i % 4],
            "yes": [True, False, None][i % 3],
            "day": date(1 + i * 700, 2, 28),
            "moment": datetime(2024, 5, 6, 7, 8, 9, i),
            "instant": aware + timedelta(days=i),
            "hour": time(1, 2, 3, i),
            "span": timedelta(days=-i, microseconds=5),
            "uid": uid,
            "uid_text": str(uid),
            "data": bytes(range(256)),
            "doc": {"text": nasty, "list": [1, None, 2.5]},
            "docb": None if i % 2 else [nasty],
            "tags": [nasty, "a,b", "{x}"],
            "blobs": [b"\x00\\'", b""],
            "color": Color.RED if i % 2 else None,
            "loud": nasty,
            "between": Range(i, i + 5),
        }
        for i, nasty in enumerate(NASTY)
    ]
    nothing = dict.fromkeys(rows[0]) | {"id": 99}
    load(everything, [*rows, nothing])
    for row in rows:
        found = stored(shop, everything, row["id"])
        assert found == row | {"loud": row["loud"].upper()}
    found = stored(shop, everything, 99)
    assert found == nothing
    with shop.engine.connect(99) as conn:  # JSON without none_as_null stores its own null, as an INSERT does
        kinds = conn.execute(text('SELECT doc::text, docb::text FROM "Every thing" WHERE id = 99')).one()
    assert tuple(kinds) == ("null", None)


def test_random_texts_survive(shop: Shop, load: Load, rng: random.Random) -> None:
    alphabet = "\\\t\n\rNa.bé☃\x02"
    rows = [(i, "".join(rng.choices(alphabet, k=rng.randrange(12)))) for i in range(3000)]
    load(everything, rows, columns=["id", everything.c["a text"]])
    found: dict[int, str] = {}
    for server in shop.servers:
        with server.connect() as conn:
            found.update(conn.execute('SELECT id, "a text" FROM "Every thing"').fetchall())
    assert found == dict(rows)


def test_a_reference_table_is_the_same_everywhere(shop: Shop, load: Load) -> None:
    result = load(country, [(f"c{i}", f"name\t{i}") for i in range(3000)], columns=["code", "name"])
    assert result.rows == 3000
    assert result.rows_by_shard == {"n0": 3000, "n1": 3000, "n2": 3000} == shop.count("country")


def test_a_mapped_class_names_attributes_and_gets_its_defaults(shop: Shop, load: Load) -> None:
    load(Order, [{"tenant_id": "a", "id": i, "customer_id": None, "currency": None} for i in range(10)])
    load(Payment, [{"tenant_id": "a", "id": 1}])
    with shop.engine.session("a") as session:
        assert [order.total for order in session.scalars(select(Order))] == [0] * 10
        assert session.scalars(select(Payment.kind)).all() == ["payment"]
    load(Currency, [{"code": "EUR", "name": "Euro"}])
    with pytest.raises(UnsupportedOperation, match="2 tables"):
        load(CardPayment, [])


def test_defaults_are_those_of_an_insert(shop: Shop, load: Load) -> None:
    load(filled, [(i,) for i in range(100)], columns=["n"])
    found = []
    for server in shop.servers:
        with server.connect() as conn:
            found += conn.execute("SELECT n, scalar, double, server FROM filled").fetchall()
    assert sorted(found) == [(i, "x", i * 2, 5) for i in range(100)]


def test_an_async_iterable_and_an_awaited_progress(shop: Shop) -> None:
    reports: list[BulkProgress] = []

    async def rows() -> AsyncIterator[dict[str, Any]]:
        for row in items(3000):
            if row["id"] % 1000 == 0:
                await asyncio.sleep(0.12)
            yield row

    async def progress(report: BulkProgress) -> None:
        await asyncio.sleep(0)
        reports.append(report)

    result = shop.loop.run(shop.other.bulk_load(item, rows(), progress=progress))
    assert sum(shop.count("item").values()) == result.rows == 3000
    assert len(reports) >= 2
    assert [report.done for report in reports] == [False] * (len(reports) - 1) + [True]
    last = reports[-1]
    assert (last.rows_read, last.rows_sent, last.bytes_sent) == (3000, result.rows_by_shard, result.bytes)
    assert last.rows_committed == result.rows_by_shard
    with pytest.raises(InvalidArgument, match="iterable"):
        shop.engine.bulk_load(item, rows())  # type: ignore[arg-type]


def test_other_tasks_run_while_a_load_does(shop: Shop) -> None:
    async def both() -> int:
        ticks = 0
        running = asyncio.ensure_future(shop.other.bulk_load(item, items(40_000)))
        while not running.done():
            ticks += 1
            await asyncio.sleep(0)
        await running
        return ticks

    assert shop.loop.run(both()) > 40


def test_nothing_to_load(shop: Shop, load: Load) -> None:
    reports: list[BulkProgress] = []
    result = load(item, [], progress=reports.append)
    assert (result.rows, result.rows_by_shard, result.bytes) == (0, {}, 0)
    assert [report.done for report in reports] == [True]


def test_the_source_is_not_read_ahead_of_a_shard_that_does_not_keep_up(shop: Shop, load: Load) -> None:
    """Half of the servers stop taking data: the source waits, in bounded memory, until the load gives up."""
    read = 0

    def rows() -> Iterator[tuple[int, str]]:
        nonlocal read
        for i in range(20_000):
            read += 1
            if i == 200:
                shop.proxies[0].stall()
            yield i, "x" * 10_000

    with pytest.raises(ShardUnavailable, match="n0"):
        load(everything, rows(), columns=["id", "a text"], stall_timeout_s=1.0)
    assert read < 10_000, "200 MB would have been sent"
    shop.proxies[0].heal()
    shop.gates_free()
    assert sum(shop.count("Every thing").values()) == 0


# -- what is wrong with a row -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "kind", "said"),
    [
        ({"tenant": None, "id": 1, "price": 1}, InvalidShardKey, "row 3001"),
        ({"tenant": 5, "id": 1, "price": 1}, InvalidShardKey, "row 3001"),
        ({"tenant": "x", "id": 1}, InvalidArgument, "row 3001"),
        ({"tenant": "x", "id": 1, "cost": 1}, InvalidArgument, "row 3001.*tenant, id, price"),
        ({"tenant": "x", "id": 1, "price": 1, "more": 2}, InvalidArgument, "row 3001"),
        (("x", 1, 1), InvalidArgument, "all mappings"),
        ({"tenant": "x", "id": "y", "price": 1}, DataError, "row 3001 of the load"),
        ({"tenant": "x", "id": 1, "price": None}, IntegrityError, "row 3001 of the load"),
        ({"tenant": "t3", "id": 3, "price": 1}, IntegrityError, "refused"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_and_nothing_is_kept(
    shop: Shop, load: Load, bad: Any, kind: type[Exception], said: str
) -> None:
    def rows() -> Iterator[Any]:
        yield from items(3000)
        yield bad
        yield from ({"tenant": "z", "id": i, "price": 0} for i in range(10))

    with pytest.raises(kind) as caught:
        load(item, rows())
    assert re.search(said, str(caught.value)), str(caught.value)
    assert sum(shop.count("item").values()) == 0
    shop.gates_free()
    assert load(item, items(10)).rows == 10, "the pools are usable"


def test_wrong_arguments_are_named(shop: Shop, load: Load) -> None:
    with pytest.raises(InvalidArgument, match="zero character"):
        load(item, [("a", "b\0c")], columns=["tenant", "id"])
    with pytest.raises(InvalidArgument, match="'nope'"):
        load(item, [], columns=["tenant", "nope"])
    with pytest.raises(ShardKeyRequired, match="'tenant'"):
        load(item, [{"id": 1}])
    with pytest.raises(InvalidArgument, match="columns"):
        load(item, [("a", 1)])
    with pytest.raises(InvalidArgument, match="batch_rows"):
        load(item, [], batch_rows=0)
    with pytest.raises(InvalidArgument, match="rows"):
        load(item, {"tenant": "a"})
    with pytest.raises(InvalidArgument, match="table"):
        load("item", [])
    with pytest.raises(InvalidArgument, match="surrogate"):
        load(everything, [(1, "fine"), (2, "\ud800")], columns=["id", "a text"])
    unknown = Table("nowhere", MetaData(), Column("id", Integer, primary_key=True, info=KEY))
    with pytest.raises(InvalidTopology, match="nowhere"):
        load(unknown, [])


def test_a_value_that_its_type_refuses(shop: Shop, load: Load) -> None:
    rows: list[tuple[int, object]] = [(i, Color.RED) for i in range(200)]
    rows.append((200, 5))
    with pytest.raises(LookupError) as caught:
        load(everything, rows, columns=["id", "color"])
    assert "row 201 of the load" in str(caught.value)
    assert "color" in str(caught.value)


# -- what is left after a failure ---------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    pass


def test_a_source_that_fails_leaves_nothing(shop: Shop, load: Load) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from items(3000)
        raise Stop

    with pytest.raises(Stop):
        load(item, rows())
    shop.gates_free()
    assert sum(shop.count("item").values()) == 0


def test_progress_that_fails_ends_the_load(shop: Shop, load: Load) -> None:
    def progress(report: BulkProgress) -> None:
        raise Stop

    with pytest.raises(Stop):
        load(item, items(10_000_000), progress=progress)
    shop.gates_free()
    assert sum(shop.count("item").values()) == 0


def test_a_killed_server_leaves_nothing(shop: Shop, load: Load) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from items(3000)
        shop.servers[1].kill()

    with pytest.raises(OperationalError):
        load(item, rows())
    shop.servers[1].start()
    shop.gates_free()
    assert sum(shop.count("item").values()) == 0


def test_ctrl_c_leaves_nothing(shop: Shop) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from items(3000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shop.engine.bulk_load(item, rows())
    shop.gates_free()
    assert sum(shop.count("item").values()) == 0


def test_cancellation_leaves_nothing(shop: Shop) -> None:
    async def cancelled() -> None:
        many = asyncio.Event()

        async def rows() -> AsyncIterator[dict[str, Any]]:
            for row in items(10_000_000):
                if row["id"] == 20_000:
                    many.set()
                yield row

        running = asyncio.ensure_future(shop.other.bulk_load(item, rows()))
        await asyncio.wait_for(many.wait(), 20)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    shop.loop.run(cancelled())
    shop.gates_free()
    assert sum(shop.count("item").values()) == 0


LATE = "ALTER TABLE late ADD CONSTRAINT later EXCLUDE (id WITH =) DEFERRABLE INITIALLY DEFERRED"


def key_of_each(shop: Shop) -> list[str]:
    """A key of each shard, in the order in which a load commits."""
    keys: dict[str, str] = {}
    for i in range(1000):
        keys.setdefault(shop.engine.shard_for(f"k{i}").name, f"k{i}")
    assert len(keys) == SHARDS
    return [keys[name] for name in sorted(keys)]


def test_a_commit_that_is_refused_names_the_shards(shop: Shop, load: Load) -> None:
    """A deferred constraint of one shard fails at COMMIT, when another shard is committed already."""
    keys = key_of_each(shop)
    rows = [(key, i) for i in range(2) for key in keys]
    rows.append((keys[1], 1_000))
    with shop.server_of(keys[1]).connect() as conn:
        conn.execute(LATE)
        conn.execute("INSERT INTO late VALUES ('already', 1000)")
    with pytest.raises(BulkLoadIncomplete) as caught:
        load(late, rows, columns=["tenant", "id"])
    first, second, third = (shop.engine.shard_for(key).name for key in keys)
    error = caught.value
    # The third goes forward: it has accepted its rows, and the load is incomplete in any case.
    assert error.committed == {first: 2, third: 2}
    assert (error.failed, error.unknown) == ((second,), ())
    assert isinstance(error.__cause__, IntegrityError)
    assert shop.count("late") == {first: 2, second: 1, third: 2}
    shop.gates_free()


def test_the_first_commit_refused_leaves_nothing(shop: Shop, load: Load) -> None:
    keys = key_of_each(shop)
    with shop.server_of(keys[0]).connect() as conn:
        conn.execute(LATE)
        conn.execute("INSERT INTO late VALUES ('already', 0)")
    with pytest.raises(IntegrityError):
        load(late, [(key, 0) for key in keys], columns=["tenant", "id"])
    assert sum(shop.count("late").values()) == 1
    shop.gates_free()


def test_a_server_killed_between_the_commits(shop: Shop, load: Load) -> None:
    keys = key_of_each(shop)
    first, second, third = (shop.engine.shard_for(key).name for key in keys)
    pools = [shop.engine._core.pools, shop.other.sync_engine._core.pools]
    hooked = [pool.engine(shop.engine.shard_for(keys[1]).id) for pool in pools]

    def kill(conn: object) -> None:
        shop.server_of(keys[1]).kill()

    for engine in hooked:
        event.listen(engine, "commit", kill)
    try:
        with pytest.raises(BulkLoadIncomplete) as caught:
            load(late, [(key, 0) for key in keys], columns=["tenant", "id"])
    finally:
        for engine in hooked:
            event.remove(engine, "commit", kill)
    error = caught.value
    assert error.committed == {first: 1, third: 1}
    assert (error.failed, error.unknown) == ((), (second,))
    assert isinstance(error.__cause__, CommitOutcomeUnknown)
    shop.server_of(keys[1]).start()
    assert shop.count("late") == {first: 1, second: 0, third: 1}


def test_a_lost_answer_of_the_only_commit_is_unknown(shop: Shop, load: Load) -> None:
    number = int(shop.engine.shard_for("one").name[1:])
    shop.proxies[number].cut_at("COMMIT")
    with pytest.raises(CommitOutcomeUnknown):
        load(late, [("one", 1)], columns=["tenant", "id"])
    assert sum(shop.count("late").values()) == 1


def test_a_reference_table_that_differs_is_told(shop: Shop, load: Load) -> None:
    shop.proxies[1].cut_at("COMMIT", forwarded=False)
    with pytest.raises(BulkLoadIncomplete) as caught:
        load(country, [{"code": "a", "name": "b"}])
    assert caught.value.committed == {"n0": 1, "n2": 1}
    assert caught.value.unknown == ("n1",)
    assert shop.count("country") == {"n0": 1, "n1": 0, "n2": 1}


# -- batches ------------------------------------------------------------------------------------------------------


def test_batches_are_committed_as_they_fill(shop: Shop, load: Load) -> None:
    reports: list[BulkProgress] = []

    def rows() -> Iterator[dict[str, Any]]:
        yield from items(5000)
        raise Stop

    with pytest.raises(BulkLoadIncomplete) as caught:
        load(item, rows(), batch_rows=200, progress=reports.append)
    error = caught.value
    assert isinstance(error.__cause__, Stop)
    assert error.committed == {name: rows for name, rows in shop.count("item").items() if rows}
    assert sum(error.committed.values()) >= 5000 - SHARDS * 400
    # What is committed is the first rows of each shard.
    for number, server in enumerate(shop.servers):
        mine = [r["id"] for r in items(5000) if shop.engine.shard_for(r["tenant"]).name == f"n{number}"]
        with server.connect() as conn:
            found = {i for (i,) in conn.execute("SELECT id FROM item")}
        assert found == set(mine[: len(found)])
    shop.gates_free()
    with pytest.raises(BulkLoadIncomplete):
        load(country, iter([{"code": f"c{i}", "name": None} for i in range(500)] + [{"code": None, "name": None}]),
             batch_rows=100)  # fmt: skip
    assert len(set(shop.count("country").values())) == 1


# -- gates --------------------------------------------------------------------------------------------------------


def renew(shop: Shop, shard_id: str) -> Callable[[], None]:
    """Give a shard new gates and close its old ones; returns what publishes the topology that names the new."""
    catalog = open_catalog(shop.url)
    before = catalog.load(None)
    after = renew_gates(before, shard_id, nonce=uuid.uuid4().hex)
    with shop.servers[int(shard_id[1:]) - 1].connect() as conn:
        for number in after.gates_of(shard_id):
            open_gate(conn, number)
        for number in before.gates_of(shard_id):
            assert close_gate(conn, number, budget_s=5).closed
    return lambda: catalog.publish(after, expected=before.version)


def test_a_gate_closed_before_the_first_row_is_routed_anew(shop: Shop, load: Load) -> None:
    publish = renew(shop, "s2")

    def rows() -> Iterator[dict[str, Any]]:
        # The topology of the load is from before: it is published only while the load waits for it.
        yield from items(1000)

    later = threading.Timer(0.3, publish)
    later.start()
    assert load(item, rows()).rows == 1000
    later.join()
    assert sum(shop.count("item").values()) == 1000


def test_a_gate_closed_after_rows_were_sent_is_stale(shop: Shop, load: Load) -> None:
    elsewhere = [f"k{i}" for i in range(1000) if shop.engine.shard_for(f"k{i}").id != "s3"]
    here = next(f"k{i}" for i in range(1000) if shop.engine.shard_for(f"k{i}").id == "s3")
    publish = None

    def rows() -> Iterator[tuple[str, int]]:
        nonlocal publish
        for i in range(3000):
            yield elsewhere[i % 20], i
        publish = renew(shop, "s3")
        yield here, 0

    try:
        with pytest.raises(StaleTopology):
            load(late, rows(), columns=["tenant", "id"])
    finally:
        assert publish is not None
        publish()
    shop.gates_free()
    assert sum(shop.count("late").values()) == 0


def own_gate(shop: Shop, key: str) -> int:
    """Give one key a gate of its own, and let the old gate of its shard be closed; the new gate's number."""
    catalog = open_catalog(shop.url)
    before = catalog.load(None)
    shard_id, token = shop.engine.shard_for(key).id, shop.engine.token(key)
    after = give_gate(before, shard_id, [TokenRange(token, token)], nonce=uuid.uuid4().hex)
    with shop.servers[int(shard_id[1:]) - 1].connect() as conn:
        for number in after.gates_of(shard_id):
            open_gate(conn, number)
        catalog.publish(after, expected=before.version)
        for number in before.gates_of(shard_id):
            assert close_gate(conn, number, budget_s=5).closed
    for engine in (shop.engine, shop.other.sync_engine):
        engine.refresh()
    return after.place(token).gate


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_a_further_gate_of_a_shard_is_taken_on_the_way(shop: Shop, load: Load, closed: bool) -> None:
    here = [f"k{i}" for i in range(1000) if shop.engine.shard_for(f"k{i}").id == "s3"]
    gate = own_gate(shop, here[0])

    def rows() -> Iterator[tuple[str, int]]:
        for i in range(3000):
            yield here[1 + i % 9], i
        with shop.servers[2].connect() as conn:
            if closed:
                assert close_gate(conn, gate, budget_s=5).closed
        for i in range(2001):  # more than one portion
            yield here[0], i
        if not closed:
            with shop.servers[2].connect() as conn:
                assert not close_gate(conn, gate, budget_s=0.1).closed, "the load holds it"

    if not closed:
        assert load(late, rows(), columns=["tenant", "id"]).rows == 5001
        assert shop.count("late") == {"n0": 0, "n1": 0, "n2": 5001}
        return
    try:
        with pytest.raises(StaleTopology) as caught:
            load(late, rows(), columns=["tenant", "id"])
        assert caught.value.gate == gate
        shop.gates_free()
        assert sum(shop.count("late").values()) == 0
    finally:
        with shop.servers[2].connect() as conn:
            open_gate(conn, gate)


def one_more_gate(shop: Shop, before: Callable[[int], None]) -> Iterator[tuple[str, int]]:
    """Rows of one shard, of which the last ones need a further gate; `before` is called in between, with its number."""
    here = [f"k{i}" for i in range(1000) if shop.engine.shard_for(f"k{i}").id == "s3"]
    gate = own_gate(shop, here[0])

    def rows() -> Iterator[tuple[str, int]]:
        for i in range(3000):
            yield here[1 + i % 9], i
        before(gate)
        for i in range(2001):
            yield here[0], i

    return rows()


def test_a_further_gate_that_somebody_locks_is_not_waited_for_without_limit(shop: Shop, load: Load) -> None:
    blocker = shop.servers[2].connect()

    def lock(gate: int) -> None:
        # The server ends this by itself, so that a load without a limit goes on and this test fails.
        blocker.execute("SET idle_in_transaction_session_timeout = '10s'")
        blocker.execute(f"BEGIN; LOCK TABLE shardlib.gate_{gate}")

    try:
        with pytest.raises(ShardUnavailable, match=r"'n2'.* 1 s"):
            load(late, one_more_gate(shop, lock), columns=["tenant", "id"], stall_timeout_s=1.0)
    finally:
        blocker.close()
    shop.gates_free()
    assert sum(shop.count("late").values()) == 0


def test_a_connection_lost_as_a_further_gate_is_taken_is_explained(shop: Shop, load: Load) -> None:
    with pytest.raises(OperationalError, match="shard 'n2' refused the load") as caught:
        load(late, one_more_gate(shop, lambda _: shop.proxies[2].cut_at("LOCK")), columns=["tenant", "id"])
    assert caught.value.connection_invalidated
    shop.gates_free()
    assert sum(shop.count("late").values()) == 0


def test_a_long_load_is_many_copies_in_one_transaction(shop: Shop, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server tells what it refuses at the end of a COPY; the row is still found."""
    monkeypatch.setattr(bulk_copy, "SEGMENT_BYTES", 100_000)
    read = 0

    def rows(bad: int | None) -> Iterator[tuple[int, str, object]]:
        nonlocal read
        for read in range(20_000):
            yield read, "x" * 90, "wrong" if read == bad else 1

    with pytest.raises(DataError) as caught:
        load(everything, rows(7_000), columns=["id", "a text", "small"])
    assert "row 7001 of the load" in str(caught.value)
    assert read < 19_999, "the source is not read to its end for nothing"
    shop.gates_free()
    assert sum(shop.count("Every thing").values()) == 0
    assert load(everything, rows(None), columns=["id", "a text", "small"]).rows == 20_000
    assert sum(shop.count("Every thing").values()) == 20_000


def test_in_batches_a_gate_may_close_on_the_way(shop: Shop, load: Load) -> None:
    elsewhere = [f"k{i}" for i in range(1000) if shop.engine.shard_for(f"k{i}").id != "s3"]
    here = next(f"k{i}" for i in range(1000) if shop.engine.shard_for(f"k{i}").id == "s3")

    def rows() -> Iterator[tuple[str, int]]:
        for i in range(3000):
            yield elsewhere[i % 20], i
        renew(shop, "s3")()
        for i in range(3000):
            yield here, i

    assert load(late, rows(), columns=["tenant", "id"], batch_rows=500).rows == 6000
    assert sum(shop.count("late").values()) == 6000


def test_a_read_only_shard_takes_nothing(shop: Shop) -> None:
    catalog = open_catalog(shop.url)
    before = catalog.load(None)
    shards = tuple(replace(s, status=Status.READONLY) if s.id == "s1" else s for s in before.shards)
    catalog.publish(before.evolve(shards=shards, nonce="readonly"), expected=before.version)
    try:
        shop.engine.refresh()
        with pytest.raises(UnsupportedOperation, match="read-only"):
            shop.engine.bulk_load(item, items(1000))
    finally:
        now = catalog.load(None)
        catalog.publish(now.evolve(shards=before.shards, nonce="active"), expected=now.version)
        shop.engine.refresh()
    assert sum(shop.count("item").values()) == 0
