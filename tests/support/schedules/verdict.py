"""What must hold when a schedule is over: the history, where each row lies, and that nothing of the jobs is left."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psycopg

from shardlib.dsn import Dsn
from shardlib.fence import list_gates
from shardlib.token import hash_of
from shardlib.topology import Topology
from shardlib_ops.reshard.cleanup.retire import leftovers
from shardlib_ops.reshard.job import Job
from tests.support.appends import Append, Look, Transfer, check_appends, check_sum
from tests.support.history import Held, Read, Write, check
from tests.support.schedules.arena import BALLAST, COINS, KEYS, Place, rows_of

KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Write, Read, Append, Look, Transfer)}


class History:
    """What all clients were told."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.events: dict[type[Any], list[Any]] = defaultdict(list)
        for path in files:
            for line in path.read_text(encoding="utf-8").splitlines():
                event = json.loads(line)
                kind = KINDS[event.pop("kind")]
                self.events[kind].append(kind(**event))

    @property
    def outcomes(self) -> Counter[str]:
        """What was said of the transactions that wrote, and how many reads there were."""
        found = Counter(event.outcome for kind in (Write, Append, Transfer) for event in self.events[kind])
        found["read"] = len(self.events[Read]) + len(self.events[Look])
        return found

    @property
    def errors(self) -> Counter[str]:
        """Names of the errors of those that were not ok."""
        return Counter(
            event.error.split(":")[0]
            for kind in (Write, Append, Transfer)
            for event in self.events[kind]
            if event.error
        )


def check_all(place: Place, topology: Topology, jobs: Sequence[Job], history: History) -> list[str]:
    """All violations, as sentences."""
    return [
        *check_rows(place, topology, history),
        *check_left(place, topology, jobs),
    ]


def check_rows(place: Place, topology: Topology, history: History) -> list[str]:
    """The history against the rows, and every row on its owner."""
    token = hash_of(topology.hash_function)
    owners = {key: topology.place(token(key.encode())).shard.name for key in KEYS}
    held, found = [], list[str]()
    elements: dict[str, list[str]] = {}
    coins: dict[str, int] = {}
    ballast: dict[str, int] = dict.fromkeys(KEYS, 0)
    for name, dsn in zip(place.shards, place.dsns, strict=True):
        bag: dict[str, list[str]] = defaultdict(list)
        for key, uid in rows_of(dsn, "SELECT key, uid FROM bag"):
            bag[key].append(uid)
        counters, registers = (dict(rows_of(dsn, f"SELECT key, v FROM {table}")) for table in ("counter", "register"))
        held.append(Held(name, bag, counters, registers))
        mine = {key: str(text).split() for key, text in rows_of(dsn, "SELECT key, elements FROM lists")}
        money = dict(rows_of(dsn, "SELECT key, coins FROM account"))
        weights = dict(rows_of(dsn, "SELECT key, count(*) FROM ballast GROUP BY key"))
        for what, keys in (("counter", counters), ("register", registers), ("lists", mine), ("account", money),
                           ("ballast", weights)):  # fmt: skip
            found += [
                f"misplaced: row of {key} in {what} on {name}, which {owners[key]} owns"
                for key in keys
                if owners[key] != name
            ]
        elements |= {key: rows for key, rows in mine.items() if owners[key] == name}
        coins |= {key: count for key, count in money.items() if owners[key] == name}
        ballast |= {key: count for key, count in weights.items() if owners[key] == name}
    events = history.events
    found += check(events[Write], events[Read], held, owners)
    found += [f"lost: {key} has no list" for key in KEYS if key not in elements]
    found += check_appends(events[Append], events[Look], {key: elements.get(key, []) for key in KEYS})
    found += check_sum(coins, COINS * len(KEYS))
    found += [f"ballast of {key}: {count} rows of {BALLAST}" for key, count in ballast.items() if count != BALLAST]
    return found


def check_left(place: Place, topology: Topology, jobs: Sequence[Job]) -> list[str]:
    """Nothing of a job is on a shard, in the topology, or prepared; gates are those of the topology."""
    found = [f"the topology holds a move of job {move.job}" for move in topology.moves]
    for name, dsn in zip(place.shards, place.dsns, strict=True):
        shard = topology.shard(name)
        with psycopg.connect(dsn, autocommit=True) as conn:
            named, there = set(topology.gates_of(shard.id)), set(list_gates(conn))
            if named != there:
                found.append(
                    f"gates of {name}: {sorted(there)}, the topology names {sorted(named)} of {topology.next_gate}"
                )
            found += [f"prepared on {name}: {gid}" for (gid,) in conn.execute(
                "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")]  # fmt: skip
            found += [f"slot on {name}: {slot}" for (slot,) in conn.execute(
                "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()")]  # fmt: skip
            found += [f"on {name}: publication {one}" for (one,) in conn.execute("SELECT pubname FROM pg_publication")]
            found += [f"trigger on {name}: {one}" for (one,) in conn.execute(
                "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")]  # fmt: skip
        found += [f"left of job {job.id} on {name}: {what}" for job in jobs for what in asyncio.run(_left(dsn, job.id))]
    return found


async def _left(dsn: str, job: int) -> list[str]:
    async with await psycopg.AsyncConnection.connect(Dsn(dsn).conninfo(), autocommit=True) as conn:
        return await leftovers(conn, job)
