"""Lists that only grow, and accounts whose sum stays: what clients saw of them, held against what is there. Pure.

After Kingsbury and Alvaro, "Elle: Inferring Isolation Anomalies from Experimental Observations" (2020): the elements
are unique, so the final list of a key tells the order of its versions, and every read tells which version it saw.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from tests.support.history import Outcome


@dataclass(frozen=True, slots=True)
class Append:
    """One transaction: `element` appended to the list of each of `keys`."""

    element: str
    keys: Sequence[str]
    began: float
    ended: float
    outcome: Outcome
    error: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """One transaction: what the lists held. `None`: the row was not there."""

    lists: Mapping[str, Sequence[str] | None]
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """One transaction: one coin from an account to another, perhaps on another shard."""

    giver: str
    taker: str
    outcome: Outcome
    error: str = ""


def check_appends(appends: Iterable[Append], looks: Iterable[Look], final: Mapping[str, Sequence[str]]) -> list[str]:
    """Lost, twice, ghost, torn (in one list and not in the other), stale, another order, cycles (G0, G1c)."""
    appends, looks = list(appends), list(looks)
    by_element = {one.element: one for one in appends}
    found = [*_final(appends, final)]
    for look in looks:
        for key, seen in look.lists.items():
            found += _looked(look, key, seen, list(final[key]), by_element, appends)
    if not found and (cycle := _cycle(looks, final)) is not None:
        found.append(f"cycle of writes and reads: {cycle}")
    return found


def _final(appends: list[Append], final: Mapping[str, Sequence[str]]) -> Iterable[str]:
    where: dict[str, list[str]] = defaultdict(list)
    for key, elements in final.items():
        for element, times in Counter(elements).items():
            where[element].append(key)
            if times > 1:
                yield f"twice: {element} is {times} times in the list of {key}"
    for one in appends:
        there, wanted = sorted(where.get(one.element, [])), sorted(one.keys)
        if one.outcome == "failed" and there:
            yield f"ghost: {one.element} was refused ({one.error}) and is in the lists of {there}"
        elif one.outcome == "ok" and there != wanted:
            yield f"lost: {one.element}, acknowledged at {one.ended:.6f} for {wanted}, is in the lists of {there}"
        elif there and there != wanted:
            yield f"torn: {one.element} for {wanted} is in the lists of {there} alone"


def _looked(
    look: Look,
    key: str,
    seen: Sequence[str] | None,
    final: list[str],
    by_element: Mapping[str, Append],
    appends: list[Append],
) -> list[str]:
    when = f"the list of {key}, read from {look.began:.6f} to {look.ended:.6f}"
    if seen is None:
        return [f"misread: {when}, was not there"]
    if list(seen) != final[: len(seen)]:
        return [f"another order: {when}, was {list(seen)[-5:]}, no beginning of the last one"]
    found = [
        f"early: {when}, held {element}, which began at {by_element[element].began:.6f}"
        for element in seen
        if by_element[element].began > look.ended
    ]
    here = set(seen)
    found += [
        f"stale: {when}, lacked {one.element}, acknowledged at {one.ended:.6f}"
        for one in appends
        if one.outcome == "ok" and key in one.keys and one.ended < look.began and one.element not in here
    ]
    return found


def _cycle(looks: list[Look], final: Mapping[str, Sequence[str]]) -> list[str] | None:
    """A cycle of ww and wr edges: each append comes after the one it follows, each read after the last it saw."""
    after = TopologicalSorter[str]()
    for elements in final.values():
        for before, next_ in pairwise(elements):
            after.add(next_, before)
    for number, look in enumerate(looks):
        for seen in look.lists.values():
            if seen:
                after.add(f"read {number}", seen[-1])
    try:
        after.prepare()
    except CycleError as error:
        return [str(name) for name in error.args[1]]
    return None


def check_sum(balances: Mapping[str, int], total: int) -> list[str]:
    """Transfers make and lose nothing."""
    there = sum(balances.values())
    return [] if there == total else [f"the accounts hold {there} together, and began with {total}: {dict(balances)}"]
