"""What a role of an application may do in the schema `shardlib`: what the fence asks of it, and no more."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import InsufficientPrivilege

from shardlib.fence import install, open_gate

CLUSTER = "6e8ff6b5-0e4f-4d0c-8ea8-7d0a0f2a4f11"
OPERATORS = ("job", "position", "copied")

Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def owner(database: str) -> Iterator[Connection]:
    with psycopg.connect(database, autocommit=True) as conn:
        yield conn


@pytest.fixture
def role(owner: Connection) -> Iterator[str]:
    name = f"app_{uuid.uuid4().hex[:12]}"
    owner.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    yield name
    owner.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
    owner.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def set_up(owner: Connection, *roles: str) -> None:
    install(owner, cluster_id=CLUSTER, shard_id="s1", roles=roles)


def as_role(owner: Connection, role: str, statement: str) -> None:
    with owner.transaction(force_rollback=True):
        owner.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
        owner.execute(statement.encode())


def readable(owner: Connection, role: str) -> set[str]:
    rows = owner.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'shardlib'::regnamespace AND relkind = 'r'"
        " AND has_table_privilege(%s, oid, 'SELECT')",
        (role,),
    )
    return {str(name) for (name,) in rows.fetchall()}


def test_a_role_reads_what_the_fence_asks_of_it_alone(owner: Connection, role: str) -> None:
    set_up(owner)
    open_gate(owner, 1)
    owner.execute("CREATE TABLE shardlib.job_7_keys (k text)")  # of a job that is under way as the role is added
    set_up(owner, role)
    open_gate(owner, 2)
    assert readable(owner, role) == {"control", "decision", "gate_1", "gate_2", "job_7_keys"}
    as_role(owner, role, "LOCK TABLE shardlib.gate_1, shardlib.job_7_keys IN ACCESS SHARE MODE")
    as_role(owner, role, "INSERT INTO shardlib.decision (txid, verdict) VALUES ('t', 'commit')")
    as_role(owner, role, "DELETE FROM shardlib.decision WHERE txid = 't'")
    for table in OPERATORS:
        with pytest.raises(InsufficientPrivilege, match=table):
            as_role(owner, role, f"SELECT FROM shardlib.{table}")


def test_what_an_earlier_release_granted_is_taken_back(owner: Connection, role: str) -> None:
    set_up(owner, role)
    before = {"control", "decision"}
    owner.execute(sql.SQL("GRANT SELECT, DELETE ON ALL TABLES IN SCHEMA shardlib TO {}").format(sql.Identifier(role)))
    assert readable(owner, role) == before | set(OPERATORS)
    set_up(owner)
    assert readable(owner, role) == before
    for table in OPERATORS:
        with pytest.raises(InsufficientPrivilege, match=table):
            as_role(owner, role, f"DELETE FROM shardlib.{table}")
    set_up(owner)
    assert readable(owner, role) == before


def test_the_owner_keeps_what_is_its_own(owner: Connection) -> None:
    (name,) = owner.execute("SELECT current_user").fetchone() or ("",)
    for _ in range(2):
        set_up(owner, str(name))
    rows = owner.execute(
        "SELECT relname FROM pg_class CROSS JOIN aclexplode(coalesce(relacl, acldefault('r', relowner))) AS granted"
        " WHERE relnamespace = 'shardlib'::regnamespace AND grantee = relowner AND privilege_type = 'SELECT'"
        " AND relkind = 'r'"
    )
    assert {str(relname) for (relname,) in rows.fetchall()} >= {*OPERATORS, "control", "decision"}


def test_a_role_that_is_gone_stops_nothing(owner: Connection, role: str) -> None:
    set_up(owner, role)
    owner.execute("UPDATE shardlib.control SET app_roles = app_roles || 'gone_since'::text")
    set_up(owner, role)
