"""A split, its rollback, a second switch and a merge on the oldest and the newest PostgreSQL, and between the two."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, text

from shardlib import ShardedEngine, ShardedSession
from shardlib.errors import CommitOutcomeUnknown
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder
from tests.support.eventually import eventually_async
from tests.support.versions import PAIRS, TwoServers, two_servers

pytestmark = pytest.mark.timeout(300)

OWNERS = [f"owner-{number}" for number in range(60)]
LARGE = 20_000
"""Bytes of a text that is stored outside its row."""

DDL = """
    CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE TYPE place AS (street text, number int);
    CREATE DOMAIN percent AS int CHECK (VALUE BETWEEN 0 AND 100);
    CREATE TABLE kinds (
        owner text NOT NULL, id bigint GENERATED ALWAYS AS IDENTITY, tiny smallint, yes boolean, exact numeric,
        inexact double precision, fewer real, at timestamptz, local timestamp, day date, clock timetz,
        span interval, bytes bytea, doc jsonb, plain json, ident uuid, numbers int4range, many int4multirange,
        words text[], grid int[][], net inet, bits bit varying, found tsvector, spot point, feels mood, since mood[],
        home place, share percent, note varchar(200) DEFAULT 'said',
        length int GENERATED ALWAYS AS (length(note)) STORED,
        PRIMARY KEY (owner, id));
    CREATE TABLE goods (
        owner text NOT NULL, id int NOT NULL, hits int NOT NULL DEFAULT 0, large text NOT NULL,
        PRIMARY KEY (owner, id));
    ALTER TABLE goods ALTER COLUMN large SET STORAGE EXTERNAL;
    CREATE INDEX ON goods (hits);
    CREATE TABLE bag (owner text NOT NULL, word text NOT NULL, hits int NOT NULL DEFAULT 0, large text);
    ALTER TABLE bag ALTER COLUMN large SET STORAGE EXTERNAL;
    ALTER TABLE bag REPLICA IDENTITY FULL;
"""

KINDS = """
    INSERT INTO kinds (owner, tiny, yes, exact, inexact, fewer, at, local, day, clock, span, bytes, doc, plain, ident,
        numbers, many, words, grid, net, bits, found, spot, feels, since, home, share, note)
    VALUES
        (%(owner)s, -32768, true, '1.50', 0.1::float8 + 0.2::float8, 0.1, '2026-03-01 02:03:04.5+05', 'infinity',
         '4713-01-01 BC', '04:05:06+02', '1 mon -2 days 03:00', '\\x00ff5c', '{"b": 1, "a": [null, 1.0]}',
         '{"b" :1, "b":2}', '6ba7b810-9dad-11d1-80b4-00c04fd430c8', '[1,5)', '{[1,3),[5,9)}',
         ARRAY['a,b', 'NULL', NULL, E'tab\\t"', ''], '{{1,2},{3,4}}', '10.0.0.0/8', B'10110', 'the cat', '(1.5,-0)',
         'good', '{bad,good}', ROW('Straße', 7), 50, 'Straße'),
        (%(owner)s, NULL, NULL, 'NaN', '-Infinity', 'NaN', '-infinity', NULL, 'infinity', NULL, NULL, '', 'null',
         NULL, NULL, 'empty', '{}', '{}', NULL, '::1', NULL, '', NULL, NULL, NULL, ROW(NULL, NULL), NULL, NULL)
"""

FIXED = {
    "kinds": "SELECT k::text FROM kinds k",
    "goods": "SELECT concat_ws('|', owner, id, md5(large)) FROM goods",
    "bag": "SELECT concat_ws('|', owner, word, md5(large)) FROM bag WHERE word NOT LIKE 'new-%'",
}
"""What no writer changes."""

metadata = MetaData()


def declared(name: str, *more: Column[int]) -> Table:
    return Table(name, metadata, Column("owner", String, primary_key=True, info={"shard_key": True}), *more)


declared("kinds", Column("id", Integer, primary_key=True))
declared("goods", Column("id", Integer, primary_key=True), Column("hits", Integer), Column("large", String))  # type: ignore[arg-type]
bag = Table(
    "bag",
    metadata,
    Column("owner", String, nullable=False, info={"shard_key": True}),
    Column("word", String),
    Column("hits", Integer),
    Column("large", String),
)


class Store:
    """The tables on the first server, and threads that write to them: what they were told."""

    def __init__(self, made: TwoServers, engine: ShardedEngine, rng: random.Random) -> None:
        self.made, self.engine, self.rng = made, engine, rng
        self.told, self.doubtful = Counter[str](), Counter[str]()
        self.errors: list[str] = []
        with made.servers[0].connect() as conn:
            conn.execute(DDL.encode())
            for owner in OWNERS:
                conn.execute(KINDS.encode(), {"owner": owner})
        engine.register(metadata)
        for owner in OWNERS:
            with engine.session(owner) as session:
                session.execute(
                    text("INSERT INTO goods (owner, id, large) VALUES (:owner, 1, :large), (:owner, 2, 'small')"),
                    {"owner": owner, "large": self._large()},
                )
                twice = {"owner": owner, "word": "twice", "hits": 0, "large": self._large()}
                session.execute(insert(bag).values([twice, twice, {**twice, "word": "once", "large": None}]))
                session.commit()

    def _large(self) -> str:
        return self.rng.randbytes(LARGE // 2).hex()

    def _write(self, owner: str, rng: random.Random) -> None:
        """Rows whose large values stay as they are: a change does not tell those."""
        word, large = f"new-{self.told[owner] + self.doubtful[owner]}", rng.randbytes(2500).hex()

        def work(session: ShardedSession) -> None:
            given = {"owner": owner, "word": word}
            session.execute(text("UPDATE goods SET hits = hits + 1 WHERE owner = :owner"), given)
            session.execute(text("UPDATE bag SET hits = hits + 1 WHERE owner = :owner AND word = 'twice'"), given)
            session.execute(insert(bag).values(owner=owner, word=word, hits=0, large=large))
            if rng.random() < 0.3:
                session.execute(text("DELETE FROM bag WHERE owner = :owner AND word = :word"), given)
                session.execute(insert(bag).values(owner=owner, word=word, hits=1, large=None))

        try:
            self.engine.run(work, shard_key=owner)
        except CommitOutcomeUnknown:
            self.doubtful[owner] += 1
        else:
            self.told[owner] += 1

    def _client(self, over: threading.Event, mine: list[str], rng: random.Random) -> None:
        try:
            while not over.wait(rng.uniform(0.0, 0.02)):
                self._write(rng.choice(mine), rng)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.errors.append(f"{type(error).__name__}: {error}")

    @contextmanager
    def written(self) -> Iterator[None]:
        over = threading.Event()
        threads = [
            threading.Thread(target=self._client, args=(over, OWNERS[at::2], random.Random(self.rng.random())))
            for at in range(2)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(timeout=90)
        assert not any(thread.is_alive() for thread in threads), "a writer hangs"

    async def heard(self) -> None:
        """The writers go on."""
        before = self.told.total()

        async def more() -> bool:
            return self.told.total() >= before + 30 or bool(self.errors)

        await eventually_async(more, 60, "thirty more writes")
        assert self.errors == []

    def rows(self, query: str) -> list[tuple[str, tuple[object, ...]]]:
        """(id of the shard, row) of all shards that have the tables."""
        found: list[tuple[str, tuple[object, ...]]] = []
        for shard in self.engine.refresh().shards:
            with psycopg.connect(shard.primary.reveal(), autocommit=True) as conn:
                # What the text of a row depends on.
                conn.execute("SET timezone = 'UTC'")
                if conn.execute("SELECT to_regclass('bag')").fetchone() != (None,):
                    found += [(shard.id, row) for row in conn.execute(query.encode()).fetchall()]
        return found

    def fixed(self) -> dict[str, Counter[tuple[object, ...]]]:
        return {name: Counter(row for _, row in self.rows(query)) for name, query in FIXED.items()}

    def check(self, before: dict[str, Counter[tuple[object, ...]]]) -> None:
        """Every row is where its key is, as often as it should be there, with what the writers were told."""
        assert self.errors == []
        assert self.fixed() == before
        for name in FIXED:
            for shard_id, (owner,) in self.rows(f"SELECT DISTINCT owner FROM {name}"):
                assert self.engine.shard_for(owner).id == shard_id, f"{name}: {owner}"
        hits = Counter(
            {str(owner): count for _, (owner, count) in self.rows("SELECT owner, hits FROM goods WHERE id = 1")}
        )
        bags = self.rows("SELECT owner, array_agg(hits) FROM bag WHERE word = 'twice' GROUP BY 1")
        new = Counter(str(owner) for _, (owner,) in self.rows("SELECT owner FROM bag WHERE word LIKE 'new-%'"))
        assert sorted(str(owner) for _, (owner, _) in bags) == sorted(OWNERS)
        for _, (owner, both) in bags:
            assert both == [hits[str(owner)]] * 2, owner
        for owner in OWNERS:
            assert self.told[owner] <= hits[owner] <= self.told[owner] + self.doubtful[owner], owner
            assert new[owner] == hits[owner], owner


async def run(url: str, job: Job, rests: Status, *, complete: bool = False) -> None:
    async with Resharder(url) as resharder, asyncio.timeout(120):
        job = await resharder.run(job.id, complete=complete)
    assert job.status is rests, job.error


@pytest.mark.parametrize("versions", PAIRS)
async def test_split_rollback_split_and_merge(versions: tuple[str, str], rng: random.Random) -> None:
    """And the merge leads from the second version to the first."""
    began = time.monotonic()
    with two_servers(versions) as made, ShardedEngine(made.url) as engine:
        store = await asyncio.to_thread(Store, made, engine, rng)
        before = store.fixed()
        assert before["bag"].most_common(1)[0][1] == 2
        async with Manager(made.url) as manager:
            await manager.create_shard("second", primary_endpoint=made.servers[1].dsn)
            with store.written():
                job = await manager.split("shard-01", targets=[{"shard_id": "second"}])
                await run(made.url, job, Status.VALIDATION)
                await store.heard()
                await manager.rollback(job.id)
                await run(made.url, job, Status.ROLLED_BACK)
                await store.heard()
            store.check(before)
            assert {engine.shard_for(owner).name for owner in OWNERS} == {"shard-01"}
            with store.written():
                job = await manager.split("shard-01", targets=[{"shard_id": "second"}])
                await run(made.url, job, Status.VALIDATION)
                await store.heard()
                await run(made.url, job, Status.COMPLETED, complete=True)
            store.check(before)
            assert {engine.shard_for(owner).name for owner in OWNERS} == {"shard-01", "second"}
            with store.written():
                job = await manager.merge(["second"], target={"shard_id": "shard-01"})
                await run(made.url, job, Status.COMPLETED, complete=True)
                await store.heard()
            store.check(before)
            assert {engine.shard_for(owner).name for owner in OWNERS} == {"shard-01"}
    print(f"{versions}: {store.told.total()} writes, {time.monotonic() - began:.0f} s")
