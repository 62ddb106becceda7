"""How a shard is judged: a table of cases, and what must hold for any sequence of looks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlib.dsn import Dsn
from shardlib_ops.failover.sighting import Sighting
from shardlib_ops.health.model import Health
from shardlib_ops.health.probe import each_server
from shardlib_ops.health.state import Lag, Limits, Positions, Settled, assess, settle, shared_servers

P, R = Dsn("postgresql://app@db-1/shop"), Dsn("postgresql://app@db-2/shop")
PRIMARY = Sighting(P, 10.0, system="7", standby=False, timeline=1, written=1000)
REPLICA = Sighting(R, 10.0, system="7", standby=True, timeline=1, received=1000, replayed=1000, receiver="db-1:5432")
LIMITS = Limits()
FOUND = Lag(0, 0.0)


@pytest.mark.parametrize(
    ("primary", "replica", "lag", "status", "problem"),
    [
        (PRIMARY, REPLICA, FOUND, Health.HEALTHY, None),
        (PRIMARY, Sighting(R, 10.0, fault="password wrong"), Lag(), Health.DEGRADED, "does not answer: password wrong"),
        (PRIMARY, replace(REPLICA, system="8"), FOUND, Health.DEGRADED, "is no copy"),
        (PRIMARY, replace(REPLICA, standby=False), FOUND, Health.DEGRADED, "takes writes"),
        (PRIMARY, replace(REPLICA, receiver=None), FOUND, Health.DEGRADED, "streams from nobody"),
        (PRIMARY, replace(REPLICA, paused=True), FOUND, Health.DEGRADED, "paused"),
        (PRIMARY, REPLICA, Lag(2**30, 1.0), Health.DEGRADED, "is late"),
        (PRIMARY, REPLICA, Lag(1, 60.0), Health.DEGRADED, "is late"),
        (PRIMARY, REPLICA, Lag(), Health.DEGRADED, "unknown number"),
        (Sighting(P, 10.0, fault="refused"), REPLICA, Lag(), Health.UNHEALTHY, None),
        (replace(PRIMARY, standby=True), REPLICA, Lag(), Health.UNHEALTHY, None),
    ],
)
def test_a_turn_is_judged(primary: Sighting, replica: Sighting, lag: Lag, status: Health, problem: str | None) -> None:
    found, servers = assess(primary, [replica], {R: lag}, LIMITS)
    assert found is status
    assert servers[0].up is (status is not Health.UNHEALTHY)
    said = servers[1].problem
    assert said is None if problem is None else said is not None and problem in said


def test_a_late_replica_has_to_come_within_half_of_the_limit() -> None:
    lag = {R: Lag(LIMITS.lag_bytes * 3 // 4, 1.0)}
    assert assess(PRIMARY, [REPLICA], lag, LIMITS)[0] is Health.HEALTHY
    late = frozenset([R.safe()])
    assert assess(PRIMARY, [REPLICA], lag, LIMITS, late_before=late)[0] is Health.DEGRADED


def test_lag_is_told_from_what_the_primary_had_written_when() -> None:
    positions = Positions()
    behind = replace(REPLICA, at=20.0, replayed=1000)
    assert positions.lag(behind) == Lag(), "nothing is known of the primary, and unknown is not zero"
    positions.add(PRIMARY)
    assert positions.lag(behind) == Lag(0, 0.0), "of a primary that writes nothing, whatever the time"
    positions.add(replace(PRIMARY, at=12.0, written=1500))
    positions.add(replace(PRIMARY, at=15.0, written=1800))
    assert positions.lag(behind) == Lag(800, 8.0)
    assert positions.lag(replace(behind, replayed=1500)) == Lag(300, 5.0)
    assert positions.lag(replace(behind, timeline=2)) == Lag(), "positions of two timelines cannot be compared"
    positions.add(replace(PRIMARY, at=30.0, timeline=2, written=1700))
    assert positions.lag(replace(behind, at=30.0)) == Lag()


@given(st.lists(st.sampled_from(list(Health)), max_size=80))
def test_no_status_flaps(seen: list[Health]) -> None:
    """It changes only after so many turns in a row that were all worse, or all better; and then it does."""
    order, state, since = list(Health), Settled(Health.HEALTHY), 0
    run: list[Health] = []
    for one in seen:
        before, state = state, settle(state, one, LIMITS)
        since += 1
        rank, shown = order.index(one), order.index(before.shown)
        side = (rank > shown) - (rank < shown)
        same = bool(run) and ((order.index(run[-1]) > shown) - (order.index(run[-1]) < shown)) == side
        run = [] if side == 0 else [*run, one] if same else [one]
        needed = LIMITS.worse_after if side > 0 else LIMITS.better_after
        assert (state.shown != before.shown) == (side != 0 and len(run) >= needed)
        if state.shown != before.shown:
            assert since >= needed
            nearest = min(run, key=lambda each: abs(order.index(each) - shown))
            assert state.shown is nearest
            run, since = [], 0


def test_two_shards_that_name_one_server_are_told_of_each_other() -> None:
    other = Sighting(Dsn("postgresql://app@db-9/shop"), 1.0, system="9", standby=False)
    alias = replace(PRIMARY, endpoint=Dsn("postgresql://app@alias/shop"))
    found = shared_servers({"a": [PRIMARY, REPLICA], "b": [alias], "c": [other]})
    assert set(found) == {"a", "b"}
    assert "shares a server with b" in found["a"]
    dead = [Sighting(P, 1.0, fault="no answer")]
    assert set(shared_servers({"a": dead, "b": dead})) == {"a", "b"}, "by its address alone"


def test_a_dsn_of_several_hosts_is_several_servers() -> None:
    both = Dsn("postgresql://app:word@db-1:6432,db-2/shop?target_session_attrs=read-write")
    assert [(one.host, one.port, "target" in one.reveal()) for one in each_server(both)] == [
        ("db-1", "6432", False),
        ("db-2", "5432", False),
    ]
    assert each_server(P) == (P,)


def test_no_wall_clock_is_read_where_something_is_judged() -> None:
    folder = Path(__file__).parents[2] / "shardlib_ops" / "health"
    files = list(folder.glob("*.py"))
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"time\.time\(|clock_timestamp\(|\bnow\(\)|utcnow|age_s\(", text), path
        # One stamp, for people, when a shard's health is written down.
        assert len(re.findall(r"datetime\.now\(", text)) == (path.name == "controller.py"), path
