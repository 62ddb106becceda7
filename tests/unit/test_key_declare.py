"""What tables say of their shard key, and what cannot be one."""

from __future__ import annotations

import enum
import gc
import weakref
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator, TypeEngine

from shardlib.errors import InvalidArgument, InvalidShardKey, InvalidTopology, ShardKeyRequired
from shardlib.key import KeySpec, describe, encode_key

KEY = {"shard_key": True}
U = UUID("0e984725-c51c-4bf4-9960-e1c80e27aba0")


class Color(enum.Enum):
    RED = "r"


class Mood(enum.StrEnum):
    GOOD = "good"


class Lowered(TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return value.lower() if value is not None else None


class Twice(TypeDecorator[str]):
    impl = Lowered
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return f"{value}{value}"


class BySql(TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def bind_expression(self, bindparam: sa.BindParameter[str]) -> sa.ColumnElement[str]:
        return sa.func.lower(bindparam)


def table(*columns: sa.schema.SchemaItem, **options: Any) -> sa.Table:
    return sa.Table("orders", sa.MetaData(), *columns, **options)


def keyed(kind: TypeEngine[Any], **info: Any) -> sa.Table:
    return table(sa.Column("k", kind, primary_key=True, autoincrement=False, info=KEY | info))


def test_a_sharded_table() -> None:
    spec = describe(
        sa.Table(
            "orders",
            sa.MetaData(),
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("tenant_id", sa.String(20), primary_key=True, key="tenant", info=KEY),
            schema="shop",
        )
    )
    assert (spec.table, spec.key_names, spec.column_keys) == ("shop.orders", ("tenant_id",), ("tenant",))
    assert spec.sharded
    assert not spec.reference
    assert spec.encode(("acme",)) == b"acme"


def test_a_reference_table() -> None:
    spec = describe(table(sa.Column("id", sa.Integer, primary_key=True), info={"reference": True}))
    assert spec.reference
    assert spec.key_names == ()
    with pytest.raises(ShardKeyRequired, match="reference table"):
        spec.encode(("x",))


def test_several_columns_are_a_key_in_their_order_or_in_the_given_one() -> None:
    def both(first: object, second: object) -> KeySpec:
        return describe(
            table(
                sa.Column("a", sa.Text, primary_key=True, info={"shard_key": first}),
                sa.Column("b", sa.Integer, primary_key=True, info={"shard_key": second}),
            )
        )

    assert both(True, True).key_names == ("a", "b")
    assert both(2, 1).key_names == ("b", "a")
    assert both(0, 1).key_names == ("a", "b")
    assert both(True, True).encode(("x", 1)) == encode_key(("x", 1))
    for first, second in ((True, 1), (1, 1), (2, True)):
        with pytest.raises(InvalidArgument, match="different position"):
            both(first, second)
    with pytest.raises(InvalidArgument, match=r"orders\.a"):
        both("yes", False)


def test_a_table_that_says_neither_is_told_the_way_out() -> None:
    with pytest.raises(ShardKeyRequired, match=r"'orders'.*shard_key.*reference"):
        describe(table(sa.Column("id", sa.Integer, primary_key=True)))


def test_a_table_that_says_both_is_refused() -> None:
    with pytest.raises(InvalidShardKey, match=r"orders\.k.*reference table"):
        describe(table(sa.Column("k", sa.Text, primary_key=True, info=KEY), info={"reference": True}))
    with pytest.raises(InvalidArgument, match="orders"):
        describe(table(sa.Column("k", sa.Text, primary_key=True), info={"reference": "yes"}))


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (lambda: sa.Column("k", sa.Text, nullable=True, info=KEY), "nullable=False"),
        (lambda: sa.Column("k", sa.Text, info=KEY), "nullable=False"),
        (lambda: sa.Column("k", sa.Integer, sa.Computed("1"), nullable=False, info=KEY), "server makes"),
        (lambda: sa.Column("k", sa.Integer, sa.Identity(always=True), nullable=False, info=KEY), "server makes"),
    ],
)
def test_a_key_must_be_known_and_there(column: Callable[[], sa.Column[Any]], says: str) -> None:
    with pytest.raises(InvalidShardKey, match=rf"orders\.k.*{says}"):
        describe(table(column()))


@pytest.mark.parametrize(
    "kind",
    [
        sa.Float(),
        sa.Double(),
        sa.REAL(),
        sa.Numeric(),
        sa.JSON(),
        sa.ARRAY(sa.Integer),
        sa.CHAR(3),
        sa.NCHAR(3),
        sa.String().with_variant(sa.CHAR(3), "postgresql"),
        sa.Interval(),
        sa.Time(),
        sa.PickleType(),
        sa.LargeBinary().with_variant(postgresql.JSONB(), "postgresql"),
        postgresql.CITEXT(),
        postgresql.INET(),
        postgresql.MONEY(),
        postgresql.DOMAIN("code", sa.CHAR(3)),
        postgresql.DOMAIN("name", sa.Text(), collation="nocase"),
        sa.String(collation="nocase"),
        BySql(),
    ],
    ids=repr,
)
def test_types_whose_equal_values_have_several_texts_are_refused(kind: TypeEngine[Any]) -> None:
    with pytest.raises(InvalidShardKey, match=r"orders\.k"):
        describe(keyed(kind))


@pytest.mark.parametrize("collation", [None, "C", "POSIX", "en_US.utf8", "de_DE", "de-x-icu", "pg_c_utf8", "C.UTF-8"])
def test_collations_that_come_with_postgresql_are_deterministic(collation: str | None) -> None:
    assert describe(keyed(sa.String(collation=collation))).encode(("a",)) == b"a"


def test_another_collation_may_be_vouched_for() -> None:
    assert describe(keyed(sa.String(collation="ours"), deterministic=True)).encode(("a",)) == b"a"


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (sa.String(5), "abcde", b"abcde"),
        (sa.Text(), Mood.GOOD, b"good"),
        (sa.Unicode(), "é", b"\xc3\xa9"),
        (sa.String().with_variant(sa.Integer(), "sqlite"), "a", b"a"),
        (sa.Integer(), 42, b"42"),
        (sa.BigInteger(), -1, b"-1"),
        (sa.SmallInteger(), 7, b"7"),
        (sa.Boolean(), True, b"t"),
        (sa.Numeric(10, 2), Decimal("1.5"), b"1.50"),
        (sa.Numeric(10, 2), Decimal("1.500"), b"1.50"),
        (sa.Numeric(10, 2), 42, b"42.00"),
        (sa.Numeric(10, 2), Decimal("1E+2"), b"100.00"),
        (sa.Numeric(10, 2), Decimal("-0"), b"0.00"),
        (sa.Numeric(60, 2), Decimal("9" * 50), b"9" * 50 + b".00"),
        (sa.Numeric(40, 2), Decimal("1234567890123456789012345678901.230"), b"1234567890123456789012345678901.23"),
        (sa.Numeric(40, 2), Decimal("1E+30"), b"1" + b"0" * 30 + b".00"),
        (sa.Numeric(10, 2), Decimal("0E-9"), b"0.00"),
        (sa.Numeric(60, 2), Decimal("-" + "9" * 50 + ".5"), b"-" + b"9" * 50 + b".50"),
        (sa.Numeric(60, 40), Decimal("0." + "0" * 39 + "1"), b"0." + b"0" * 39 + b"1"),
        (sa.Numeric(10), Decimal(7), b"7"),
        (sa.DECIMAL(4, 1), Decimal(7), b"7.0"),
        (sa.Uuid(), U, str(U).encode()),
        (sa.Uuid(), str(U).upper(), str(U).encode()),
        (sa.Uuid(as_uuid=False), str(U).upper(), str(U).encode()),
        (sa.Uuid(native_uuid=False), U, U.hex.encode()),
        (postgresql.UUID(), U, str(U).encode()),
        (sa.LargeBinary(), b"\x00a", b"\\x0061"),
        (postgresql.BYTEA(), bytearray(b"a"), b"\\x61"),
        (sa.Date(), date(2024, 5, 6), b"2024-05-06"),
        (sa.DateTime(), datetime(2024, 5, 6, 7, 8, 9, 500_000), b"2024-05-06 07:08:09.5"),
        (sa.DateTime(timezone=True), datetime(2024, 5, 6, tzinfo=UTC), b"2024-05-06 00:00:00+00"),
        (postgresql.TIMESTAMP(precision=1), datetime(2024, 5, 6, 0, 0, 0, 500_000), b"2024-05-06 00:00:00.5"),
        (sa.Enum(Color), Color.RED, b"RED"),
        (sa.Enum(Color), "RED", b"RED"),
        (sa.Enum(Color, values_callable=lambda kind: [e.value for e in kind]), Color.RED, b"r"),
        (sa.Enum(Color, native_enum=False), Color.RED, b"RED"),
        (sa.Enum(Mood), Mood.GOOD, b"GOOD"),
        (sa.Enum("small", "large", name="size"), "large", b"large"),
        (postgresql.ENUM(Color, name="color"), Color.RED, b"RED"),
        (postgresql.DOMAIN("code", sa.String(3)), "abc", b"abc"),
        (Lowered(), "ABC", b"abc"),
        (Lowered(3), "ABC", b"abc"),
        (Twice(), "AB", b"abab"),
    ],
    ids=repr,
)
def test_a_value_becomes_what_the_column_holds(kind: TypeEngine[Any], value: object, expected: bytes) -> None:
    assert describe(keyed(kind)).encode((value,)) == expected


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (sa.String(3), "abc ", "at most 3"),  # PostgreSQL would cut the space off
        (sa.String(), 42, "a str"),
        (sa.String(), None, "NULL"),
        (sa.String(), "a\0", "zero character"),
        (sa.Numeric(40, 2), Decimal("1234567890123456789012345678901.231"), "at most 2 digits"),
        (sa.Numeric(10, 2), Decimal("1E-9"), "at most 2 digits"),
        (sa.Integer(), "42", "an int"),
        (sa.Integer(), True, "an int"),
        (sa.Integer(), Decimal(1), "an int"),
        (sa.Integer(), None, "NULL"),
        (sa.Boolean(), 1, "True or False"),
        (sa.Numeric(10, 2), Decimal("1.505"), "2 digits"),  # PostgreSQL would round it
        (sa.Numeric(10, 2), 1.5, "a Decimal"),
        (sa.Numeric(10, 2), True, "a Decimal"),
        (sa.Numeric(10, 2), Decimal("NaN"), "not a number"),
        (sa.Uuid(), "zz", "a UUID"),
        (sa.Uuid(), 5, "a UUID"),
        (sa.LargeBinary(), "a", "bytes"),
        (sa.Date(), datetime(2024, 5, 6), "a date"),
        (sa.Date(), "2024-05-06", "a date"),
        (sa.DateTime(), datetime(2024, 5, 6, tzinfo=UTC), "naive"),
        (sa.DateTime(timezone=True), datetime(2024, 5, 6), "aware"),
        (sa.DateTime(), date(2024, 5, 6), "naive datetime"),
        (postgresql.TIMESTAMP(precision=0), datetime(2024, 5, 6, 0, 0, 0, 1), "0 digits"),
        (sa.Enum(Color), "r", "'RED'"),
        (sa.Enum(Color), Mood.GOOD, "'RED'"),
        (sa.Enum(Color), 1, "member"),
        (sa.Enum(Color), None, "NULL"),
        (Lowered(2), "ABC", "at most 2"),
        (Lowered(), None, "NULL"),
    ],
    ids=repr,
)
def test_a_value_that_the_column_would_change_or_refuse(kind: TypeEngine[Any], value: object, says: str) -> None:
    spec = describe(keyed(kind))
    with pytest.raises(InvalidShardKey, match=says):
        spec.encode((value,))


def test_the_number_of_values_is_checked() -> None:
    with pytest.raises(InvalidShardKey, match="1 columns"):
        describe(keyed(sa.Text())).encode(("a", "b"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (lambda: [sa.Column("id", sa.Integer, primary_key=True)], "primary key"),
        (lambda: [sa.Column("mail", sa.Text, unique=True)], "unique constraint"),
        (lambda: [sa.Column("mail", sa.Text, unique=True, index=True)], "unique index"),
        (lambda: [sa.Column("mail", sa.Text), sa.UniqueConstraint("mail", name="one_mail")], "one_mail"),
        (lambda: [sa.Column("mail", sa.Text), sa.Index("ix_mail", "mail", unique=True)], "ix_mail"),
        (lambda: [sa.Index("ix_low", sa.text("lower(k)"), unique=True)], "ix_low"),
        (lambda: [sa.Column("during", postgresql.TSRANGE), postgresql.ExcludeConstraint(("during", "&&"))], "unique"),
    ],
)
def test_uniqueness_without_the_shard_key_is_refused(more: Callable[[], list[Any]], says: str) -> None:
    with pytest.raises(InvalidTopology, match=rf"{says}.*'orders'.*'k'"):
        describe(table(sa.Column("k", sa.Text, nullable=False, info=KEY), *more()))


def test_a_key_column_inside_an_expression_does_not_make_an_index_safe() -> None:
    k = sa.Column("k", sa.Text, primary_key=True, info=KEY)
    lowered = table(k, sa.Index("ix_low", sa.func.lower(k), unique=True))
    with pytest.raises(InvalidTopology, match="ix_low"):
        describe(lowered)


def test_uniqueness_with_the_key_or_meant_for_each_shard_is_fine() -> None:
    spec = describe(
        table(
            sa.Column("k", sa.Text, primary_key=True, info=KEY),
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("mail", sa.Text),
            sa.Column("during", postgresql.TSRANGE),
            sa.UniqueConstraint("mail", "k"),
            sa.UniqueConstraint("mail", info={"per_shard": True}),
            sa.Index("ix_mail", "mail", "k", unique=True),
            sa.Index("ix_shard", "mail", unique=True, info={"per_shard": True}),
            sa.Index("ix_plain", "mail"),
            postgresql.ExcludeConstraint(("during", "&&"), ("k", "=")),
            sa.CheckConstraint("id > 0"),
        )
    )
    assert spec.key_names == ("k",)


def test_a_primary_key_is_never_for_each_shard_only() -> None:
    with pytest.raises(InvalidTopology, match="primary key"):
        describe(
            table(
                sa.Column("k", sa.Text, nullable=False, info=KEY),
                sa.Column("id", sa.Integer),
                sa.PrimaryKeyConstraint("id", info={"per_shard": True}),
            )
        )


def test_a_description_is_read_once_and_dies_with_its_table() -> None:
    declared = keyed(sa.Text())
    spec = describe(declared)
    assert describe(declared) is spec
    watch = weakref.ref(declared)
    del declared
    gc.collect()
    assert watch() is None
    assert spec.encode(("a",)) == b"a"
