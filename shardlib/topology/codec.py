"""A topology and its bytes: a small head, and chunks named by the digest of their content.

The head carries what every change touches (version, nonce, counters) and the list of chunks. The rest is cut
into buckets that a change leaves alone (`sections.py`), so the next version shares all chunks but a few with
the one before, and only those few are written and read. A small topology has its chunks inside the head: one
value.

Layout, all integers little-endian whatever the machine:

- head: ``SLTP``, format (1 byte), BLAKE2b-128 of the body, body (msgpack of `Head`);
- bucket of the ring: n tokens (uint64), then n owners (uint32, the number of the shard `s<number>`);
- bucket of any other section: msgpack.

Pure: no clock, socket, thread or random source. Everything read is bounded and checked; DSNs are stored
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.topology.model import Topology
from shardlib.topology.sections import (
    NAMES,
    RING_BITS_MAX,
    WAY_OUT,
    Name,
    Number,
    Reader,
    Text,
    read_as,
    ring_bits,
    write,
)

__all__ = ["ChunkKey", "Encoded", "Head", "Ref", "decode", "dump", "encode", "pack", "parse", "unpack"]

FORMAT: Final = 1
HEAD_BYTES_MAX: Final = 1 << 20
CHUNK_BYTES_MAX: Final = 1 << 18
INLINE_BYTES_MAX: Final = 1 << 16
"""A topology whose chunks take no more than this is stored in its head: one value, no second read."""
RETIRED_VERSIONS: Final = 8
"""A chunk is deleted when none of this many last versions had it: readers of an old head still find it."""
_MAGIC: Final = b"SLTP"
_FILE_MAGIC: Final = b"SLTF\x01"
_PREFIX_BYTES: Final = 21
_FILE_BYTES_MAX: Final = 1 << 30

Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Version = Annotated[int, Meta(ge=0, lt=1 << 62)]


class ChunkKey(NamedTuple):
    """Where a chunk is stored: the attempt that wrote it and the digest of its content, 16 bytes each.

    An attempt is named by its version and nonce, so two writers that race never share a stored chunk, and
    whoever lost may delete what it wrote.
    """

    attempt: bytes
    digest: bytes


class Ref(msgspec.Struct, array_like=True, frozen=True):
    """One chunk of a bucket. `attempt` is an index into `Head.attempts`, or -1 for a chunk inside the head."""

    bucket: Number
    attempt: Annotated[int, Meta(ge=-1, lt=1 << 16)]
    digest: Digest


class Retired(msgspec.Struct, array_like=True, frozen=True):
    """A stored chunk that no version from `since` on refers to."""

    since: Version
    attempt: Digest
    digest: Digest


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The record that is swapped at each change."""

    version: Version
    nonce: Text
    cluster_id: Text
    hash_function: Name
    next_shard: Number
    next_gate: Number
    ring_bits: Annotated[int, Meta(ge=0, le=RING_BITS_MAX)]
    attempts: Annotated[list[Digest], Meta(max_length=1 << 16)]
    sections: dict[str, list[Ref]]
    inline: list[bytes]
    retired: list[Retired]

    def key_of(self, ref: Ref) -> ChunkKey | None:
        """Where a chunk is stored, None if it is inside the head."""
        return None if ref.attempt < 0 else ChunkKey(self.attempts[ref.attempt], ref.digest)

    def keys(self) -> set[ChunkKey]:
        """Every stored chunk that this version needs."""
        return {key for refs in self.sections.values() for ref in refs if (key := self.key_of(ref)) is not None}

    def live(self) -> set[ChunkKey]:
        """Every stored chunk that is needed, by this version or by readers of the last ones."""
        return self.keys() | {ChunkKey(item.attempt, item.digest) for item in self.retired}

    def ring_name(self) -> bytes:
        """A digest of all that the ring is made of."""
        refs = [ref for section in ("order", "ring") for ref in self.sections.get(section, ())]
        parts = [bytes([self.ring_bits]), *(ref.bucket.to_bytes(4, "little") + ref.digest for ref in refs)]
        return _digest(b"".join(parts))

    def buckets(self, section: str) -> dict[int, tuple[Ref, ...]]:
        """The chunks of each bucket of a section, in order."""
        return {bucket: tuple(refs) for bucket, refs in groupby(self.sections.get(section, ()), lambda ref: ref.bucket)}


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a publisher writes: the new chunks, then the head; and what it may delete after that."""

    head: Head
    data: bytes
    chunks: Mapping[ChunkKey, bytes]
    drop: tuple[ChunkKey, ...]


def attempt_of(version: int, nonce: str) -> bytes:
    """The 16 bytes that name an attempt to publish; the first 8 are the version."""
    return version.to_bytes(8, "big") + blake2b(nonce.encode(), digest_size=8).digest()


def encode(topology: Topology, previous: Head | None = None) -> Encoded:
    """The head, and the chunks that are not stored already.

    Args:
        topology: every shard id is `s<number>`.
        previous: the stored head; its chunks are used again where the content is the same.

    Raises:
        InvalidTopology: a shard id of another form, or a size past the limits above.
    """
    pieces = {
        name: [
            (bucket, raw[at : at + CHUNK_BYTES_MAX])
            for bucket, raw in buckets.items()
            for at in range(0, len(raw), CHUNK_BYTES_MAX)
        ]
        for name, buckets in write(topology).items()
    }
    inline = sum(len(piece) for section in pieces.values() for _, piece in section) <= INLINE_BYTES_MAX
    stored = previous.keys() if previous is not None else set()
    writers = {key.digest: key.attempt for key in stored}
    this = attempt_of(topology.version, topology.nonce)
    attempts: dict[bytes, int] = {}
    inside: dict[bytes, bytes] = {}
    chunks: dict[ChunkKey, bytes] = {}
    kept: set[ChunkKey] = set()
    sections: dict[str, list[Ref]] = {}
    for name, section in pieces.items():
        refs = sections[name] = []
        for bucket, piece in section:
            digest = _digest(piece)
            if inline:
                inside[digest] = piece
                refs.append(Ref(bucket, -1, digest))
                continue
            key = ChunkKey(writers.get(digest, this), digest)
            kept.add(key)
            if key not in stored:
                chunks[key] = piece
            refs.append(Ref(bucket, attempts.setdefault(key.attempt, len(attempts)), digest))
    retired, drop = _retire(previous, stored - kept, topology.version)
    head = Head(
        version=topology.version,
        nonce=topology.nonce,
        cluster_id=topology.cluster_id,
        hash_function=topology.hash_function,
        next_shard=topology.next_shard,
        next_gate=topology.next_gate,
        ring_bits=ring_bits(len(topology.ring.tokens)),
        attempts=list(attempts),
        sections=sections,
        inline=list(inside.values()),
        retired=retired,
    )
    return Encoded(head, pack(head), chunks, drop)


def _retire(previous: Head | None, unused: set[ChunkKey], version: int) -> tuple[list[Retired], tuple[ChunkKey, ...]]:
    """What stays for readers of old heads, and what is deleted now."""
    before = list(previous.retired) if previous is not None else []
    left = [item for item in before if item.since > version - RETIRED_VERSIONS]
    drop = tuple(ChunkKey(item.attempt, item.digest) for item in before if item.since <= version - RETIRED_VERSIONS)
    left += [Retired(version, key.attempt, key.digest) for key in sorted(unused)]
    return left, drop


def pack(head: Head) -> bytes:
    """The bytes of a head.

    Raises:
        InvalidTopology: more than `HEAD_BYTES_MAX`.
    """
    body = msgspec.msgpack.encode(head)
    if len(body) > HEAD_BYTES_MAX:
        raise InvalidTopology(
            f"the head of topology {head.version} takes {len(body)} bytes", f"the limit is {HEAD_BYTES_MAX}"
        )
    return _MAGIC + bytes([FORMAT]) + _digest(body) + body


def unpack(data: bytes) -> Head:
    """A head from its bytes.

    Raises:
        InvalidTopology: not a head, damaged, or of a format that this release does not know.
    """
    if len(data) < _PREFIX_BYTES or data[:4] != _MAGIC or len(data) > HEAD_BYTES_MAX + _PREFIX_BYTES:
        raise InvalidTopology(f"{len(data)} bytes that are no topology of shardlib", WAY_OUT)
    if data[4] != FORMAT:
        raise InvalidTopology(
            f"a topology of format {data[4]}; this release reads format {FORMAT}",
            "use the release that wrote it",
        )
    body = data[_PREFIX_BYTES:]
    if _digest(body) != data[5:_PREFIX_BYTES]:
        raise InvalidTopology("the head of a stored topology does not match its digest", WAY_OUT)
    head = read_as(body, Head, "head")
    if set(head.sections) - set(NAMES):
        raise InvalidTopology(f"topology {head.version} has unknown sections {sorted(head.sections)}", WAY_OUT)
    if any(ref.attempt >= len(head.attempts) for refs in head.sections.values() for ref in refs):
        raise InvalidTopology(f"topology {head.version} refers to a chunk that it does not name", WAY_OUT)
    return head


def decode(
    head: Head,
    fetch: Callable[[set[ChunkKey]], Mapping[ChunkKey, bytes]],
    known: Topology | None = None,
    known_head: Head | None = None,
) -> Topology:
    """The topology of a head. Buckets with the same content are taken from `known`, not fetched.

    Args:
        head: what is asked for.
        fetch: called at most once, with the chunks needed; it leaves out what is not there.
        known: a topology at hand, of any version; used only together with its head.
        known_head: the head of `known`.

    Raises:
        KeyError: the argument is the key of a chunk that was not found.
        InvalidTopology: damaged content.
    """
    wanted = {name: head.buckets(name) for name in NAMES}
    same: dict[str, set[int]] = {name: set() for name in NAMES}
    if known is not None and known_head is not None:
        for name, buckets in wanted.items():
            if name != "ring" or known_head.ring_bits == head.ring_bits:
                held = known_head.buckets(name)
                same[name] = {at for at, refs in buckets.items() if _digests(held.get(at, ())) == _digests(refs)}
    needed = {
        key
        for name, buckets in wanted.items()
        for bucket, refs in buckets.items()
        if bucket not in same[name]
        for ref in refs
        if (key := head.key_of(ref)) is not None
    }
    have = {_digest(piece): piece for piece in head.inline}
    found = fetch(needed) if needed else {}
    for key in needed:
        chunk = found[key]
        if len(chunk) > CHUNK_BYTES_MAX or _digest(chunk) != key.digest:
            raise InvalidTopology(f"a chunk of topology {head.version} does not match its digest", WAY_OUT)
        have[key.digest] = chunk

    def raw(name: str, bucket: int) -> bytes:
        try:
            return b"".join(have[ref.digest] for ref in wanted[name][bucket])
        except KeyError:
            raise InvalidTopology(f"topology {head.version} lacks a part of {name}", WAY_OUT) from None

    return _build(head, Reader(wanted, same, raw, known))


def _build(head: Head, reader: Reader) -> Topology:
    try:
        shards, owners = reader.order()
        return Topology(
            version=head.version,
            cluster_id=head.cluster_id,
            hash_function=head.hash_function,
            shards=reader.shards(shards),
            ring=reader.ring(head.ring_bits, owners, head.ring_name()),
            gates=reader.gates(),
            tables=reader.tables(),
            moves=reader.moves(),
            next_shard=head.next_shard,
            next_gate=head.next_gate,
            nonce=head.nonce,
        )
    except (InvalidArgument, ValueError, OverflowError, LookupError) as error:
        # Numbers and names that do not fit together. A DSN that does not parse says so without showing
        # itself.
        raise InvalidTopology(
            f"topology {head.version} cannot be read ({type(error).__name__}: {error})", WAY_OUT
        ) from None


def dump(topology: Topology) -> bytes:
    """The whole topology as one string of bytes, for a file. It holds the DSNs with their passwords."""
    encoded = encode(topology)
    body = msgspec.msgpack.encode([encoded.data, list(encoded.chunks.values())])
    return _FILE_MAGIC + _digest(body) + body


def parse(data: bytes) -> Topology:
    """A topology from the bytes of `dump`.

    Raises:
        InvalidTopology: not such bytes, damaged, or of an unknown format.
    """
    body = data[_PREFIX_BYTES:]
    if len(data) > _FILE_BYTES_MAX or data[:5] != _FILE_MAGIC or _digest(body) != data[5:_PREFIX_BYTES]:
        raise InvalidTopology(f"{len(data)} bytes that are no saved topology, or a damaged one", "delete the file")
    packed, pieces = read_as(body, tuple[bytes, list[bytes]], "file")
    head, chunks = unpack(packed), {_digest(piece): piece for piece in pieces}
    try:
        return decode(head, lambda keys: {key: chunks[key.digest] for key in keys})
    except KeyError:
        raise InvalidTopology(f"the file of topology {head.version} lacks a chunk", "delete the file") from None


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _digests(refs: tuple[Ref, ...]) -> list[bytes]:
    return [ref.digest for ref in refs]
