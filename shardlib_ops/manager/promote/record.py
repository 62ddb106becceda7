"""What is written down of a promotion before anything is done: `promotions/s1` in the catalog."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import msgspec

from shardlib.catalog import Catalog, Conflict, Lease
from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology

__all__ = ["Promotion", "PromotionStore", "Stage"]

_PREFIX: Final = "promotions/"


class Stage(StrEnum):
    """How far a promotion is."""

    PREPARED = "prepared"
    CLOSING = "closing"
    PROMOTING = "promoting"
    SWITCHED = "switched"
    DONE = "done"
    UNDONE = "undone"

    @property
    def over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self in (Stage.DONE, Stage.UNDONE)


class Promotion(msgspec.Struct, frozen=True, kw_only=True):
    """One promotion of a shard; the last one stays in the catalog.

    Attributes:
        shard: id of the shard.
        name: its name.
        old: the primary that steps down.
        new: the replica that takes over.
        others: the shard's other replicas.
        upstreams: what each of them had in `primary_conninfo`, in the same order.
        forward: gate numbers that are kept for the new primary.
        back: gate numbers that are kept for the old one, if it comes to nothing.
        slots: replication slots that were made on the new primary for the others.
        synchronous: `synchronous_standby_names` that the new primary is to get; empty for none.
        own: `synchronous_standby_names` that the new primary had as a replica; None if that is left as it is.
        own_by_sql: whether `ALTER SYSTEM` had set that, and not a file of the operator's.
        stage: how far it is.
        given_up: the new primary did not answer when it was to be told whether it was promoted: only back is left.
        lsn: WAL position of the old primary that the new one had replayed; None before that.
        started_at: UTC, ISO 8601.
        ended_at: the same; None while it is open.
        pause_s: seconds from the closing of the first gate to the topology that names the new primary.
        error: why it came to nothing, or what is left to do by hand.
    """

    shard: str
    name: str
    old: Dsn
    new: Dsn
    others: tuple[Dsn, ...] = ()
    upstreams: tuple[Dsn, ...] = ()
    forward: tuple[int, ...] = ()
    back: tuple[int, ...] = ()
    slots: tuple[str, ...] = ()
    synchronous: str = ""
    own: str | None = None
    own_by_sql: bool = True
    stage: Stage = Stage.PREPARED
    given_up: bool = False
    lsn: str | None = None
    started_at: str = ""
    ended_at: str | None = None
    pause_s: float | None = None
    error: str | None = None

    def changed(self, **changes: Any) -> Promotion:
        """The record with these fields replaced."""
        return msgspec.structs.replace(self, **changes)


class PromotionStore:
    """The records of promotions. Blocks; one writer at a time, who holds the lease `promote-<shard id>`."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def load(self, shard_id: str) -> Promotion | None:
        """The last promotion of a shard, None if there was none.

        Raises:
            CatalogUnavailable: no answer.
            InvalidTopology: the record is damaged, or of a later version.
        """
        found = self._catalog.read_document(_PREFIX + shard_id)
        return None if found is None else _decode(found.data)

    def open(self) -> dict[str, Promotion]:
        """The promotions that are not over, by the id of their shard.

        Raises:
            CatalogUnavailable: no answer.
            InvalidTopology: a record is damaged, or of a later version.
        """
        found = [_decode(document.data) for document in self._catalog.list_documents(_PREFIX).values()]
        return {one.shard: one for one in found if not one.stage.over}

    def save(self, record: Promotion, lease: Lease) -> None:
        """Store a record while the lease of its shard is held.

        Raises:
            Conflict: the lease is lost.
            CatalogUnavailable: no answer; it may be stored.
        """
        name, data = _PREFIX + record.shard, msgspec.json.encode(record, enc_hook=_reveal)
        found = self._catalog.read_document(name)
        try:
            self._catalog.write_document(name, data, expected=None if found is None else found.revision, lease=lease)
        except Conflict:
            # An earlier write of this very holder may have arrived after all: nobody else writes it.
            if not lease.alive():
                raise
            found = self._catalog.read_document(name)
            self._catalog.write_document(name, data, expected=None if found is None else found.revision, lease=lease)


def _reveal(value: object) -> str:
    if isinstance(value, Dsn):
        return value.reveal()
    raise NotImplementedError(type(value))


def _dsn(kind: type, value: Any) -> Dsn:
    del kind  # the only one that msgspec does not know
    return Dsn(value)


def _decode(data: bytes) -> Promotion:
    try:
        return msgspec.json.decode(data, type=Promotion, dec_hook=_dsn)
    except msgspec.DecodeError as error:
        raise InvalidTopology(
            f"the record of a promotion cannot be read: {type(error).__name__}",
            "upgrade shardlib, or restore the catalog",
        ) from error
