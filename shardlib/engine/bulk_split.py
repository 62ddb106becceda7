"""Which rows of a portion go to which shard, and through which gates."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from datetime import date
from typing import Any, Final
from uuid import UUID

from shardlib.engine.bulk_where import locate
from shardlib.key.declare import KeySpec
from shardlib.session.core import Needed
from shardlib.token import hash_of
from shardlib.topology import Topology

__all__ = ["Splitter"]

_KNOWN_MAX: Final = 65_536
_VAIN_MAX: Final = 8
"""Keys are no longer remembered after so many portions of which most had not been seen before."""
_REMEMBERED: Final = frozenset({str, int, UUID, date, bytes})
"""Types whose equal values have the same key bytes, as long as no other type is mixed in."""


class _Slot:
    """The rows of one portion that go through one gate."""

    __slots__ = ("gate", "positions", "shard_id")

    def __init__(self, shard_id: str, gate: int) -> None:
        self.shard_id, self.gate = shard_id, gate
        self.positions: list[int] = []


class Splitter:
    """Splits portions of a sharded table; remembers where keys go while the topology stays the same.

    Args:
        spec: how the table is placed.
        at: index of each key column among the columns of a portion.
    """

    def __init__(self, spec: KeySpec, at: Sequence[int]) -> None:
        self._spec, self._at = spec, tuple(at)
        self._topology: Topology | None = None
        self._slots: dict[int, _Slot] = {}  # by gate: a number is of one gate in the whole cluster
        self._in_vain = 0
        self._known: dict[type, dict[Any, _Slot]] = {}

    def parts(
        self, topology: Topology, values: Sequence[Sequence[Any]], first: int
    ) -> tuple[Needed, dict[str, array[int]]]:
        """The gates that the rows need, and the positions of the rows in the portion, by shard id.

        Args:
            topology: to route by.
            values: for each column, its values.
            first: number of the first row, for messages.

        Raises:
            InvalidShardKey: a row has no valid key; a note tells which.
        """
        if topology is not self._topology:
            self._topology, self._slots, self._known = topology, {}, {}
        for slot in self._slots.values():
            slot.positions = []
        slots = self._slots_of(topology, values, first)
        for position, slot in enumerate(slots):
            slot.positions.append(position)
        gates: dict[str, list[int]] = {}
        rows: dict[str, list[int]] = {}
        for slot in self._slots.values():
            if slot.positions:
                gates.setdefault(slot.shard_id, []).append(slot.gate)
                rows.setdefault(slot.shard_id, []).extend(slot.positions)
        needed = {shard_id: tuple(sorted(numbers)) for shard_id, numbers in gates.items()}
        return needed, {shard_id: array("H", sorted(positions)) for shard_id, positions in rows.items()}

    def _slots_of(self, topology: Topology, values: Sequence[Sequence[Any]], first: int) -> Sequence[_Slot]:
        keys = [values[i] for i in self._at]
        kinds = set(map(type, keys[0]))
        kind = kinds.pop()
        if len(keys) > 1 or kinds or kind not in _REMEMBERED or self._in_vain > _VAIN_MAX:
            return self._find(topology, keys, range(first, first + len(keys[0])))
        return self._recall(topology, keys[0], self._known.setdefault(kind, {}), first)

    def _recall(
        self, topology: Topology, column: Sequence[Any], known: dict[Any, _Slot], first: int
    ) -> Sequence[_Slot]:
        """Slots of keys that come again and again, which cost one look each."""
        found = list(map(known.get, column))
        fresh: dict[Any, int] = {}  # key -> number of its first row
        for number, (value, slot) in enumerate(zip(column, found, strict=True), first):
            if slot is None:
                fresh.setdefault(value, number)
        if not fresh:
            return found  # type: ignore[return-value]
        if len(fresh) > len(column) // 2:
            self._in_vain += 1
        new = dict(zip(fresh, self._find(topology, [tuple(fresh)], tuple(fresh.values())), strict=True))
        if len(known) + len(new) > _KNOWN_MAX:
            known.clear()
        known.update(new)
        return [new[value] if slot is None else slot for value, slot in zip(column, found, strict=True)]

    def _find(self, topology: Topology, keys: Sequence[Sequence[Any]], numbers: Sequence[int]) -> list[_Slot]:
        slots, found = self._slots, list[_Slot]()
        tokens = map(hash_of(topology.hash_function), map(self._spec.encode, zip(*keys, strict=True)))
        try:
            for shard, gate in map(topology.place, tokens):
                slot = slots.get(gate)
                if slot is None:
                    slot = slots[gate] = _Slot(shard.id, gate)
                found.append(slot)
        except Exception as error:
            locate(error, f"row {numbers[len(found)]} of the load")
            raise
        return found
