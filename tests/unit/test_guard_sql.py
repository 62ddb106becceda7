"""The guard's hashes, computed by real servers, are the library's."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from shardlib.errors import InvalidArgument
from shardlib.token import hash_of
from shardlib_ops import LocalCluster
from shardlib_ops.reshard.guard import token_function
from shardlib_ops.reshard.guard.arithmetic import signed

_DEBIAN = Path("/usr/lib/postgresql/15/bin")
_EDGES = sorted(
    {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 143, 144, 145, 239, 240, 241, 255}
    | {256, 257, 320, 321, 511, 512, 513, 1023, 1024, 1025, 1088, 1089, 2047, 2048, 2049, 2112, 2113, 4097}
)


def the_version(name: str) -> dict[str, Any]:
    if name == "18":
        return {}
    if not _DEBIAN.is_dir():
        pytest.skip("no PostgreSQL 15 in /usr/lib/postgresql/15: the form for servers before 18 is not tried")
    return {"pg_bin": _DEBIAN}


@pytest.fixture(scope="module", params=["18", "15"])
def server(request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Any]]:
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(shards=1, bootstrap=False, **the_version(request.param)))
        yield stack.enter_context(psycopg.connect(cluster.servers[0].dsn, autocommit=True))


def keys(seed: int) -> list[bytes]:
    source = random.Random(seed)
    plain = [source.randbytes(length) for length in [*range(301), *_EDGES] for _ in range(6)]
    texts = ["".join(chr(source.choice((65, 233, 0x20AC, 0x1F600)) + source.randrange(16)) for _ in range(n))
             for n in range(70) for _ in range(12)]  # fmt: skip
    extreme = [bytes([value]) * length for value in (0, 127, 128, 255) for length in [*range(64), *_EDGES]]
    numbers = [str(source.randrange(-(1 << 63), 1 << 63)).encode() for _ in range(500)]
    return plain + [text.encode() for text in texts] + extreme + numbers


@pytest.mark.parametrize("hash_function", ["murmur3", "xxhash"])
def test_each_key_has_the_token_of_the_library(server: psycopg.Connection[Any], hash_function: str) -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print(f"SEED={seed}")
    name = sql.Identifier(f"hash_{hash_function}")
    server.execute(token_function(name, hash_function, server.info.server_version))
    token, wanted = hash_of(hash_function), keys(seed)
    assert len(wanted) > 3000
    with server.cursor(binary=True) as cursor:
        cursor.execute(
            sql.SQL("SELECT key, {}(key) FROM unnest(%b::bytea[]) WITH ORDINALITY AS u(key, n) ORDER BY n").format(
                name
            ),
            (wanted,),
        )
        found = cursor.fetchall()
    assert [bytes(key) for key, _ in found] == wanted
    wrong = {len(key) for key, value in found if value != signed(token(bytes(key)))}
    assert not wrong, f"keys of these lengths have other tokens: {sorted(wrong)}"


def test_an_unknown_hash_function_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="sha256"):
        token_function(sql.Identifier("f"), "sha256", 18_00_00)
