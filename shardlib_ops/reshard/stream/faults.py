# ruff: noqa: N818 - named for what they say, as those of shardlib.errors
"""What can break a stream, said so that an operator knows what to do."""

from __future__ import annotations

from shardlib.errors import RetryableError, ShardlibError
from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.units import size

__all__ = [
    "CannotFollow",
    "Diverged",
    "MalformedStream",
    "SchemaChanged",
    "SlotBlocked",
    "SlotLost",
    "SlotOverBudget",
    "StreamStopped",
]


class _FaultError(ShardlibError):
    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(problem, way_out)
        self.problem, self.way_out = problem, way_out

    def __str__(self) -> str:
        return f"{self.problem}; {self.way_out}"


class SchemaChanged(_FaultError):
    """A table is not any more what it was when the job looked at it: columns, their types, its name."""


class SlotLost(_FaultError):
    """The slot is gone or invalidated, or the sink lost changes that the slot was told of: the copy starts anew."""


class Diverged(_FaultError):
    """A change is for a row that the sink does not have."""


class CannotFollow(_FaultError):
    """A change that the stream does not carry whole."""


class MalformedStream(_FaultError):
    """Bytes that are no message of `pgoutput`, protocol version 1."""


class SlotBlocked(RetryableError):
    """A slot could not be made in time, since transactions that were open before it have not ended.

    Attributes:
        shard: the shard's name.
        slot: the slot's name.
        timeout_s: how long was waited, in seconds.
        holders: the transactions waited for, in words.
    """

    def __init__(self, shard: str, slot: str, timeout_s: float, holders: str) -> None:
        super().__init__(shard, slot, timeout_s, holders)
        self.shard, self.slot, self.timeout_s, self.holders = shard, slot, timeout_s, holders

    def __str__(self) -> str:
        return (
            f"slot {self.slot!r} of shard {self.shard!r} was not ready within {self.timeout_s:g} s, as it waits for "
            f"{self.holders}; end these, or wait until they have ended, and run it again"
        )


class SlotOverBudget(Exception):
    """A server keeps more WAL for a slot than the job may take of its disk. The runner decides what that ends.

    Attributes:
        shard: the shard's name.
        slot: the slot's name.
        leg: number of the leg.
        direction: of the stream.
        retained_bytes: WAL that is kept for it.
        max_bytes: what was allowed.
    """

    def __init__(
        self, shard: str, slot: str, leg: int, direction: Direction, retained_bytes: int, max_bytes: int
    ) -> None:
        super().__init__(shard, slot, leg, direction, retained_bytes, max_bytes)
        self.shard, self.slot, self.leg, self.direction = shard, slot, leg, direction
        self.retained_bytes, self.max_bytes = retained_bytes, max_bytes

    def __str__(self) -> str:
        return (
            f"shard {self.shard!r} keeps {size(self.retained_bytes)} of WAL for slot {self.slot!r}, and max_slot_wal "
            f"allows {size(self.max_bytes)}"
        )


class StreamStopped(RetryableError):
    """What was waited for did not come: the stream is not running any more. Its `__cause__` says why."""

    def __init__(self, slot: str, reason: str) -> None:
        super().__init__(slot, reason)
        self.slot, self.reason = slot, reason

    def __str__(self) -> str:
        return f"the stream from slot {self.slot!r} stopped: {self.reason}; run it again"
