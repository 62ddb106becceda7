"""What is asked of a job last counts; a pause keeps what was asked before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from shardlib.catalog import open_catalog
from shardlib_ops.reshard.job import Wish
from shardlib_ops.reshard.store import JobStore


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[JobStore]:
    with closing(open_catalog(f"memory://{request.node.name.translate({91: 45, 93: 45})}")) as catalog:
        yield JobStore(catalog)


def _asked(store: JobStore, *wishes: Wish) -> Wish:
    for wish in wishes:
        store.ask(7, wish)
    return store.wish(7)


@pytest.mark.parametrize("before", [Wish.ROLLBACK, Wish.COMPLETE, Wish.CANCEL])
def test_a_resumed_job_goes_on_with_what_was_asked_before_the_pause(store: JobStore, before: Wish) -> None:
    assert _asked(store, before, Wish.PAUSE) is Wish.PAUSE
    assert _asked(store, Wish.PAUSE) is Wish.PAUSE
    assert _asked(store, Wish.RUN) is before
    assert _asked(store, Wish.RUN) is Wish.RUN


def test_without_a_pause_the_last_wish_counts(store: JobStore) -> None:
    assert store.wish(7) is Wish.RUN
    assert _asked(store, Wish.PAUSE, Wish.RUN) is Wish.RUN
    assert _asked(store, Wish.ROLLBACK, Wish.RUN) is Wish.RUN
    assert _asked(store, Wish.ROLLBACK, Wish.PAUSE, Wish.COMPLETE) is Wish.COMPLETE
    assert _asked(store, Wish.RUN, Wish.PAUSE, Wish.RUN) is Wish.RUN
