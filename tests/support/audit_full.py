"""A process that does audited work until its log takes no more: `python -m tests.support.audit_full PATH HOW`.

HOW is `limit` (a file must not grow beyond 64 kB, by the kernel) or `disk` (the folder is a file system of 64 kB). It
prints what happened, makes room, and goes on.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from shardlib_ops.audit import Audit, AuditUnavailable, Entry, open_audit, verify, walk
from tests.support.audits import ALICE


def small(path: Path, how: str) -> Callable[[], object]:
    """Leave little room; what is returned makes more."""
    if how == "limit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    filler = path.with_name("filler")
    filler.write_bytes(b"x" * 32 * 1024)
    return filler.unlink


async def work(path: Path, how: str) -> dict[str, object]:
    release = small(path, how)
    ran = 0

    async def attempt(audit: Audit) -> None:
        nonlocal ran
        async with audit.attempt(ALICE, "shard.create", "shard-04", {"why": "x" * 700}):
            ran += 1

    async with Audit(open_audit(f"file:{path}")) as audit:
        while True:
            try:
                await attempt(audit)
            except AuditUnavailable as error:
                first = error
                break
        before = ran
        again: list[bool] = []
        for _ in range(3):
            try:
                await attempt(audit)
            except AuditUnavailable as error:
                again.append(error.done)
        after = ran
        entries = [item for item in walk(audit.store) if isinstance(item, Entry)]
        release()
        await attempt(audit)
        return {
            "reason": first.reason,
            "first_done": first.done,
            "again_done": again,
            "ran_while_full": after - before,
            "ran": before,
            "intents": sum(entry.kind == "intent" for entry in entries),
            "outcomes": sum(entry.kind == "outcome" for entry in entries),
            "entries_at_the_end": len(list(walk(audit.store))),
            "entries_while_full": len(entries),
            "findings": [one.text for one in verify(walk(audit.store))],
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(work(Path(sys.argv[1]), sys.argv[2]))))
