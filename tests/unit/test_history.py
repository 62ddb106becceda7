"""The checkers see what they are for: each planted fault is found, and a right history passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.history import Held, Read, Write, check

OWNERS = {"a": "s1", "b": "s2"}
WRITES = [
    Write("a", "u1", 1, 1.0, 2.0, "ok"),
    Write("a", "u2", 2, 3.0, 4.0, "ok"),
    Write("a", "u3", 3, 5.0, 6.0, "unknown"),
    Write("b", "u4", 1, 1.0, 2.0, "failed"),
    Write("b", "u5", 2, 2.5, 3.0, "ok"),
    Write("b", "u6", None, 3.0, 3.5, "ok"),
]
READS = [
    Read("a", 0, 0.5, 0.9),
    Read("a", 1, 2.5, 3.5),
    Read("a", 2, 4.5, 9.0),
    Read("a", 3, 5.5, 7.0),
    Read("b", 2, 4.0, 5.0),
]
HELD = [
    Held("s1", {"a": ["u1", "u2", "u3"]}, {"a": 3}, {"a": 3}),
    Held("s2", {"b": ["u5", "u6"]}, {"b": 2}, {"b": 2}),
]


def test_a_right_history_passes() -> None:
    assert check(WRITES, READS, HELD, OWNERS) == []


def test_an_unknown_write_may_be_absent() -> None:
    held = [Held("s1", {"a": ["u1", "u2"]}, {"a": 2}, {}), HELD[1]]
    reads = [read for read in READS if read.value != 3]
    assert check(WRITES, reads, held, OWNERS) == []


@pytest.mark.parametrize(
    ("word", "held"),
    [
        ("lost", [Held("s1", {"a": ["u1", "u3"]}, {"a": 3}, {}), HELD[1]]),
        ("lost", [Held("s1", {"a": ["u1", "u2", "u3"]}, {}, {}), HELD[1]]),
        ("twice", [Held("s1", {"a": ["u1", "u2", "u2", "u3"]}, {"a": 3}, {}), HELD[1]]),
        ("twice", [HELD[0], Held("s2", {"b": ["u5", "u6"], "a": ["u1"]}, {"b": 2}, {})]),
        ("ghost", [HELD[0], Held("s2", {"b": ["u4", "u5", "u6"]}, {"b": 2}, {})]),
        (
            "misplaced",
            [Held("s1", {"a": ["u1", "u2", "u3"], "b": ["u5", "u6"]}, {"a": 3}, {}), Held("s2", {}, {"b": 2}, {})],
        ),
        ("counter of a is 4", [Held("s1", {"a": ["u1", "u2", "u3"]}, {"a": 4}, {}), HELD[1]]),
        ("counter of b is 1", [HELD[0], Held("s2", {"b": ["u5", "u6"]}, {"b": 1}, {})]),
    ],
)
def test_a_planted_fault_of_the_rows_is_found(word: str, held: list[Held]) -> None:
    assert any(word in violation for violation in check(WRITES, READS, held, OWNERS))


@pytest.mark.parametrize(
    "read",
    [
        Read("a", 0, 2.5, 3.5),
        Read("a", 1, 4.1, 4.2),
        Read("a", 3, 4.1, 4.2),
        Read("a", None, 1.0, 1.1),
        Read("b", 1, 4.0, 5.0),
        Read("b", 3, 4.0, 5.0),
    ],
)
def test_a_planted_fault_of_a_read_is_found(read: Read) -> None:
    assert len(check(WRITES, [*READS, read], HELD, OWNERS)) == 1


def test_a_refused_write_was_never_to_be_read() -> None:
    writes = [replace(WRITES[0], outcome="failed"), *WRITES[1:]]
    assert any("ghost" in violation for violation in check(writes, READS, HELD, OWNERS))
