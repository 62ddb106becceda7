"""Cutting tables into chunks, and finding the rows that move in COPY data that is cut anywhere."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from shardlib.key.composite import join_parts
from shardlib.ring import TokenRange
from shardlib.ring.ranges import merge_ranges, ranges_contain
from shardlib.token import hash_of
from shardlib_ops.reshard.copy.chunks import Chunk, chunks_of
from shardlib_ops.reshard.copy.sieve import BinarySieve, Pass, Sieve, TextSieve
from shardlib_ops.reshard.lines import binary_alike, bucket_table, points_of, whole_lines
from shardlib_ops.reshard.rows import Column

STEP = 1 << 60
RANGES = (*(TokenRange(at * STEP, (at + 1) * STEP - 1) for at in range(0, 16, 2)), TokenRange(STEP + 5, STEP + 10**15))
HEADER, TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


def test_chunks_cover_every_block_once(rng: random.Random) -> None:
    for _ in range(500):
        blocks = rng.choice([0, 1, 2, rng.randrange(10_000)])
        total = blocks * 8192 * rng.choice([1, 1, 3, 100])
        wanted = rng.choice([1, 8192, 1 << 20, 1 << 40])
        chunks = chunks_of(blocks, total, wanted)
        assert chunks[0].first == 0
        assert chunks[-1].stop is None, "blocks that came after the table was measured"
        for left, right in itertools.pairwise(chunks):
            assert left.stop == right.first > left.first
        assert chunks[-1].first < max(1, blocks)
        per_block = max(8192, total // max(1, blocks))
        for chunk in chunks[:-1]:
            assert chunk.stop is not None
            assert (chunk.stop - chunk.first) * per_block <= max(wanted, per_block)


def test_conditions() -> None:
    assert Chunk(3, 7).condition() == "t.ctid >= '(3,0)' AND t.ctid < '(7,0)'"
    assert Chunk(3, None).condition("x") == "x.ctid >= '(3,0)'"


def test_bucket_tables_agree_with_the_ranges(rng: random.Random) -> None:
    for _ in range(40):
        bounds = sorted(
            {rng.choice([rng.getrandbits(64), rng.getrandbits(16) << 48, 0, (1 << 64) - 1]) for _ in range(20)}
        )
        ranges = tuple(TokenRange(*pair) for pair in zip(bounds[::2], bounds[1::2], strict=False))
        table, normal = bucket_table(points_of(ranges)), merge_ranges(ranges)
        assert len(table) == 65_536
        near = [bound + more for bound in bounds for more in (-1, 0, 1) if 0 <= bound + more < 1 << 64]
        for token in [*near, *(rng.getrandbits(64) for _ in range(2000))]:
            assert table[token >> 48] in (2, ranges_contain(normal, token))
        assert list(table).count(2) <= len(bounds)


def columns(*types: str) -> list[Column]:
    return [Column(f"c{n}", kind, kind, generated=False, not_null=False) for n, kind in enumerate(types)]


@pytest.mark.parametrize(
    ("left", "right", "alike"),
    [
        (["text", "numeric(10,2)", "bit(3)[]"], ["text", "numeric(10,2)", "bit(3)[]"], True),
        (["timestamp(3) with time zone[]"], ["timestamp(3) with time zone[]"], True),
        (["character varying(20)"], ["character varying(30)"], False),
        (["text"], ["character varying"], False),
        (["public.mood"], ["public.mood"], False),
        (["public.mood[]"], ["public.mood[]"], False),
        (["regclass"], ["regclass"], False),
        (["money"], ["money"], False),
        (["text"], [], False),
    ],
)  # fmt: skip
def test_binary_only_where_it_means_the_same_on_both_sides(left: list[str], right: list[str], alike: bool) -> None:
    assert binary_alike(columns(*left), columns(*right)) is alike


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    """Anywhere, and most often into small pieces."""
    pieces = []
    while data:
        size = rng.choice([1, 1, 2, 7, 100, 5000, len(data)])
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def passed(sieve: Sieve, pieces: Sequence[bytes]) -> bytes:
    return b"".join([*(sieve.feed(piece) for piece in pieces), sieve.finish()])


def test_whole_lines_of_a_stream_cut_anywhere(rng: random.Random) -> None:
    lines = [bytes(rng.choices(b"abc\t\\", k=rng.choice([0, 3, 50, 9000]))) for _ in range(100)]
    pending: list[bytes] = []
    found = [
        line for piece in cut(rng, b"".join(line + b"\n" for line in lines)) for line in whole_lines(pending, piece)
    ]
    assert found == lines
    assert not pending


def random_keys(rng: random.Random, parts: int) -> list[tuple[str, ...] | None]:
    texts = ["", "\\N", "\t", "a\\b\n", "é☃", "x" * 255, "x" * 256, "y" * 70_000, "k" * 65_536]
    return [
        None if rng.random() < 0.05
        else tuple(rng.choice(texts) if rng.random() < 0.1 else f"key{rng.random()}" for _ in range(parts))
        for _ in range(300)
    ]  # fmt: skip


def moves(key: tuple[str, ...] | None, hash_function: str) -> bool:
    if key is None:
        return False
    token = hash_of(hash_function)(join_parts(part.encode() for part in key))
    return ranges_contain(merge_ranges(RANGES), token)


ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n"})


@pytest.mark.parametrize("hash_function", ["murmur3", "xxhash"])
@pytest.mark.parametrize("parts", [1, 3])
def test_text_that_moves(rng: random.Random, hash_function: str, parts: int) -> None:
    keys = random_keys(rng, parts)
    lines = []
    for number, key in enumerate(keys):
        fields = ["\\N"] * parts if key is None else [part.translate(ESCAPES) for part in key]
        lines.append("\t".join([*fields, str(number), "\\N"]).encode() + b"\n")
    wanted = b"".join(line for line, key in zip(lines, keys, strict=True) if moves(key, hash_function))
    assert passed(TextSieve(RANGES, hash_function, parts), cut(rng, b"".join(lines))) == wanted != b""


def binary_row(*fields: bytes | None) -> bytes:
    return len(fields).to_bytes(2, "big") + b"".join(
        b"\xff" * 4 if field is None else len(field).to_bytes(4, "big") + field for field in fields
    )


@pytest.mark.parametrize("hash_function", ["murmur3", "xxhash"])
@pytest.mark.parametrize("separate", [False, True])
def test_binary_rows_that_move(rng: random.Random, hash_function: str, separate: bool) -> None:
    mark = rng.randbytes(16)
    keys = random_keys(rng, 1)
    read, wanted = [HEADER], [HEADER]
    for number, key in enumerate(keys):
        text = None if key is None else key[0].encode()
        rest = (number.to_bytes(4, "big"), None, mark[:-1], rng.randbytes(rng.choice([0, 3, 20_000])), TRAILER)
        row = (None, *rest) if separate else (text, *rest)
        read.append(binary_row(mark, *([text] if separate else []), *row))
        if moves(key, hash_function):
            wanted.append(binary_row(*row))
    sieve = BinarySieve(mark, 6, separate_key=separate, ranges=RANGES, hash_function=hash_function)
    found = passed(sieve, cut(rng, b"".join([*read, TRAILER])))
    assert found == b"".join([*wanted, TRAILER])
    assert len(wanted) > 50


def test_binary_without_rows(rng: random.Random) -> None:
    for rows in ([], [binary_row(b"m" * 16, None)]):
        sieve = BinarySieve(b"m" * 16, 1, separate_key=False, ranges=RANGES, hash_function="murmur3")
        assert passed(sieve, cut(rng, b"".join([HEADER, *rows, TRAILER]))) == HEADER + TRAILER


@pytest.mark.parametrize("data", [b"", HEADER, b"not binary" + TRAILER, HEADER + binary_row(b"m" * 16, b"key")])
def test_binary_that_is_cut_is_noticed(data: bytes) -> None:
    sieve = BinarySieve(b"m" * 16, 1, separate_key=False, ranges=RANGES, hash_function="murmur3")
    with pytest.raises(ValueError, match="binary COPY"):
        passed(sieve, [data])


def test_what_the_server_picked_passes() -> None:
    assert passed(Pass(), [b"a", b"b"]) == b"ab"
