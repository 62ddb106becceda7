"""Old entries leave the log for a file, and the chain still holds: an entry says how far the file goes."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from shardlib.errors import InvalidArgument
from shardlib_ops.audit.audit import Audit
from shardlib_ops.audit.base import AuditStore, walk
from shardlib_ops.audit.entry import Actor, Damaged, Entry, Head, encode
from shardlib_ops.audit.errors import AuditUnavailable
from shardlib_ops.audit.heads import sign_head
from shardlib_ops.audit.verify import CHECKPOINT, Finding, check

__all__ = ["Archived", "Unsound", "archive"]


class Unsound(InvalidArgument):
    """The log does not verify: it is evidence, and nothing of it is cut.

    Attributes:
        findings: what is wrong.
    """

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("audit", f"{len(findings)} findings", "only a log that `audit verify` finds whole is archived")
        self.findings = tuple(findings)

    def __reduce__(self) -> tuple[type[Unsound], tuple[tuple[Finding, ...]]]:
        return (Unsound, (self.findings,))


class Archived(NamedTuple):
    """What went to the file."""

    entries: int
    through: Head
    """The last of them."""
    sha256: str
    """Of the file."""


async def archive(
    audit: Audit, actor: Actor, before: str, to: Path, *, key: bytes | None = None, heads: Sequence[str] = ()
) -> Archived | None:
    """Move the entries before a moment to a file: lines of JSON, to be read as the log `file:/path`.

    First the whole log is verified and the file is on disk; then an entry says how far it goes, signed if there is a
    key; then the store lets go of the entries. An archive that was interrupted is completed by the next one. The newest
    entry always stays.

    Args:
        audit: the log.
        actor: who asks for it.
        before: UTC, ISO 8601; entries older than it go, up to the first that is not.
        to: a file that is not there yet; it is readable by its owner only.
        key: as for signed heads; `verify` with a key asks for it.
        heads: as for `verify`.

    Returns:
        what was archived, None if nothing is as old.

    Raises:
        Unsound: the log does not verify.
        InvalidArgument: the file is there already, or cannot be written.
        AuditUnavailable: no answer.
    """
    store = audit.store
    found = await asyncio.to_thread(_write, store, before, to, key, heads)
    if found is None:
        return None
    seq, end = found.through
    details: dict[str, object] = {"through": seq, "hash": end, "entries": found.entries, "sha256": found.sha256}
    if key is not None:
        details["head"] = sign_head(key, found.through)
    async with audit.attempt(actor, CHECKPOINT, str(to), details) as attempt:
        attempt.result(cut=await asyncio.to_thread(store.cut, seq))
    return found


def _write(store: AuditStore, before: str, to: Path, key: bytes | None, heads: Sequence[str]) -> Archived | None:
    report = check(walk(store), heads, key)
    if report.findings:
        raise Unsound(report.findings)
    old = list(_numbers(store, before, report.last.seq))
    if not old:
        return None
    digest, last = hashlib.sha256(), old[-1]
    count = 0
    end: Head | None = None
    try:
        handle = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            for item in walk(store):
                if isinstance(item, Damaged):
                    raise AuditUnavailable(store.safe_url, "it was changed while it was read")
                if item.seq > last:
                    break
                line = encode(item) + b"\n"
                digest.update(line)
                file.write(line)
                count, end = count + 1, item.head
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InvalidArgument("to", str(to), f"a new file that can be written ({error.strerror})") from error
    if end is None or end.seq != last:
        raise AuditUnavailable(store.safe_url, "it was changed while it was read")
    return Archived(count, end, digest.hexdigest())


def _numbers(store: AuditStore, before: str, newest: int) -> Iterator[int]:
    for item in walk(store):
        if isinstance(item, Entry) and item.at < before and item.seq < newest:
            yield item.seq
        else:
            return
