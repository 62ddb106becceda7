"""What stands in a job's way on real servers: each fault is caused, found, and comes with its way out."""

from __future__ import annotations

import itertools
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg import sql

from shardlib.dsn import Dsn
from shardlib.fence import install
from shardlib.ring import build_ring
from shardlib.topology import Gate, Shard, Table, Topology
from shardlib_ops import LocalCluster
from shardlib_ops.reshard.check import Fault, check_job, check_shard, shard
from shardlib_ops.reshard.job import Job, Kind, legs_of

ORDERS = Table("orders", ("tenant",))
COUNTRY = Table("country")
CLUSTER = str(uuid.uuid4())
NUMBERS = itertools.count(1)
SCHEMA = """
    CREATE TABLE country (code text PRIMARY KEY);
    CREATE TABLE orders (tenant text, id bigint, note text, PRIMARY KEY (tenant, id))"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2, settings={"max_prepared_transactions": "5"}) as running:
        yield running


class Two:
    """A source with tables and an empty target, in new databases of two servers; a job that moves half."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.name = f"check_{next(NUMBERS)}"
        self.admins = [server.dsn for server in cluster.servers[:2]]
        self.dsns = []
        for at, admin in enumerate(self.admins, 1):
            with psycopg.connect(admin, autocommit=True) as conn:
                conn.execute(f"CREATE DATABASE {self.name}")
            dsn = Dsn(Dsn(admin).conninfo(dbname=self.name))
            with psycopg.connect(dsn.conninfo(), autocommit=True) as conn:
                install(conn, cluster_id=CLUSTER, shard_id=f"s{at}")
            self.dsns.append(dsn)
        self.source(SCHEMA)

    def run(self, at: int, statement: str) -> list[Any]:
        with psycopg.connect(self.dsns[at].conninfo(), autocommit=True) as conn:
            cursor = conn.execute(sql.SQL(statement))
            return cursor.fetchall() if cursor.description else []

    def source(self, statement: str) -> list[Any]:
        return self.run(0, statement)

    def target(self, statement: str) -> list[Any]:
        return self.run(1, statement)

    def topology(self, **changes: Any) -> Topology:
        shards = (Shard("s1", "shard-01", self.dsns[0]), Shard("s2", "shard-02", self.dsns[1]))
        return Topology(
            version=1, cluster_id=CLUSTER, hash_function="murmur3", shards=changes.pop("shards", shards),
            ring=build_ring({"s1": 16}), gates=(Gate(1, "s1"), Gate(2, "s2")),
            tables=(ORDERS, COUNTRY), next_shard=3, next_gate=3, **changes,
        )  # fmt: skip

    def job(self) -> Job:
        return Job(next(NUMBERS), Kind.SPLIT, legs_of([("s1", "s2", build_ring({"s1": 16}).ranges_of("s1"))]))

    async def faults(self, *, notes: bool = False, **changes: Any) -> list[Fault]:
        found = await check_job(self.topology(**changes), self.job())
        return [fault for fault in found if notes or not fault.note]

    def login(self, at: int, options: str) -> None:
        """Let the shard's DSN name a role that is nobody's superuser."""
        role = f"{self.name}_role"
        with psycopg.connect(Dsn(self.admins[at]).conninfo(dbname=self.name), autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret-word' " + options).format(sql.Identifier(role)))
        self.dsns[at] = Dsn(Dsn(self.admins[at]).conninfo(dbname=self.name, user=role, password="secret-word"))


@pytest.fixture
def two(cluster: LocalCluster) -> Two:
    return Two(cluster)


def told(faults: list[Fault], where: str, problem: str, way_out: str) -> bool:
    found = [f for f in faults if f.where == where and problem in f.problem and way_out in f.way_out]
    assert found, "\n".join(map(str, faults)) or "no faults"
    return True


async def test_a_job_with_nothing_in_its_way(two: Two) -> None:
    two.source("INSERT INTO orders SELECT 't' || n, n FROM generate_series(1, 100) n")
    assert await two.faults(notes=True) == []
    two.target(SCHEMA)
    assert await two.faults(notes=True) == []


async def test_tables_that_cannot_move(two: Two) -> None:
    two.source(
        "ALTER TABLE orders DROP CONSTRAINT orders_pkey, SET UNLOGGED; DROP TABLE country;"
        "CREATE TABLE country (code text) PARTITION BY LIST (code)"
    )
    faults = await two.faults()
    told(faults, "shard-01", "'orders' has no primary key and no replica identity", "REPLICA IDENTITY FULL")
    told(faults, "shard-01", "'orders' is unlogged", 'ALTER TABLE "public"."orders" SET LOGGED')
    told(faults, "shard-01", "'country' is a partitioned table", "only ordinary tables")
    two.source("ALTER TABLE orders SET LOGGED, REPLICA IDENTITY FULL; DROP TABLE country")
    faults = await two.faults()
    assert len(faults) == 1
    told(faults, "shard-01", "lacks the tables country", "create_all")


async def test_a_replica_identity_without_the_key(two: Two) -> None:
    two.source("ALTER TABLE orders DROP CONSTRAINT orders_pkey, ADD PRIMARY KEY (id)")
    faults = await two.faults(notes=True)
    told(faults, "shard-01", "the replica identity (id)", 'ALTER TABLE "public"."orders" REPLICA IDENTITY FULL')
    told(faults, "shard-01 -> shard-02", "unique index 'orders_pkey' of table 'orders'", "add the shard key")
    two.target(SCHEMA.replace("PRIMARY KEY (tenant, id)", "PRIMARY KEY (id)"))
    two.target("INSERT INTO orders VALUES ('there', 1)")
    told(await two.faults(), "shard-01 -> shard-02", "and come together on the target", "add the shard key")


async def test_rows_of_the_ranges_on_the_target_are_named_before_any_harm(two: Two) -> None:
    two.target(SCHEMA)
    two.target("INSERT INTO orders VALUES ('stray', 1)")
    job = two.job()
    faults = await check_job(two.topology(), job)
    told(faults, "shard-01 -> shard-02", "orders 'stray'", "delete them there")
    two.target(
        f"CREATE TABLE shardlib.job_{job.id}_keys (k text, more text[] DEFAULT '{{}}', PRIMARY KEY (k, more));"
        f"INSERT INTO shardlib.job_{job.id}_keys VALUES ('stray')"
    )
    assert await check_job(two.topology(), job) == []  # the job brought it itself


async def test_a_target_with_other_tables(two: Two) -> None:
    two.target("CREATE TABLE orders (tenant text)")
    faults = await two.faults()
    told(faults, "shard-01 -> shard-02", "has the tables orders, but not country", "drop all of them there")
    told(faults, "shard-01 -> shard-02", "column 'id': not at the target", "bring the tables into line")
    two.target("DROP TABLE orders; CREATE TABLE country (code text)")
    told(await two.faults(), "shard-01 -> shard-02", "'country', but none of the sharded", "drop it there")


async def test_what_the_target_server_does_not_have(two: Two, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    two.source("CREATE ROLE " + two.name + "_reader; GRANT SELECT ON orders TO " + two.name + "_reader")
    monkeypatch.setenv("SHARDLIB_PG_BIN", str(tmp_path))
    faults = await two.faults()
    told(faults, "shard-01 -> shard-02", f"{two.name}_reader", "CREATE ROLE")
    told(faults, "shard-01 -> shard-02", "no pg_dump of version", "see above")


async def test_an_extension_that_the_target_server_cannot_install(two: Two) -> None:
    # The name of an installed extension is changed: no server has a package of that name.
    two.source("CREATE EXTENSION hstore; UPDATE pg_extension SET extname = 'geography' WHERE extname = 'hstore'")
    told(await two.faults(), "shard-01 -> shard-02", "the extension 'geography'", "install its package")


async def test_a_role_without_rights(two: Two) -> None:
    two.source("ALTER TABLE orders ENABLE ROW LEVEL SECURITY")
    two.login(0, "")
    two.source("SELECT 1")
    faults = await two.faults()
    role = f"{two.name}_role"
    told(faults, "shard-01", "has no REPLICATION", f'ALTER ROLE "{role}" REPLICATION')
    told(faults, "shard-01", "may not create in database", f'GRANT CREATE ON DATABASE "{two.name}"')
    told(faults, "shard-01", "may not set session_replication_role", "GRANT SET ON PARAMETER")
    told(faults, "shard-01", "does not own the schema shardlib", "ALTER SCHEMA shardlib OWNER")
    told(faults, "shard-01", "does not own table 'orders'", "OWNER TO")
    told(faults, "shard-01", "may not read and write table 'country'", "GRANT SELECT, INSERT, UPDATE, DELETE")
    told(faults, "shard-01", "row-level security hides rows of table 'orders'", "BYPASSRLS")
    told(faults, "shard-01", "no table shardlib.control that the role can read", "owns the schema shardlib")
    assert "secret-word" not in "".join(map(repr, faults))


async def test_a_role_with_just_the_rights(two: Two) -> None:
    two.login(1, "REPLICATION")
    role = f'"{two.name}_role"'
    with psycopg.connect(Dsn(two.admins[1]).conninfo(dbname=two.name), autocommit=True) as conn:
        conn.execute(
            f"GRANT CREATE ON DATABASE {two.name} TO {role}; GRANT SET ON PARAMETER session_replication_role TO {role};"
            f"ALTER SCHEMA shardlib OWNER TO {role}; GRANT SELECT ON shardlib.control TO {role}".encode()
        )
    assert await two.faults() == []


async def test_servers_that_are_not_there_or_silent(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "LOOK_S", 1.0)
    with socket.socket() as silent, socket.socket() as closed:
        for each in (silent, closed):
            each.bind(("127.0.0.1", 0))
        silent.listen()
        shards = two.topology().shards
        gone = Dsn(f"postgresql://u:secret-word@127.0.0.1:{closed.getsockname()[1]}/x")
        mute = Dsn(f"postgresql://u:secret-word@127.0.0.1:{silent.getsockname()[1]}/x")
        faults = await two.faults(shards=(replace(shards[0], primary=gone), replace(shards[1], primary=mute)))
        told(faults, "shard-01", "refused", "start the server, or correct the shard's DSN")
        told(faults, "shard-02", "did not answer within 1 s", "load")
        faults = await two.faults(shards=(replace(shards[0], replicas=(gone,)), shards[1]))
        told(faults, "shard-01", "replica postgresql://u@127.0.0.1", "take it out of the topology")
        assert "secret-word" not in "".join(map(repr, faults))


async def test_the_same_database_twice_and_a_database_of_others(two: Two) -> None:
    shards = two.topology().shards
    faults = await two.faults(shards=(shards[0], replace(shards[1], primary=shards[0].primary)))
    told(faults, "shard-01, shard-02", "both are the same database", "correct the DSN")
    told(faults, "shard-02", f"shard 's1' of cluster {CLUSTER}, not 's2'", "correct the shard's DSN")
    topology = two.topology()
    told(await check_shard(two.dsns[0], topology=topology, name="shard-03"), "shard-03",
         "its database is that of shard 'shard-01'", "a database of its own")  # fmt: skip
    assert await check_shard(two.dsns[1], topology=topology, name="shard-02") == []
    assert await check_shard(two.dsns[1], topology=None, name="any") == []
    two.target("UPDATE shardlib.control SET cluster_id = 'others'")
    told(await check_shard(two.dsns[1], topology=topology, name="shard-02"), "shard-02",
         "belongs to another cluster (others", "DROP SCHEMA shardlib")  # fmt: skip


async def test_transactions_in_doubt_and_notes(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardlib_ops.reshard.check.server._PREPARED_S", -1.0)
    two.source("ALTER DATABASE " + two.name + " SET statement_timeout = '5s'")
    two.source("ALTER DATABASE " + two.name + " SET idle_session_timeout = '1min'")
    two.source("CREATE SEQUENCE q CACHE 50 OWNED BY orders.id")
    with psycopg.connect(two.dsns[0].conninfo()) as conn:
        conn.execute("INSERT INTO orders VALUES ('a', 1)")
        conn.execute(f"PREPARE TRANSACTION '{two.name}'")
        conn.commit()
    try:
        faults = await two.faults(notes=True)
        told(faults, "shard-01", f"prepared transaction {two.name!r}", "ROLLBACK PREPARED")
        told(faults, "shard-01", "statement_timeout=5s", "nothing")
        told(faults, "shard-01", "idle_session_timeout=1min", "longer")
        told(faults, "shard-01", "sequence public.q has CACHE 50", "CACHE 1")
        assert [fault.problem[:20] for fault in faults if not fault.note] == ["prepared transaction"]
    finally:
        two.source(f"ROLLBACK PREPARED '{two.name}'")


async def test_a_read_only_role(two: Two) -> None:
    two.target("ALTER DATABASE " + two.name + " SET default_transaction_read_only = on")
    told(await two.faults(), "shard-02", "read-only", "default_transaction_read_only = off")


async def test_no_slots_left_and_the_jobs_own_do_not_count_twice(two: Two) -> None:
    job = two.job()
    (most,) = two.source("SELECT current_setting('max_replication_slots')::int - count(*) FROM pg_replication_slots")[0]
    names = [f"shardlib_job_{job.id}_1_f", *(f"{two.name}_{n}" for n in range(most - 1))]
    for name in names:
        two.source(f"SELECT pg_create_physical_replication_slot('{name}')")
    try:
        told(await check_job(two.topology(), job), "shard-01", "the job needs 1 more", "max_replication_slots")
        two.source(f"SELECT pg_drop_replication_slot('{names.pop()}')")
        assert [fault for fault in await check_job(two.topology(), job) if not fault.note] == []
    finally:
        for name in names:
            two.source(f"SELECT pg_drop_replication_slot('{name}')")


@pytest.mark.parametrize(
    ("settings", "problem", "way_out"),
    [
        ({"wal_level": "replica"}, "wal_level is 'replica'", "ALTER SYSTEM SET wal_level = logical"),
        ({"max_wal_senders": "1"}, "max_wal_senders is 1, of which 0", "ALTER SYSTEM SET max_wal_senders = 6"),
        ({"max_prepared_transactions": "0"}, "max_prepared_transactions is 0", "max_prepared_transactions = 100"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_settings_of_a_server(settings: dict[str, str], problem: str, way_out: str) -> None:
    with LocalCluster(shards=1, settings=settings) as cluster:
        faults = await check_shard(Dsn(cluster.servers[0].dsn), topology=None, name="new")
    told(faults, "new", problem, way_out)
    assert len(faults) == 1, faults


async def test_a_standby() -> None:
    with LocalCluster(shards=1, replicas=1) as cluster:
        replica = cluster.replicas("shard-01")[0]
        told(await check_shard(Dsn(replica.dsn), topology=None, name="new"), "new", "is a standby", "primary's address")


def test_versions() -> None:
    from shardlib_ops.reshard.check.server import version_fault

    check: Callable[[int], Fault | None] = lambda version: version_fault("x", version)  # noqa: E731
    assert check(150_000) is None
    assert check(180_006) is None
    assert "PostgreSQL 14" in str(check(140_012))
    assert "PostgreSQL 19" in str(check(190_000))
