"""What a topology must be, and where it says that a token lives."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.topology import Shard
from shardlib.topology.change import initial, with_shard
from tests.support.gates import give_gate
from tests.support.topologies import make_topology


def shard(shard_id: str) -> Shard:
    return Shard(shard_id, f"name-of-{shard_id}", Dsn("postgresql://h/d"))


@pytest.mark.parametrize("next_shard", [1, 3])
def test_a_number_that_is_still_to_be_given_is_no_shard(next_shard: int) -> None:
    with pytest.raises(InvalidTopology, match=rf"shard 's3' is not below the next free number {next_shard}"):
        make_topology(3).evolve(next_shard=next_shard)
    assert make_topology(3).evolve(next_shard=4).next_shard == 4


def test_a_shard_that_skips_numbers_does_not_join() -> None:
    topology = make_topology(3)
    with pytest.raises(InvalidTopology, match="'s7' is not below the next free number 5"):
        with_shard(topology, shard("s7"), nonce="n")
    assert with_shard(topology, shard("s4"), nonce="n").next_shard == 5


def test_a_new_cluster_goes_on_after_its_highest_number() -> None:
    assert initial([shard("s9"), shard("s2")], hash_function="murmur3", cluster_id="c", nonce="n").next_shard == 10


@pytest.mark.parametrize("name", ["s2", "s7", "s01"])
def test_no_shard_is_named_like_the_id_of_another(name: str) -> None:
    topology = make_topology(3)
    first, *others = topology.shards
    with pytest.raises(InvalidTopology, match=f"shard 's1' is named '{name}'"):
        topology.evolve(shards=(replace(first, name=name), *others))
    for own in ("s1", "s2a", "s"):
        assert topology.evolve(shards=(replace(first, name=own), *others)).shard(own).id == "s1"


def test_the_shard_of_a_token_is_that_of_its_place(rng: random.Random) -> None:
    topology = make_topology(5)
    topology = give_gate(topology, "s2", topology.ring.ranges_of("s2")[:3], nonce="n")
    for _ in range(1000):
        token = rng.getrandbits(64)
        assert topology.shard_of(token) is topology.place(token).shard
