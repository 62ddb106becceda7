"""JSON parameters as PostgreSQL's text, PostgreSQL's text as JSON."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlib.errors import InvalidArgument
from shardlib_ops.gateway.statement import check_statement, leaves_traces
from shardlib_ops.gateway.values import array_text, encoder_of, parameter_text, read_json

TYPES = psycopg.adapters.types


def encoded(name: str, text: str, *, array: bool = False) -> str:
    info = TYPES[name]
    return encoder_of(info.array_oid if array else info.oid)(text.encode()).decode()


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("int8", "9223372036854775807", "9223372036854775807"),
    ("float8", "1e+300", "1e+300"),
    ("float8", "NaN", '"NaN"'),
    ("float4", "-Infinity", '"-Infinity"'),
    ("numeric", "1.100", '"1.100"'),
    ("bool", "f", "false"),
    ("jsonb", '{"a": 1.0}', '{"a": 1.0}'),
    ("text", 'a"\\\n\u00e9', json.dumps('a"\\\n\u00e9', ensure_ascii=False)),
    ("bytea", "\\x00ff", '"\\\\x00ff"'),
    ("timestamptz", "2026-01-31 09:30:00.25+00", '"2026-01-31T09:30:00.25+00:00"'),
    ("timestamptz", "2026-01-31 09:30:00-03:30", '"2026-01-31T09:30:00-03:30"'),
    ("timestamp", "2026-01-31 09:30:00", '"2026-01-31T09:30:00"'),
    ("timestamp", "infinity", '"infinity"'),
    ("timestamp", "0044-03-15 00:00:00 BC", '"0044-03-15 00:00:00 BC"'),
    ("interval", "1 day 02:00:00", '"1 day 02:00:00"'),
])  # fmt: skip
def test_columns(name: str, text: str, expected: str) -> None:
    assert encoded(name, text) == expected
    json.loads(expected)


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("int4", "{}", []),
    ("int4", "{1,NULL,3}", [1, None, 3]),
    ("int4", "{{1,2},{3,4}}", [[1, 2], [3, 4]]),
    ("int4", "[0:1]={7,8}", [7, 8]),
    ("text", '{a,"b c","NULL",NULL,"\\"q\\\\","{,}"}', ["a", "b c", "NULL", None, '"q\\', "{,}"]),
    ("bool", "{t,f}", [True, False]),
    ("numeric", "{1.10,NaN}", ["1.10", "NaN"]),
    ("jsonb", '{"{\\"a\\": [1]}"}', [{"a": [1]}]),
    ("box", "{(1,1),(0,0);(2,2),(1,1)}", ["(1,1),(0,0)", "(2,2),(1,1)"]),
    ("timestamptz", '{"2026-01-31 09:30:00+00"}', ["2026-01-31T09:30:00+00:00"]),
])  # fmt: skip
def test_arrays(name: str, text: str, expected: list[Any]) -> None:
    assert json.loads(encoded(name, text, array=True)) == expected


TEXTS = st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.lists(TEXTS, min_size=1))
def test_an_array_comes_back_as_it_went(values: list[str | None]) -> None:
    assert json.loads(encoded("text", array_text(values), array=True)) == values


@pytest.mark.parametrize(("value", "expected"), [
    (None, None),
    (True, b"true"),
    (-7, b"-7"),
    (Decimal("1.10"), b"1.10"),
    ("a", b"a"),
    ({"a": Decimal("1.0")}, b'{"a":1.0}'),
    ([1, None, [2]], b'{"1",NULL,{"2"}}'),
])  # fmt: skip
def test_parameters(value: object, expected: bytes | None) -> None:
    assert parameter_text(value) == expected


def test_a_list_for_a_document_stays_json() -> None:
    assert parameter_text([1, "x", None], TYPES["jsonb"].oid) == b'[1,"x",null]'


def test_a_parameter_with_a_nul_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="NUL"):
        parameter_text("a\0b")
    with pytest.raises(InvalidArgument, match="NUL"):
        parameter_text(["a\0b"])


def test_numbers_keep_their_digits() -> None:
    assert read_json(b'{"a": 1.10, "b": 123456789012345678901234567890, "c": 1e2}') == {
        "a": Decimal("1.10"), "b": 123456789012345678901234567890, "c": Decimal("1E+2"),
    }  # fmt: skip


@pytest.mark.parametrize("body", [b"NaN", b"{", b"\xff", b"1" * 5000, b"0." + b"1" * 5000, b"[" * 100_000])
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(ValueError):
        read_json(body)


@pytest.mark.parametrize("query", [
    "select 1", "/* c */ SELECT 1;", "(select 1) union (select 2)", "with a as (select 1) select * from a",
    "insert into t values ($1)", "update t set a = ';'", "delete from t",
    "merge into t using s on true when matched then do nothing",
    "values (1)", "table t", "explain select 1", "-- a\nselect 1 -- b",
])  # fmt: skip
def test_statements_that_pass(query: str) -> None:
    check_statement(query)


@pytest.mark.parametrize("query", [
    "", " ", ";", "-- nothing", "select 1; select 2", "select 1;;select 2", "commit", "begin", "set role postgres",
    "reset role", "copy t to program 'id'", "do $$begin end$$", "lock table t", "create table t()", "drop table t",
    "call p()", "prepare a as select 1", "execute a", "declare c cursor for select 1", "listen x", "vacuum",
    "truncate t",
    "set local statement_timeout = 0", "grant all on t to public", "/* select */ copy t from stdin", "nonsense",
])  # fmt: skip
def test_statements_that_do_not(query: str) -> None:
    with pytest.raises(InvalidArgument):
        check_statement(query)


def test_what_may_change_the_session() -> None:
    assert leaves_traces("select set_config('role', 'x', false)")
    assert leaves_traces("SELECT pg_Advisory_lock(1)")
    assert leaves_traces("select 1 into temp t")
    assert not leaves_traces("insert into t values ($1)")
    assert not leaves_traces("select a from t where b = $1")
