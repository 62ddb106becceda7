"""The audit log: who asked for what, on what, and what came of it. Append-only, and chained by hashes.

An entry of the intent is stored before anything is done, one of the outcome after it; while the log cannot be written
nothing is done. Each entry holds the hash of the one before. Signed heads, kept elsewhere, show a cut tail.
"""

from __future__ import annotations

from shardlib_ops.audit.archive import Archived, Unsound, archive
from shardlib_ops.audit.audit import Attempt, Audit
from shardlib_ops.audit.base import AuditStore, Page, walk
from shardlib_ops.audit.entry import GENESIS, Actor, Damaged, Draft, Entry, Head
from shardlib_ops.audit.errors import AuditUnavailable
from shardlib_ops.audit.heads import SignedHead, find_heads, read_key, sign_head
from shardlib_ops.audit.open import open_audit
from shardlib_ops.audit.verify import Finding, Report, check, verify

__all__ = [
    "GENESIS",
    "Actor",
    "Archived",
    "Attempt",
    "Audit",
    "AuditStore",
    "AuditUnavailable",
    "Damaged",
    "Draft",
    "Entry",
    "Finding",
    "Head",
    "Page",
    "Report",
    "SignedHead",
    "Unsound",
    "archive",
    "check",
    "find_heads",
    "open_audit",
    "read_key",
    "sign_head",
    "verify",
    "walk",
]
