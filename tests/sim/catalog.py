"""A catalog that loses replies: versions by compare-and-swap, one lease, the job's record, the operator's wish."""

from __future__ import annotations

from collections.abc import Callable

from shardlib.topology import Topology
from shardlib.topology.model import MoveState
from shardlib_ops.reshard.job import Job, Wish

__all__ = ["FakeCatalog"]


class FakeCatalog:
    """What is stored. Its methods are what happens at the server, at once; who calls adds the way there and back.

    Attributes:
        history: every topology that was ever stored.
        away: nobody gets an answer.
        violations: what must never be, as sentences.
    """

    def __init__(self, topology: Topology, job: Job, clock: Callable[[], float]) -> None:
        self.topology, self.job, self.wish = topology, job, Wish.RUN
        self.history = [topology]
        self._named = {gate.number: gate for gate in topology.gates}
        self.revision = 1
        self.away = False
        self.violations: list[str] = []
        self.listeners: list[Callable[[Topology], None]] = []
        self.on_wish: Callable[[], None] = lambda: None
        self._clock = clock
        self._token, self._until = 0, 0.0

    def grant(self, ttl_s: float) -> int | None:
        """Give the lease if it is free: its token, higher than any before."""
        if self._clock() < self._until:
            return None
        self._token += 1
        self._until = self._clock() + ttl_s
        return self._token

    def holds(self, token: int) -> bool:
        """Whether the lease is held by this token now."""
        return token == self._token and self._clock() < self._until

    def renew(self, token: int, ttl_s: float) -> bool:
        """Keep it for a while longer, unless it is lost."""
        if not self.holds(token):
            return False
        self._until = self._clock() + ttl_s
        return True

    def release(self, token: int) -> None:
        """Give it up."""
        if token == self._token:
            self._until = 0.0

    def swap(self, after: Topology, expected: int, token: int | None) -> bool:
        """Store a topology if `expected` is stored and the lease is held; True also if it is stored already."""
        if after.nonce == self.topology.nonce:
            return True
        if self.topology.version != expected or (token is not None and not self.holds(token)):
            return False
        self._look_at(self.topology, after)
        self.topology = after
        self.history.append(after)
        for listener in self.listeners:
            listener(after)
        return True

    def _look_at(self, before: Topology, after: Topology) -> None:
        if after.version != before.version + 1:
            self.violations.append(f"version {after.version} follows {before.version}")
        if after.next_gate < before.next_gate:
            self.violations.append(f"version {after.version}: the next gate number went back")
        named = {gate.number: gate for gate in before.gates}
        for gate in after.gates:
            if self._named.setdefault(gate.number, gate) != gate or (
                gate.number not in named and any(gate in old.gates for old in self.history)
            ):
                self.violations.append(f"version {after.version}: gate number {gate.number} was used again")
        self._look_at_owners(before, after)

    def _look_at_owners(self, before: Topology, after: Topology) -> None:
        if before.ring is after.ring:
            return
        planned = [(part, leg) for leg in self.job.legs for part in leg.ranges]
        for token in dict.fromkeys((*before.ring.tokens, *after.ring.tokens)):
            old, new = before.ring.owner_of(token), after.ring.owner_of(token)
            if old != new and not any(
                part.first <= token <= part.last and {old, new} == {leg.source, leg.target} for part, leg in planned
            ):
                self.violations.append(f"version {after.version}: token {token} went from {old} to {new}, unplanned")
        for move in after.moves:
            owner = move.source if move.state is MoveState.COPYING else move.target
            for part in move.ranges:
                if not after.ring.owns(owner, part):
                    self.violations.append(f"version {after.version}: {owner} does not own what its move says")

    def save(self, job: Job, expected: int, token: int, *, late: bool) -> int | None:
        """Store the record under the lease, like `JobStore.save`; the revision, None if it is not this runner's."""
        if not self.holds(token) or (late and expected != self.revision):
            return None
        self.job = job
        self.revision += 1
        return self.revision

    def ask(self, wish: Wish) -> None:
        """An operator's wish."""
        self.wish = wish
        self.on_wish()
