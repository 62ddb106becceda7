"""Statements of the gateway on real shards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg
from sqlalchemy import Column, Integer, MetaData, String, Table

from shardlib import AsyncShardedEngine, RetryPolicy
from shardlib.errors import InvalidArgument, RetryableError
from shardlib_ops import LocalCluster
from shardlib_ops.gateway.execute import Executor, Limits, ResultTooLarge, Statement, StatementTimeout
from shardlib_ops.gateway.values import read_json

metadata = MetaData()
item = Table(
    "item", metadata,
    Column("owner", String, primary_key=True, info={"shard_key": True}),
    Column("id", Integer, primary_key=True),
    Column("note", String),
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as made:
        yield made


@pytest.fixture
async def engine(cluster: LocalCluster) -> AsyncIterator[AsyncShardedEngine]:
    async with await AsyncShardedEngine.open(cluster.url, pool_size=4) as made:
        await made.create_all(metadata)
        yield made
        for server in cluster.servers:
            with server.connect() as conn:
                conn.execute("TRUNCATE item")


@pytest.fixture
def executor(engine: AsyncShardedEngine) -> Executor:
    return Executor(engine, Limits(rows_max=1_000, bytes_max=100_000, timeout_s=20), any_role=True)


async def rows(executor: Executor, query: str, *params: object, key: object = "a", **options: Any) -> Any:
    answer = json.loads((await executor.run(Statement(key, query, params, **options))).json())
    return answer["rows"]


async def test_a_row_goes_to_the_shard_of_its_key(cluster: LocalCluster, executor: Executor) -> None:
    engine = executor._engine
    for number in range(20):
        answer = await executor.run(Statement(f"k{number}", "INSERT INTO item VALUES ($1, $2)", (f"k{number}", 1)))
        assert (answer.rows, answer.row_count, answer.shard_id) == (b"[]", 1, engine.shard_for(f"k{number}").id)
    for server in cluster.servers:
        with server.connect() as conn:
            for (owner,) in conn.execute("SELECT owner FROM item").fetchall():
                assert engine.shard_for(owner).name == server.shard
    assert await rows(executor, "SELECT id, note FROM item WHERE owner = $1", "k3", key="k3") == [
        {"id": 1, "note": None}
    ]


async def test_values_come_back_as_they_went(executor: Executor) -> None:
    sent = read_json(
        b'{"n": 1.10000000000000000000000001, "d": {"x": 1.0}, "list": [1, null, "a b"], "nested": [[1, 2], [3, 4]]}'
    )
    query = "SELECT $1::numeric n, $2::jsonb d, $3::text[] t, $4::jsonb j, $5::int[] i, $6::bool b, $7::bytea y"
    params = (sent["n"], sent["d"], sent["list"], sent["list"], sent["nested"], True, "\\x00ff")
    answer = await executor.run(Statement("a", query, params))
    assert b'"x": 1.0' in answer.rows  # a document's own digits
    (row,) = json.loads(answer.rows, parse_float=Decimal)
    assert row == {
        "n": "1.10000000000000000000000001", "d": {"x": Decimal("1.0")}, "t": ["1", None, "a b"],
        "j": [1, None, "a b"], "i": [[1, 2], [3, 4]], "b": True, "y": "\\x00ff",
    }  # fmt: skip


async def test_the_place_decides_a_parameters_type(executor: Executor) -> None:
    await rows(executor, "INSERT INTO item VALUES ($1, $2, $3)", "a", 7, 12)
    assert await rows(executor, "SELECT id, note FROM item WHERE id = $1 AND note = $2", "7", 12) == [
        {"id": 7, "note": "12"}
    ]


@pytest.mark.parametrize(("query", "params", "error"), [
    ("SELECT 1; SELECT 2", (), InvalidArgument),
    ("COPY item TO STDOUT", (), InvalidArgument),
    ("SELECT 1 AS a, 2 AS a", (), InvalidArgument),
    ("SELECT $1::int[]", ([1], 2), InvalidArgument),
    ("SELECT $1", (), pg.ProtocolViolation),
    ("SELECT * FROM nowhere", (), pg.UndefinedTable),
    ("SELECT $1::int", ("x",), pg.InvalidTextRepresentation),
    ("SELECT g FROM generate_series(1, 1001) AS g", (), ResultTooLarge),
    ("SELECT repeat('x', 60000) AS x FROM generate_series(1, 2)", (), ResultTooLarge),
])  # fmt: skip
async def test_what_is_refused_leaves_the_connection_whole(
    executor: Executor, query: str, params: tuple[object, ...], error: type[Exception]
) -> None:
    for _ in range(6):  # more often than the pool has connections
        with pytest.raises(error):
            await executor.run(Statement("a", query, params))
    assert await rows(executor, "SELECT 1 AS one") == [{"one": 1}]


async def test_a_refused_result_is_rolled_back(executor: Executor) -> None:
    query = "INSERT INTO item SELECT 'a', g FROM generate_series(1, 1001) AS g RETURNING id"
    with pytest.raises(ResultTooLarge):
        await executor.run(Statement("a", query))
    assert await rows(executor, "SELECT count(*) AS n FROM item") == [{"n": 0}]


async def test_a_statement_that_takes_too_long_is_cancelled_at_the_server(
    engine: AsyncShardedEngine, cluster: LocalCluster
) -> None:
    executor = Executor(engine, Limits(timeout_s=0.3), any_role=True)
    with pytest.raises(StatementTimeout):
        await executor.run(Statement("a", "SELECT pg_sleep(60)"))
    for server in cluster.servers:
        with server.connect() as conn:
            assert conn.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'SELECT pg_sleep%'"
            ).fetchone() == (0,)
    assert await rows(executor, "SELECT 1 AS one") == [{"one": 1}]


async def test_an_end_that_crosses_an_error_of_the_server_is_one_of_the_two(executor: Executor) -> None:
    """The connection may be lost by it, which the caller does not learn of."""
    for number in range(1, 60):
        statement = Statement("a", "SELECT nothing FROM nowhere WHERE x = $1", timeout_s=number * 0.0002)
        with pytest.raises((StatementTimeout, pg.UndefinedTable, pg.QueryCanceled)):
            await executor.run(statement)
    assert await rows(executor, "SELECT 1 AS one") == [{"one": 1}]


async def test_a_read_only_statement_may_not_write(executor: Executor) -> None:
    for query in (
        "INSERT INTO item VALUES ('a', 1)",
        "WITH w AS (DELETE FROM item RETURNING id) SELECT * FROM w",
        "EXPLAIN ANALYZE DELETE FROM item",
        "SELECT nextval('item_seq')",
    ):
        with pytest.raises((pg.ReadOnlySqlTransaction, pg.UndefinedTable)):
            await rows(executor, query, read_only=True)
    assert await rows(executor, "SELECT count(*) AS n FROM item", read_only=True) == [{"n": 0}]
    await rows(executor, "INSERT INTO item VALUES ('a', 1)")


async def test_what_a_statement_sets_does_not_reach_the_next(executor: Executor) -> None:
    await rows(executor, "SELECT set_config('search_path', 'nowhere', false) AS path")
    for _ in range(6):
        assert (await rows(executor, "SELECT current_setting('search_path') AS path"))[0]["path"] != "nowhere"


async def test_a_stream_ends_with_its_commit(executor: Executor, cluster: LocalCluster) -> None:
    query = "INSERT INTO item SELECT 'a', g FROM generate_series(1, 5000) AS g RETURNING id"
    lines = b"".join(await streamed(executor, query)).splitlines()
    assert [json.loads(line)["row"]["id"] for line in lines[:-1]] == list(range(1, 5001))
    end = json.loads(lines[-1])["end"]
    assert (end["row_count"], end["shard_id"]) == (5000, executor._engine.shard_for("a").id)
    assert await rows(executor, "SELECT count(*) AS n FROM item") == [{"n": 5000}]


async def streamed(executor: Executor, query: str, parts: list[bytes] | None = None) -> list[bytes]:
    """What a stream emits; kept in `parts` also if it fails."""
    found: list[bytes] = [] if parts is None else parts

    async def emit(part: bytes) -> None:
        found.append(part)

    await executor.stream(Statement("a", query), emit)
    return found


async def test_a_stream_that_is_left_is_rolled_back(executor: Executor) -> None:
    query = "INSERT INTO item SELECT 'a', g FROM generate_series(1, 50000) AS g RETURNING id"

    async def leave(part: bytes) -> None:
        raise BrokenPipeError

    for _ in range(6):
        with pytest.raises(BrokenPipeError):
            await executor.stream(Statement("a", query), leave)
    assert await rows(executor, "SELECT count(*) AS n FROM item") == [{"n": 0}]


async def test_a_slow_reader_does_not_hold_the_transaction_for_longer_than_a_statement(
    engine: AsyncShardedEngine,
) -> None:
    executor = Executor(engine, Limits(timeout_s=0.5), any_role=True)

    async def wait(part: bytes) -> None:
        await asyncio.Event().wait()

    query = "INSERT INTO item SELECT 'a', g FROM generate_series(1, 50000) AS g RETURNING id"
    for _ in range(6):
        async with asyncio.timeout(30):
            with pytest.raises(StatementTimeout):
                await executor.stream(Statement("a", query), wait)
    assert await rows(executor, "SELECT count(*) AS n FROM item") == [{"n": 0}]


async def test_an_error_in_the_middle_of_a_stream_is_raised(executor: Executor) -> None:
    query = "SELECT 1 / (2000 - g) AS x FROM generate_series(1, 3000) AS g"
    parts: list[bytes] = []
    with pytest.raises(pg.DivisionByZero):
        await streamed(executor, query, parts)
    assert 0 < sum(part.count(b"\n") for part in parts) < 2000
    assert await rows(executor, "SELECT 1 AS one") == [{"one": 1}]


async def test_what_the_server_rolled_back_to_break_a_deadlock_is_tried_again(executor: Executor) -> None:
    """The first attempt raises as the server would; a sequence, which no rollback turns back, counts the attempts."""
    await rows(executor, "SELECT 1 AS one")
    engine = executor._engine
    async with engine.begin("a") as conn:
        await conn.exec_driver_sql("CREATE SEQUENCE IF NOT EXISTS tries")
        await conn.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION conflict(times int) RETURNS bigint LANGUAGE plpgsql AS $f$ "
            "DECLARE n bigint := nextval('tries'); BEGIN "
            "IF mod(n, times + 1) <> 0 THEN RAISE EXCEPTION 'again' USING ERRCODE = '40P01'; END IF; RETURN n; END $f$"
        )
    assert await rows(executor, "SELECT conflict(2) AS n") == [{"n": 3}]
    with pytest.raises(pg.DeadlockDetected):
        await Executor(engine, retry=RetryPolicy(attempts_max=2), any_role=True).run(
            Statement("a", "SELECT conflict(100)")
        )


async def test_the_server_bounds_statements_too(engine: AsyncShardedEngine) -> None:
    """A gateway that freezes cancels nothing."""
    executor = Executor(engine, Limits(timeout_s=7.5), any_role=True)
    for _ in range(3):
        assert await rows(executor, "SELECT current_setting('statement_timeout') AS s") == [{"s": "7500ms"}]


async def test_a_lost_connection_is_tried_again(cluster: LocalCluster, executor: Executor) -> None:
    await rows(executor, "SELECT 1 AS one")
    for server in cluster.servers:
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'shardlib' AND pid <> pg_backend_pid()"
            )
    assert await rows(executor, "SELECT 1 AS one") == [{"one": 1}]


async def test_many_at_once(executor: Executor) -> None:
    async def add(number: int) -> None:
        await executor.run(Statement(f"k{number}", "INSERT INTO item VALUES ($1, $2)", (f"k{number}", number)))

    async with asyncio.timeout(60):
        await asyncio.gather(*(add(number) for number in range(100)))
    answers = await asyncio.gather(
        *(rows(executor, "SELECT id FROM item WHERE owner = $1", f"k{n}", key=f"k{n}") for n in range(100))
    )
    assert answers == [[{"id": number}] for number in range(100)]


async def test_a_shard_that_is_away_is_told(cluster: LocalCluster) -> None:
    async with await AsyncShardedEngine.open(cluster.url, connect_timeout_s=2) as engine:
        executor = Executor(engine, any_role=True)
        (server,) = [one for one in cluster.servers if one.shard == engine.shard_for("a").name]
        server.kill()
        try:
            with pytest.raises(RetryableError):
                await executor.run(Statement("a", "SELECT 1"))
        finally:
            server.start()
