"""When a failed unit of work runs again."""

from __future__ import annotations

import pytest

from shardlib import RetryPolicy
from shardlib.errors import CatalogUnavailable, CommitOutcomeUnknown, RetryableError, ShardUnavailable, StaleTopology
from shardlib.route.retry import next_wait

POLICY = RetryPolicy(attempts_max=4, wait_s_first=0.1, wait_s_max=0.3)


@pytest.mark.parametrize("make", [
    lambda final: StaleTopology("shard-01", 7, 3, final),
    lambda final: ShardUnavailable("shard-01", "away", final),
    lambda final: CatalogUnavailable("etcd://localhost/x", "away", final),
])  # fmt: skip
def test_what_may_do_better_runs_again_and_what_is_final_does_not(make: object) -> None:
    assert callable(make)
    again, final = make(False), make(True)
    assert isinstance(again, RetryableError)
    assert isinstance(final, RetryableError)
    assert str(again) != str(final)
    assert [next_wait(again, attempt, POLICY, 1.0) for attempt in (1, 2, 3, 4)] == [0.1, 0.2, 0.3, None]
    assert next_wait(final, 1, POLICY, 1.0) is None


def test_an_unknown_commit_never_runs_again() -> None:
    assert next_wait(CommitOutcomeUnknown("shard-01", "the connection broke"), 1, POLICY, 1.0) is None
