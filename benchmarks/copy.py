"""The copy of a leg's rows to another server beside `psql COPY | psql COPY` of exactly those rows, picked before."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from psycopg import AsyncConnection

from benchmarks.report import ROUNDS, Row, at_least
from shardlib.dsn import Dsn
from shardlib.ring import TokenRange
from shardlib.topology import Shard, Table
from shardlib_ops import LocalCluster
from shardlib_ops.reshard import control
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.copy import collect_keys, copy_tables, export_snapshot
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.reader import find_psql
from shardlib_ops.reshard.rows import read_shapes

__all__ = ["run"]

_ROWS: Final = 1_000_000
_FEW_KEYS: Final = 20_000
_STEP: Final = (1 << 64) // 256
_RANGES: Final = tuple(TokenRange(at * _STEP, (at + 1) * _STEP - 1) for at in range(0, 256, 2))

_DDL: Final = "CREATE TABLE {} (id bigint, k text, a text, b int, n numeric, f float8, at timestamptz, note text)"
_FILL: Final = """
    INSERT INTO t SELECT i, 'customer-' || lpad((i % {keys})::text, 10, '0'), 'the text of row number ' || i ||
           ', with words enough to give it the length of others', i, i / 100.0, i / 7.0,
           timestamptz '2026-01-01' + i * interval '1 s', CASE WHEN i % 3 = 0 THEN 'a note' END
      FROM generate_series(1, {rows}) i
"""


@dataclass
class _Times:
    keys: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    pipe: list[float] = field(default_factory=list)


class _Bench:
    def __init__(self, cluster: LocalCluster, psql: Path, a: AsyncConnection[Any], b: AsyncConnection[Any]) -> None:
        self.psql, self.a, self.b = psql, a, b
        self.dsns = [server.dsn for server in cluster.servers]
        self.jobs = itertools.count(1)

    async def fill(self, rows: int, keys: int) -> None:
        for conn in (self.a, self.b):
            await conn.execute("DROP TABLE IF EXISTS t, half")
            await conn.execute(_DDL.format("t").encode())
        await self.a.execute(_FILL.format(rows=rows, keys=keys).encode())
        await self.a.execute("VACUUM ANALYZE t")

    async def empty(self) -> None:
        await self.b.execute("TRUNCATE t")
        for conn in (self.a, self.b):
            await conn.execute("CHECKPOINT")

    async def ours(self, times: _Times) -> int:
        """One copy, as a job of its own; how many rows."""
        await self.empty()
        shards = [Shard(f"s{n}", f"shard-{n:02d}", Dsn(dsn)) for n, dsn in enumerate(self.dsns, 1)]
        tables, runner = (Table("t", ("k",)),), Runner(next(self.jobs), 1)
        link = Link(runner, 1, "forward", shards[0], shards[1], _RANGES, "murmur3", tables)
        for conn in (self.a, self.b):
            await control.claim(conn, runner)
            await control.create_keys(conn, runner)
        origin, sink = await read_shapes(self.a, tables), await read_shapes(self.b, tables)
        async with await export_snapshot(link, slot=f"bench_{runner.job}", temporary=True, timeout_s=30) as snapshot:
            began = time.perf_counter()
            await collect_keys(link, origin, snapshot)
            middle = time.perf_counter()
            copied = await copy_tables(link, origin, sink, snapshot)
            ended = time.perf_counter()
        times.keys.append(middle - began)
        times.rows.append(ended - middle)
        times.both.append(ended - began)
        await self.a.execute(f"CREATE TABLE IF NOT EXISTS half AS SELECT t.* FROM t"
                             f" JOIN shardlib.job_{runner.job}_keys USING (k)".encode())  # fmt: skip
        for conn in (self.a, self.b):
            await conn.execute(f"DROP TABLE shardlib.job_{runner.job}_keys".encode())
            await control.drop_control(conn, runner)
        return copied

    async def pipe(self, times: _Times) -> int:
        await self.empty()
        began = time.perf_counter()
        await asyncio.to_thread(self._pipe)
        times.pipe.append(time.perf_counter() - began)
        row = await (await self.b.execute("SELECT count(*) FROM t")).fetchone()
        assert row is not None
        return int(row[0])

    def _pipe(self) -> None:
        out = [str(self.psql), "-Xq", "-d", self.dsns[0], "-c", "COPY half TO STDOUT"]
        into = [str(self.psql), "-Xq", "-d", self.dsns[1], "-c", "COPY t FROM STDIN"]
        with subprocess.Popen(out, stdout=subprocess.PIPE) as reader:
            subprocess.run(into, stdin=reader.stdout, check=True)
        assert reader.returncode == 0


async def _compare(bench: _Bench, rows: int, keys: int, what: str, limit: float, aim: str) -> list[Row]:
    await bench.fill(rows, keys)
    times = _Times()
    for _ in range(ROUNDS + 1):
        copied = await bench.ours(times)
        assert copied == await bench.pipe(times) > 0
    # The first one warms up.
    per_s = {name: copied / statistics.median(took[1:]) for name, took in vars(times).items()}
    return [
        at_least("copy", f"{what}; psql COPY | psql COPY", per_s["rows"], per_s["pipe"], "rows/s", limit, aim=aim),
        at_least("copy", "the same with the key pass", per_s["both"], per_s["pipe"], "rows/s", 0.8, aim="1.0x"),
    ]


async def _run(scale: float) -> list[Row]:
    psql = find_psql()
    assert psql is not None, "the baseline is psql's"
    rows = max(2000, round(_ROWS * scale))
    with LocalCluster(shards=2) as cluster:
        a, b = [await AsyncConnection.connect(server.dsn, autocommit=True) for server in cluster.servers]
        async with a, b:
            bench = _Bench(cluster, psql, a, b)
            few = max(20, round(_FEW_KEYS * min(1.0, scale * 4)))
            return [
                *await _compare(bench, rows, rows, f"half of {rows:,} rows, a key for each,", 0.85, "1.0x"),
                *await _compare(bench, rows, few, f"half of {rows:,} rows, {few:,} keys,", 1.1, "1.4x"),
            ]


def run(scale: float = 1.0) -> list[Row]:
    """Half of a table moves: with a key for each row, and with 20,000 keys.

    Args:
        scale: part of a million rows.
    """
    return asyncio.run(_run(scale))
