"""The first topology of a cluster: what is refused, and that a refusal leaves the shards as they were."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest

from shardlib.catalog import open_catalog
from shardlib.catalog.base import Catalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology, ShardUnavailable, UnsupportedOperation
from shardlib.fence.gate import list_gates
from shardlib_ops import LocalCluster
from shardlib_ops.manager.bootstrap import NewShard, create_cluster, create_cluster_async


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    catalog = open_catalog(f"memory://bootstrap-{uuid.uuid4().hex}")
    yield catalog
    catalog.close()


def has_schema(dsn: str) -> bool:
    with psycopg.connect(dsn) as connection:
        return connection.execute("SELECT to_regnamespace('shardlib') IS NOT NULL").fetchone() == (True,)


def test_publishes_what_the_shards_are_ready_for(catalog: Catalog, database: str, second_database: str) -> None:
    made = create_cluster(
        catalog, [NewShard("north", Dsn(database)), NewShard("south", Dsn(second_database), vnode_count=64)]
    )
    stored = catalog.load()
    assert stored.version == made.version == 1
    assert stored.ring.weights() == {"s1": 256, "s2": 64}
    assert [shard.name for shard in stored.shards] == ["north", "south"]
    for shard in stored.shards:
        with psycopg.connect(shard.primary.conninfo(), autocommit=True) as connection:
            assert list_gates(connection) == stored.gates_of(shard.id)


async def test_is_there_for_coroutines(catalog: Catalog, database: str) -> None:
    made = await create_cluster_async(catalog, [NewShard("only", Dsn(database))], hash_function="xxhash")
    assert made.hash_function == catalog.load().hash_function == "xxhash"


def test_application_role_may_pass_the_gate(catalog: Catalog, database: str) -> None:
    role = f"app_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role}")
        try:
            create_cluster(catalog, [NewShard("only", Dsn(database))], app_roles=[role])
            with admin.transaction():
                admin.execute(f"SET LOCAL ROLE {role}")
                admin.execute("LOCK TABLE shardlib.gate_1 IN ACCESS SHARE MODE")
        finally:
            admin.execute(f"DROP OWNED BY {role}")
            admin.execute(f"DROP ROLE {role}")


def test_catalog_that_holds_a_topology_is_refused(catalog: Catalog, database: str, second_database: str) -> None:
    create_cluster(catalog, [NewShard("first", Dsn(database))])
    with pytest.raises(InvalidTopology, match=r"already holds a topology, version 1"):
        create_cluster(catalog, [NewShard("second", Dsn(second_database))])
    assert not has_schema(second_database)


def test_shard_of_another_cluster_is_refused_and_the_rest_taken_back(
    catalog: Catalog, database: str, second_database: str
) -> None:
    create_cluster(catalog, [NewShard("first", Dsn(database))])
    other = open_catalog(f"memory://bootstrap-{uuid.uuid4().hex}")
    with pytest.raises(InvalidTopology):
        create_cluster(other, [NewShard("fresh", Dsn(second_database)), NewShard("taken", Dsn(database))])
    assert other.version() is None
    assert not has_schema(second_database)
    assert has_schema(database), "what belongs to the other cluster stays"
    other.close()


def test_one_database_cannot_be_two_shards(catalog: Catalog, database: str) -> None:
    with pytest.raises(InvalidTopology):
        create_cluster(catalog, [NewShard("one", Dsn(database)), NewShard("two", Dsn(database))])
    assert not has_schema(database)
    assert catalog.version() is None


def test_unreachable_shard_touches_nothing_and_tells_no_password(catalog: Catalog, database: str) -> None:
    away = Dsn("postgresql://postgres:canary-secret@127.0.0.1:1/postgres")
    with pytest.raises(ShardUnavailable, match="'far'") as caught:
        create_cluster(catalog, [NewShard("near", Dsn(database)), NewShard("far", away)])
    assert "canary-secret" not in str(caught.value)
    assert not has_schema(database)
    assert catalog.version() is None


def test_replica_cannot_be_a_primary(catalog: Catalog) -> None:
    with LocalCluster(shards=1, replicas=1, bootstrap=False) as cluster:
        (replica,) = cluster.replicas("shard-01")
        with pytest.raises(UnsupportedOperation, match="is a replica"):
            create_cluster(catalog, [NewShard("wrong", Dsn(replica.dsn))])


@pytest.mark.parametrize("name", ["", "1st", "a b", "s7", "x" * 64, "shard;drop"])
def test_names_that_are_not_allowed(name: str) -> None:
    with pytest.raises(InvalidArgument, match="name="):
        NewShard(name, Dsn("postgresql://localhost/x"))


@pytest.mark.parametrize("count", [0, -1, 65_537])
def test_weights_that_are_not_allowed(count: int) -> None:
    with pytest.raises(InvalidArgument, match=f"vnode_count={count}"):
        NewShard("x", Dsn("postgresql://localhost/x"), vnode_count=count)


def test_no_shards_or_an_unknown_hash_are_refused(catalog: Catalog, database: str) -> None:
    with pytest.raises(InvalidTopology, match="at least one shard"):
        create_cluster(catalog, [])
    with pytest.raises(InvalidArgument, match="md5"):
        create_cluster(catalog, [NewShard("only", Dsn(database))], hash_function="md5")
