"""Which server somebody else has promoted: Patroni, a cloud provider, or a person. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardlib.dsn import Dsn
from shardlib_ops.failover.sighting import Sighting

__all__ = ["Promoted", "promoted"]


@dataclass(frozen=True, slots=True)
class Promoted:
    """What was found.

    Attributes:
        new: the server that is the primary now; None if that cannot be told yet.
        reason: why, in a few words, without secrets.
    """

    new: Dsn | None
    reason: str


def promoted(primary: Sighting, others: Sequence[Sighting], before: Sighting | None) -> Promoted | None:
    """The server that takes writes in the place of the primary of the catalog; None if none does.

    It is a copy of the same primary, on a later timeline, and alone there. Where the timeline before is not known, a
    replica has to follow it: a server that was restored from a backup takes writes too.

    Args:
        primary: what the primary of the catalog says now.
        others: the same of every other server of the shard.
        before: what that primary said when it took writes last; None if it was never seen.
    """
    known = primary if primary.answered and not primary.standby else before
    writers = [
        one for one in others if one.answered and one.standby is False and (known is None or one.system == known.system)
    ]
    if not writers:
        return None
    top = max(one.timeline or 0 for one in writers)
    if len(highest := [one for one in writers if (one.timeline or 0) == top]) > 1:
        return Promoted(None, f"{' and '.join(map(_at, highest))} take writes on one timeline: stop one of them")
    new = highest[0]
    took = f"{_at(new)} takes writes on timeline {top}"
    followed = any(one.standby and one.receiver == _at(new) for one in others if one.answered)
    if known is None:
        if followed:
            return Promoted(new.endpoint, f"{took}, and a replica follows it")
        return Promoted(None, f"{took}, and nobody follows it: whether it is the shard's primary cannot be told")
    if top <= (known.timeline or 0):
        return Promoted(None, f"{took}, which is no later one than that of {_at(known)}: one of them is to be stopped")
    return Promoted(new.endpoint, f"{took}, and {_at(known)} was on timeline {known.timeline}")


def _at(seen: Sighting) -> str:
    return f"{seen.endpoint.host}:{seen.endpoint.port}"
