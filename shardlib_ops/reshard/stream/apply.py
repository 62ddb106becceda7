"""Changes of a leg are written at its sink, with their keys and the position, in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from psycopg import AsyncConnection, AsyncRawCursor
from psycopg import errors as pg

from shardlib_ops.reshard import control
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.rows import TableShape, read_shapes
from shardlib_ops.reshard.stream.decode import UNCHANGED, Value, lsn_text
from shardlib_ops.reshard.stream.faults import Diverged, SchemaChanged
from shardlib_ops.reshard.stream.filter import DELETE, INSERT, TRUNCATE, Change, Source
from shardlib_ops.reshard.stream.net import Net, copy_line, net_of
from shardlib_ops.reshard.stream.statements import SinkFacts, Statements

__all__ = ["Key", "Sink"]

Key = tuple[str, tuple[str, ...]]
"""A row of a key table: the text of the first key part, and those of the others."""

_FEW: Final = 24
_RUN_MIN: Final = 100
_PIPELINED: Final = 500
_LINES_AT_ONCE: Final = 500
_KEYS_AT_ONCE: Final = 10_000

_SETTINGS: Final = (
    # Triggers of the application and foreign keys did their work at the origin.
    "SET session_replication_role = replica",
    "SET client_encoding = 'UTF8'",
    # Few rows are looked up in tables of any size: always through an index.
    "SET enable_hashjoin = off",
    "SET enable_mergejoin = off",
    "SET enable_seqscan = off",
    "SET jit = off",
    # What the slot is told of has to be durable.
    (
        "SELECT set_config('synchronous_commit', 'on', false)"
        " WHERE current_setting('synchronous_commit') IN ('off', 'local')"
    ),
)


class Sink:
    """The writing side of a stream: one connection. Made by `open`; the caller closes it.

    Its role may set `session_replication_role`: a superuser, or one with `GRANT SET ON PARAMETER` of that name.

    After an error it is of no use: close it, and what was not committed is gone.
    """

    def __init__(self, conn: AsyncConnection[Any], link: Link, facts: dict[tuple[str, str], SinkFacts]) -> None:
        self._conn, self._link, self._facts = conn, link, facts
        self._statements: dict[Source, Statements] = {}
        self._numbers = 0
        self._made: set[int] = set()
        self._used: set[int] = set()
        self._upsert_keys = _UPSERT_KEYS.format(control.keys_table(link.runner.job).as_string()).encode()
        self.position = 0
        """LSN up to which everything is applied, as the sink has it."""
        self.begun = False
        """Whether a transaction is open."""

    @classmethod
    async def open(cls, link: Link, shapes: Sequence[TableShape]) -> Sink:
        """Connect to the sink of a leg, and look whether its tables are what is expected.

        Raises:
            SchemaChanged: a table has other columns at the sink.
            ShardUnavailable: no server.
        """
        conn = await link.open_sink("apply")
        try:
            for setting in _SETTINGS:
                await conn.execute(setting.encode())
            facts = {}
            there = await read_shapes(conn, [shape.table for shape in shapes])
            for shape, other in zip(shapes, there, strict=True):
                _same(shape, other, link.sink.name)
                row = await (await conn.execute(_FACTS, (other.oid, other.oid))).fetchone()
                assert row is not None  # noqa: S101 - a SELECT of two expressions
                place = (shape.table.schema or "public", shape.table.name)
                facts[place] = SinkFacts(bool(row[0]), frozenset(row[1]))
            return cls(conn, link, facts)
        except BaseException:
            await conn.close()
            raise

    async def close(self) -> None:
        """End the connection, and with it a transaction that is open."""
        await self._conn.close()

    async def start(self) -> tuple[int | None, dict[tuple[str, str], int]]:
        """(the position, None if no start was written down; what is in the copy already, by table)."""
        link, runner = self._link, self._link.runner
        await self._conn.execute(control.claimed(runner))
        text = await control.position(self._conn, runner.job, link.number, link.direction)
        copied: dict[tuple[str, str], int] = {}
        if link.direction == "forward":
            found = await self._conn.execute(
                "SELECT table_name, (lsn - '0/0')::bigint FROM shardlib.copied WHERE job = %s AND leg = %s",
                (runner.job, link.number),
            )
            lsns = {str(name): int(lsn) for name, lsn in await found.fetchall()}
            for table in link.tables:
                place = (table.schema or "public", table.name)
                copied[place] = max(lsns.get(table.fullname, 0), lsns.get(".".join(place), 0))
        if text is None:
            return None, copied
        high, low = text.split("/")
        self.position = int(high, 16) << 32 | int(low, 16)
        return self.position, copied

    async def keys_after(self, lsn: int, moves: Callable[[bytes], bool]) -> list[Key]:
        """The keys of the leg that a change after `lsn` touched."""
        name = control.keys_table(self._link.runner.job).as_string()
        found = await self._conn.execute(f"SELECT k, more FROM {name} WHERE lsn > %s".encode(), (lsn_text(lsn),))
        return [(k, tuple(more)) for k, more in await found.fetchall() if moves("\0".join((k, *more)).encode())]

    async def write(self, changes: list[Change], keys: Iterable[bytes], *, lsn: int, last: bool) -> list[Key]:
        """Write changes, and commit if they are the `last` of the transaction.

        Args:
            changes: in commit order.
            keys: key bytes of their rows.
            lsn: just after the last commit record among them; while more of a transaction is to come, one past the
                start of its commit record.
            last: whether they end with a whole transaction of the origin.

        Returns:
            Those of the keys that the sink did not know.

        Raises:
            Diverged: a row is not there.
            psycopg.Error: the server refused, or is gone; SQLSTATE SL001 if a later runner holds the job.
        """
        whole = last and not self.begun
        if whole and len(changes) <= _FEW and all(change[0] != TRUNCATE for change in changes):
            return await self._few(changes, list(keys), lsn)
        if not self.begun:
            async with self._conn.pipeline():
                await self._begin(lsn if whole else self.position)
        fresh = await (await self._keys(list(keys), lsn)).fetchall()
        for part in _around_truncates(changes):
            if part[0][0] == TRUNCATE:
                await self._emptied(self._of(part[0][1]), lsn)
            else:
                await self._many(part)
        if last:
            if not whole:
                await self._advance(lsn)
            await self._conn.execute("COMMIT")
            self._ended(lsn)
        return [(k, tuple(more)) for k, more in fresh]

    async def rest(self, lsn: int) -> None:
        """Write down that nothing concerned the leg up to `lsn`."""
        async with self._conn.pipeline():
            await self._begin(lsn)
            await self._conn.execute("COMMIT")
        self._ended(lsn)

    async def _begin(self, lsn: int) -> None:
        self.begun = True
        await self._conn.execute("BEGIN")
        await self._advance(lsn)
        await self._conn.execute("SET CONSTRAINTS ALL DEFERRED")

    async def _advance(self, lsn: int) -> None:
        await control.advance(self._conn, self._link.runner, self._link.number, self._link.direction, lsn_text(lsn))

    def _ended(self, lsn: int) -> None:
        self.position, self.begun = lsn, False
        self._used.clear()

    async def _few(self, changes: list[Change], keys: list[bytes], lsn: int) -> list[Key]:
        """One message to the server, and one answer."""
        steps = [step for change in changes for step in self._steps(change)]
        certain = not any(must for _, _, must in steps)
        async with self._conn.pipeline():
            await self._begin(lsn)
            known = await self._keys(keys, lsn)
            done = [(await self._run(text, values), must, text) for text, values, must in steps]
            if certain:
                await self._conn.execute("COMMIT")
        self._check(done)
        if not certain:
            await self._conn.execute("COMMIT")
        self._ended(lsn)
        return [(k, tuple(more)) for k, more in await known.fetchall()]

    async def _keys(self, keys: list[bytes], lsn: int) -> AsyncRawCursor[Any]:
        cursor = AsyncRawCursor(self._conn)
        texts = [key.decode() for key in keys]
        if b"\0" in b",".join(keys):
            parts = [text.split("\0") for text in texts]
            first, more = _array([part[0] for part in parts]), _array([_array(part[1:]) for part in parts])
        else:
            first, more = _array(texts), _array(["{}"] * len(texts))
        await cursor.execute(self._upsert_keys, [first, more, lsn_text(lsn)])
        return cursor

    async def _run(self, text: str, values: Sequence[Value]) -> AsyncRawCursor[Any]:
        cursor = AsyncRawCursor(self._conn)
        await cursor.execute(text.encode(), [value.decode() if value.__class__ is bytes else None for value in values])
        return cursor

    def _steps(self, change: Change) -> list[tuple[str, Sequence[Value], bool]]:
        """Statements, their values, and whether each must find a row."""
        kind, source, old, new = change
        table = self._of(source)
        if kind == INSERT:
            assert new is not None  # noqa: S101 - so it is decoded
            return [(table.insert, new, False)]
        if kind == DELETE:
            assert old is not None  # noqa: S101 - so it is decoded
            return [(*table.delete(old), not table.match_at)]
        assert new is not None  # noqa: S101 - so it is decoded
        before = new if old is None else old
        same = all(before[at] == new[at] for at in table.match_at)
        if UNCHANGED not in new:
            if table.keyed and same:
                return [(table.upsert, new, False)]
            if table.rewrites:
                return [(*table.delete(before), True), (table.insert, new, False)]
        return [(*table.update(new, before), True)]

    def _check(self, done: Iterable[tuple[AsyncRawCursor[Any], bool, str]]) -> None:
        for cursor, must, text in done:
            if must and cursor.rowcount != 1:
                raise Diverged(
                    f"a change from shard {self._link.origin.name!r} is for one row, and found {cursor.rowcount} rows"
                    f" on shard {self._link.sink.name!r} ({text.split(' SET ')[0].split(' WHERE ')[0]})",
                    "something else wrote to the moving rows there: let the copy start anew",
                )

    def _of(self, source: Source) -> Statements:
        made = self._statements.get(source)
        if made is None:
            place = (source.shape.table.schema or "public", source.shape.table.name)
            made = self._statements[source] = Statements(source, self._facts[place], self._numbers)
            self._numbers += 1
        return made

    async def _many(self, changes: list[Change]) -> None:
        by_table: dict[Source, list[Change]] = {}
        for change in changes:
            by_table.setdefault(change[1], []).append(change)
        plans: list[tuple[Statements, list[Change], Net | None]] = []
        for source, listed in by_table.items():
            table = self._of(source)
            net = net_of(listed, table.match_at) if table.keyed else None
            plans.append((table, listed, net))
            if net is not None and (net.upserts or net.partials or net.deletes) and table.number not in self._made:
                await self._conn.execute(table.make_stage.encode())
                self._made.add(table.number)
        await self._conn.execute("SAVEPOINT shardlib_many")
        try:
            for table, listed, net in plans:
                if net is None:
                    await self._in_order(listed)
                else:
                    await self._net(table, net)
        except (pg.UniqueViolation, pg.ExclusionViolation):
            # Values of a unique column that changed hands: only the order of the origin avoids the clash.
            await self._conn.execute("ROLLBACK TO SAVEPOINT shardlib_many")
            await self._in_order(changes)
        await self._conn.execute("RELEASE SAVEPOINT shardlib_many")

    async def _net(self, table: Statements, net: Net) -> None:
        staged = [(0, row) for row in net.upserts] + [(1, row) for row in net.deletes]
        for what, rows in enumerate(net.partials.values(), 2):
            staged += [(what, row) for row in rows]
        if staged:
            if table.number in self._used:
                await self._conn.execute(f"TRUNCATE {table.stage}".encode())
            self._used.add(table.number)
            await self._copy(table.copy_stage, [b"%d\t%b" % (what, copy_line(row)) for what, row in staged])
        if net.deletes:
            await self._conn.execute(table.delete_staged(1).encode())
        if net.upserts:
            await self._conn.execute(table.upsert_staged(0).encode())
        for what, (sent, rows) in enumerate(net.partials.items(), 2):
            text = table.update_staged(what, sent)
            cursor = await self._conn.execute(text.encode())
            if cursor.rowcount != len(rows):
                raise Diverged(
                    f"{len(rows) - cursor.rowcount} rows of {table.shape.table.fullname!r} that changed on shard"
                    f" {self._link.origin.name!r} are not on shard {self._link.sink.name!r}",
                    "something else wrote to the moving rows there: let the copy start anew",
                )
        if net.inserts:
            await self._copy(table.copy_rows, [copy_line(row) for row in net.inserts])

    async def _copy(self, text: str, lines: list[bytes]) -> None:
        async with self._conn.cursor() as cursor, cursor.copy(text.encode()) as copy:
            for at in range(0, len(lines), _LINES_AT_ONCE):
                await copy.write(b"\n".join(lines[at : at + _LINES_AT_ONCE]) + b"\n")

    async def _in_order(self, changes: list[Change]) -> None:
        at = 0
        while at < len(changes):
            end = at
            if changes[at][0] == INSERT:
                while end < len(changes) and changes[end][0] == INSERT and changes[end][1] is changes[at][1]:
                    end += 1
            if end - at >= _RUN_MIN:
                rows = [copy_line(new) for _, _, _, new in changes[at:end] if new is not None]
                await self._copy(self._of(changes[at][1]).copy_rows, rows)
                at = end
                continue
            end = min(max(end, at + 1), at + _PIPELINED)
            while end < min(len(changes), at + _PIPELINED) and changes[end][0] != INSERT:
                end += 1
            async with self._conn.pipeline():
                done = [
                    (await self._run(text, values), must, text)
                    for change in changes[at:end]
                    for text, values, must in self._steps(change)
                ]
            self._check(done)
            at = end

    async def _emptied(self, table: Statements, lsn: int) -> None:
        """The origin's table was emptied: delete the rows of the leg's keys here, and of no others.

        Each of these keys has changed by it, and is compared again.
        """
        await self._conn.execute(
            "CREATE TEMP TABLE IF NOT EXISTS shardlib_leg_keys (k text, more text[]) ON COMMIT DELETE ROWS"
        )
        await self._conn.execute("TRUNCATE pg_temp.shardlib_leg_keys")
        name = control.keys_table(self._link.runner.job).as_string()
        async with self._conn.cursor(name="shardlib_keys") as keys:
            await keys.execute(f"SELECT k, more FROM {name}".encode())
            while some := await keys.fetchmany(_KEYS_AT_ONCE):
                ours = [(k, more) for k, more in some if self._link.moves("\0".join((k, *more)).encode())]
                cursor = AsyncRawCursor(self._conn)
                await cursor.execute(
                    "INSERT INTO pg_temp.shardlib_leg_keys"
                    " SELECT k, more::text[] FROM unnest($1::text[], $2::text[]) AS x (k, more)",
                    [_array([k for k, _ in ours]), _array([_array(more) for _, more in ours])],
                )
        await self._conn.execute("SET LOCAL enable_hashjoin = on")
        await self._conn.execute(table.delete_keys.encode())
        await self._conn.execute(
            f"UPDATE {name} AS t SET lsn = %s FROM pg_temp.shardlib_leg_keys AS k"
            " WHERE t.k = k.k AND t.more = k.more".encode(),
            (lsn_text(lsn),),
        )
        await self._conn.execute("SET LOCAL enable_hashjoin = off")


def _around_truncates(changes: list[Change]) -> Iterable[list[Change]]:
    at = 0
    for index, change in enumerate(changes):
        if change[0] == TRUNCATE:
            if index > at:
                yield changes[at:index]
            yield [change]
            at = index + 1
    if at < len(changes):
        yield changes[at:]


def _array(items: Sequence[str]) -> str:
    """A text array as PostgreSQL reads it; made here, since psycopg's way costs several times as much."""
    text = '","'.join(items)
    if "\\" in text or text.count('"') != 2 * len(items) - 2:
        text = '","'.join([item.replace("\\", "\\\\").replace('"', '\\"') for item in items])
    return f'{{"{text}"}}' if items else "{}"


def _same(shape: TableShape, other: TableShape, shard: str) -> None:
    ours = {column.name: column.type for column in shape.stored}
    theirs = {column.name: column.type for column in other.stored}
    if ours != theirs or set(shape.primary_key) != set(other.primary_key):
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        what = f"column {differing[0]!r}" if differing else "the primary key"
        raise SchemaChanged(
            f"table {shape.table.fullname!r} is not alike on both sides: {what} differs on shard {shard!r}",
            "make the tables alike and run the job again, or cancel it",
        )


_FACTS: Final = """
    SELECT coalesce((SELECT bool_and(i.indimmediate) FROM pg_index i WHERE i.indrelid = %s AND i.indisprimary), false),
           coalesce((SELECT array_agg(a.attname::text) FROM pg_attribute a
                      WHERE a.attrelid = %s AND a.attidentity = 'a' AND NOT a.attisdropped), '{}')
"""

# In what RETURNING gives, a row that was there has been locked, and a new one has no xmax.
_UPSERT_KEYS: Final = """
    WITH done AS (
        INSERT INTO {} AS t (k, more, lsn)
        SELECT k, more::text[], $3::pg_lsn FROM unnest($1::text[], $2::text[]) AS x (k, more)
        ON CONFLICT (k, more) DO UPDATE SET lsn = excluded.lsn
        RETURNING t.k, t.more, t.xmax = 0 AS fresh
    ) SELECT k, more FROM done WHERE fresh
"""
