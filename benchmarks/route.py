"""Key to shard: time of a lookup against uhashring and the bare hash, evenness, memory, and what a change moves."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

from mmh3 import mmh3_x64_128_uintdigest
from uhashring import HashRing

from benchmarks.report import Row, at_least, at_most, measured
from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.ring import Ring, add_shard, build_ring, diff
from shardlib.token import hash_of, token_of
from shardlib.topology import Shard
from shardlib.topology.change import initial

__all__ = ["run"]

VNODES = 256


def _ring(shards: int) -> Ring:
    return build_ring({f"s{i}": VNODES for i in range(1, shards + 1)})


def _through_ring(ring: Ring, keys: list[str]) -> Callable[[], None]:
    index_of, shard_ids, token = ring.index_of, ring.shard_ids, token_of("murmur3")

    def work() -> None:
        for key in keys:
            shard_ids[index_of(token(key))]

    return work


def _through_call(function: Callable[[str], object], keys: list[str]) -> Callable[[], None]:
    def work() -> None:
        for key in keys:
            function(key)

    return work


def _hash_alone(keys: list[str]) -> Callable[[], None]:
    def work() -> None:
        for key in keys:
            mmh3_x64_128_uintdigest(key.encode()) & 0xFFFFFFFFFFFFFFFF

    return work


def _engine(shards: int) -> ShardedEngine:
    """An engine over servers that are never connected to."""
    url = f"memory://bench-{uuid.uuid4().hex}"
    members = [
        Shard(f"s{i}", f"shard-{i}", Dsn(f"postgresql://127.0.0.1:1/shard{i}"), vnode_count=VNODES)
        for i in range(1, shards + 1)
    ]
    catalog = open_catalog(url)
    catalog.publish(
        initial(members, hash_function="murmur3", cluster_id=uuid.uuid4().hex, nonce=uuid.uuid4().hex), expected=None
    )
    catalog.close()
    return ShardedEngine(url)


def _lookups(scale: float) -> list[Row]:
    middle, large = max(32, int(1_000 * scale)), max(64, int(10_000 * scale))
    keys = [f"user-{i}" for i in range(max(1_000, int(200_000 * scale)))]
    random.Random(7).shuffle(keys)  # neighbours in the list are not neighbours in memory
    rings = {count: _ring(count) for count in (16, middle, large)}
    grown = rings[16]
    for i in range(17, 65):
        grown = add_shard(grown, f"s{i}", VNODES)
    baseline = {count: HashRing([f"s{i}" for i in range(count)], vnodes=VNODES) for count in (16, middle)}
    engine = _engine(16)
    try:
        work = {f"ours {count}": _through_ring(ring, keys) for count, ring in rings.items()}
        work |= {f"uhashring {count}": _through_call(ring.get_node, keys) for count, ring in baseline.items()}
        work |= {"hash": _hash_alone(keys), "grown": _through_ring(grown, keys)}
        work["engine"] = _through_call(engine.shard_for, keys)
        ns = {name: seconds / len(keys) * 1e9 for name, seconds in measured(work).items()}
    finally:
        engine.dispose()
    first, second, third = (ns[f"ours {count}"] for count in rings)
    extra = first - ns["hash"]
    return [
        at_least(
            "route",
            f"str key to shard, 16 x {VNODES}, against uhashring",
            first,
            ns["uhashring 16"],
            "ns",
            5,
            aim=f"hash + encode + 150 ns (here + {extra:.0f})",
            lower_is_better=True,
        ),
        at_least(
            "route",
            f"the same, {middle:,} shards",
            second,
            ns[f"uhashring {middle}"],
            "ns",
            5,
            lower_is_better=True,
        ),
        at_most("route", f"the same, {middle:,} shards, against 16", second, first, "ns", 1.5, aim="1x"),
        at_most("route", f"the same, {large:,} shards, against the hash alone", third, ns["hash"], "ns", 6),
        at_most("route", "the same, 16 shards grown to 64 one by one, against 16", ns["grown"], first, "ns", 1.5),
        at_most("route", "engine.shard_for, against the lookup alone", ns["engine"], first, "ns", 1.5, aim="1.2x"),
    ]


def _sizes(scale: float) -> list[Row]:
    count = max(64, int(10_000 * scale))
    ring = _ring(count)
    took = measured(
        {
            "load": lambda: Ring(ring.tokens, ring.owners, ring.shard_ids),
            "add": lambda: add_shard(ring, "new", VNODES),
        },
        rounds=5 if scale < 1 else 3,
    )
    return [
        at_most(
            "route", f"memory of {count:,} x {VNODES}, a virtual node", ring.nbytes() / len(ring), None, "bytes", 24
        ),
        at_most("route", f"load of {count:,} x {VNODES} from its arrays", took["load"], None, "s", 1),
        Row("route", f"one shard more on {count:,} x {VNODES}", took["add"], None, "s", took["add"], "-"),
    ]


def _spread(scale: float) -> list[Row]:
    ring, digest = _ring(16), hash_of("murmur3")
    counts = [0] * 16
    total = max(10_000, int(1_000_000 * scale))
    for i in range(total):
        counts[ring.index_of(digest(b"user-%d" % i))] += 1
    rows = [
        at_most(
            "route",
            f"keys of the fullest of 16 shards, {total:,} keys",
            max(counts),
            total / 16,
            "keys",
            1.1,
            aim="1.03x",
        )
    ]
    worst, fullest = 0.0, 0.0
    for count in range(17, 65):
        grown = add_shard(ring, f"s{count}", VNODES)
        moved = sum(move.range.size for move in diff(ring, grown)) / 2**64
        worst = max(worst, moved * count)
        fullest = max(fullest, max(grown.shares().values()) / 2**64 * count)
        ring = grown
    return [
        *rows,
        at_most("route", "tokens moved when a shard joins, 17 to 64, worst", worst, 1.0, "of 1/N", 1.05, aim="1x"),
        at_most("route", "tokens of the fullest shard meanwhile, worst", fullest, 1.0, "of 1/N", 1.1, aim="1.03x"),
    ]


def run(scale: float) -> list[Row]:
    """Rows of the section `route`; `scale` 1 is the full size, less is a quick look."""
    return [*_lookups(scale), *_sizes(scale), *_spread(scale)]
