"""P10: bad input gets a clear error of ours, with the offending value and the way out, and changes nothing."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    Column,
    Float,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from shardlib import AsyncShardedEngine, AsyncShardedSession, ShardedEngine, ShardedSession, errors
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.engine.options import CALLS, EngineOptions
from shardlib.route.retry import RetryPolicy
from shardlib.shard.options import PoolOptions
from shardlib.telemetry.options import TelemetryOptions
from shardlib_ops import LocalCluster
from shardlib_ops.manager.bootstrap import NewShard, create_cluster
from tests.support.models import Base, Currency, Customer, Order

pytestmark = pytest.mark.promise("P10")


@pytest.mark.parametrize("engine_class", [ShardedEngine, AsyncShardedEngine])
@pytest.mark.parametrize(
    ("url", "options", "error", "match"),
    [
        ("etcd://127.0.0.1:1/shop", {}, errors.CatalogUnavailable, r"127\.0\.0\.1:1.*check that it runs"),
        ("memory://empty", {}, errors.InvalidTopology, "holds no topology|empty"),
        ("redis://127.0.0.1/x", {}, errors.InvalidArgument, "redis"),
        ("", {}, errors.InvalidArgument, "url|catalog"),
        ("memory://empty", {"consistency": "strongest"}, errors.InvalidArgument, "'strongest'.*'eventual'"),
        ("memory://empty", {"hash_function": "md5"}, errors.InvalidArgument, "'md5'.*murmur3"),
        ("memory://empty", {"pool_sise": 5}, errors.InvalidArgument, "pool_sise.*pool_size"),
        ("memory://empty", {"pool_size": -1}, errors.InvalidArgument, "pool_size"),
        ("memory://empty", {"pool_size": "many"}, errors.InvalidArgument, "'many'"),
        ("memory://empty", {"poll_s": 0}, errors.InvalidArgument, "poll_s"),
        ("memory://empty", {"reroute_timeout_s": None}, errors.InvalidArgument, "reroute_timeout_s"),
    ],
)
def test_p10_engine_arguments(
    engine_class: Any, url: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        engine_class(url, **{"catalog_timeout_s": 0.3} | options)


OPTIONS = {
    "consistency": [5, None],
    "hash_function": [5, True, ["murmur3"]],
    "topology_file": [5, True, ""],
    "catalog_timeout_s": ["3", None, True, float("nan"), float("inf")],
    "poll_s": ["30", None],
    "reroute_timeout_s": ["15"],
    "retry": [3, 0, False, "8", RetryPolicy],
    "telemetry": [True, False, {}, TelemetryOptions],
    "echo": ["no", 1, None],
    "pgbouncer": ["no", 1, None],
    "pool_size": ["5", True, None],
    "pool_timeout_s": ["30", None, float("nan")],
    "pre_ping_idle_s": ["30"],
    "connect_timeout_s": ["5", 2.5],
    "application_name": [None, 5],
    "prepare_threshold": ["5", True],
}


def says(caught: Any, name: str, value: object) -> None:
    """The option, the value and what is expected stand in the message and in the attributes."""
    error = caught.value
    assert isinstance(error, errors.InvalidArgument)
    assert error.name == name
    assert error.value is value
    assert f"{name}={value!r} is not allowed: " in str(error)
    assert len(error.allowed) > 5


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OPTIONS for value in OPTIONS[name]])
async def test_p10_options_of_a_wrong_type(name: str, value: Any) -> None:
    for make in (ShardedEngine, AsyncShardedEngine):
        with pytest.raises(errors.InvalidArgument) as caught:
            make("memory://empty", **{name: value})
        says(caught, name, value)
    with pytest.raises(errors.InvalidArgument) as caught:
        await AsyncShardedEngine.open("memory://empty", **{name: value})
    says(caught, name, value)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (RetryPolicy, "attempts_max", "8"),
        (RetryPolicy, "attempts_max", 0),
        (RetryPolicy, "attempts_max", True),
        (RetryPolicy, "attempts_max", 2.5),
        (RetryPolicy, "wait_s_first", "0.1"),
        (RetryPolicy, "wait_s_first", None),
        (RetryPolicy, "wait_s_max", "2"),
        (RetryPolicy, "wait_s_max", float("nan")),
        (TelemetryOptions, "spans", "no"),
        (TelemetryOptions, "metrics", 1),
        (TelemetryOptions, "query_text", None),
        (TelemetryOptions, "tracer_provider", "jaeger"),
        (TelemetryOptions, "meter_provider", object),
        (partial(open_catalog, "memory://empty"), "timeout_s", "3"),
        (partial(open_catalog, "memory://empty"), "poll_s", None),
    ],
)
def test_p10_values_of_a_wrong_type(make: Any, name: str, value: Any) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        make(**{name: value})
    says(caught, name, value)


def test_p10_every_option_has_a_rule() -> None:
    """An option that is added gets one too, or this names it."""
    for options in (EngineOptions, PoolOptions, RetryPolicy, TelemetryOptions):
        rules = vars(inspect.getmodule(options))["_RULES"]
        assert {field.name for field in dataclasses.fields(options)} - {"consistency"} == set(rules)
    load = inspect.signature(ShardedEngine.bulk_load).parameters.values()
    assert {each.name for each in load if each.kind is each.KEYWORD_ONLY} <= set(CALLS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_rows", "5"), ("batch_rows", 0), ("batch_rows", True), ("batch_rows", 2.5),
        ("stall_timeout_s", "5"), ("stall_timeout_s", None), ("stall_timeout_s", 0), ("stall_timeout_s", float("nan")),
        ("progress", True), ("progress", "yes"), ("columns", "tenant_id"), ("columns", 5),
    ],
)  # fmt: skip
def test_p10_options_of_a_bulk_load(facade: Any, name: str, value: Any) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        facade.core.bulk_load(Customer, [], **{name: value})
    says(caught, name, value)


async def test_p10_options_of_a_bulk_load_of_asyncio(shop: LocalCluster) -> None:
    async with AsyncShardedEngine(shop.url) as engine:
        with pytest.raises(errors.InvalidArgument, match=r"batch_rows='5'.*whole number"):
            await engine.bulk_load(Customer, [], batch_rows="5")  # type: ignore[arg-type]


@pytest.mark.parametrize("roles", ["app", 5, None, [5], b"app"])
def test_p10_roles_of_applications(shop: LocalCluster, roles: Any) -> None:
    with ShardedEngine(shop.url) as engine:
        with pytest.raises(errors.InvalidArgument) as caught:
            engine.create_all(Base.metadata, app_roles=roles)
        says(caught, "app_roles", roles)
        with pytest.raises(errors.InvalidArgument) as caught:
            engine.settle(older_than_s="60")  # type: ignore[arg-type]
        says(caught, "older_than_s", "60")


def test_p10_two_engines_with_different_hash_functions(shop: LocalCluster) -> None:
    with pytest.raises(errors.InvalidTopology, match=r"'murmur3'.*'xxhash'"):
        ShardedEngine(shop.url, hash_function="xxhash")


@pytest.mark.parametrize("key", [None, 1.5, object(), [], {}, "a\0b", ("a", None), (), float("nan")])
def test_p10_keys(facade: Any, key: object) -> None:
    for use in (facade.core.shard_for, facade.core.token, facade.engine.session, facade.engine.connect):
        with pytest.raises(errors.InvalidShardKey) as caught:
            use(key)
        assert type(key).__name__ in str(caught.value) or "NULL" in str(caught.value) or "NUL" in str(caught.value)


def test_p10_sessions(facade: Any) -> None:
    with pytest.raises(errors.ShardKeyRequired, match=r"engine\.connect"):
        facade.engine.connect()
    with pytest.raises(errors.InvalidArgument, match="consistency"):
        facade.engine.session("t", consistency="weak")
    with pytest.raises(errors.InvalidArgument, match="twophase='no'"):
        facade.engine.session("t", twophase="no")
    with pytest.raises(errors.InvalidArgument, match="'odd'"):
        facade.session(lambda s: s.scalars(select(Customer).execution_options(consistency="odd")).all())


def test_p10_sessions_of_another_engine(facade: Any) -> None:
    plain = create_engine("postgresql+psycopg://app:s3cret-canary@127.0.0.1/shop")
    mine, other = ShardedSession, AsyncShardedSession
    if isinstance(facade.engine, AsyncShardedEngine):
        mine, other = other, mine  # type: ignore[assignment, misc]
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (mine, {}, "engine"),
        (mine, {"engine": plain}, "engine"),
        (mine, {"engine": create_async_engine(plain.url)}, "engine"),
        (mine, {"engine": facade.engine.topology}, "engine"),
        (mine, {"engine": "memory://shop"}, "engine"),
        (mine, {"engine": facade.engine, "bind": plain}, "bind"),
        (mine, {"engine": facade.engine, "binds": {Base: plain}}, "binds"),
        (other, {"engine": facade.engine}, "engine"),
    ]
    for kind, options, name in wrong:
        with pytest.raises(errors.InvalidArgument, match=r"use engine\.session\(\)") as caught:
            kind(**options)
        assert caught.value.name == name
        assert caught.value.value is options.get(name)
        assert "s3cret-canary" not in str(caught.value)
    maker = sessionmaker(class_=ShardedSession, engine=plain)  # type: ignore[call-overload]
    with pytest.raises(errors.InvalidArgument, match="engine="):
        maker()


REFUSED = [
    (lambda s: s.execute(text("SELECT 1")), errors.ShardKeyRequired, "session"),
    (lambda s: s.connection(), errors.ShardKeyRequired, "session"),
    (lambda s: s.execute(update(Customer).values(name="x")), errors.ShardKeyRequired, "all_shards"),
    (lambda s: s.execute(delete(Customer)), errors.ShardKeyRequired, "all_shards"),
    (lambda s: s.execute(insert(Customer).values(id=1, name="x")), errors.ShardKeyRequired, "tenant_id"),
    (lambda s: (s.add(Customer(id=1, name="x")), s.flush()), errors.ShardKeyRequired, "this Customer .* tenant_id"),
    (lambda s: s.execute(insert(Currency).values(code="EUR")), errors.UnsupportedOperation, "bulk_load"),
    (lambda s: s.execute(delete(Currency)), errors.UnsupportedOperation, "bulk_load"),
    (lambda s: s.scalars(select(Customer).order_by(Customer.name)), errors.UnsupportedCrossShardQuery, "ORDER BY"),
    (lambda s: s.scalars(select(Customer).limit(1)), errors.UnsupportedCrossShardQuery, "LIMIT"),
    (lambda s: s.scalar(select(func.count()).select_from(Customer)), errors.UnsupportedCrossShardQuery, "aggregate"),
    (lambda s: s.scalars(select(Customer.name).distinct()), errors.UnsupportedCrossShardQuery, "DISTINCT"),
    (lambda s: s.execute(select(Customer, Order)), errors.UnsupportedCrossShardQuery, "join"),
    (
        lambda s: s.execute(update(Customer).where(Customer.tenant_id == "a").values(tenant_id="b")),
        errors.ShardKeyChanged,
        "'a'.*'b'|insert a row",
    ),
    (lambda s: s.get(Customer, (1.5, 1)), errors.InvalidShardKey, "float"),
]


@pytest.mark.parametrize(("work", "error", "match"), REFUSED)
def test_p10_statements_of_a_routed_session(facade: Any, work: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        facade.session(work)
    # The session's transaction is not broken by it: nothing was sent.
    assert facade.session(lambda s: s.scalars(select(Customer)).all()) == []


def test_p10_other_keys_in_a_pinned_session(facade: Any, keys: list[str]) -> None:
    for work in (
        lambda s: s.get(Customer, (keys[1], 1)),
        lambda s: s.scalars(select(Customer).where(Customer.tenant_id.in_(keys))),
        lambda s: (s.add(Customer(tenant_id=keys[1], id=1, name="x")), s.flush()),
        lambda s: s.execute(insert(Customer).values(tenant_id=keys[1], id=1, name="x")),
        lambda s: s.execute(insert(Customer), [{"tenant_id": key, "id": 1, "name": "x"} for key in keys]),
        lambda s: s.bulk_insert_mappings(Customer, [{"tenant_id": keys[1], "id": 1, "name": "x"}]),
    ):
        with pytest.raises(errors.ShardKeyMismatch, match=keys[1]):
            facade.session(work, keys[0])
    assert facade.session(lambda s: s.scalars(select(Customer)).all()) == []


def test_p10_changing_the_key_of_an_object(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        customer = Customer(tenant_id=keys[0], id=1, name="x")
        s.add(customer)
        s.commit()
        customer.tenant_id = keys[1]
        with pytest.raises(errors.ShardKeyChanged) as caught:
            s.flush()
        assert (caught.value.old, caught.value.new) == (keys[0], keys[1])
        s.rollback()
        assert s.get(Customer, (keys[0], 1)).name == "x"

    facade.session(body)


def test_p10_models(facade: Any) -> None:
    def refused(*columns: Column[Any], error: type[Exception], match: str, **info: Any) -> None:
        metadata = MetaData()
        Table("bad", metadata, *columns, **info)
        with pytest.raises(error, match=match):
            facade.core.create_all(metadata)

    key = {"info": {"shard_key": True}}
    refused(Column("id", Integer, primary_key=True), error=errors.ShardKeyRequired, match="'bad'.*shard_key")
    refused(Column("k", Float, primary_key=True, **key), error=errors.InvalidShardKey, match="k")
    refused(Column("k", String, nullable=True, **key), error=errors.InvalidShardKey, match="null|NULL")
    refused(
        Column("id", Integer, primary_key=True), Column("k", String, nullable=False, **key),
        error=errors.InvalidTopology, match="primary key",
    )  # fmt: skip
    refused(
        Column("k", String, primary_key=True, **key), info={"reference": True},
        error=errors.InvalidShardKey, match="reference",
    )  # fmt: skip
    for server in facade.core.topology.shards:
        with psycopg.connect(server.primary.conninfo()) as conn:
            assert conn.execute("SELECT to_regclass('bad')").fetchone() == (None,)


def test_p10_foreign_keys_across_shards(facade: Any) -> None:
    """A row and what it refers to must be on one shard, or PostgreSQL cannot hold the one to the other."""
    key = {"info": {"shard_key": True}}

    def child(reference: ForeignKeyConstraint, **info: Any) -> MetaData:
        metadata = MetaData()
        Table("parent", metadata, Column("t", String, primary_key=True, **key), Column("i", Integer, primary_key=True))
        keyed = {} if info else key
        columns = [Column("u", String, primary_key=True, **keyed), Column("t", String), Column("i", Integer)]
        Table("child", metadata, *columns, reference, **info)
        return metadata

    across = ForeignKeyConstraint(["t", "i"], ["parent.t", "parent.i"])
    with pytest.raises(errors.InvalidTopology, match=r"'child'.*'parent'.*add the shard key"):
        facade.core.create_all(child(across))
    from_reference = ForeignKeyConstraint(["u", "i"], ["parent.t", "parent.i"])
    with pytest.raises(errors.InvalidTopology, match="a reference table"):
        facade.core.register(child(from_reference, info={"reference": True}))


def test_p10_a_disposed_engine_and_wrong_kinds_of_work(shop: LocalCluster) -> None:
    async def coroutine(session: Any) -> int:
        return 1

    engine = ShardedEngine(shop.url)
    with pytest.raises(errors.InvalidArgument, match="AsyncShardedEngine"):
        engine.run(coroutine, shard_key="t")
    with pytest.raises(errors.UnsupportedOperation, match=r"engine\.create_all"):
        Base.metadata.create_all(engine)
    with engine.begin("t") as conn:
        assert conn.scalar(text("SELECT 1")) == 1
    engine.dispose()
    engine.dispose()
    for work in (lambda: engine.session("t").scalar(text("SELECT 1")), lambda: engine.connect("t")):
        with pytest.raises(errors.UnsupportedOperation, match="disposed"):
            work()
    with pytest.raises(errors.InvalidArgument, match="did you mean topology_file"):
        ShardedEngine(shop.url, topology_fil="x")


async def test_p10_a_plain_function_for_the_asyncio_engine(shop: LocalCluster) -> None:
    async with AsyncShardedEngine(shop.url) as engine:
        with pytest.raises(errors.InvalidArgument, match="coroutine function"):
            await engine.run(lambda session: 1, shard_key="t")
        async with engine.begin("t") as conn:
            assert await conn.scalar(text("SELECT 1")) == 1


def test_p10_a_table_that_the_cluster_does_not_know(facade: Any) -> None:
    class Local(DeclarativeBase):
        pass

    class Unknown(Local):
        __tablename__ = "unknown"
        k: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})

    with pytest.raises(errors.InvalidTopology, match=r"'unknown'.*create_all.*register"):
        facade.session(lambda s: s.get(Unknown, "x"))

    class Other(DeclarativeBase):
        pass

    class Redeclared(Other):
        __tablename__ = "customer"
        tenant_id: Mapped[str] = mapped_column(primary_key=True)
        id: Mapped[int] = mapped_column(primary_key=True, info={"shard_key": True})

    with pytest.raises(errors.InvalidTopology, match="tenant_id"):
        facade.session(lambda s: s.get(Redeclared, ("x", 1)))
    with pytest.raises(errors.InvalidTopology, match="cannot change"):
        facade.core.create_all(Other.metadata)


@pytest.fixture
def broken() -> Iterator[tuple[str, LocalCluster]]:
    """A cluster in memory with one shard whose server is not what the catalog says."""
    with LocalCluster(shards=1, bootstrap=False) as cluster:
        yield "memory://broken", cluster


def test_p10_shards_that_are_not_right(broken: tuple[str, LocalCluster]) -> None:
    url, cluster = broken
    catalog = open_catalog(url)
    good = Dsn(cluster.servers[0].dsn)
    with pytest.raises(errors.ShardUnavailable, match="one"):
        create_cluster(catalog, [NewShard("one", Dsn("postgresql://postgres@127.0.0.1:1/postgres"))])
    wrong = good.reveal().replace(":" + good.reveal().split(":")[2].split("@")[0] + "@", ":wrong@")
    with pytest.raises(errors.ShardUnavailable, match="password"):
        create_cluster(catalog, [NewShard("one", Dsn(wrong))])
    with pytest.raises(errors.InvalidArgument, match="postgresql://"):
        Dsn("mysql://root@localhost/db")
    with pytest.raises(errors.ShardlibError):
        create_cluster(catalog, [NewShard("one", good), NewShard("one", good)])
    with pytest.raises(errors.ShardlibError):
        create_cluster(catalog, [])
    assert catalog.version() is None
    create_cluster(catalog, [NewShard("one", good)])
    with pytest.raises(errors.InvalidTopology, match="1"):
        create_cluster(catalog, [NewShard("two", good)])
    with ShardedEngine(url) as engine:
        engine.create_all(Base.metadata)
        with psycopg.connect(good.conninfo(), autocommit=True) as conn:
            conn.execute("DROP SCHEMA shardlib CASCADE")
        with pytest.raises(errors.InvalidTopology, match="no schema shardlib"):
            engine.session("t").scalars(select(Customer)).all()
        engine.create_all(Base.metadata)
        assert engine.session("t").scalars(select(Customer)).all() == []
    catalog.close()
