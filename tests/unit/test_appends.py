"""The checkers of lists and sums see what they are for: each planted fault is found, and a right history passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.appends import Append, Look, check_appends, check_sum

APPENDS = [
    Append("a", ["x"], 1.0, 2.0, "ok"),
    Append("b", ["x", "y"], 3.0, 4.0, "ok"),
    Append("c", ["y"], 5.0, 6.0, "unknown"),
    Append("d", ["x", "y"], 5.0, 6.0, "failed"),
    Append("e", ["x"], 7.0, 8.0, "ok"),
    Append("f", ["x", "y"], 7.0, 8.0, "unknown"),
]
LOOKS = [
    Look({"x": []}, 0.1, 0.2),
    Look({"x": ["a"], "y": []}, 2.5, 2.6),
    Look({"x": ["a"], "y": ["b"]}, 3.5, 3.6),  # of two shards: no snapshot is promised
    Look({"y": ["b", "c"]}, 5.5, 5.6),
]
FINAL = {"x": ["a", "b", "e"], "y": ["b", "c"]}


def test_a_right_history_passes() -> None:
    assert check_appends(APPENDS, LOOKS, FINAL) == []


def test_an_unknown_append_may_be_there() -> None:
    assert check_appends(APPENDS, LOOKS, {"x": ["a", "b", "f", "e"], "y": ["b", "c", "f"]}) == []


@pytest.mark.parametrize(
    ("word", "final"),
    [
        ("lost", {"x": ["a", "b"], "y": ["b", "c"]}),
        ("lost", {"x": ["a", "e"], "y": ["b", "c"]}),
        ("lost", {"x": ["a", "e"], "y": ["c"]}),
        ("twice", {"x": ["a", "b", "e", "b"], "y": ["b", "c"]}),
        ("ghost", {"x": ["a", "b", "d", "e"], "y": ["b", "c", "d"]}),
        ("torn", {"x": ["a", "b", "e"], "y": ["b", "c", "f"]}),
    ],
)
def test_a_planted_fault_of_the_lists_is_found(word: str, final: dict[str, list[str]]) -> None:
    assert any(word in violation for violation in check_appends(APPENDS, [], final))


@pytest.mark.parametrize(
    ("word", "look"),
    [
        ("stale", Look({"x": ["a"]}, 4.5, 4.6)),
        ("stale", Look({"x": []}, 2.1, 2.2)),
        ("early", Look({"x": ["a", "b", "e"]}, 5.0, 6.5)),
        ("another order", Look({"x": ["b"]}, 4.5, 4.6)),
        ("another order", Look({"x": ["a", "b", "d"]}, 5.5, 5.6)),
        ("misread", Look({"x": None}, 2.1, 2.2)),
    ],
)
def test_a_planted_fault_of_a_look_is_found(word: str, look: Look) -> None:
    found = check_appends(APPENDS, [*LOOKS, look], FINAL)
    assert found
    assert all(word in violation for violation in found)


def test_two_lists_in_opposite_orders_are_a_cycle() -> None:
    appends = [replace(one, keys=["x", "y"], began=1.0, ended=9.0) for one in APPENDS[:2]]
    assert "cycle" in check_appends(appends, [], {"x": ["a", "b"], "y": ["b", "a"]})[0]


def test_a_sum_that_changed_is_found() -> None:
    assert check_sum({"x": 99, "y": 101}, 200) == []
    assert check_sum({"x": 100, "y": 101}, 200)
