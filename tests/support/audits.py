"""Entries of an audit log as tests need them, and processes that write one."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

from shardlib.catalog import open_catalog
from shardlib_ops.audit import GENESIS, Actor, AuditStore, Draft, Entry, open_audit
from shardlib_ops.audit.entry import draft, seal

ALICE = Actor("alice", role="admin", address="192.0.2.7", request_id="r-1", via="http")


def some_draft(target: str = "shard-01", details: Mapping[str, object] | None = None, at: int = 0) -> Draft:
    moment = f"2026-11-24T{at // 3600:02d}:{at // 60 % 60:02d}:{at % 60:02d}.000000Z"
    return draft(
        id=secrets.token_hex(8),
        at=moment,
        kind="intent",
        actor=ALICE,
        action="shard.create",
        target=target,
        details=details,
    )


def chain(count: int) -> list[Entry]:
    entries: list[Entry] = []
    for number in range(count):
        entries.append(seal(some_draft(f"shard-{number}", at=number), entries[-1].head if entries else GENESIS))
    return entries


def append_from_threads(store: AuditStore, name: str, threads: int, each: int) -> list[tuple[int, str]]:
    """Append from many threads at once; the number and target of each entry that was acknowledged."""

    def write(thread: int) -> list[tuple[int, str]]:
        targets = [f"{name}-{thread}-{number}" for number in range(each)]
        return [(store.append(some_draft(target)).seq, target) for target in targets]

    with ThreadPoolExecutor(threads) as pool:
        return [one for part in pool.map(write, range(threads)) for one in part]


def main(audit: str, catalog: str, name: str, threads: str, each: str) -> None:
    """A process that writes once it is told to: `python -m tests.support.audits URL CATALOG NAME THREADS EACH`."""
    with ExitStack() as stack:
        beside = stack.enter_context(closing(open_catalog(catalog, timeout_s=20))) if catalog else None
        store = stack.enter_context(closing(open_audit(audit, beside, timeout_s=60)))
        store.head()
        print("ready", flush=True)
        sys.stdin.readline()
        for seq, target in append_from_threads(store, name, int(threads), int(each)):
            print(seq, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
