"""`bulk_load` over four shards beside one COPY into one server, of the same rows, as an application has them."""

from __future__ import annotations

import gc
import statistics
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Column, DateTime, Integer, MetaData, Numeric, String, Table

from benchmarks.report import ROUNDS, Row, at_least
from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from shardlib_ops.manager.bootstrap import NewShard, create_cluster

__all__ = ["run"]

_SHARDS: Final = 4
_ROWS: Final = 1_000_000

metadata = MetaData()
sale = Table(
    "sale",
    metadata,
    Column("tenant_id", String, primary_key=True, info={"shard_key": True}),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("name", String, nullable=False),
    Column("amount", Numeric(10, 2), nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("note", String),
)
_NAMES: Final = [column.name for column in sale.columns]
_COPY_IN: Final = f"COPY sale ({', '.join(_NAMES)}) FROM STDIN"
_COPY_OUT: Final = f"COPY sale ({', '.join(_NAMES)}) TO STDOUT"


def _rows(count: int, tenants: int) -> list[tuple[Any, ...]]:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    return [
        (
            f"tenant-{i % tenants}",
            i,
            f"the sale of thing number {i}",
            Decimal(i % 100_000) / 100,
            moment,
            None if i % 3 else "a note",
        )
        for i in range(count)
    ]


def _empty(servers: list[LocalServer]) -> None:
    for server in servers:
        with server.connect() as conn:
            conn.execute("TRUNCATE sale")
            conn.execute("CHECKPOINT")


def _one_copy(server: LocalServer, rows: list[tuple[Any, ...]]) -> None:
    with server.connect(autocommit=False) as conn, conn.cursor().copy(_COPY_IN) as copy:
        for row in rows:
            copy.write_row(row)


def _blocks(server: LocalServer, blocks: list[bytes]) -> None:
    with server.connect(autocommit=False) as conn, conn.cursor().copy(_COPY_IN) as copy:
        for block in blocks:
            copy.write(block)


def _text_of(server: LocalServer) -> list[bytes]:
    """What COPY says of the whole table, in blocks: the rows with all the work of a client done."""
    blocks, block = [], bytearray()
    with server.connect() as conn, conn.cursor().copy(_COPY_OUT) as copy:
        for line in copy:
            block += line
            if len(block) >= 64 * 1024:
                blocks.append(bytes(block))
                block.clear()
    return [*blocks, bytes(block)]


def _compare(engine: ShardedEngine, servers: list[LocalServer], rows: list[tuple[Any, ...]], what: str) -> list[Row]:
    _empty(servers)
    _one_copy(servers[0], rows)
    blocks = _text_of(servers[0])

    took = _medians(
        servers,
        {
            "ours": lambda: engine.bulk_load(sale, rows, columns=_NAMES),
            "rows": lambda: _one_copy(servers[0], rows),
            "text": lambda: _blocks(servers[0], blocks),
        },
    )
    per_s = {name: len(rows) / seconds for name, seconds in took.items()}
    text_ratio = per_s["ours"] / per_s["text"]
    return [
        at_least(
            "bulk", f"{what} over {_SHARDS} shards; one COPY of the same rows", per_s["ours"], per_s["rows"],
            "rows/s", 0.6,
        ),
        Row("bulk", "the same; one COPY of text made before", per_s["ours"], per_s["text"], "rows/s", text_ratio, ""),
    ]  # fmt: skip


def _medians(servers: list[LocalServer], candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds; the candidates take turns, and the tables are emptied outside of the time."""
    took: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(ROUNDS + 1):
        for name, work in candidates.items():
            _empty(servers)
            gc.collect()
            gc.disable()
            try:
                began = time.perf_counter()
                work()
                ended = time.perf_counter()
            finally:
                gc.enable()
            if turn:  # the first one warms up
                took[name].append(ended - began)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def run(scale: float = 1.0) -> list[Row]:
    """Rows of a sale each, with many tenants and with a tenant for each row.

    Args:
        scale: part of a million rows.
    """
    count = max(1000, round(_ROWS * scale))
    found: list[Row] = []
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(shards=_SHARDS, bootstrap=False))
        url = f"memory://bench-{uuid.uuid4().hex}"
        servers = list(cluster.servers)
        create_cluster(open_catalog(url), [NewShard(f"shard-{i}", Dsn(s.dsn)) for i, s in enumerate(servers)])
        engine = stack.enter_context(ShardedEngine(url))
        engine.create_all(metadata)
        for tenants, shown in ((20_000, "20,000 tenants"), (count, "a key for each row")):
            rows = _rows(count, tenants)
            found += _compare(engine, servers, rows, f"bulk_load of {count:,} rows, {shown},")
    return found
