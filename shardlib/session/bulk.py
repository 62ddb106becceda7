"""SQLAlchemy's bulk operations of a session: rows without objects, each to the shard of its key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from sqlalchemy import inspect

from shardlib.session.held import HoldsShards
from shardlib.session.instances import InstanceKeys
from shardlib.session.unit import Leg

__all__ = ["WritesInBulk"]


class _Engine(Protocol):
    """What the sharded engine has for its sessions, as far as it is used here."""

    @property
    def _instance_keys(self) -> InstanceKeys: ...


class WritesInBulk(HoldsShards):
    """The part of a `ShardedSession` that writes rows without objects."""

    engine: _Engine
    _bulk: tuple[Leg, bool] | None = None

    @property
    def _instance_keys(self) -> InstanceKeys:
        return self.engine._instance_keys  # noqa: SLF001 - shared by the engine's sessions

    @property
    def _bulk_leg(self) -> Leg | None:
        """Where rows without objects are written. An autoflush in the midst of it sends objects to their own shards."""
        if self._bulk is None or self._flushing is not self._bulk[1]:
            return None
        return self._bulk[0]

    @contextmanager
    def _in_bulk(self, leg: Leg, *, flushing: bool) -> Iterator[None]:
        """While rows without objects are written: they all go to this leg.

        `flushing` tells whether SQLAlchemy takes the operation itself for a flush.
        """
        before, self._bulk = self._bulk, (leg, flushing)
        try:
            yield
        finally:
            self._bulk = before

    def bulk_save_objects(
        self, objects: Iterable[object], return_defaults: bool = False, update_changed_only: bool = True,
        preserve_order: bool = True,
    ) -> None:  # fmt: skip
        """As SQLAlchemy's, grouped by shard."""
        rows = list(objects)
        keys = [self._instance_keys.writable_key_of(row) for row in rows]
        done: list[Leg] = []
        with self._whole(done):
            for leg, positions in self._rows_by_leg(keys):
                with self._in_bulk(leg, flushing=True):
                    super().bulk_save_objects(
                        [rows[i] for i in positions], return_defaults, update_changed_only, preserve_order
                    )
                done.append(leg)

    def bulk_insert_mappings(
        self, mapper: Any, mappings: Iterable[dict[str, Any]], return_defaults: bool = False,
        render_nulls: bool = False,
    ) -> None:  # fmt: skip
        """As SQLAlchemy's, grouped by shard."""
        of = inspect(mapper)
        rows = [self._instance_keys.with_defaults(of, row, in_place=return_defaults) for row in mappings]
        keys = [self._instance_keys.mapping_key(of, row) for row in rows]
        done: list[Leg] = []
        with self._whole(done):
            for leg, positions in self._rows_by_leg(keys):
                with self._in_bulk(leg, flushing=True):
                    super().bulk_insert_mappings(mapper, [rows[i] for i in positions], return_defaults, render_nulls)
                done.append(leg)

    def bulk_update_mappings(self, mapper: Any, mappings: Iterable[dict[str, Any]]) -> None:
        """As SQLAlchemy's, grouped by shard."""
        rows = list(mappings)
        keys = [self._instance_keys.mapping_key(inspect(mapper), row) for row in rows]
        done: list[Leg] = []
        with self._whole(done):
            for leg, positions in self._rows_by_leg(keys):
                with self._in_bulk(leg, flushing=True):
                    super().bulk_update_mappings(mapper, [rows[i] for i in positions])
                done.append(leg)
