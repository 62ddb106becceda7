"""Health in the catalog: `health/s1` is written by the elected controller, `maintenance/s1` by people."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from shardlib.catalog import Catalog, Conflict, Lease
from shardlib.errors import InvalidTopology
from shardlib_ops.health.model import Maintenance, ShardHealth

__all__ = ["HealthStore"]

T = TypeVar("T", ShardHealth, Maintenance)

_HEALTH: Final = "health/"
_MAINTENANCE: Final = "maintenance/"
_TRIES: Final = 20


class HealthStore:
    """The documents of health. Blocks; thread-safe as its catalog is."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._revisions: dict[str, int | None] = {}

    def all(self) -> dict[str, ShardHealth]:
        """What was published last, by shard id.

        Raises:
            CatalogUnavailable: no answer.
            InvalidTopology: a document is damaged, or of a later version.
        """
        found = self._catalog.list_documents(_HEALTH)
        return {name.removeprefix(_HEALTH): _decoded(ShardHealth, one.data) for name, one in found.items()}

    def load(self, shard_id: str) -> ShardHealth | None:
        """The same of one shard; None if no controller has looked at it yet. Raises as `all`."""
        found = self._catalog.read_document(_HEALTH + shard_id)
        return None if found is None else _decoded(ShardHealth, found.data)

    def save(self, health: ShardHealth, lease: Lease) -> None:
        """Publish, while the lease `health` is held. Tried once: the next turn tells more.

        Raises:
            Conflict: the lease is lost, or another has written.
            CatalogUnavailable: no answer.
        """
        name = _HEALTH + health.shard
        if name not in self._revisions:
            found = self._catalog.read_document(name)
            self._revisions[name] = None if found is None else found.revision
        expected = self._revisions.pop(name)  # whatever fails now, it is read again
        data = msgspec.json.encode(health)
        self._revisions[name] = self._catalog.write_document(name, data, expected=expected, lease=lease)

    def maintenance(self) -> dict[str, Maintenance]:
        """Every shard of which a person has said something, by its id. Raises as `all`."""
        found = self._catalog.list_documents(_MAINTENANCE)
        return {name.removeprefix(_MAINTENANCE): _decoded(Maintenance, one.data) for name, one in found.items()}

    def set_maintenance(self, shard_id: str, wanted: Maintenance) -> None:
        """Write down what a person has said; the last one counts.

        Raises:
            Conflict: others write without end.
            CatalogUnavailable: no answer; it may be stored.
        """
        name, last = _MAINTENANCE + shard_id, Conflict(None, None)
        for _ in range(_TRIES):
            found = self._catalog.read_document(name)
            try:
                self._catalog.write_document(
                    name, msgspec.json.encode(wanted), expected=None if found is None else found.revision
                )
            except Conflict as conflict:
                last = conflict
                continue
            return
        raise last


def _decoded(kind: type[T], data: bytes) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise InvalidTopology(
            f"a document of health cannot be read: {type(error).__name__}", "upgrade shardlib, or restore the catalog"
        ) from error
