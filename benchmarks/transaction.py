"""What the library adds to a transaction: BARS `overhead` (through the ORM) and `fence` (the gate alone).

The client runs on the first core and the servers on the others, so that a candidate is not judged by where the
system happened to put its backend; candidates take turns, statement by statement.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import Engine, create_engine, event, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.ext.horizontal_shard import ShardedSession as HorizontalSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.report import Row, at_least, at_most
from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.fence import FencedConnection, close_gate, open_gate, start
from shardlib.ring import TokenRange
from shardlib.topology.change import renew_gates
from shardlib_ops import LocalCluster
from shardlib_ops.local.binaries import find_postgres
from shardlib_ops.local.process import account, children_of
from tests.support.gates import give_gate

__all__ = ["run"]


class Base(DeclarativeBase):
    """The tables of this benchmark."""


class Item(Base):
    """One row of a tenant."""

    __tablename__ = "item"
    tenant: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]


KEYS = [f"tenant-{number}" for number in range(64)]


@contextmanager
def one_core_for_the_client(cluster: LocalCluster) -> Iterator[None]:
    """Client on the first core, servers on the rest, where the system can do that."""
    if not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2:
        yield
        return
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    for server in (*cluster.servers, *cluster.etcd):
        for pid in () if server.pid is None else (server.pid, *children_of(server.pid)):
            os.sched_setaffinity(pid, cores[1:])
    os.sched_setaffinity(0, cores[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def turns(candidates: Mapping[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Median seconds of each candidate, one call each in turn, after a tenth as many to warm up.

    Each round begins with another candidate, and every other one goes backwards: what a candidate leaves behind in
    caches, or to a server that still works, is met by all others alike.
    """
    took: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(count + count // 10):
        first, step = number % len(names), 1 if number // len(names) % 2 else -1
        for place in range(len(names)):
            name = names[(first + step * place) % len(names)]
            work = candidates[name]
            began = time.perf_counter()
            work()
            ended = time.perf_counter()
            if number >= count // 10:
                took[name].append(ended - began)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def orm(cluster: LocalCluster, engine: ShardedEngine, plain: Engine, count: int) -> list[Row]:
    """Select and insert through sessions, on one server."""
    numbers = iter(range(1_000_000, 10_000_000))
    statement = select(Item).where(Item.tenant == KEYS[0], Item.id == 1)

    def read_plain() -> str:
        with Session(plain) as session:
            return session.scalars(statement).one().name

    def read_pinned() -> str:
        with engine.session(KEYS[0]) as session:
            return session.scalars(statement).one().name

    def read_inferred() -> str:
        with engine.session() as session:
            return session.scalars(statement).one().name

    def add(session: Any) -> None:
        session.add(Item(tenant=KEYS[0], id=next(numbers), name="new"))
        session.commit()

    def write_plain() -> None:
        with Session(plain) as session:
            add(session)

    def write_pinned() -> None:
        with engine.session(KEYS[0]) as session:
            add(session)

    def write_routed() -> None:
        with engine.session() as session:
            add(session)

    gate = engine.topology.place(engine.token(KEYS[0])).gate
    fenced = create_engine(
        "postgresql+psycopg://", creator=lambda: FencedConnection.connect(cluster.servers[0].dsn), pool_size=5
    )
    event.listen(fenced, "begin", lambda conn: conn.connection.driver_connection.arm((gate,)))

    def read_fenced() -> str:
        with Session(fenced) as session:
            return session.scalars(statement).one().name

    reads = turns({"plain": read_plain, "pinned": read_pinned, "inferred": read_inferred, "fenced": read_fenced}, count)
    writes = turns({"plain": write_plain, "pinned": write_pinned, "routed": write_routed}, count)
    fenced.dispose()

    def us(what: str, figures: dict[str, float], name: str, limit: float, aim: str, section: str = "overhead") -> Row:
        return at_most(section, what, figures[name] * 1e6, figures["plain"] * 1e6, "us", limit, aim=aim)

    return [
        us("ORM select by key, pinned", reads, "pinned", 1.06, "1.03x"),
        us("ORM select by key, inferred", reads, "inferred", 1.10, "1.06x"),
        us("ORM insert + commit, pinned", writes, "pinned", 1.08, "1.04x"),
        us("ORM insert + commit, inferred", writes, "routed", 1.08, "1.04x"),
        us("one-SELECT transaction through a plain Session, gate alone", reads, "fenced", 1.04, "1.01x", "fence"),
    ]


def raw(cluster: LocalCluster, gate: int, count: int) -> Row:
    """The gate alone, on psycopg: several connections of each kind, since each backend has its own luck."""
    dsn = cluster.servers[0].dsn
    query = "SELECT name FROM item WHERE tenant = %s AND id = 1"
    with ExitStack() as stack:
        plain = [stack.enter_context(psycopg.connect(dsn)) for _ in range(4)]
        fenced = [stack.enter_context(FencedConnection.connect(dsn)) for _ in range(4)]
        took: dict[str, list[float]] = {"plain": [], "fenced": []}
        for number in range(count + 400):
            for name, conn in (("plain", plain[number % 4]), ("fenced", fenced[number % 4])):
                began = time.perf_counter()
                if name == "fenced":
                    start(conn, (gate,))  # type: ignore[arg-type]
                conn.execute(query, (KEYS[0],)).fetchone()
                conn.commit()
                if number >= 400:
                    took[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(seconds) * 1e6 for name, seconds in took.items()}
    what = "one-SELECT transaction, raw psycopg"
    return at_most("fence", what, middle["fenced"], middle["plain"], "us", 1.08, aim="1.05x")


def horizontal(cluster: LocalCluster, engine: ShardedEngine, count: int) -> Row:
    """SQLAlchemy's own sharded session with the simplest choosers, over the same shards."""
    shards = {
        shard.id: create_engine(
            "postgresql+psycopg://", creator=lambda dsn=shard.primary: psycopg.connect(dsn.conninfo()), pool_size=5
        )
        for shard in engine.topology.shards
    }
    home = engine.shard_for(KEYS[0]).id
    statement = select(Item).where(Item.tenant == KEYS[0], Item.id == 1)

    def theirs() -> str:
        with HorizontalSession(
            shard_chooser=lambda mapper, instance, clause=None: home,
            identity_chooser=lambda *args, **kw: [home],
            execute_chooser=lambda context: [home],
            shards=shards,
        ) as session:
            return session.scalars(statement).one().name

    def ours() -> str:
        with engine.session() as session:
            return session.scalars(statement).one().name

    figures = turns({"theirs": theirs, "ours": ours}, count)
    for each in shards.values():
        each.dispose()
    what = "ORM select by key, 4 shards, against ext.horizontal_shard"
    return at_least(
        "overhead", what, figures["ours"] * 1e6, figures["theirs"] * 1e6, "us", 1.0, aim="1.3x", lower_is_better=True
    )


async def concurrent(cluster: LocalCluster, count: int) -> Row:
    """64 tasks that each run transactions, against AsyncSession on the same server."""
    dsn = cluster.servers[0].dsn
    statement = select(Item).where(Item.tenant == KEYS[0], Item.id == 1)
    plain = create_async_engine(
        "postgresql+psycopg://",
        async_creator=lambda: psycopg.AsyncConnection.connect(dsn),
        pool_size=16,
        max_overflow=0,
    )
    async with await AsyncShardedEngine.open(cluster.url, pool_size=16, max_overflow=0) as engine:

        async def read_plain() -> None:
            async with AsyncSession(plain) as session:
                (await session.scalars(statement)).one()

        async def read_ours() -> None:
            async with engine.session(KEYS[0]) as session:
                (await session.scalars(statement)).one()

        async def rate(work: Callable[[], Any]) -> float:
            async def task() -> None:
                for _ in range(max(2, count // 64)):
                    await work()

            began = time.perf_counter()
            await asyncio.gather(*[task() for _ in range(64)])
            return 64 * max(2, count // 64) / (time.perf_counter() - began)

        rates: dict[str, list[float]] = {"plain": [], "ours": []}
        for turn in range(6):
            for name, work in (("plain", read_plain), ("ours", read_ours)):
                measured = await rate(work)
                if turn:
                    rates[name].append(measured)
    await plain.dispose()
    ours, theirs = statistics.median(rates["ours"]), statistics.median(rates["plain"])
    return at_least("overhead", "asyncio, 64 tasks, one-select transactions", ours, theirs, "tx/s", 0.90, aim="0.95x")


def pgbench(cluster: LocalCluster, gate: int, seconds: int, folder: Path) -> list[Row]:
    """Server throughput with and without the gate; no rows, said aloud, where there is no pgbench."""
    program = find_postgres(None, account()).program("pgbench")
    if not Path(program).exists():
        print("no pgbench beside the servers' programs: its rows are left out")
        return []
    bodies = {
        "one-insert": "INSERT INTO bench_insert VALUES (:client_id, 1)",
        "one-select": "SELECT name FROM item WHERE tenant = 'tenant-0' AND id = 1",
    }
    with psycopg.connect(cluster.servers[0].dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS bench_insert (c int, v int)")
    rows = []
    for name, body in bodies.items():
        for clients in (4, 16):
            rates: dict[str, list[float]] = {"with": [], "without": []}
            for _ in range(3):
                for way, seen in rates.items():
                    begin = (
                        "BEGIN;"
                        if way == "without"
                        else (f"BEGIN\\; LOCK TABLE shardlib.gate_{gate} IN ACCESS SHARE MODE;")
                    )
                    script = folder / f"{way}.sql"
                    script.write_text(f"{begin}\n{body};\nCOMMIT;\n")
                    done = subprocess.run(
                        [str(program), "-n", "-M", "simple", "-c", str(clients), "-j", "2", "-T", str(seconds),
                         "-f", str(script), cluster.servers[0].dsn],
                        capture_output=True, text=True, check=True, timeout=seconds + 60,
                    )  # fmt: skip
                    rate = next(line for line in done.stdout.splitlines() if line.startswith("tps"))
                    seen.append(float(rate.split()[2]))
            rows.append(
                at_least(
                    "fence", f"server throughput, pgbench, {clients} clients, {name}",
                    statistics.median(rates["with"]), statistics.median(rates["without"]), "tx/s", 0.92, aim="0.97x",
                )
            )  # fmt: skip
    return rows


def closing(cluster: LocalCluster, engine: ShardedEngine, rounds: int) -> list[Row]:
    """Writers' pause when the gate of their range closes and another opens; and writers beside it."""
    topology = engine.topology
    shard = topology.shards[0]
    here = [key for key in KEYS if engine.shard_for(key).id == shard.id]
    moving, beside = here[0], here[1]
    token = engine.token(moving)
    ranges = (TokenRange(token, token),)
    catalog = open_catalog(cluster.url)
    waits: dict[str, list[float]] = {"moving": [], "beside": [], "quiet": []}
    phase = ["quiet"]
    end = threading.Event()

    def writer(key: str, name: str) -> None:
        while not end.is_set():
            began = time.perf_counter()
            with engine.session(key) as session:
                session.get_one(Item, (key, 1)).name = "w"
                session.commit()
            took = time.perf_counter() - began
            if phase[0] == "quiet":
                if name == "beside":
                    waits["quiet"].append(took)
            else:
                waits[name].append(took)
            end.wait(0.004)

    threads = [
        threading.Thread(target=writer, args=(key, name))
        for key, name in [(moving, "moving"), (beside, "beside")]
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    with psycopg.connect(shard.primary.conninfo(), autocommit=True) as conn:
        now = give_gate(catalog.load(), shard.id, ranges, nonce=uuid4().hex)
        for number in now.gates_of(shard.id):
            open_gate(conn, number)
        catalog.publish(now, expected=now.version - 1)
        end.wait(max(1.0, rounds * 0.05))
        phase[0] = "closing"
        for _ in range(rounds):
            before = next(gate.number for gate in now.gates if gate.shard_id == shard.id and gate.ranges)
            then = renew_gates(now, shard.id, nonce=uuid4().hex)
            assert close_gate(conn, before, budget_s=5).closed
            for number in then.gates_of(shard.id):
                open_gate(conn, number)
            catalog.publish(then, expected=now.version)
            close_gate(conn, now.default_gate(shard.id), budget_s=5)
            now = then
            end.wait(0.05)
    end.set()
    for thread in threads:
        thread.join()
    catalog.close()

    def p99(name: str) -> float:
        ordered = sorted(waits[name])
        return ordered[int(len(ordered) * 0.99)] * 1e3

    return [
        at_most("fence", "writers' p99 while the gate of their range closes and moves on", p99("moving"), None, "ms",
                60, aim="25 ms"),
        at_most("fence", "writers' p99 on other ranges of the shard meanwhile", p99("beside"), p99("quiet"), "ms", 1.2,
                aim="1.0x"),
    ]  # fmt: skip


def run(scale: float) -> list[Row]:
    """Rows of the sections `overhead` and `fence`; `scale` 1 is the full size, less is a quick look."""
    count = max(60, int(4000 * scale))
    rows: list[Row] = []
    with LocalCluster(shards=1) as cluster, ShardedEngine(cluster.url) as engine:
        fill(engine)
        plain = create_engine(
            "postgresql+psycopg://", creator=lambda: psycopg.connect(cluster.servers[0].dsn), pool_size=5
        )
        gate = engine.topology.place(engine.token(KEYS[0])).gate
        with one_core_for_the_client(cluster):
            rows += orm(cluster, engine, plain, count)
            rows.append(raw(cluster, gate, count))
        plain.dispose()
        rows.append(asyncio.run(concurrent(cluster, max(128, count))))
        rows += pgbench(cluster, gate, max(1, int(4 * scale)), cluster.directory)
        rows += closing(cluster, engine, max(5, int(100 * scale)))
    with LocalCluster(shards=4) as cluster, ShardedEngine(cluster.url) as engine:
        fill(engine)
        with one_core_for_the_client(cluster):
            rows.append(horizontal(cluster, engine, count))
    return sorted(rows, key=lambda row: row.section != "overhead")


def fill(engine: ShardedEngine) -> None:
    """The table, with one row of each key."""
    engine.create_all(Base.metadata)
    with engine.session(twophase=True) as session:
        session.add_all([Item(tenant=key, id=1, name="x") for key in KEYS])
        session.commit()
