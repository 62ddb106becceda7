"""P1: at every version of the topology each token has one owner, and a change moves only what it must."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable

import pytest

from shardlib.catalog import Conflict, open_catalog
from shardlib.dsn import Dsn
from shardlib.ring import TOKEN_MAX, TokenRange, add_shard, diff, merge_ranges, remove_shard, subtract_ranges
from shardlib.topology import Shard, Topology
from shardlib.topology.change import initial, move_ranges

pytestmark = pytest.mark.promise("P1")

OPERATORS = 4
CHANGES = 12
"""Changes that each operator gets published."""


def shards(count: int) -> list[Shard]:
    return [
        Shard(f"s{i}", f"shard-{i:02}", Dsn(f"postgresql://127.0.0.1:1/shard{i}"), vnode_count=64)
        for i in range(1, count + 1)
    ]


def nonce() -> str:
    return uuid.uuid4().hex


def check_one_owner(topology: Topology) -> None:
    owned = [part for shard in topology.shards for part in topology.ring.ranges_of(shard.id)]
    assert merge_ranges(owned) == (TokenRange(0, TOKEN_MAX),)
    assert sum(part.size for part in owned) == 2**64
    for part in owned:
        for token in (part.first, part.last):
            shard = topology.place(token).shard
            assert topology.ring.owns(shard.id, TokenRange(token, token))


def test_p1_one_owner_while_operators_race(etcd_url: str, rng: random.Random) -> None:
    """Operators move ranges at once and through one catalog; a reader keeps every version it gets to see."""
    with_catalog = [open_catalog(etcd_url) for _ in range(OPERATORS + 1)]
    reader = with_catalog[-1]
    first = initial(shards(5), hash_function="murmur3", cluster_id=nonce(), nonce=nonce())
    reader.publish(first, expected=None)
    planned: dict[int, tuple[TokenRange, str]] = {}
    conflicts: list[int] = []
    faults: list[BaseException] = []
    seen: dict[int, Topology] = {first.version: first}

    def operate(number: int, dice: random.Random) -> None:
        catalog, done, known = with_catalog[number], 0, None
        while done < CHANGES:
            known = catalog.load(known)
            low = dice.getrandbits(64)
            part = TokenRange(low, min(TOKEN_MAX, low + dice.getrandbits(dice.choice([0, 20, 60, 62]))))
            target = dice.choice(known.shards).id
            if known.ring.owns(target, part):
                continue
            changed = move_ranges(known, [part], target, nonce=nonce())
            try:
                catalog.publish(changed, expected=known.version)
            except Conflict:
                conflicts.append(number)
                continue
            planned[changed.version] = part, target
            seen[changed.version] = changed
            done += 1

    def guarded(work: Callable[[int, random.Random], None], number: int, dice: random.Random) -> None:
        try:
            work(number, dice)
        except BaseException as fault:  # noqa: BLE001 - raised again by the test
            faults.append(fault)

    threads = [
        threading.Thread(target=guarded, args=(operate, i, random.Random(rng.random()))) for i in range(OPERATORS)
    ]
    try:
        for thread in threads:
            thread.start()
        stored: dict[int, Topology] = {}
        known = None
        while any(thread.is_alive() for thread in threads):
            known = reader.load(known)
            stored[known.version] = known
        for thread in threads:
            thread.join(timeout=60)
        final = reader.load()
    finally:
        for catalog in with_catalog:
            catalog.close()
    assert faults == []

    stored[final.version] = final
    for version, topology in stored.items():
        check_one_owner(topology)
        assert topology.ring == seen[version].ring
    assert sorted(planned) == list(range(first.version + 1, first.version + 1 + OPERATORS * CHANGES))
    for version, (part, target) in planned.items():
        moves = diff(seen[version - 1].ring, seen[version].ring)
        assert {move.target for move in moves} == {target}
        moved = merge_ranges(move.range for move in moves)
        assert moved == subtract_ranges([part], seen[version - 1].ring.ranges_of(target))
    # A run without a race, or of which the reader saw nothing, shows nothing.
    assert conflicts
    assert len(stored) > 3


def test_p1_adding_or_removing_a_shard_moves_about_one_nth(rng: random.Random) -> None:
    ring = initial(shards(10), hash_function="murmur3", cluster_id=nonce(), nonce=nonce()).ring
    for step in range(30):
        if len(ring.shard_ids) < 4 or rng.random() < 0.6:
            changed = add_shard(ring, f"new{step}", 64)
            moves = diff(ring, changed)
            assert {move.target for move in moves} == {f"new{step}"}
            limit = 1.05 / len(changed.shard_ids)
        else:
            gone = rng.choice(ring.shard_ids)
            changed = remove_shard(ring, gone)
            moves = diff(ring, changed)
            assert {move.source for move in moves} == {gone}
            limit = 1.10 / len(ring.shard_ids)
        assert sum(move.range.size for move in moves) / 2**64 <= limit
        shares = changed.shares().values()
        assert max(shares) / (2**64 / len(shares)) <= 1.10
        ring = changed
