"""Splitting the rows of a bulk load by shard agrees with the topology, whatever the keys are."""

from __future__ import annotations

import random
import uuid
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, Uuid

from shardlib.engine.bulk_split import Splitter
from shardlib.errors import InvalidShardKey
from shardlib.key.declare import describe
from shardlib.ring import TokenRange
from shardlib.token import hash_of
from shardlib.topology import Topology
from tests.support.gates import give_gate
from tests.support.topologies import make_topology

KEY = {"shard_key": True}


def table(*kinds: Any) -> Table:
    columns = [Column(f"k{i}", kind, primary_key=True, info=KEY) for i, kind in enumerate(kinds)]
    return Table("t", MetaData(), Column("x", Integer), *columns)


def check(topology: Topology, splitter: Splitter, columns: list[list[Any]], spec: Any) -> None:
    needed, parts = splitter.parts(topology, [[0] * len(columns[0]), *columns], 1)
    token = hash_of(topology.hash_function)
    rows: dict[str, list[int]] = {}
    gates: dict[str, set[int]] = {}
    for position, key in enumerate(zip(*columns, strict=True)):
        place = topology.place(token(spec.encode(key)))
        rows.setdefault(place.shard.id, []).append(position)
        gates.setdefault(place.shard.id, set()).add(place.gate)
    assert {shard: list(positions) for shard, positions in parts.items()} == rows
    assert {shard: set(numbers) for shard, numbers in needed.items()} == gates


@pytest.mark.parametrize("tenants", [7, 10**9], ids=["few", "many"])
def test_rows_go_where_their_key_is(rng: random.Random, tenants: int) -> None:
    spec = describe(table(String))
    splitter = Splitter(spec, [1])
    topology = make_topology(3)
    for turn in range(30):
        check(topology, splitter, [[f"t{rng.randrange(tenants)}" for _ in range(300)]], spec)
        if turn == 20:
            keys = [hash_of("murmur3")(f"t{i}".encode()) for i in range(7)]
            points = [point for point in sorted(keys) if topology.place(point).shard.id == "s1"]
            topology = give_gate(topology, "s1", [TokenRange(p, p) for p in points], nonce="n")


def test_composite_and_other_keys(rng: random.Random) -> None:
    topology = make_topology(3)
    spec = describe(table(String, Integer))
    check(topology, Splitter(spec, [1, 2]), [["a", "b", "a"] * 50, [rng.randrange(9) for _ in range(150)]], spec)
    spec = describe(table(Uuid))
    ids = [uuid.UUID(int=rng.getrandbits(128)) for _ in range(100)]
    check(topology, Splitter(spec, [1]), [ids + [str(i) for i in ids]], spec)


def test_a_remembered_key_lets_no_equal_value_of_another_type_pass() -> None:
    """1 == True, but only one of them is an int."""
    spec = describe(table(Integer))
    splitter = Splitter(spec, [1])
    topology = make_topology(3)
    splitter.parts(topology, [[0], [1]], 1)
    for bad in ([1, True], [True], [1.0]):
        with pytest.raises(InvalidShardKey) as caught:
            splitter.parts(topology, [[0] * len(bad), bad], 10)
        assert str(caught.value).endswith(f"(row {9 + len(bad)} of the load)")


def test_the_first_of_equal_wrong_keys_is_named() -> None:
    splitter = Splitter(describe(table(String)), [1])
    column = ["a", "b", "c\0", "d", "c\0"]
    with pytest.raises(InvalidShardKey) as caught:
        splitter.parts(make_topology(3), [[0] * 5, column], 1)
    assert str(caught.value).endswith("(row 3 of the load)")
