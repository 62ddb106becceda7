"""What a verb of the world makes of a server's errors."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors as pg

from shardlib.topology import Shard
from shardlib_ops.reshard.schema.dump import Entry, explained
from shardlib_ops.reshard.side import translated
from shardlib_ops.reshard.world import Blocked, Failure, Lost
from tests.support.topologies import make_topology

PASSING = [pg.LockNotAvailable, pg.DeadlockDetected, pg.SerializationFailure, pg.ObjectInUse]


class _Verb:
    def __init__(self, error: Exception) -> None:
        self._error = error

    @translated
    async def call(self) -> None:
        raise self._error


def _shard() -> Shard:
    return make_topology().shards[0]


@pytest.mark.parametrize("kind", PASSING)
async def test_a_conflict_that_passes_is_waited_for(kind: type[psycopg.Error]) -> None:
    with pytest.raises(Blocked, match="in the way"):
        await _Verb(kind("somebody is in the way")).call()


@pytest.mark.parametrize("kind", PASSING)
def test_making_a_table_waits_for_the_same_conflicts(kind: type[psycopg.Error]) -> None:
    told = explained(kind("somebody is in the way"), _shard(), Entry("book", "TABLE", "public", b""))
    assert isinstance(told, Blocked)
    assert "TABLE public.book" in str(told)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (pg.DuplicateObject("there is such a slot"), Failure),
        (pg.CheckViolation("no such price"), Failure),
        (pg.AdminShutdown("the server goes away"), Lost),
    ],
)
async def test_what_does_not_pass_and_what_is_away_stay_what_they_are(
    error: psycopg.Error, becomes: type[Exception]
) -> None:
    with pytest.raises(becomes):
        await _Verb(error).call()
