"""The helper that other tests wait with."""

from __future__ import annotations

import pytest

from tests.support.eventually import eventually, eventually_async


def test_returns_the_first_true_answer() -> None:
    answers = iter([0, "", 7])
    assert eventually(lambda: next(answers), 5) == 7


def test_says_what_was_seen_last() -> None:
    with pytest.raises(AssertionError, match=r"not within 0.05 s: the moon is full; last seen: 0"):
        eventually(lambda: 0, 0.05, "the moon is full")


def test_ignores_only_the_errors_it_was_told_of() -> None:
    with pytest.raises(AssertionError, match="KeyError"):
        eventually(lambda: {}["x"], 0.05, ignore=KeyError)
    with pytest.raises(KeyError):
        eventually(lambda: {}["x"], 0.05, ignore=ValueError)


async def test_asks_coroutines_too() -> None:
    answers = iter([False, True])

    async def ask() -> bool:
        return next(answers)

    assert await eventually_async(ask, 5)
