"""Each fact that the simulation leans on holds in it, and on real servers: the same script on both."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from shardlib_ops import LocalCluster
from shardlib_ops.reshard.world import Lost, Superseded
from tests.sim import facts_catalog, facts_shard, facts_stream
from tests.sim.catalog import FakeCatalog
from tests.sim.facts import FACTS
from tests.sim.fake_stage import play_fake
from tests.sim.flow import FakeFlow
from tests.sim.real_stage import play_real, running_cluster
from tests.sim.shard import FakeShard, Transaction, apply_changes
from tests.sim.stage import Fact
from tests.sim.world import FakeSide

facts = pytest.mark.parametrize("fact", FACTS, ids=[fact.__name__ for fact in FACTS])


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    yield from running_cluster()


@facts
def test_a_fact_holds_in_the_simulation(fact: Fact) -> None:
    for seed in range(4):
        play_fake(fact, seed)


@facts
def test_a_fact_holds_on_real_servers(fact: Fact, cluster: LocalCluster) -> None:
    play_real(fact, cluster)


# A simulation that is wrong


def _drop_at_once(self: FakeShard, number: int) -> bool:
    self.open.discard(number)
    return True


async def _enter_anyway(self: FakeShard, flight: Transaction, gate: int) -> None:
    assert flight.gates is not None
    flight.gates.append(gate)


async def _see_first(self: FakeShard, flight: Transaction) -> None:
    apply_changes(self.seen, flight.changes)
    await self._wait(0.002)
    self._log(tuple(flight.changes))
    self.end_flight(flight)


async def _no_wait(self: FakeFlow, *, timeout_s: float) -> None:
    await asyncio.sleep(0)


async def _from_its_slot(self: FakeFlow) -> int:
    """The position is not looked at: all that the slot has is applied."""
    self.sink.position[self.at] = 0
    self.applied, self.running = 0, True
    return self.origin.slots[self.slot].point


async def _no_gate_alone(self: FakeSide) -> tuple[str, ...]:
    return tuple(flight.name for flight in self.shard.unfinished() if not flight.gates)


async def _replayed_at_once(self: FakeSide, lsn: str, *, timeout_s: float) -> None:
    """Nobody looks."""


def _swap_anyway(self: FakeCatalog, after: Any, expected: int, token: int | None) -> bool:
    self.topology = after
    return True


def _grant_again(self: FakeCatalog, ttl_s: float) -> int:
    self._token, self._until = max(1, self._token), self._clock() + ttl_s
    return self._token


WRONG: dict[str, tuple[Fact, type[object], str, object]] = {
    "a gate closes on who holds it": (facts_shard.closing_gives_way, FakeShard, "drop_gate", _drop_at_once),
    "a closed gate lets in": (facts_shard.who_is_late_is_refused, FakeShard, "enter", _enter_anyway),
    "a claim is not asked for": (facts_shard.an_earlier_round_is_refused, FakeShard, "claimed", lambda *_: None),
    "the guard sees no gated writers": (
        facts_shard.who_wrote_before_the_guard_may_pass,
        FakeSide,
        "foreign_writers",
        _no_gate_alone,
    ),
    "a slot is there at once": (facts_stream.a_slot_waits_for_writers, FakeFlow, "settled", _no_wait),
    "seen before it is logged": (facts_stream.a_commit_is_sent_before_it_is_seen, FakeShard, "commit", _see_first),
    "a stream without a position": (
        facts_stream.a_taken_over_stream_goes_on_exactly,
        FakeFlow,
        "_start",
        _from_its_slot,
    ),
    "a replica is not looked at": (
        facts_stream.a_replica_that_lags_holds_the_switch,
        FakeSide,
        "replayed",
        _replayed_at_once,
    ),
    "a swap of any version": (facts_catalog.a_newer_version_ends_a_late_swap, FakeCatalog, "swap", _swap_anyway),
    "a lease is asked for by nobody": (
        facts_catalog.a_swap_of_a_former_holder_is_refused,
        FakeCatalog,
        "holds",
        lambda *_: True,
    ),
    "a token twice": (facts_catalog.a_lease_has_one_holder, FakeCatalog, "grant", _grant_again),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_fact_fails_in_a_simulation_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fact, where, what, wrong = WRONG[name]
    play_fake(fact)
    monkeypatch.setattr(where, what, wrong)
    with pytest.raises((AssertionError, TimeoutError, Lost, Superseded, pytest.fail.Exception)):
        play_fake(fact)
