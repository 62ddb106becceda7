"""A job's way through the topologies: every step keeps one owner a token, and never uses a gate number twice."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import TokenRange
from shardlib.topology import Topology
from shardlib.topology.codec import dump, parse
from shardlib.topology.model import Move, MoveState
from shardlib.topology.moving import announce, finish, give_back, moving_gates, renew_moving, switch
from tests.support.topologies import facts, make_topology


def nonce() -> str:
    return uuid.uuid4().hex


def part_of(topology: Topology, shard_id: str, at: int = 0, count: int = 2) -> tuple[TokenRange, ...]:
    return topology.ring.ranges_of(shard_id)[at : at + count]


@pytest.fixture
def before() -> Topology:
    return make_topology(4, 8)


@pytest.fixture
def moves(before: Topology) -> tuple[Move, ...]:
    return (
        Move(7, part_of(before, "s1"), "s1", "s3"),
        Move(7, part_of(before, "s1", 2), "s1", "s4"),
        Move(7, part_of(before, "s2"), "s2", "s3"),
    )


def test_announced_ranges_have_gates_of_their_own_and_all_default_gates_are_new(
    before: Topology, moves: tuple[Move, ...]
) -> None:
    after = announce(before, moves, nonce=nonce())
    assert {gate.shard_id for gate in moving_gates(after, 7)} == {"s1", "s2"}
    old = {gate.number for gate in before.gates}
    assert not old & {gate.number for gate in after.gates}
    assert after.hidden_on("s3") == after.hidden_on("s4") == (7,)
    assert after.hidden_on("s1") == after.hidden_on("s2") == ()
    assert after.scan_gates("s3") == (*after.gates_of("s3"), -7)
    assert after.scan_gates("s1") == after.gates_of("s1")
    assert after.place(moves[0].ranges[0].first) == after.place(moves[1].ranges[0].last), "one gate for each shard"


def test_switch_moves_only_what_is_announced_and_back_again(before: Topology, moves: tuple[Move, ...]) -> None:
    announced = announce(before, moves, nonce=nonce())
    switched = switch(announced, 7, nonce=nonce())
    for move in moves:
        for part in move.ranges:
            assert switched.place(part.first).shard.id == move.target
            assert switched.place(part.last).gate != switched.default_gate(move.target)
    assert switched.hidden_on("s1") == (7,)
    assert switched.hidden_on("s3") == ()
    returned = give_back(switched, 7, nonce=nonce())
    for move in moves:
        assert all(returned.ring.owns(move.source, part) for part in move.ranges)
    over = finish(returned, 7, nonce=nonce())
    assert over.moves == ()
    assert all(not gate.ranges for gate in over.gates)
    for shard in before.shards:
        assert over.ring.ranges_of(shard.id) == before.ring.ranges_of(shard.id)


def test_a_stored_topology_keeps_its_moves(before: Topology, moves: tuple[Move, ...]) -> None:
    after = switch(announce(before, moves, nonce=nonce()), 7, nonce=nonce())
    assert facts(parse(dump(after))) == facts(after)


def test_steps_out_of_order_are_refused(before: Topology, moves: tuple[Move, ...]) -> None:
    announced = announce(before, moves, nonce=nonce())
    with pytest.raises(InvalidTopology, match="not `switched`"):
        give_back(announced, 7, nonce=nonce())
    with pytest.raises(InvalidTopology, match="under way already"):
        announce(announced, moves, nonce=nonce())
    switched = switch(announced, 7, nonce=nonce())
    with pytest.raises(InvalidTopology, match="not `copying`"):
        switch(switched, 7, nonce=nonce())
    with pytest.raises(InvalidTopology, match="no moves of job 8"):
        finish(switched, 8, nonce=nonce())


def test_ranges_that_move_already_or_belong_elsewhere_are_refused(before: Topology, moves: tuple[Move, ...]) -> None:
    announced = announce(before, moves, nonce=nonce())
    with pytest.raises(InvalidTopology, match="another job"):
        announce(announced, [Move(8, moves[0].ranges, "s1", "s2")], nonce=nonce())
    with pytest.raises(InvalidTopology, match="does not own"):
        announce(before, [Move(8, part_of(before, "s2"), "s1", "s3")], nonce=nonce())
    with pytest.raises(InvalidTopology, match="onto itself"):
        announce(before, [Move(8, part_of(before, "s1"), "s1", "s1")], nonce=nonce())
    with pytest.raises(InvalidArgument, match="of one job"):
        announce(before, [moves[0], Move(8, part_of(before, "s2"), "s2", "s3")], nonce=nonce())


STEPS = st.lists(st.sampled_from(["switch", "give_back", "renew", "finish", "announce"]), max_size=12)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, other=st.booleans())
def test_any_order_of_steps_keeps_one_owner_and_gate_numbers_rise(steps: list[str], other: bool) -> None:
    topology = make_topology(4, 4)
    start = {shard.id: topology.ring.ranges_of(shard.id) for shard in topology.shards}
    if other:
        topology = announce(topology, [Move(3, part_of(topology, "s2"), "s2", "s4")], nonce=nonce())
    moves = (Move(7, part_of(topology, "s1"), "s1", "s3"), Move(7, part_of(topology, "s2", 2, 1), "s2", "s3"))
    used = {gate.number for gate in topology.gates}
    for step in steps:
        try:
            after = {
                "announce": lambda t: announce(t, moves, nonce=nonce()),
                "switch": lambda t: switch(t, 7, nonce=nonce()),
                "give_back": lambda t: give_back(t, 7, nonce=nonce()),
                "renew": lambda t: renew_moving(t, 7, nonce=nonce()),
                "finish": lambda t: finish(t, 7, nonce=nonce()),
            }[step](topology)
        except InvalidTopology:
            continue
        assert after.version == topology.version + 1
        new = {gate.number for gate in after.gates} - {gate.number for gate in topology.gates}
        assert not new & used, "a gate number is never used twice"
        used |= new
        topology = after
        for move in topology.moves:
            if move.job == 7:
                owner = move.source if move.state is MoveState.COPYING else move.target
                assert {topology.place(part.first).shard.id for part in move.ranges} == {owner}
                gates = {topology.place(part.last).gate for part in move.ranges}
                assert not gates & {topology.default_gate(owner)}
        if other:
            assert topology.hidden_on("s4") == (3,)
    if not any(move.state is MoveState.SWITCHED for move in topology.moves) and topology.ring.owns(
        "s1", moves[0].ranges[0]
    ):
        assert {shard.id: topology.ring.ranges_of(shard.id) for shard in topology.shards} == start
