"""What was done to a log behind its back: pure, over entries as they are stored and heads as they were published."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

from shardlib_ops.audit.entry import GENESIS, Damaged, Entry, Head, hash_of
from shardlib_ops.audit.heads import SignedHead, find_heads

__all__ = ["CHECKPOINT", "Finding", "Report", "check", "verify"]

CHECKPOINT: Final = "audit.archive"
"""The action whose entry says that the entries before were archived: `through`, `hash`, and perhaps `head`, signed."""

Fault = Literal["removed", "changed", "swapped", "duplicated", "truncated", "forked", "signature"]


class Finding(NamedTuple):
    """One thing that is not as it was written."""

    kind: Fault
    seq: int
    """The number of the entry, of the first one if there are several."""
    text: str


class Report(NamedTuple):
    """What was looked at, and what was found."""

    findings: list[Finding]
    entries: int
    first: Head
    """The end of what was archived, of number 0 if nothing was."""
    last: Head


class _Link(NamedTuple):
    hash: str
    prev: str
    sound: bool = True
    """False for what is no entry: what its hash was is not known."""


class _Reading:
    """What is kept of the entries: the links, not the entries, so that a long log fits."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.links: dict[int, _Link] = {}
        self.checkpoints: list[Entry] = []
        self.count = 0
        self.newest = 0

    def take(self, item: Entry | Damaged) -> None:
        self.count += 1
        if isinstance(item, Damaged):
            self._damaged(item)
            return
        seq = item.seq
        known = self.links.get(seq)
        if known is not None:
            self._again(item, known)
            return
        if hash_of(item) != item.hash:
            self.findings.append(Finding("changed", seq, f"entry {seq} does not have the hash that it bears"))
        if seq < self.newest:
            self.findings.append(Finding("swapped", seq, f"entry {seq} stands behind entry {self.newest}"))
        self.newest = max(self.newest, seq)
        self.links[seq] = _Link(item.hash, item.prev)
        if item.action == CHECKPOINT and item.kind == "intent":
            self.checkpoints.append(item)

    def _damaged(self, item: Damaged) -> None:
        # The next number, as its place in the order says.
        seq = self.newest + 1
        self.findings.append(Finding("changed", seq, f"what stands behind entry {self.newest} is {item.reason}"))
        self.newest = seq
        self.links[seq] = _Link(item.hash, "", sound=False)

    def _again(self, item: Entry, known: _Link) -> None:
        if known == _Link(item.hash, item.prev):
            self.findings.append(Finding("duplicated", item.seq, f"entry {item.seq} stands in the log twice"))
        else:
            self.findings.append(Finding("forked", item.seq, f"there are two entries of number {item.seq}"))


def verify(entries: Iterable[Entry | Damaged], heads: Sequence[str] = (), key: bytes | None = None) -> list[Finding]:
    """What is wrong with a log; see `check`."""
    return check(entries, heads, key).findings


def check(entries: Iterable[Entry | Damaged], heads: Sequence[str] = (), key: bytes | None = None) -> Report:
    """Look at a whole log.

    Found are entries that were removed, changed, swapped or duplicated, a chain that was forked or written anew, and,
    by heads that were published, a tail that was cut. A log that was written anew as a whole, or whose tail was cut,
    is found by heads alone.

    Args:
        entries: in the order in which they are stored.
        heads: texts with signed heads in them, such as the log of the manager.
        key: by which the heads were signed; without it their signatures are not looked at.

    Shape: memory grows with the log, by some 400 bytes an entry.
    """
    reading = _Reading()
    for item in entries:
        reading.take(item)
    links, findings = reading.links, reading.findings
    start = min(links, default=1) - 1
    base, text = _base(start, reading, key)
    findings += [Finding("removed", 1, text)] if text else []
    findings += _gaps(links, start)
    findings += _joints(links, base)
    last = reading.newest
    for signed in {signed: None for text in heads for signed in find_heads(text)}:
        findings += _against(signed, links, base, last, key)
    findings.sort(key=lambda one: one.seq)
    return Report(findings, reading.count, base, Head(last, links[last].hash) if last else base)


def _base(start: int, reading: _Reading, key: bytes | None) -> tuple[Head, str]:
    """What the first entry that is there is chained to, and what is wrong with it.

    An archive that was interrupted may have let go of fewer entries than its checkpoint says, never of more.
    """
    if start == 0:
        return GENESIS, ""
    gone = f"entries 1 to {start} are missing" if start > 1 else "entry 1 is missing"
    found = Head(start, reading.links[start + 1].prev)
    for entry in reading.checkpoints:
        through, marked = entry.details.get("through", ""), entry.details.get("hash", "")
        if not through.isdecimal() or int(through) < start or entry.seq <= int(through):
            continue
        if key is not None:
            signed = list(find_heads(entry.details.get("head", "")))
            if not any(one.head == Head(int(through), marked) and one.signed_by(key) for one in signed):
                return found, f"{gone}, and entry {entry.seq}, which says that they were archived, is not signed so"
        link = reading.links.get(int(through))
        if marked != (found.hash if int(through) == start else link.hash if link else ""):
            return found, f"{gone}, and what was archived by entry {entry.seq} ended otherwise"
        return found, ""
    return found, f"{gone}, and no entry says that they were archived"


def _gaps(links: dict[int, _Link], start: int) -> Iterator[Finding]:
    expected = start + 1
    for seq in sorted(links):
        if seq > expected:
            which = f"entries {expected} to {seq - 1} are" if seq - 1 > expected else f"entry {expected} is"
            yield Finding("removed", expected, f"{which} missing")
        expected = seq + 1


def _joints(links: dict[int, _Link], base: Head) -> Iterator[Finding]:
    start = _Link(base.hash, "")
    for seq, link in links.items():
        before = links.get(seq - 1, start if seq - 1 == base.seq else None)
        if before is not None and before.sound and link.sound and link.prev != before.hash:
            yield Finding(
                "forked",
                seq,
                f"entry {seq} follows another entry {seq - 1} than the one that is there: "
                "that one was written anew, or the chain was forked",
            )


def _against(
    signed: SignedHead, links: dict[int, _Link], base: Head, last: int, key: bytes | None
) -> Iterator[Finding]:
    seq = signed.head.seq
    if key is not None and not signed.signed_by(key):
        yield Finding("signature", seq, f"the published head of number {seq} was not signed with this key")
    elif seq > last:
        yield Finding("truncated", last + 1, f"the log ends with entry {last}, and was seen to have {seq}")
    elif seq == base.seq and signed.head.hash != base.hash:
        yield Finding("forked", seq, f"entry {seq}, archived, is another one than was published")
    elif seq in links and links[seq].sound and links[seq].hash != signed.head.hash:
        yield Finding("forked", seq, f"entry {seq} is another one than was published: the log was written anew")
