"""What stands in a job's way."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Fault"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that would stop a job, or that its operator should know.

    Attributes:
        where: the shard's name, or the names of both shards of a leg.
        problem: what is wrong, with the value that is.
        way_out: what to do about it.
        note: nothing is stopped by it.
    """

    where: str
    problem: str
    way_out: str
    note: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.way_out}"
