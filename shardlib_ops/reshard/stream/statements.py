"""The SQL that brings a table's changes to the sink, made once for each announcement of the table. `$1` style."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Final

from psycopg import sql

from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.stream.decode import UNCHANGED, Value
from shardlib_ops.reshard.stream.filter import Source

__all__ = ["SinkFacts", "Statements"]

_STAGE: Final = "shardlib_stage_{}"


class SinkFacts:
    """What matters of a table at the sink beyond its shape.

    Attributes:
        checked_at_once: whether its primary key is not deferrable, so that `ON CONFLICT` can use it.
        fixed: columns that an UPDATE cannot set (`GENERATED ALWAYS AS IDENTITY`).
    """

    __slots__ = ("checked_at_once", "fixed")

    def __init__(self, checked_at_once: bool, fixed: frozenset[str]) -> None:
        self.checked_at_once, self.fixed = checked_at_once, fixed


class Statements:
    """The statements of one table.

    Args:
        source: the table as the stream has it.
        facts: of the sink's table.
        number: tells the tables of one stream apart.

    Attributes:
        match_at: where the columns that tell one row from all others are; empty for a bag, where equal rows are alike.
        keyed: whether `upsert` and the statements over many rows may be used.
        rewrites: whether a row is better deleted and inserted, since an UPDATE cannot set all of it.
    """

    def __init__(self, source: Source, facts: SinkFacts, number: int) -> None:
        self.source, self.number, self._fixed = source, number, facts.fixed
        shape, names = source.shape, source.names
        self._types = {column.name: column.type for column in shape.columns}
        primary = tuple(names.index(name) for name in shape.primary_key)
        self.match_at = source.match_at
        self.keyed = (
            bool(primary)
            and set(self.match_at) == set(primary)
            and facts.checked_at_once
            and not facts.fixed - set(shape.primary_key)
        )
        self.rewrites = bool(self.match_at) and bool(facts.fixed - {names[at] for at in self.match_at})
        self._updates: dict[tuple[int, ...], str] = {}

    @property
    def shape(self) -> TableShape:
        """The table."""
        return self.source.shape

    @cached_property
    def _table(self) -> str:
        return self.shape.name.as_string()

    @cached_property
    def _list(self) -> str:
        return ", ".join(map(_quoted, self.source.names))

    @cached_property
    def insert(self) -> str:
        """One row; its values are the parameters."""
        values = ", ".join(f"${n}" for n in range(1, len(self.source.names) + 1))
        return f"INSERT INTO {self._table} ({self._list}) OVERRIDING SYSTEM VALUE VALUES ({values})"

    @cached_property
    def _on_conflict(self) -> str:
        key = ", ".join(map(_quoted, self.shape.primary_key))
        rest = [_quoted(name) for name in self.source.names if name not in self.shape.primary_key]
        sets = ", ".join(f"{name} = excluded.{name}" for name in rest)
        return f"ON CONFLICT ({key}) DO " + (f"UPDATE SET {sets}" if rest else "NOTHING")

    @cached_property
    def upsert(self) -> str:
        """One row, whole, whether it is there or not; its values are the parameters."""
        return f"{self.insert} {self._on_conflict}"

    def update(self, new: Sequence[Value], old: Sequence[Value]) -> tuple[str, list[Value]]:
        """Set the values of `new` that are carried in the one row that `old` identifies."""
        sent = tuple(
            at
            for at, value in enumerate(new)
            if value is not UNCHANGED
            and not (self.source.names[at] in self._fixed and (at not in self.match_at or value == old[at]))
        )
        text = self._updates.get(sent)
        if text is None:
            sets = ", ".join(f"{_quoted(self.source.names[at])} = ${n}" for n, at in enumerate(sent, 1))
            text = self._updates[sent] = f"UPDATE {self._table} AS t SET {sets} WHERE {self._where(len(sent))}"
        return text, [new[at] for at in sent] + self._matching(old)

    def delete(self, old: Sequence[Value]) -> tuple[str, list[Value]]:
        """Delete the one row that `old` identifies."""
        return self._delete, self._matching(old)

    @cached_property
    def _delete(self) -> str:
        return f"DELETE FROM {self._table} AS t WHERE {self._where(0)}"

    def _matching(self, old: Sequence[Value]) -> list[Value]:
        return [old[at] for at in self.match_at] if self.match_at else list(old)

    def _where(self, before: int) -> str:
        names = self.source.names
        if self.match_at:
            return " AND ".join(
                f"t.{_quoted(names[at])} = ${before + n}::{self._types[names[at]]}"
                for n, at in enumerate(self.match_at, 1)
            )
        # A bag: of equal rows any one, equal by what their output is, so that 1.0 is not taken for 1.00. The shard key
        # is compared by itself too, since it may have an index.
        row = ", ".join(f"x.{_quoted(name)}" for name in names)
        given = ", ".join(f"${before + n}::{self._types[name]}" for n, name in enumerate(names, 1))
        key = " AND ".join(
            f"x.{_quoted(names[at])} = ${before + at + 1}::{self._types[names[at]]}" for at in self.source.key_at
        )
        return (
            f"(t.tableoid, t.ctid) = (SELECT x.tableoid, x.ctid FROM {self._table} AS x"
            f" WHERE {key} AND ROW({row})::text = (SELECT ROW({given})::text) LIMIT 1)"
        )

    # Many rows at once. The stage is of texts, so that it needs no type of the sink and NULL stands anywhere.

    @cached_property
    def stage(self) -> str:
        """The stage's name."""
        return f"pg_temp.{_STAGE.format(self.number)}"

    @cached_property
    def make_stage(self) -> str:
        """Make the stage of this session."""
        columns = "".join(f", c{at} text" for at in range(len(self.source.names)))
        return f"CREATE TEMP TABLE IF NOT EXISTS {_STAGE.format(self.number)} (what int{columns}) ON COMMIT DELETE ROWS"

    @cached_property
    def copy_stage(self) -> str:
        """Fill the stage: `what`, then the values."""
        return f"COPY {self.stage} FROM STDIN"

    @cached_property
    def copy_rows(self) -> str:
        """Insert rows."""
        return f"COPY {self._table} ({self._list}) FROM STDIN"

    def _staged(self, at: int) -> str:
        return f"s.c{at}::{self._types[self.source.names[at]]}"

    @cached_property
    def _same_row(self) -> str:
        return " AND ".join(f"t.{_quoted(self.source.names[at])} = {self._staged(at)}" for at in self.match_at)

    def delete_staged(self, what: int) -> str:
        """Delete the rows whose identity is in the stage under `what`."""
        return f"DELETE FROM {self._table} AS t USING {self.stage} AS s WHERE s.what = {what:d} AND {self._same_row}"

    def upsert_staged(self, what: int) -> str:
        """Insert or overwrite the rows that are in the stage under `what`."""
        values = ", ".join(self._staged(at) for at in range(len(self.source.names)))
        return (
            f"INSERT INTO {self._table} ({self._list}) OVERRIDING SYSTEM VALUE SELECT {values}"
            f" FROM {self.stage} AS s WHERE s.what = {what:d} {self._on_conflict}"
        )

    def update_staged(self, what: int, sent: Sequence[int]) -> str:
        """Set the columns `sent` of the rows that are in the stage under `what`."""
        names = self.source.names
        sets = ", ".join(f"{_quoted(names[at])} = {self._staged(at)}" for at in sent if at not in self.match_at)
        if not sets:  # nothing but the identity is carried: the row is looked for all the same
            other = _quoted(next(name for at, name in enumerate(names) if at not in self.match_at))
            sets = f"{other} = t.{other}"
        return (
            f"UPDATE {self._table} AS t SET {sets} FROM {self.stage} AS s WHERE s.what = {what:d} AND {self._same_row}"
        )

    @cached_property
    def delete_keys(self) -> str:
        """Delete the rows whose keys are in `pg_temp.shardlib_leg_keys`."""
        matches = self.shape.matches("t", "k").as_string()
        return f"DELETE FROM {self._table} AS t USING pg_temp.shardlib_leg_keys AS k WHERE {matches}"


def _quoted(name: str) -> str:
    return sql.Identifier(name).as_string()
