"""Whatever topology follows whatever other: reading it with or without the other gives the same."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.ring import Ring
from shardlib.topology import Gate, Move, MoveState, Shard, Status, Table, Topology
from shardlib.topology.codec import ChunkKey, decode, dump, encode, parse, unpack
from tests.support.topologies import facts

tokens = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1]),
    st.builds(lambda high, low: high << 48 | low, st.integers(0, 2**16 - 1), st.integers(0, 3)),
)


@st.composite
def topologies(draw: st.DrawFn, version: int = 1) -> Topology:
    numbers = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=6, unique=True))
    ring_tokens = sorted(draw(st.sets(tokens, min_size=1, max_size=60)))
    owners = [draw(st.sampled_from(numbers)) for _ in ring_tokens]
    order = list(dict.fromkeys(owners))
    wide = "x" * draw(st.sampled_from([1, 1, 1500]))  # wide names push a topology out of its head
    shards = tuple(
        Shard(
            f"s{number}",
            f"{wide[:200]}-{number}",
            Dsn(f"postgresql://u:p@{wide}{number}/app"),
            tuple(Dsn(f"postgresql://r{i}/{wide}") for i in range(draw(st.integers(0, 20)))),
            draw(st.sampled_from(Status)),
            draw(st.integers(0, 1000)),
        )
        for number in numbers
    )
    ring = Ring(ring_tokens, [order.index(owner) for owner in owners], [f"s{number}" for number in order])
    owner = ring.shard_ids[0]
    others = [shard.id for shard in shards if shard.id != owner]
    moves = []
    for job, part in enumerate(ring.ranges_of(owner)[: draw(st.integers(0, 2))] if others else ()):
        state, other = draw(st.sampled_from(MoveState)), draw(st.sampled_from(others))
        ends = (owner, other) if state is MoveState.COPYING else (other, owner)
        moves.append(Move(job, (part,), *ends, state))
    return Topology(
        version=version,
        cluster_id=draw(st.text(max_size=20)),
        hash_function="murmur3",
        shards=shards,
        ring=ring,
        gates=tuple(Gate(i, shard.id) for i, shard in enumerate(shards, draw(st.integers(1, 50)))),
        tables=tuple(
            Table(name, ("key",) * draw(st.integers(0, 1)))
            for name in draw(st.sets(st.text("abc", min_size=1, max_size=5), max_size=4))
        ),
        moves=tuple(moves),
        next_shard=2001,
        next_gate=100,
        nonce=draw(st.text(min_size=1, max_size=20)),
    )


@settings(max_examples=200, deadline=None)
@given(topologies(version=1), topologies(version=2))
def test_a_topology_is_read_alike_with_and_without_an_earlier_one(first: Topology, second: Topology) -> None:
    one = encode(first)
    two = encode(second, one.head)
    stored: dict[ChunkKey, bytes] = {**one.chunks, **two.chunks}

    def fetch(keys: set[ChunkKey]) -> dict[ChunkKey, bytes]:
        return {key: stored[key] for key in keys}

    assert facts(decode(unpack(one.data), fetch)) == facts(first)
    assert facts(decode(unpack(two.data), fetch)) == facts(second)
    known = decode(unpack(one.data), fetch)
    assert facts(decode(unpack(two.data), fetch, known, one.head)) == facts(second)


@settings(max_examples=100, deadline=None)
@given(topologies())
def test_a_file_holds_the_whole(topology: Topology) -> None:
    assert facts(parse(dump(topology))) == facts(topology)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_foreign_bytes_are_refused_and_nothing_else(data: bytes) -> None:
    for call in (unpack, parse):
        for prefix in (b"", b"SLTP\x01", b"SLTF\x01"):
            with contextlib.suppress(InvalidTopology):
                call(prefix + data)
                raise AssertionError("random bytes passed for a topology")
