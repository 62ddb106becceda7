"""From the switch to the cleanup, the old side's database refuses who writes rows that have moved: on real servers."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import TokenRange
from shardlib.token import hash_of
from shardlib_ops import LocalCluster
from shardlib_ops.local.binaries import find_postgres
from shardlib_ops.reshard import control
from shardlib_ops.reshard.connect import Runner, is_superseded
from shardlib_ops.reshard.guard import (
    activate_guard,
    deactivate_guard,
    foreign_writers,
    install_guard,
    lasting,
    remove_guard,
)
from shardlib_ops.reshard.world import Blocked
from tests.support.old_side import RANGES, OldSide, old_side

Make = Callable[..., AbstractAsyncContextManager[OldSide]]

pytestmark = pytest.mark.promise("P8")


_DEBIAN = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module", params=["18", "15"])
def servers(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    if request.param == "15" and not _DEBIAN.is_dir():
        pytest.skip("no PostgreSQL 15 in /usr/lib/postgresql/15: the form for servers before 18 is not tried")
    folder = _DEBIAN if request.param == "15" else None
    with LocalCluster(shards=1, pg_bin=folder, settings={"max_prepared_transactions": "10"}) as cluster:
        yield cluster


@pytest.fixture
def make(servers: LocalCluster) -> Make:
    return partial(old_side, servers)


async def activate(side: OldSide, **more: Any) -> None:
    await activate_guard(
        side.conn, side.runner, side.shapes, hash_function=side.link.hash_function, ranges=RANGES, **more
    )


@asynccontextmanager
async def refused(*words: str) -> AsyncIterator[None]:
    with pytest.raises(psycopg.Error) as caught:
        yield
    assert caught.value.sqlstate == "SL002", caught.value
    for word in words:
        assert word in str(caught.value)


def plain(name: str) -> tuple[str, tuple[str, tuple[str, ...]]]:
    return f"CREATE TABLE {name} (k text, id int, v text, PRIMARY KEY (k, id))", (name, ("k",))


@pytest.mark.parametrize("kind", ["murmur3", "xxhash"])
async def test_every_plain_write_of_a_moved_row_is_refused_and_others_pass(make: Make, kind: str) -> None:
    name = f"plain_{kind}"
    ddl, table = plain(name)
    async with make(ddl, table, kind=kind) as side, side.client() as client:
        moved, stays = side.some(True, 300), side.some(False, 300)
        for key in (moved[0], stays[0]):
            await client.execute(f"INSERT INTO {name} VALUES (%s, 1, 'before')", (key,))
        await install_guard(side.conn, side.runner, side.shapes)
        await client.execute(f"UPDATE {name} SET v = 'inactive'")
        await activate(side)

        for key in moved:
            async with refused("INSERT", name, key, f"job {side.job}", "moved to another shard", "Write through"):
                await client.execute(f"INSERT INTO {name} VALUES (%s, 2)", (key,))
        await client.cursor().executemany(f"INSERT INTO {name} VALUES (%s, 2)", [(key,) for key in stays])
        async with refused("UPDATE"):
            await client.execute(f"UPDATE {name} SET v = 'x' WHERE k = %s", (moved[0],))
        async with refused("DELETE"):
            await client.execute(f"DELETE FROM {name} WHERE k = %s", (moved[0],))
        async with refused("UPDATE", moved[1]):  # a row that stays gets a key that has moved
            await client.execute(f"UPDATE {name} SET k = %s WHERE k = %s AND id = 1", (moved[1], stays[0]))
        async with refused("UPDATE", moved[0]):  # and the other way
            await client.execute(f"UPDATE {name} SET k = %s, id = 9 WHERE k = %s", (stays[0], moved[0]))
        async with refused("INSERT"):
            await client.execute(
                f"INSERT INTO {name} VALUES (%s, 1) ON CONFLICT (k, id) DO UPDATE SET v = 'x'", (moved[0],)
            )
        async with refused("cannot be truncated"):
            await client.execute(f"TRUNCATE {name}")
        await client.execute(f"UPDATE {name} SET v = 'y' WHERE k = %s", (stays[0],))
        await client.execute(f"DELETE FROM {name} WHERE k = %s AND id = 1", (stays[0],))
        assert await side.fetch(f"SELECT v FROM {name} WHERE k = %s", (moved[0],)) == [("inactive",)]
        assert await side.fetch(f"SELECT count(*) FROM {name}") == [(301,)]

        await deactivate_guard(side.conn, side.runner, side.shapes)
        await client.execute(f"DELETE FROM {name} WHERE k = %s", (moved[0],))
        await client.execute(f"TRUNCATE {name}")


async def test_copy_and_psql_are_refused(make: Make, tmp_path: Path) -> None:
    ddl, table = plain("copied_in")
    async with make(ddl, table) as side, side.client() as client:
        await install_guard(side.conn, side.runner, side.shapes)
        await activate(side)
        moved, stays = side.some(True, 1), side.some(False, 500)
        rows = [(key, 1) for key in [*stays, *moved]]
        async with refused(moved[0]), client.cursor() as cursor, cursor.copy("COPY copied_in FROM STDIN") as copy:
            for key, number in rows:
                await copy.write_row((key, number, None))
        assert await side.fetch("SELECT count(*) FROM copied_in") == [(0,)]
        insert = f"INSERT INTO copied_in VALUES ('{moved[0]}', 1)"
        postgres = find_postgres(None, None)
        psql = await asyncio.to_thread(
            subprocess.run,
            [postgres.program("psql"), "-X", side.dsn, "-v", "VERBOSITY=verbose", "-c", insert],
            env=postgres.environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert psql.returncode == 1
        assert "SL002" in psql.stderr
        assert "this key has moved" in psql.stderr


async def test_cascades_are_refused(make: Make) -> None:
    ddl = """
        CREATE TABLE parents (k text PRIMARY KEY);
        CREATE TABLE regions (name text PRIMARY KEY);
        CREATE TABLE children (k text REFERENCES parents ON UPDATE CASCADE ON DELETE CASCADE, id int,
                               region text REFERENCES regions ON UPDATE CASCADE ON DELETE SET NULL,
                               PRIMARY KEY (k, id));
    """
    async with make(ddl, ("children", ("k",))) as side, side.client() as client:
        moved, stays = side.some(True, 1)[0], side.some(False, 2)
        await client.execute("INSERT INTO regions VALUES ('east')")
        for key in (moved, stays[0]):
            await client.execute("INSERT INTO parents VALUES (%s)", (key,))
            await client.execute("INSERT INTO children VALUES (%s, 1, 'east')", (key,))
        await install_guard(side.conn, side.runner, side.shapes)
        await activate(side)
        # `parents` and `regions` have no guard themselves: what is refused is the cascade.
        async with refused("DELETE of table children"):
            await client.execute("DELETE FROM parents WHERE k = %s", (moved,))
        async with refused("UPDATE of table children"):
            await client.execute("UPDATE parents SET k = 'other' WHERE k = %s", (moved,))
        async with refused("UPDATE of table children"):
            await client.execute("UPDATE regions SET name = 'west'")
        async with refused("UPDATE of table children"):
            await client.execute("DELETE FROM regions")
        async with refused("children"):
            await client.execute("TRUNCATE parents CASCADE")
        await client.execute("UPDATE parents SET k = %s WHERE k = %s", (stays[1], stays[0]))
        await client.execute("DELETE FROM parents WHERE k = %s", (stays[1],))
        assert await side.fetch("SELECT k, region FROM children") == [(moved, "east")]


async def test_triggers_of_the_application_are_refused(make: Make) -> None:
    ddl = """
        CREATE TABLE inbox (v text);
        CREATE TABLE outbox (k text PRIMARY KEY, wanted text);
        CREATE FUNCTION pass_on() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO outbox VALUES (NEW.v); RETURN NEW; END $$;
        CREATE TRIGGER t AFTER INSERT ON inbox FOR EACH ROW EXECUTE FUNCTION pass_on();
        CREATE FUNCTION rename() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.k := coalesce(NEW.wanted, NEW.k); RETURN NEW; END $$;
        CREATE TRIGGER zzz BEFORE INSERT OR UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION rename();
    """
    async with make(ddl, ("outbox", ("k",))) as side, side.client() as client:
        await install_guard(side.conn, side.runner, side.shapes)
        await activate(side)
        moved, stays = side.some(True, 1)[0], side.some(False, 2)
        async with refused(moved):
            await client.execute("INSERT INTO inbox VALUES (%s)", (moved,))
        async with refused(moved):  # a trigger changes the key, after any that comes before the guard
            await client.execute("INSERT INTO outbox VALUES (%s, %s)", (stays[0], moved))
        await client.execute("INSERT INTO inbox VALUES (%s)", (stays[0],))
        await client.execute("INSERT INTO outbox VALUES (%s, %s)", (moved, stays[1]))
        assert sorted(await side.fetch("SELECT k FROM outbox")) == sorted([(stays[0],), (stays[1],)])


async def test_a_trigger_that_would_fire_after_the_guard_is_named_before_anything_is_done(make: Make) -> None:
    ddl = """
        CREATE TABLE late (k text PRIMARY KEY);
        CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
        CREATE TRIGGER "~~late" BEFORE INSERT ON late FOR EACH ROW EXECUTE FUNCTION late();
    """
    async with make(ddl, ("late", ("k",))) as side:
        with pytest.raises(InvalidTopology, match="'~~late' of table 'late'"):
            await install_guard(side.conn, side.runner, side.shapes)
        assert await side.fetch("SELECT count(*) FROM pg_trigger WHERE tgrelid = 'public.late'::regclass") == [(1,)]


async def test_neither_replica_role_nor_superuser_passes_but_the_job_itself_does(make: Make) -> None:
    ddl, table = plain("passing")
    async with make(ddl, table) as side, side.client() as client:
        await install_guard(side.conn, side.runner, side.shapes)
        await activate(side)
        moved = side.some(True, 3)
        assert await (await client.execute("SHOW is_superuser")).fetchone() == ("on",)
        await client.execute("SET session_replication_role = replica")
        async with refused():
            await client.execute("INSERT INTO passing VALUES (%s, 1)", (moved[0],))
        async with refused():
            await client.execute("TRUNCATE passing")
        async with side.conn.transaction():
            await control.advance(side.conn, side.runner, 1, "reverse", "0/2")
            await side.conn.execute("SET LOCAL session_replication_role = replica")
            await side.conn.execute("INSERT INTO public.passing VALUES (%s, 1), (%s, 1)", (moved[0], moved[1]))
            await side.conn.execute("UPDATE public.passing SET v = 'x'")
            await side.conn.execute("DELETE FROM public.passing WHERE k = %s", (moved[1],))
        assert await side.fetch("SELECT k, v FROM passing") == [(moved[0], "x")]
        # The pass was that of one transaction.
        async with refused():
            await side.conn.execute("DELETE FROM public.passing")
        with pytest.raises(psycopg.Error) as caught:
            async with side.conn.transaction():
                await control.advance(side.conn, Runner(side.job, 0), 1, "reverse", "0/3")
        assert is_superseded(caught.value)
        # Another job's row is no pass.
        other = Runner(side.job + 100_000, 1)
        await control.claim(side.conn, other)
        await control.start_position(side.conn, other, 1, "reverse", "0/1")
        async with refused(), side.conn.transaction():
            await control.advance(side.conn, other, 1, "reverse", "0/2")
            await side.conn.execute("DELETE FROM public.passing")
        await control.drop_control(side.conn, other)


async def test_a_role_without_any_right_to_the_schema_gets_the_same_message(make: Make) -> None:
    ddl = plain("roles")[0] + "; CREATE ROLE clerk LOGIN PASSWORD 'clerk'; GRANT ALL ON roles TO clerk"
    async with make(ddl, ("roles", ("k",))) as side, side.client(user="clerk", password="clerk") as client:
        await install_guard(side.conn, side.runner, side.shapes)
        moved, stays = side.some(True, 1)[0], side.some(False, 1)[0]
        await activate(side, places=[("shard-07", RANGES)])
        await client.execute("INSERT INTO roles VALUES (%s, 1)", (stays,))
        async with refused("has moved to shard shard-07"):
            await client.execute("INSERT INTO roles VALUES (%s, 1)", (moved,))
        # Its own idea of operators changes nothing.
        await client.execute("SET search_path = pg_temp, public, pg_catalog")
        await client.execute("CREATE FUNCTION pg_temp.never(bigint, bigint) RETURNS bigint LANGUAGE sql AS 'SELECT 0'")
        await client.execute(
            "CREATE OPERATOR pg_temp.# (leftarg = bigint, rightarg = bigint, function = pg_temp.never)"
        )
        async with refused():
            await client.execute("INSERT INTO public.roles VALUES (%s, 1)", (moved,))
        with pytest.raises(pg.InsufficientPrivilege):
            await client.execute("UPDATE shardlib.position SET lsn = lsn")


KINDS = {
    "number": ("k bigint", ("k",)),
    "uuid": ("k uuid", ("k",)),
    "day": ("k date", ("k",)),
    "instant": ("k timestamptz", ("k",)),
    "bytes": ("k bytea", ("k",)),
    "pair": ("k text, more int", ("k", "more")),
    "triple": ("k uuid, more text, last bool", ("k", "more", "last")),
}

SAMPLES = {
    "number": "SELECT n::text FROM generate_series(-60, 60) n",
    "uuid": "SELECT md5(n::text)::uuid::text FROM generate_series(1, 120) n",
    "day": "SELECT to_char(date '0055-01-01' + n * 7919, 'YYYY-MM-DD') FROM generate_series(1, 120) n",
    "instant": r"SELECT to_char(timestamp '1970-01-01' + n * interval '7919.5 s', 'YYYY-MM-DD HH24:MI:SS')"
    r" || CASE n % 2 WHEN 1 THEN '.5' ELSE '' END || '+00' FROM generate_series(1, 120) n",
    "bytes": r"SELECT '\x' || md5(n::text) FROM generate_series(1, 120) n",
    "pair": "SELECT 'ü' || n % 11, (n * n)::text FROM generate_series(1, 120) n",
    "triple": "SELECT md5(n::text)::uuid::text, repeat('é', n % 30), CASE WHEN n % 2 = 0 THEN 't' ELSE 'f' END"
    " FROM generate_series(1, 120) n",
}


@pytest.mark.parametrize("kind", list(SAMPLES))
async def test_keys_of_each_type_are_judged_as_the_library_does(make: Make, kind: str) -> None:
    columns, key = KINDS[kind]
    ddl = f"CREATE TABLE typed_{kind} ({columns}, v int, PRIMARY KEY ({', '.join(key)}))"
    async with make(ddl, (f"typed_{kind}", key)) as side, side.client() as client:
        await install_guard(side.conn, side.runner, side.shapes)
        await activate(side)
        await client.execute("SET datestyle = 'German'; SET timezone = 'Asia/Kathmandu'; SET bytea_output = 'escape'")
        await client.execute("SET standard_conforming_strings = off; SET escape_string_warning = off")
        types = [column.split()[1] for column in columns.split(", ")]
        typed = ", ".join(f"%s::{name}" for name in types)
        insert = f"INSERT INTO typed_{kind} VALUES ({', '.join(['%s'] * len(types))})"
        stays = 0
        for texts in await side.fetch(SAMPLES[kind]):
            values = (await side.fetch(f"SELECT {typed}", texts))[0]
            if side.link.moves("\0".join(texts).encode()):
                async with refused():
                    await client.execute(insert, values)
            else:
                await client.execute(insert, values)
                stays += 1
        assert 10 < stays < 110
        assert await side.fetch(f"SELECT count(*) FROM typed_{kind}") == [(stays,)]


async def test_partitions_are_guarded_too(make: Make) -> None:
    ddl = """
        CREATE TABLE parted (k text, id int, v text, PRIMARY KEY (k, id)) PARTITION BY HASH (id);
        CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE parted_1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    """
    async with make(ddl, ("parted", ("k",))) as side, side.client() as client:
        await install_guard(side.conn, side.runner, side.shapes)
        await activate(side)
        moved, stays = side.some(True, 1)[0], side.some(False, 1)[0]
        await client.execute("SET session_replication_role = replica")
        for number in range(4):
            async with refused():
                await client.execute("INSERT INTO parted VALUES (%s, %s)", (moved, number))
            await client.execute("INSERT INTO parted VALUES (%s, %s)", (stays, number))
        for table in ("parted", "parted_0", "parted_1"):
            async with refused("truncated"):
                await client.execute(f"TRUNCATE {table}")
        async with client.transaction():
            async with client.transaction(force_rollback=True):
                await client.execute("UPDATE parted_0 SET v = 'x'")
            assert await foreign_writers(side.conn, side.shapes) == ()
        async with client.transaction():
            await client.execute("UPDATE parted_0 SET v = 'x'")
            assert [writer.table for writer in await foreign_writers(side.conn, side.shapes)] == ["public.parted_0"]
        await remove_guard(side.conn, side.runner, side.shapes)
        await client.execute("TRUNCATE parted")


async def test_a_transaction_that_began_before_and_writes_after_is_refused(make: Make) -> None:
    for level in ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"):
        name = "began_" + level.replace(" ", "_").lower()
        ddl, table = plain(name)
        async with make(ddl, table) as side, side.client() as client:
            await install_guard(side.conn, side.runner, side.shapes)
            moved = side.some(True, 2)
            await client.execute(f"INSERT INTO {name} VALUES (%s, 1)", (moved[0],))  # knows the inactive guard
            await client.execute(f"BEGIN ISOLATION LEVEL {level}")
            await client.execute(f"SELECT * FROM {name}")
            await client.execute("SELECT txid_current()")
            await activate(side)
            async with refused():
                await client.execute(f"INSERT INTO {name} VALUES (%s, 1)", (moved[1],))


async def test_a_transaction_that_has_written_before_is_named_until_it_has_ended(make: Make) -> None:
    ddl, table = plain("wrote_before")
    async with make(ddl, table) as side, side.client() as client:
        await install_guard(side.conn, side.runner, side.shapes)
        delete = "DELETE FROM wrote_before WHERE k = %s AND id = %s"
        stays, moved = side.some(False, 1)[0], side.some(True, 1)[0]
        for key in (stays, moved):
            await client.execute("INSERT INTO wrote_before SELECT %s, n FROM generate_series(1, 20) n", (key,))
        await client.execute("BEGIN")
        for number in range(12):  # so that it has the plan, the locks and the inactive guard at hand
            await client.execute(delete, (stays, number), prepare=True)
        await activate(side)
        # Whether it meets the guard now is up to the server, so nobody relies on it.
        first = await foreign_writers(side.conn, side.shapes)
        assert [writer.pid for writer in first] == [client.info.backend_pid]
        await client.execute("COMMIT")
        await client.execute("BEGIN")
        async with refused():
            await client.execute(delete, (moved, 1), prepare=True)
        await client.execute("ROLLBACK")
        assert lasting(first, await foreign_writers(side.conn, side.shapes)) == ()


async def test_foreign_writers_are_found_and_users_of_gates_are_not(make: Make) -> None:
    ddl, table = plain("foreign_ones")
    ddl += "; CREATE TABLE elsewhere (k text); CREATE TABLE shardlib.gate_900001 ()"
    async with make(ddl, table) as side:
        key = side.some(True, 1)[0]
        insert = "INSERT INTO foreign_ones VALUES (%s, %s)"
        async with (
            side.client(application_name="nightly import") as old,
            side.client() as gated,
            side.client() as reader,
            side.client() as other,
            side.client() as ours,
        ):
            for client in (old, gated, reader, other, ours):
                await client.execute("BEGIN")
            await old.execute(insert, (key, 1))
            await gated.execute("LOCK TABLE shardlib.gate_900001 IN ACCESS SHARE MODE")
            await gated.execute(insert, (key, 2))
            await reader.execute("SELECT * FROM foreign_ones FOR SHARE")
            await other.execute("INSERT INTO elsewhere VALUES ('x')")
            await ours.execute(f"SET application_name = '{side.runner.application('apply 1')}'")
            await ours.execute(insert, (key, 3))
            async with side.client() as client:
                for gid, gate in (("orders-1", False), ("orders-2", True)):
                    await client.execute("BEGIN")
                    if gate:
                        await client.execute("LOCK TABLE shardlib.gate_900001 IN ACCESS SHARE MODE")
                    await client.execute(insert, (key, 4 + gate))
                    await client.execute(f"PREPARE TRANSACTION '{gid}'")
            found = await foreign_writers(side.conn, side.shapes)
            assert {(writer.pid, writer.gid) for writer in found} == {
                (old.info.backend_pid, None),
                (None, "orders-1"),
            }
            everyone = await foreign_writers(side.conn, side.shapes, gated=True)
            assert {(writer.pid, writer.gid) for writer in everyone} == {
                (old.info.backend_pid, None),
                (gated.info.backend_pid, None),
                (None, "orders-1"),
                (None, "orders-2"),
            }
            texts = sorted(map(str, found))
            assert re.match(
                r"prepared transaction 'orders-1' of \w+, which writes to table 'public.foreign_ones'", texts[0]
            )
            assert "nightly import, idle in transaction, for " in texts[1]
            async with side.client() as late:
                await late.execute("BEGIN")
                await late.execute(insert, (key, 6))
                now = await foreign_writers(side.conn, side.shapes)
                assert {writer.pid for writer in now} == {old.info.backend_pid, late.info.backend_pid, None}
                assert {writer.pid for writer in lasting(found, now)} == {old.info.backend_pid, None}
                await old.execute("PREPARE TRANSACTION 'orders-3'")
                now = await foreign_writers(side.conn, side.shapes)
                assert {writer.gid for writer in lasting(found, now)} == {"orders-1", "orders-3"}
                await old.execute("ROLLBACK PREPARED 'orders-3'")
                await old.execute("BEGIN")
                await old.execute(insert, (key, 1))
                assert {writer.gid for writer in lasting(found, await foreign_writers(side.conn, side.shapes))} == {
                    "orders-1"
                }
            await old.execute("COMMIT")
            assert [writer.gid for writer in await foreign_writers(side.conn, side.shapes)] == ["orders-1"]
            for gid in ("orders-1", "orders-2"):
                await side.conn.execute(f"ROLLBACK PREPARED '{gid}'")
            assert await foreign_writers(side.conn, side.shapes) == ()


async def test_who_prepares_after_the_guard_stood_is_not_waited_for(make: Make) -> None:
    """Else two-phase commits that follow one another, of keys that stay, would keep a job from switching."""
    ddl, table = plain("prepared_later")
    async with make(ddl, table) as side:
        insert = "INSERT INTO prepared_later VALUES (%s, %s)"
        key = side.some(False, 1)[0]
        async with side.client() as old, side.client() as late, side.client() as touching:
            await old.execute("BEGIN")
            await old.execute(insert, (key, 1))
            first = await foreign_writers(side.conn, side.shapes)
            await late.execute("BEGIN")
            await late.execute(insert, (key, 2))
            await late.execute("SAVEPOINT s")
            await late.execute(insert, (key, 3))
            await late.execute("PREPARE TRANSACTION 'late'")
            await old.execute("SAVEPOINT s")
            await old.execute(insert, (key, 4))
            await old.execute("PREPARE TRANSACTION 'old'")
            now = await foreign_writers(side.conn, side.shapes)
            assert {writer.gid for writer in now} == {"late", "old"}
            assert [writer.gid for writer in lasting(first, now)] == ["old"]
            await side.conn.execute("ROLLBACK PREPARED 'old'")
            assert lasting(first, await foreign_writers(side.conn, side.shapes)) == ()
            # Who had the lock and no number yet may have been any of those that are prepared now.
            await touching.execute("BEGIN")
            await touching.execute("DELETE FROM prepared_later WHERE id = 99")
            first = await foreign_writers(side.conn, side.shapes)
            assert {writer.gid for writer in first} == {None, "late"}
            await touching.execute(insert, (key, 5))
            await touching.execute("PREPARE TRANSACTION 'touching'")
            now = await foreign_writers(side.conn, side.shapes)
            assert {writer.gid for writer in lasting(first, now)} == {"late", "touching"}
            for gid in ("late", "touching"):
                await side.conn.execute(f"ROLLBACK PREPARED '{gid}'")


async def test_installing_gives_way_to_writers_and_names_them(make: Make) -> None:
    ddl, table = plain("busy")
    async with make(ddl, table) as side, side.client(application_name="slow report") as client, side.client() as more:
        await client.execute("BEGIN")
        await client.execute("INSERT INTO busy VALUES ('x', 1)")
        with pytest.raises(
            Blocked, match=rf"table 'busy' within 0.5 s.*process {client.info.backend_pid} .*slow report"
        ):
            await install_guard(side.conn, side.runner, side.shapes, budget_s=0.5)
        waiting = asyncio.create_task(install_guard(side.conn, side.runner, side.shapes))
        await asyncio.wait_for(more.execute("INSERT INTO busy VALUES ('y', 1)"), 2)
        await client.execute("COMMIT")
        await asyncio.wait_for(waiting, 20)
        await activate(side)
        async with refused():
            await client.execute("INSERT INTO busy VALUES (%s, 2)", (side.some(True, 1)[0],))


async def test_steps_may_be_repeated_and_an_active_guard_stays_active(make: Make) -> None:
    ddl, table = plain("again")
    async with make(ddl, table) as side, side.client() as client:
        moved = side.some(True, 1)[0]
        for _ in range(2):
            await install_guard(side.conn, side.runner, side.shapes)
        before = await side.fetch("SELECT oid FROM pg_trigger WHERE tgrelid = 'public.again'::regclass ORDER BY 1")
        assert len(before) == 2
        for _ in range(2):
            await activate(side)
        await install_guard(side.conn, side.runner, side.shapes)
        async with refused():
            await client.execute("INSERT INTO again VALUES (%s, 1)", (moved,))
        assert before == await side.fetch(
            "SELECT oid FROM pg_trigger WHERE tgrelid = 'public.again'::regclass ORDER BY 1"
        )
        with pytest.raises(InvalidArgument, match="at least one range"):
            await activate_guard(side.conn, side.runner, side.shapes, hash_function="murmur3", ranges=())
        await control.claim(side.conn, Runner(side.job, 2))
        for call in (
            partial(activate_guard, hash_function="murmur3", ranges=RANGES), deactivate_guard, remove_guard,
        ):  # fmt: skip
            with pytest.raises(psycopg.Error) as caught:
                await call(side.conn, side.runner, side.shapes)
            assert is_superseded(caught.value)
        for _ in range(2):
            await remove_guard(side.conn, Runner(side.job, 2), side.shapes)
        await client.execute("INSERT INTO again VALUES (%s, 1)", (moved,))


async def test_a_key_that_is_null_belongs_to_no_range(make: Make) -> None:
    async with make("CREATE TABLE loose (k text, v int)", ("loose", ("k",))) as side, side.client() as client:
        await install_guard(side.conn, side.runner, side.shapes)
        await activate(side)
        await client.execute("INSERT INTO loose VALUES (NULL, 1)")
        async with refused():
            await client.execute("UPDATE loose SET k = %s", (side.some(True, 1)[0],))
        await client.execute("DELETE FROM loose")


async def test_the_edges_of_ranges_are_exact(make: Make) -> None:
    ddl, table = plain("edges")
    async with make(ddl, table) as side, side.client() as client:
        await install_guard(side.conn, side.runner, side.shapes)
        token = hash_of("murmur3")
        keys = [f"edge-{number}" for number in range(120)]
        tokens = {key: token(key.encode()) for key in keys}
        moved, beside, between = keys[:40], keys[40:80], keys[80:]
        ranges = [TokenRange(tokens[key], tokens[key]) for key in moved]
        for key in beside:
            ranges += [TokenRange(tokens[key] - 1, tokens[key] - 1), TokenRange(tokens[key] + 1, tokens[key] + 1)]
        await activate_guard(side.conn, side.runner, side.shapes, hash_function="murmur3", ranges=ranges)
        for key in moved:
            async with refused():
                await client.execute("INSERT INTO edges VALUES (%s, 1)", (key,))
        for key in (*beside, *between):
            await client.execute("INSERT INTO edges VALUES (%s, 1)", (key,))
        # All tokens, with a hole of one: both ends of the numbers are in.
        hole = tokens[beside[0]]
        ranges = [TokenRange(0, hole - 1), TokenRange(hole + 1, (1 << 64) - 1)]
        await activate_guard(side.conn, side.runner, side.shapes, hash_function="murmur3", ranges=ranges)
        for key in keys[:40] + keys[41:]:
            async with refused():
                await client.execute("INSERT INTO edges VALUES (%s, 2)", (key,))
        await client.execute("INSERT INTO edges VALUES (%s, 2)", (beside[0],))


class Writers:
    """Clients that write moved and other rows in transactions without a gate, and count what was let in."""

    def __init__(self, side: OldSide, seed: int) -> None:
        self.side, self.seed, self.done = side, seed, False
        self.moved, self.stays = side.some(True, 50), side.some(False, 50)
        self.in_moved = self.in_staying = self.refusals = 0

    async def write(self, number: int) -> None:
        source = random.Random(self.seed + number)
        async with self.side.client() as client:
            for count in itertools.count():
                if self.done:
                    return
                last_moves = source.random() < 0.7
                keys = [source.choice(self.stays) for _ in range(source.randrange(3))]
                keys.append(source.choice(self.moved if last_moves else self.stays))
                try:
                    async with client.transaction():
                        for n, key in enumerate(keys):
                            row = (key, number * 1_000_000 + count * 10 + n)
                            await client.execute("INSERT INTO raced VALUES (%s, %s)", row, prepare=True)
                        await asyncio.sleep(source.random() * 0.01)  # as an application does between its statements
                except psycopg.Error as error:
                    if error.sqlstate != "SL002":
                        raise
                    self.refusals += 1
                else:
                    self.in_moved += last_moves
                    self.in_staying += len(keys) - last_moves

    async def held(self) -> int:
        found = await self.side.fetch("SELECT count(*) FROM raced WHERE k = ANY (%s)", (self.moved,))
        return int(found[0][0])

    async def goes_on(self, *, moved: int = 0, staying: int = 0, refused: int = 0) -> None:
        """Wait until so many more of each have happened."""
        wanted = (self.in_moved + moved, self.in_staying + staying, self.refusals + refused)
        async with asyncio.timeout(60):
            while True:
                now = (self.in_moved, self.in_staying, self.refusals)
                if all(count >= least for count, least in zip(now, wanted, strict=True)):
                    return
                await asyncio.sleep(0.002)


async def nobody_else(side: OldSide) -> None:
    """Wait for who may have written before the guard stood; there is always somebody who came later."""
    first = await foreign_writers(side.conn, side.shapes)
    async with asyncio.timeout(60):
        while True:
            if not lasting(first, await foreign_writers(side.conn, side.shapes)):
                return
            await asyncio.sleep(0.001)


async def test_nothing_gets_in_once_the_guard_stands_and_no_foreign_writer_is_left(make: Make) -> None:
    ddl, table = plain("raced")
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print(f"SEED={seed}")
    async with make(ddl, table) as side:
        await install_guard(side.conn, side.runner, side.shapes)
        writers = Writers(side, seed)
        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(writers.write(number))
            for _ in range(10):
                await activate(side)
                await nobody_else(side)
                before = await writers.held()
                await writers.goes_on(refused=5, staying=10)
                assert await writers.held() == before, "rows got in behind the guard"
                await deactivate_guard(side.conn, side.runner, side.shapes)
                await writers.goes_on(moved=5)
            writers.done = True
        assert await writers.held() == writers.in_moved
