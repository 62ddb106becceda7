"""Topologies as bytes: sizes, sharing, bounds, damage."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest

from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.topology import Move, MoveState, Shard, Status, Table, Topology
from shardlib.topology.change import initial, with_shard
from shardlib.topology.codec import (
    CHUNK_BYTES_MAX,
    RETIRED_VERSIONS,
    ChunkKey,
    Encoded,
    Head,
    decode,
    dump,
    encode,
    pack,
    parse,
    unpack,
)
from tests.support.gates import give_gate
from tests.support.topologies import PASSWORD, changed, facts, make_topology, one_range_moved, scattered_topology


def read(encoded: Encoded, *earlier: Encoded) -> Topology:
    """Decode with every chunk that these wrote."""
    stored: dict[ChunkKey, bytes] = {}
    for one in (*earlier, encoded):
        stored.update(one.chunks)
    return decode(unpack(encoded.data), lambda keys: {key: stored[key] for key in keys if key in stored})


def full() -> Topology:
    """A topology that uses every field."""
    base = make_topology(5)
    part = base.ring.ranges_of("s2")[3]
    shards = (
        replace(base.shards[0], status=Status.READONLY, name="größte"),
        replace(base.shards[1], replicas=(Dsn("postgresql://r:p@r1/app"), Dsn("host=r2 dbname=app"))),
        *base.shards[2:],
    )
    return give_gate(base.evolve(shards=shards), "s2", [part], nonce="gate").evolve(
        tables=(Table("orders", ("tenant", "region"), "shop"), Table("currency")),
        moves=(Move(7, (part,), "s3", "s2", MoveState.SWITCHED),),
    )


class TestRoundTrip:
    @pytest.mark.parametrize("topology", [full(), make_topology(1, 1), make_topology(60)], ids=["full", "one", "big"])
    def test_what_was_written_is_read(self, topology: Topology) -> None:
        assert facts(read(encode(topology))) == facts(topology)
        assert facts(parse(dump(topology))) == facts(topology)

    def test_a_shard_without_tokens_stays(self) -> None:
        grown = with_shard(make_topology(), Shard("s4", "new", Dsn("postgresql://h/d")), nonce="n")
        assert facts(read(encode(grown))) == facts(grown)

    def test_the_order_of_the_shards_stays(self) -> None:
        base = make_topology(4)
        turned = base.evolve(shards=tuple(reversed(base.shards)))
        assert facts(read(encode(turned))) == facts(turned)

    def test_the_bytes_of_a_ring_are_those_of_the_format(self) -> None:
        """A golden value: whatever machine or release reads it, the layout stays."""
        topology = initial(
            [Shard("s1", "a", Dsn("postgresql://h/d"), vnode_count=1)],
            hash_function="murmur3", cluster_id="c", nonce="n",
        )  # fmt: skip
        token = topology.ring.tokens[0]
        assert encode(topology).head.inline.count(token.to_bytes(8, "little") + b"\x01\0\0\0") == 1

    def test_equal_topologies_have_equal_bytes(self) -> None:
        topology = full()
        assert encode(topology).data == encode(read(encode(topology))).data


class TestSharing:
    def test_a_small_topology_is_one_value(self) -> None:
        encoded = encode(make_topology(4))
        assert not encoded.chunks
        assert not encoded.head.keys()

    def test_moving_a_range_writes_one_chunk(self, rng: random.Random) -> None:
        first = scattered_topology(rng, 400, 256)
        before = encode(first)
        second = one_range_moved(first)
        after = encode(second, before.head)
        assert len(before.chunks) > 10
        assert len(after.chunks) == 1
        assert max(map(len, after.chunks.values())) <= 100_000
        fetched: set[ChunkKey] = set()

        def fetch(keys: set[ChunkKey]) -> dict[ChunkKey, bytes]:
            fetched.update(keys)
            return {key: after.chunks[key] for key in keys}

        assert facts(decode(after.head, fetch, first, before.head)) == facts(second)
        assert fetched == set(after.chunks)

    def test_a_changed_gate_leaves_the_ring_alone(self, rng: random.Random) -> None:
        first = scattered_topology(rng, 400, 256)
        before = encode(first)
        second = changed(first, gates=(*first.gates[:-1], replace(first.gates[-1], number=900)), next_gate=901)
        after = encode(second, before.head)
        assert len(after.chunks) == 1
        again = decode(after.head, lambda keys: {key: after.chunks[key] for key in keys}, first, before.head)
        assert again.ring is first.ring
        assert facts(again) == facts(second)

    def test_a_chunk_is_dropped_after_some_versions_and_never_one_in_use(self, rng: random.Random) -> None:
        topology = scattered_topology(rng, 100, 256)
        encoded = encode(topology)
        stored = dict(encoded.chunks)
        dropped = 0
        for turn in range(3 * RETIRED_VERSIONS):
            topology = one_range_moved(topology, *(("s1", "s2") if turn % 3 else ("s2", "s1")))
            encoded = encode(topology, encoded.head)
            stored.update(encoded.chunks)
            for key in encoded.drop:
                del stored[key]
                dropped += 1
            assert encoded.head.live() == set(stored)
        assert dropped
        assert facts(decode(encoded.head, lambda keys: {key: stored[key] for key in keys})) == facts(topology)

    def test_attempts_at_one_version_share_no_key(self) -> None:
        first = make_topology(60)
        before = encode(first).head
        ours, theirs = (encode(with_shard(first, Shard("s61", "n", Dsn("postgresql://h/d")), nonce=n), before)
                        for n in ("ours", "theirs"))  # fmt: skip
        assert ours.chunks
        assert not ours.chunks.keys() & theirs.chunks.keys()

    def test_a_missing_chunk_is_named(self) -> None:
        encoded = encode(make_topology(60))
        with pytest.raises(KeyError) as raised:
            decode(encoded.head, lambda keys: {})
        assert raised.value.args[0] in encoded.chunks


class TestDamage:
    @pytest.mark.parametrize("data", [b"", b"SLTP", b"x" * 100, b"SLTP\x01" + b"\0" * 16 + b"\x80"])
    def test_other_bytes_are_no_head(self, data: bytes) -> None:
        with pytest.raises(InvalidTopology):
            unpack(data)

    def test_another_format_says_which(self) -> None:
        data = bytearray(encode(make_topology()).data)
        data[4] = 9
        with pytest.raises(InvalidTopology, match="format 9"):
            unpack(bytes(data))

    def test_every_flipped_byte_is_noticed(self) -> None:
        data, file = encode(make_topology(2, 4)).data, dump(make_topology(2, 4))
        for at in range(len(data)):
            with pytest.raises(InvalidTopology):
                unpack(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        for at in range(len(file)):
            with pytest.raises(InvalidTopology):
                parse(file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :])

    def test_a_changed_chunk_is_noticed(self) -> None:
        encoded = encode(make_topology(60))
        with pytest.raises(InvalidTopology, match="digest"):
            decode(encoded.head, lambda keys: {key: encoded.chunks[key][::-1] for key in keys})

    @pytest.mark.parametrize(
        "changes",
        [
            {"sections": {}},
            {"inline": []},
            {"ring_bits": 17},
            {"next_gate": 1},
            {"next_shard": 3},
            {"version": -1},
            {"sections": {"unknown": []}},
            {"cluster_id": "x" * 5000},
        ],
    )
    def test_a_head_that_does_not_fit_together(self, changes: dict[str, object]) -> None:
        head = encode(make_topology()).head
        with pytest.raises(InvalidTopology):
            decode(unpack(pack(msgspec.structs.replace(head, **changes))), lambda keys: {})

    def test_a_head_that_is_too_large_is_not_written(self) -> None:
        head = encode(make_topology()).head
        with pytest.raises(InvalidTopology, match="limit"):
            pack(msgspec.structs.replace(head, inline=[b"x" * (1 << 21)]))

    def test_a_dsn_is_never_shown(self) -> None:
        """Content that is almost right: a DSN of another kind, with a password in it."""
        head = encode(make_topology(1)).head
        bad = [piece.replace(b"postgresql://", b"mongodbxxx://") for piece in head.inline]
        assert bad != head.inline
        by_old = dict(zip(head.inline, bad, strict=True))
        forged = _with_pieces(head, by_old)
        with pytest.raises(InvalidTopology) as raised:
            decode(forged, lambda keys: {})
        assert PASSWORD not in f"{raised.value} {raised.value!r}"


class TestBounds:
    @pytest.mark.parametrize("shard_id", ["x1", "s", "s01", "s-1", "s4294967296", ""])
    def test_an_id_that_is_no_number_cannot_be_stored(self, shard_id: str) -> None:
        base = make_topology(1)
        odd = Shard(shard_id, "odd", Dsn("postgresql://h/d"))

        def store() -> None:
            encode(base.evolve(shards=(*base.shards, odd), next_shard=1 << 33))

        with pytest.raises(InvalidTopology, match="cannot be stored"):
            store()

    def test_a_large_bucket_is_cut(self) -> None:
        base = make_topology(256, 1)
        wide = base.evolve(
            shards=tuple(replace(shard, replicas=(Dsn(f"postgresql://{'h' * 2000}/d"),)) for shard in base.shards)
        )
        encoded = encode(wide)
        assert max(map(len, encoded.chunks.values())) <= CHUNK_BYTES_MAX
        assert sum(1 for ref in encoded.head.sections["shards"] if ref.bucket == 0) > 1
        assert facts(read(encoded)) == facts(wide)


def _with_pieces(head: Head, by_old: dict[bytes, bytes]) -> Head:
    from hashlib import blake2b

    from shardlib.topology.codec import Ref

    digests = {blake2b(old, digest_size=16).digest(): new for old, new in by_old.items()}
    return msgspec.structs.replace(
        head,
        inline=list(by_old.values()),
        sections={
            name: [Ref(ref.bucket, -1, blake2b(digests[ref.digest], digest_size=16).digest()) for ref in refs]
            for name, refs in head.sections.items()
        },
    )
