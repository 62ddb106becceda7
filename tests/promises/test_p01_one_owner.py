"""P1: at every version of the topology each token has one owner, and a change moves only what it must."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterable

import pytest

from shardlib.catalog import Catalog, Conflict, open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.ring import TOKEN_MAX, TokenRange, add_shard, diff, intersect_ranges, merge_ranges, remove_shard
from shardlib.topology import Move, Shard, Topology
from shardlib.topology.change import initial
from shardlib.topology.moving import announce, finish, give_back, moves_of, switch

pytestmark = pytest.mark.promise("P1")

OPERATORS = 4
JOBS = 5
"""Jobs that each operator carries to their end."""


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


class History:
    """What the operators have published, by version, and which ranges each switch was to hand over."""

    def __init__(self, first: Topology) -> None:
        self.seen = {first.version: first}
        self.planned: dict[int, tuple[Move, ...]] = {}
        self.conflicts = 0
        self.faults: list[BaseException] = []

    def check(self, version: int) -> None:
        """The step to this version has moved what it was to move, and nothing else."""
        moved = diff(self.seen[version - 1].ring, self.seen[version].ring)
        planned = self.planned.get(version, ())
        assert {(move.source, move.target) for move in moved} == {(move.source, move.target) for move in planned}
        for move in planned:
            pair = move.source, move.target
            assert merge_ranges(each.range for each in moved if (each.source, each.target) == pair) == move.ranges


class Operator:
    """Carries jobs to their end: each is announced, switched and finished; every other one is given back first."""

    def __init__(self, catalog: Catalog, history: History, dice: random.Random) -> None:
        self.catalog, self.history, self.dice = catalog, history, dice

    def run(self, jobs: Iterable[int]) -> None:
        try:
            for job in jobs:
                self.job(job)
        except BaseException as fault:  # noqa: BLE001 - the test tells of it
            self.history.faults.append(fault)

    def job(self, job: int) -> None:
        moves = moves_of(self.publish(lambda known: self.announced(known, job)), job)
        back = tuple(Move(job, move.ranges, move.target, move.source) for move in moves)
        self.hand_over(switch, job, moves)
        if job % 2:
            self.hand_over(give_back, job, back)
            self.hand_over(switch, job, moves)
        self.publish(lambda known: finish(known, job, nonce=nonce()))

    def hand_over(self, step: Callable[..., Topology], job: int, moves: tuple[Move, ...]) -> None:
        done = self.publish(lambda known: step(known, job, nonce=nonce()))
        self.history.planned[done.version] = moves

    def announced(self, known: Topology, job: int) -> Topology:
        """With a job that takes ranges from all their owners and gives them to one shard."""
        while True:
            low = self.dice.getrandbits(64)
            part = TokenRange(low, min(TOKEN_MAX, low + self.dice.getrandbits(self.dice.choice([0, 20, 58, 60]))))
            target = self.dice.choice(known.shards).id
            moves = [
                Move(job, ranges, shard.id, target)
                for shard in known.shards
                if shard.id != target and (ranges := intersect_ranges([part], known.ring.ranges_of(shard.id)))
            ]
            try:
                if moves:
                    return announce(known, moves, nonce=nonce())
            except InvalidTopology as error:
                if "another job moves them" not in str(error):
                    raise

    def publish(self, make: Callable[[Topology], Topology]) -> Topology:
        """Make the change from the newest topology until it is published."""
        known = None
        while True:
            known = self.catalog.load(known)
            changed = make(known)
            try:
                self.catalog.publish(changed, expected=known.version)
            except Conflict:
                self.history.conflicts += 1
                continue
            self.history.seen[changed.version] = changed
            return changed


def test_p1_one_owner_while_operators_race(etcd_url: str, rng: random.Random) -> None:
    """Operators run the steps of their jobs at once and through one catalog; a reader keeps every version it sees."""
    catalogs = [open_catalog(etcd_url) for _ in range(OPERATORS + 1)]
    reader = catalogs[-1]
    first = initial(shards(5), hash_function="murmur3", cluster_id=nonce(), nonce=nonce())
    reader.publish(first, expected=None)
    history = History(first)
    threads = [
        threading.Thread(
            target=Operator(catalog, history, random.Random(rng.random())).run,
            args=(range(number * JOBS + 1, (number + 1) * JOBS + 1),),
        )
        for number, catalog in enumerate(catalogs[:-1])
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
        for catalog in catalogs:
            catalog.close()
    assert history.faults == []

    stored[final.version] = final
    for version, topology in stored.items():
        check_one_owner(topology)
        assert topology.ring == history.seen[version].ring
    assert sorted(history.seen) == list(range(first.version, final.version + 1))
    for version in range(first.version + 1, final.version + 1):
        history.check(version)
    assert final.moves == ()
    assert len(history.planned) == sum(3 if job % 2 else 1 for job in range(1, OPERATORS * JOBS + 1))
    # A run without a race, or of which the reader saw nothing, shows nothing.
    assert history.conflicts
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
