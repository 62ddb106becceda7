"""Who was promoted by somebody else: a table of cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardlib.dsn import Dsn
from shardlib_ops.failover.external import promoted
from shardlib_ops.failover.sighting import Sighting

A, B, C = (Dsn(f"postgresql://app@db-{number}:5432/shop") for number in (1, 2, 3))
OLD = Sighting(A, 1.0, system="7", standby=False, timeline=1)
GONE = Sighting(A, 2.0, fault="no answer")
NEW = Sighting(B, 2.0, system="7", standby=False, timeline=2)
REPLICA = Sighting(C, 2.0, system="7", standby=True, timeline=1, receiver="db-1:5432")
FOLLOWS = replace(REPLICA, timeline=2, receiver="db-2:5432")
DEMOTED = replace(OLD, standby=True, timeline=2)


@pytest.mark.parametrize(
    ("primary", "others", "before", "new", "reason"),
    [
        (GONE, [NEW, REPLICA], OLD, B, "timeline 2"),
        (DEMOTED, [NEW, REPLICA], OLD, B, "timeline 2"),
        (OLD, [NEW, REPLICA], OLD, B, "was on timeline 1"),
        (GONE, [NEW, FOLLOWS], None, B, "a replica follows it"),
        (GONE, [NEW, REPLICA], None, None, "cannot be told"),
        (GONE, [replace(NEW, timeline=1)], OLD, None, "no later one"),
        (OLD, [replace(NEW, timeline=1)], OLD, None, "no later one"),
        (GONE, [NEW, replace(NEW, endpoint=C)], OLD, None, "on one timeline"),
        (GONE, [NEW, replace(NEW, endpoint=C, timeline=3)], OLD, C, "timeline 3"),
    ],
)
def test_who_was_promoted(
    primary: Sighting, others: list[Sighting], before: Sighting | None, new: Dsn | None, reason: str
) -> None:
    found = promoted(primary, others, before)
    assert found is not None
    assert found.new == new
    assert reason in found.reason


@pytest.mark.parametrize("other", [REPLICA, replace(NEW, system="8"), Sighting(B, 2.0, fault="no answer")])
def test_nobody_was_promoted(other: Sighting) -> None:
    assert promoted(GONE, [other], OLD) is None
