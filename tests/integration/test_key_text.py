"""Key bytes computed here are those that PostgreSQL's COPY writes, for every type and through the driver itself."""

from __future__ import annotations

import enum
import random
import string
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator, TypeEngine

from shardlib.key import copy_key, describe, encode_key
from shardlib_ops.local import LocalServer

ROWS = 200


class Size(enum.Enum):
    SMALL = "s"
    VERY_LARGE = "very large"


class Lowered(TypeDecorator[str]):
    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return value.lower() if value is not None else None


def text(rng: random.Random) -> str:
    alphabet = string.printable + "\\\\\t\n\r\b\f\v\x01\x7fäß東京😀\u2028 '\""
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 30)))


def moment(rng: random.Random) -> datetime:
    at = datetime(rng.randint(1, 9998), rng.randint(1, 12), rng.randint(1, 28), rng.randint(0, 23), rng.randint(0, 59))
    return at + timedelta(seconds=rng.randint(0, 59), microseconds=rng.choice([0, 1, 10, 500_000, 999_999, 120]))


Maker = Callable[[random.Random], Any]
TYPES: dict[str, tuple[TypeEngine[Any], Maker]] = {
    "text": (sa.Text(), text),
    "varchar": (sa.String(40), text),
    "smallint": (sa.SmallInteger(), lambda rng: rng.randint(-(2**15), 2**15 - 1)),
    "integer": (sa.Integer(), lambda rng: rng.randint(-(2**31), 2**31 - 1)),
    "bigint": (sa.BigInteger(), lambda rng: rng.randint(-(2**63), 2**63 - 1)),
    "uuid": (sa.Uuid(), lambda rng: uuid.UUID(int=rng.getrandbits(128))),
    "uuid-text": (sa.Uuid(as_uuid=False), lambda rng: str(uuid.UUID(int=rng.getrandbits(128))).upper()),
    "uuid-char": (sa.Uuid(native_uuid=False), lambda rng: uuid.UUID(int=rng.getrandbits(128))),
    "bytea": (sa.LargeBinary(), lambda rng: rng.randbytes(rng.randint(0, 20))),
    "boolean": (sa.Boolean(), lambda rng: rng.random() < 0.5),
    "date": (sa.Date(), lambda rng: date.fromordinal(rng.randint(1, date.max.toordinal()))),
    "timestamp": (sa.DateTime(), moment),
    "timestamptz": (sa.DateTime(timezone=True), lambda rng: moment(rng).replace(tzinfo=UTC)),
    "timestamp-3": (postgresql.TIMESTAMP(precision=3), lambda rng: moment(rng).replace(microsecond=120_000)),
    "numeric": (sa.Numeric(20, 4), lambda rng: Decimal(rng.randint(-(10**8), 10**8)).scaleb(-rng.randint(0, 4))),
    "numeric-0": (sa.Numeric(30), lambda rng: Decimal(rng.randint(-(10**29), 10**29))),
    "numeric-int": (sa.Numeric(20, 2), lambda rng: rng.randint(-(10**8), 10**8)),
    "enum": (sa.Enum(Size, name="size"), lambda rng: rng.choice(list(Size))),
    "enum-values": (
        sa.Enum(Size, name="size_value", values_callable=lambda kind: [e.value for e in kind]),
        lambda rng: rng.choice(list(Size)),
    ),
    "enum-text": (sa.Enum(Size, native_enum=False), lambda rng: rng.choice(list(Size))),
    "domain": (postgresql.DOMAIN("code", sa.String(40)), text),
    "decorated": (Lowered(), text),
}


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://", 1))
    yield engine
    engine.dispose()


def copied(conn: sa.Connection, table: sa.Table, fields: int) -> list[list[bytes]]:
    """The rows in the order they were inserted, as raw fields of a text COPY under the pinned settings."""
    for setting in ("DateStyle=ISO", "TimeZone=UTC", "bytea_output=hex"):
        conn.exec_driver_sql("SET {} = '{}'".format(*setting.split("=")))
    driver = conn.connection.driver_connection
    assert driver is not None
    with driver.cursor().copy(f"COPY (SELECT * FROM {table.name} ORDER BY row) TO STDOUT") as copy:
        data = b"".join(bytes(block) for block in copy)
    return [line.split(b"\t")[1 : fields + 1] for line in data.split(b"\n")[:-1]]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_gives_the_bytes_that_copy_writes(engine: sa.Engine, rng: random.Random, name: str) -> None:
    kind, make = TYPES[name]
    metadata = sa.MetaData()
    table = sa.Table(
        "keys",
        metadata,
        sa.Column("row", sa.Integer, nullable=False),
        sa.Column("k", kind, nullable=False, info={"shard_key": True}),
    )
    spec = describe(table)
    values = [make(rng) for _ in range(ROWS)]
    if name in ("text", "varchar", "domain", "decorated"):
        values = [value[:40] for value in values]
    with engine.connect() as conn:
        metadata.create_all(conn)
        # Another zone for the session that writes must not matter.
        conn.exec_driver_sql("SET TimeZone = 'Asia/Kolkata'")
        conn.execute(sa.insert(table), [{"row": i, "k": value} for i, value in enumerate(values)])
        rows = copied(conn, table, 1)
    assert len(rows) == ROWS
    for value, fields in zip(values, rows, strict=True):
        assert copy_key(fields) == spec.encode((value,)), repr(value)


PLAIN = [
    name
    for name in TYPES
    if name not in ("uuid-text", "uuid-char", "numeric", "numeric-int", "enum-values", "decorated")
]


@pytest.mark.parametrize("name", PLAIN)
def test_without_the_table_a_value_gives_the_same_bytes(rng: random.Random, name: str) -> None:
    """What `engine.session(key)` hashes is what a statement on the table hashes, for types with one text."""
    kind, make = TYPES[name]
    table = sa.Table("keys", sa.MetaData(), sa.Column("k", kind, primary_key=True, info={"shard_key": True}))
    for _ in range(ROWS):
        value = make(rng)
        assert encode_key(value) == describe(table).encode((value,))


def test_a_composite_key_gives_the_bytes_of_its_columns(engine: sa.Engine, rng: random.Random) -> None:
    metadata = sa.MetaData()
    table = sa.Table(
        "keys",
        metadata,
        sa.Column("row", sa.Integer, nullable=False),
        sa.Column("a", sa.Text, nullable=False, info={"shard_key": 1}),
        sa.Column("b", sa.BigInteger, nullable=False, info={"shard_key": 2}),
        sa.Column("c", sa.LargeBinary, nullable=False, info={"shard_key": 3}),
    )
    values = [(text(rng), rng.randint(-99, 99), rng.randbytes(3)) for _ in range(ROWS)]
    with engine.connect() as conn:
        metadata.create_all(conn)
        rows = [{"row": i, "a": a, "b": b, "c": c} for i, (a, b, c) in enumerate(values)]
        conn.execute(sa.insert(table), rows)
        copies = copied(conn, table, 3)
    for value, fields in zip(values, copies, strict=True):
        assert copy_key(fields) == describe(table).encode(value) == encode_key(value)


def test_postgresql_can_compute_the_key_bytes_itself(server: LocalServer) -> None:
    """The rule for a composite key needs nothing but what every language, SQL too, has."""
    with server.connect() as conn:
        found = conn.execute(
            r"SELECT convert_to('acme'::text, 'UTF8') || '\x00'::bytea || convert_to(42::text, 'UTF8')"
        ).fetchone()
    assert found == (encode_key(("acme", 42)),)
