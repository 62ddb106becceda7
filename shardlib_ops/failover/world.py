"""The port: every look at and act on the world that a failover makes. One world belongs to one shard and one lease.

The decisions and the order of the steps lie above it, and are the same over real servers (`servers.py`) and over a
simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from shardlib.dsn import Dsn
from shardlib.topology import Topology
from shardlib_ops.failover.record import Failover, Synchrony
from shardlib_ops.failover.sighting import Sighting

__all__ = ["ServerAway", "ServerRefused", "Superseded", "World"]


class ServerAway(Exception):  # noqa: N818 - an answer of the world: tried again later
    """A server gave no answer in time. What was asked of it may have been done, or may be done yet."""


class ServerRefused(Exception):  # noqa: N818 - an answer of the world
    """A server answered, and has not done what was asked. The message tells why."""


class Superseded(Exception):  # noqa: N818 - an answer of the world: nothing more is done
    """The lease is lost, or another holder has claimed the server."""


class World(Protocol):
    """What one holder of the lease `promote-<shard id>` sees of its shard, and does to it.

    Every call ends by itself: each has a deadline of its own. Every call that changes a server or the catalog raises
    `Superseded` instead, if the lease is known to be lost when it begins. All of them may be done again.
    """

    # -- time ---------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    def stamp(self) -> str:
        """The wall clock as UTC in ISO 8601: for people, never for a decision."""
        ...

    def nonce(self) -> str:
        """Never the same twice, on any machine."""
        ...

    async def step(self, name: str) -> None:
        """A named step is done. Raises what it likes: a test ends a controller here."""
        ...

    # -- the catalog --------------------------------------------------------------------------------------------------

    def held(self) -> bool:
        """Whether the lease is held, by this process's own monotonic clock."""
        ...

    async def topology(self) -> Topology:
        """The stored topology. Raises CatalogUnavailable."""
        ...

    async def publish(self, change: Callable[[Topology], Topology]) -> Topology:
        """Compare-and-swap under the lease, again when others were faster; the same object means nothing to change.

        Raises CatalogUnavailable (it may be published), Superseded, and what `change` raises.
        """
        ...

    async def load(self) -> Failover | None:
        """The shard's last failover. Raises CatalogUnavailable."""
        ...

    async def save(self, record: Failover) -> None:
        """Store it, under the lease. Raises CatalogUnavailable (it may be stored), Superseded."""
        ...

    async def synchrony(self) -> Synchrony | None:
        """What the shard's commits wait for, as it was written down last. Raises CatalogUnavailable."""
        ...

    async def save_synchrony(self, synchrony: Synchrony) -> None:
        """Store it, under the lease. Raises CatalogUnavailable (it may be stored), Superseded."""
        ...

    # -- servers ------------------------------------------------------------------------------------------------------

    async def look(self, server: Dsn) -> Sighting:
        """Ask a server how it is. Never raises for what a server can be."""
        ...

    async def cut(self, replica: Dsn) -> Sighting:
        """A replica streams from nobody any more, also after a restart of its own, until `follow`.

        Returns when no receiver runs and everything that it has on disk counts in `received`, which is final: from now
        on it acknowledges nothing. A server that takes writes is left alone.

        Returns:
            what it says afterwards.

        Raises:
            ServerAway, ServerRefused, Superseded.
        """
        ...

    async def follow(self, replica: Dsn, upstream: Dsn, *, wait_s: float) -> None:
        """A replica streams from that server from now on; a slot that it reads is made there if it is missing.

        Args:
            replica: which one.
            upstream: whom it is to follow.
            wait_s: seconds to wait until it streams; 0 only tells it.

        Raises:
            ServerAway: one of both does not answer.
            ServerRefused: it does not stream from there in time.
            Superseded: see above.
        """
        ...

    async def promote(self, replica: Dsn) -> None:
        """A replica ends its recovery; returns when it takes writes, at once if it does already.

        Raises:
            ServerAway, ServerRefused, Superseded. It may be promoted yet after the first two.
        """
        ...

    async def claim(self, primary: Dsn) -> None:
        """From now on every act of an earlier holder is refused by this primary, and what it had in flight is ended.

        Raises:
            ServerAway, ServerRefused: not yet.
            Superseded: a later holder was faster.
        """
        ...

    async def wait_for(self, primary: Dsn, names: str) -> None:
        """Set `synchronous_standby_names`; returns when every session has it. Raises as `claim`."""
        ...

    async def open_gates(self, primary: Dsn, numbers: Sequence[int]) -> None:
        """Open these gates. Raises as `claim`."""
        ...

    async def close_others(self, primary: Dsn, keep: Sequence[int], guards: Sequence[int]) -> None:
        """Close every gate but these, and drop the guards of every job but these.

        Raises as `claim`; ServerRefused names who holds a gate.
        """
        ...

    async def fence(self, old: Dsn) -> None:
        """A primary that is none any more: sessions begin read-only, every gate is closed.

        A transaction that holds a gate there is ended: its client does not learn that it was committed. Waits for no
        replica. A server in recovery is left alone.

        Raises:
            ServerAway, ServerRefused, Superseded.
        """
        ...

    async def in_doubt(self, primary: Dsn) -> tuple[str, ...]:
        """The prepared transactions there, by gid. Raises ServerAway, ServerRefused."""
        ...

    async def release(self, primary: Dsn) -> None:
        """Forget the claim: the failover is over. Raises as `claim`."""
        ...

    async def rejoin(self, old: Dsn, new: Dsn) -> bool:
        """Make the old primary a replica of the new one by the hook, and a server of the shard again.

        Returns:
            False if there is no hook.

        Raises:
            ServerAway, ServerRefused: it is none yet.
            Superseded: see above.
        """
        ...
