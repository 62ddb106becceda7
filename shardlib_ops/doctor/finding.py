"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "Limits", "Report", "Severity"]


class Severity(StrEnum):
    """How bad it is."""

    ERROR = "error"
    """Something does not work, or rows are in danger."""
    WARNING = "warning"
    """It works, and will not for ever."""
    NOTE = "note"
    """To be known; nothing needs to be done."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing.

    Attributes:
        severity: how bad it is.
        check: name of the check that found it.
        where: the name of a shard, a server, a job; or `catalog`.
        what: what is wrong, with the value that is. Without secrets.
        todo: what to do about it.
    """

    severity: Severity
    check: str
    where: str
    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.severity.value}: {self.where}: {self.what}; {self.todo}"


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on something is worth a finding.

    Attributes:
        check_s: seconds that one check of one shard may take.
        catalog_s: seconds for one answer of the catalog.
        sample_rows: rows of each table and shard whose place is looked at.
        in_doubt_s: age of a prepared transaction, in seconds.
        transaction_s: age of an open transaction, in seconds.
        slot_bytes: WAL that a server keeps for a slot that nobody reads.
        lag_bytes: WAL that a replica is behind.
        clocks_s: seconds by which two servers' clocks differ.
        transaction_ids: age of the oldest transaction id of a database, of the 2**31 that there are.
        disk_free: part of the disk that is free, where that can be told.
        quiet_s: seconds since anybody worked on a job, a promotion or a change of the tables.
        failed_s: seconds for which a job that failed is told of.
    """

    check_s: float = 30.0
    catalog_s: float = 1.0
    sample_rows: int = 1_000
    in_doubt_s: float = 60.0
    transaction_s: float = 3_600.0
    slot_bytes: int = 1 << 30
    lag_bytes: int = 64 << 20
    clocks_s: float = 2.0
    transaction_ids: int = 1_000_000_000
    disk_free: float = 0.1
    quiet_s: float = 60.0
    failed_s: float = 86_400.0


@dataclass(frozen=True, slots=True)
class Report:
    """What came out of all checks.

    Attributes:
        findings: the worst first.
        version: of the topology that everything was held against; None if the catalog did not tell.
        shards: how many there are.
        checks: names of the checks that were made.
        elapsed_s: how long it took, in seconds.
    """

    findings: tuple[Finding, ...]
    version: int | None
    shards: int
    checks: tuple[str, ...]
    elapsed_s: float

    @property
    def fine(self) -> bool:
        """Whether there is nothing to do."""
        return all(finding.severity is Severity.NOTE for finding in self.findings)
