"""The shard key of a mapped object or row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import instance_state, set_committed_value

from shardlib.errors import ShardKeyChanged, ShardKeyRequired, UnsupportedOperation
from shardlib.key.composite import shown_key
from shardlib.key.declare import KeySpec
from shardlib.session.defaults import default_of, has_default

__all__ = ["InstanceKeys"]


class _Plan:
    """Where a mapper keeps the key of its rows: attribute names, and positions in the primary key."""

    __slots__ = ("attributes", "columns", "positions", "spec", "table")

    def __init__(
        self, table: Table, spec: KeySpec, columns: tuple[Column[Any], ...], attributes: tuple[str, ...],
        positions: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.table, self.spec, self.columns = table, spec, columns
        self.attributes, self.positions = attributes, positions


class InstanceKeys:
    """Key bytes of objects, by mapper; one instance serves all sessions of an engine."""

    def __init__(self, describe: Callable[[Table], KeySpec]) -> None:
        self._describe = describe
        self._plans: WeakKeyDictionary[Mapper[Any], _Plan | None] = WeakKeyDictionary()

    def key_of(self, instance: object) -> bytes | None:
        """Key bytes of an object, None for one of a reference table or one without a key yet."""
        state: Any = instance_state(instance)
        plan = self._plan(state.mapper)
        if plan is None:
            return None
        values = self._values(plan, state)
        return None if any(value is None for value in values) else plan.spec.encode(values)

    def writable_key_of(self, instance: object) -> bytes:
        """Key bytes of an object that is to be written; a new one gets the defaults of its key now.

        Raises:
            ShardKeyRequired: a new object has no key yet.
            ShardKeyChanged: the key of a persistent object was changed.
            UnsupportedOperation: the object is a row of a reference table.
        """
        state: Any = instance_state(instance)
        plan = self._plan(state.mapper)
        if plan is None:
            raise UnsupportedOperation(
                f"this {type(instance).__name__} is a row of a reference table, which every shard must hold alike",
                f"write it with engine.bulk_load({type(instance).__name__}, rows)",
            )
        values = self._values(plan, state)
        if None in values and state.key is None:
            for name, column in zip(plan.attributes, plan.columns, strict=True):
                if state.dict.get(name) is None and has_default(column):
                    set_committed_value(instance, name, default_of(column))
            values = self._values(plan, state)
        if any(value is None for value in values):
            missing = [name for name, value in zip(plan.attributes, values, strict=True) if value is None]
            raise ShardKeyRequired(
                f"this {type(instance).__name__} has no value for its shard key {', '.join(missing)}",
                "set it before the object is flushed (a database default would be known too late)",
            )
        key = plan.spec.encode(values)
        if state.key is not None:
            now = tuple(state.dict.get(name, value) for name, value in zip(plan.attributes, values, strict=True))
            if now != values and (None in now or plan.spec.encode(now) != key):
                raise ShardKeyChanged(plan.table.fullname, _single(values), _single(now))
        return key

    def check_unchanged(self, instance: object, key: bytes) -> None:
        """See that an object still has the key by which its row was sent.

        SQLAlchemy asks for the connection before it tells `before_insert` and `before_update`, whose listeners may
        change the row.

        Raises:
            ShardKeyChanged: it has another key.
        """
        state: Any = instance_state(instance)
        plan = self._plan(state.mapper)
        if plan is None:
            return
        now = tuple([state.dict.get(name, _LEFT) for name in plan.attributes])
        if _LEFT in now:  # not loaded, so not changed
            return
        if None in now or plan.spec.encode(now) != key:
            raise ShardKeyChanged(plan.table.fullname, shown_key(key), _single(now))

    def with_defaults(self, mapper: Mapper[Any], row: dict[str, Any], *, in_place: bool) -> dict[str, Any]:
        """A row given as a mapping, with the defaults of its key.

        Args:
            mapper: whose row it is.
            row: by attribute names.
            in_place: put them in the application's own mapping.
        """
        plan = self._plan(mapper)
        for name, column in zip(plan.attributes, plan.columns, strict=True) if plan is not None else ():
            if row.get(name) is None and has_default(column):
                if not in_place:
                    row, in_place = dict(row), True
                row[name] = default_of(column)
        return row

    def mapping_key(self, mapper: Mapper[Any], row: Mapping[str, Any]) -> bytes:
        """Key bytes of a row given as a mapping from attribute names.

        Raises:
            ShardKeyRequired: the row has no key.
            UnsupportedOperation: the mapper is of a reference table.
        """
        plan = self._plan(mapper)
        if plan is None:
            raise UnsupportedOperation(
                f"{mapper.class_.__name__} is a reference table, which every shard must hold alike",
                f"write it with engine.bulk_load({mapper.class_.__name__}, rows)",
            )
        values = tuple(row.get(name) for name in plan.attributes)
        if any(value is None for value in values):
            raise ShardKeyRequired(
                f"a row for {mapper.class_.__name__} has no shard key {', '.join(plan.attributes)}",
                "give it in every row",
            )
        return plan.spec.encode(values)

    @staticmethod
    def _values(plan: _Plan, state: Any) -> tuple[Any, ...]:
        if state.key is not None:
            identity = state.key[1]
            return tuple([identity[i] for i in plan.positions])
        return tuple([state.dict.get(name) for name in plan.attributes])

    def _plan(self, mapper: Mapper[Any]) -> _Plan | None:
        try:
            return self._plans[mapper]
        except KeyError:
            plan = self._plans[mapper] = self._make(mapper)
            return plan

    def _make(self, mapper: Mapper[Any]) -> _Plan | None:
        # The base table of an inheritance chain has the primary key that the others refer to.
        tables = [table for table in mapper.tables if isinstance(table, Table)]
        specs = [self._describe(table) for table in tables]
        for table, spec in zip(tables, specs, strict=True):
            if spec.reference:
                continue
            columns = [table.columns[name] for name in spec.column_keys]
            primary = list(mapper.primary_key)
            if all(column in primary for column in columns):
                attributes = tuple(mapper.get_property_by_column(column).key for column in columns)
                positions = tuple(primary.index(column) for column in columns)
                return _Plan(table, spec, tuple(columns), attributes, positions)
        if any(not spec.reference for spec in specs):
            raise ShardKeyRequired(
                f"the shard key of {mapper.class_.__name__} is not part of the mapper's primary key",
                "map the class with the whole primary key of its table",
            )
        return None


_LEFT: Final = object()


def changes_rows(mapper: Mapper[Any] | None) -> bool:
    """Whether somebody listens who may change a row of this mapper, or of one below, after it was routed."""
    if mapper is None:
        return True
    for below in mapper.self_and_descendants:
        heard = below.dispatch
        if heard.before_insert or heard.before_update:
            return True
    return False


def _single(values: tuple[Any, ...]) -> object:
    return values[0] if len(values) == 1 else values
