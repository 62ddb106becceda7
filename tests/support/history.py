"""What clients were told, held against what the shards hold. Pure: events and final rows go in, violations come out.

The checks are those of a bag (each acknowledged write is there once), of a register that one client raises (a strong
read never goes back in time) and of a counter (a write applied twice shows). They are sound and near-linear; see
Lamport, "On interprocess communication" (1986), for single-writer registers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "failed", "unknown"]


@dataclass(frozen=True, slots=True)
class Write:
    """One transaction: a row `uid` into the bag of `key`, its counter + 1, and its register raised to `value`."""

    key: str
    uid: str
    value: int | None
    began: float
    ended: float
    outcome: Outcome
    error: str = ""


@dataclass(frozen=True, slots=True)
class Read:
    """A strong read of the register of `key`. `value` None: the row was not there."""

    key: str
    value: int | None
    began: float
    ended: float
    how: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """What one shard holds at the end: uids by key (with repetitions), counters and registers by key."""

    shard: str
    bag: Mapping[str, list[str]]
    counters: Mapping[str, int]
    registers: Mapping[str, int]


def check(writes: Iterable[Write], reads: Iterable[Read], held: Iterable[Held], owners: Mapping[str, str]) -> list[str]:
    """All violations, as sentences. `owners` tells the shard that owns each key at the end."""
    writes, held = list(writes), list(held)
    return [
        *check_bag(writes, held, owners),
        *check_counters(writes, held, owners),
        *check_registers(writes, list(reads)),
    ]


def check_bag(writes: list[Write], held: list[Held], owners: Mapping[str, str]) -> list[str]:
    """Lost (acknowledged and gone), twice, ghost (refused and there), misplaced (on a shard that is not the owner)."""
    found: list[str] = []
    where: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for one in held:
        for key, uids in one.bag.items():
            for uid in uids:
                where[uid].append((one.shard, key))
                if owners[key] != one.shard:
                    found.append(f"misplaced: {uid} of {key} on {one.shard}, which {owners[key]} owns")
    for write in writes:
        places = where.get(write.uid, [])
        if len(places) > 1:
            found.append(f"twice: {write.uid} of {write.key} at {places}")
        if write.outcome == "ok" and not places:
            found.append(f"lost: {write.uid} of {write.key}, acknowledged at {write.ended:.6f}")
        if write.outcome == "failed" and places:
            found.append(f"ghost: {write.uid} of {write.key} was refused ({write.error}) and is there")
    return found


def check_counters(writes: list[Write], held: list[Held], owners: Mapping[str, str]) -> list[str]:
    """Each counter lies between acknowledged and acknowledged plus unknown writes."""
    ok, unknown = Counter[str](), Counter[str]()
    for write in writes:
        if write.outcome == "ok":
            ok[write.key] += 1
        elif write.outcome == "unknown":
            unknown[write.key] += 1
    values = {(one.shard, key): value for one in held for key, value in one.counters.items()}
    found = []
    for key, owner in owners.items():
        value = values.get((owner, key))
        if value is None:
            found.append(f"lost: the counter of {key} is not on its owner {owner}")
        elif not ok[key] <= value <= ok[key] + unknown[key]:
            found.append(f"counter of {key} is {value}, with {ok[key]} acknowledged and {unknown[key]} unknown writes")
    return found


def check_registers(writes: list[Write], reads: list[Read]) -> list[str]:
    """A read returns no less than what was acknowledged before it began, no more than was begun before it ended."""
    acked: dict[str, list[tuple[float, int]]] = defaultdict(list)
    invoked: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for write in writes:
        if write.value is None:
            continue
        if write.outcome == "ok":
            acked[write.key].append((write.ended, write.value))
        if write.outcome != "failed":
            invoked[write.key].append((write.began, write.value))
    low = {key: _running_max(pairs) for key, pairs in acked.items()}
    high = {key: _running_max(pairs) for key, pairs in invoked.items()}
    found = []
    for read in reads:
        if read.value is None:
            found.append(f"misread: {read.how} of {read.key} at {read.began:.6f} found no row")
            continue
        least = _at(low.get(read.key), read.began, bisect_left)
        most = _at(high.get(read.key), read.ended, bisect_right)
        if not least <= read.value <= most:
            found.append(
                f"stale or ghost: {read.how} of {read.key} from {read.began:.6f} to {read.ended:.6f} "
                f"returned {read.value}, allowed {least}..{most}"
            )
    return found


def _running_max(pairs: list[tuple[float, int]]) -> tuple[list[float], list[int]]:
    times: list[float] = []
    values: list[int] = []
    highest = 0
    for when, value in sorted(pairs):
        highest = max(highest, value)
        times.append(when)
        values.append(highest)
    return times, values


def _at(steps: tuple[list[float], list[int]] | None, when: float, side: object) -> int:
    if steps is None:
        return 0
    times, values = steps
    index = side(times, when)  # type: ignore[operator]
    return values[index - 1] if index else 0
