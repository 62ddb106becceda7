"""Every error of shardlib: what went wrong, the offending value, and the way out.

::

    ShardlibError
     ├─ RetryableError                     the work did not come about; running it again is safe
     │   ├─ StaleTopology                  the shard has closed the gate this client came through
     │   ├─ ShardUnavailable               no server of the shard answered, or it refused the login
     │   ├─ CatalogUnavailable             the catalog did not answer, or it refused the login
     │   ├─ PoolTimeout                    no connection became free in time
     │   └─ LockTimeout                    a change of the tables waited too long for another transaction
     ├─ BulkLoadIncomplete                 a bulk load is committed on some shards and not on others
     ├─ CommitOutcomeUnknown               COMMIT was sent, its answer never came: never retried by itself
     ├─ ShardKeyRequired                   the statement or row names no shard key
     ├─ ShardKeyMismatch                   a key other than the one the session is pinned to
     ├─ ShardKeyChanged                    an UPDATE would change the shard key of a row
     ├─ InvalidShardKey                    a value that cannot be a shard key
     ├─ CrossShardTransaction              writes on several shards without two-phase commit
     ├─ UnsupportedCrossShardQuery         an answer over several shards that would need a merge
     ├─ UnsupportedOperation               something the fence cannot protect, or a shard cannot do
     ├─ InvalidTopology                    a topology, catalog or shard database that does not fit
     └─ InvalidArgument                    an option with a wrong value (also a ValueError)

Errors pickle, carry their values as attributes, and never hold a password. `shard`, where there is one, is the name of
the shard, as it stands in the message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "BulkLoadIncomplete",
    "CatalogUnavailable",
    "CommitOutcomeUnknown",
    "CrossShardTransaction",
    "InvalidArgument",
    "InvalidShardKey",
    "InvalidTopology",
    "LockTimeout",
    "PoolTimeout",
    "RetryableError",
    "ShardKeyChanged",
    "ShardKeyMismatch",
    "ShardKeyRequired",
    "ShardUnavailable",
    "ShardlibError",
    "StaleTopology",
    "UnsupportedCrossShardQuery",
    "UnsupportedOperation",
]


def _shown(value: object) -> str:
    """`repr` of a value, cut so that a message stays readable."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


class ShardlibError(Exception):
    """Base of every error that shardlib raises on purpose."""


class RetryableError(ShardlibError):
    """The work did not come about, and running the whole of it again is safe.

    A transaction left nothing behind. What is done in steps, such as tables on one shard after the other or a change of
    the topology, may have come a part of the way: the same again completes it. Three of these errors have a `final`; if
    it is True, running the work again is safe and useless until somebody changes what it tells.
    """


class StaleTopology(RetryableError):
    """The shard's database has closed the gate this client came through. Nothing of the transaction was applied.

    Attributes:
        shard: name of the shard.
        gate: number of the closed gate; less than 0: of the job whose key table says that the key has left.
        version: of the topology that the client routed by.
        final: the work had not begun, and waited `reroute_timeout_s` for a topology with an open gate: none came.
            `engine.run` does not wait as long again.
    """

    def __init__(self, shard: str, gate: int, version: int, final: bool = False) -> None:
        super().__init__(shard, gate, version, final)
        self.shard, self.gate, self.version, self.final = shard, gate, version, final

    def __str__(self) -> str:
        what = f"gate {self.gate}" if self.gate >= 0 else f"the key table of job {-self.gate}"
        if self.final:
            return (
                f"{what} of shard {self.shard!r} is closed, and within reroute_timeout_s no topology with an open one "
                f"came (this client has {self.version}); rows are being moved and nobody goes on with it, or this "
                "client does not hear the catalog: `shardlib-ops reshard list` tells"
            )
        return (
            f"{what} of shard {self.shard!r} is closed; this client routed by topology {self.version}; "
            "call engine.refresh() and run the unit of work again, or let engine.run() do it"
        )


class ShardUnavailable(RetryableError):
    """No server of the shard could be reached, it refused the login, or it began no transaction in time.

    What is done in steps may have been under way when the connection broke or fell silent: of a `bulk_load` nothing is
    kept unless it is a `BulkLoadIncomplete`; tables that were being made or dropped may be done, also on this shard.

    Attributes:
        shard: name of the shard.
        reason: why, without secrets.
        final: the server is there and refuses who we are (a wrong password, an unknown role or database). Running
            the work again is still safe, and useless until somebody changes that: `engine.run` does not.
    """

    def __init__(self, shard: str, reason: str, final: bool = False) -> None:
        super().__init__(shard, reason, final)
        self.shard, self.reason, self.final = shard, reason, final

    def __str__(self) -> str:
        if self.final:
            return (
                f"shard {self.shard!r} lets nobody in: {self.reason}; correct its DSN in the catalog (or the password "
                "that it refers to), or the role on the server; other shards are not affected"
            )
        return f"shard {self.shard!r} is not reachable: {self.reason}; other shards are not affected"


class CatalogUnavailable(RetryableError):
    """The catalog did not answer in time, or refused this client. Reads and writes go on from the cached topology.

    Attributes:
        catalog: its URL, without secrets.
        reason: why, without secrets.
        final: the catalog is there and refuses who we are, or what we ask of it (a wrong password, a role without the
            rights). It had no effect, and the same again is useless until somebody changes that: `engine.run` does not.
    """

    def __init__(self, catalog: str, reason: str, final: bool = False) -> None:
        super().__init__(catalog, reason, final)
        self.catalog, self.reason, self.final = catalog, reason, final

    def __str__(self) -> str:
        if self.final:
            return (
                f"catalog {self.catalog} refuses this client: {self.reason}; correct the user or the password in its "
                "URL (or what the password refers to), or the rights of the user there"
            )
        return (
            f"catalog {self.catalog} is not reachable: {self.reason}; check that it runs and that the URL is right "
            "(an application can start without it from a saved topology: topology_file=...)"
        )


class PoolTimeout(RetryableError):
    """No connection to the shard became free within the wait limit."""

    def __init__(self, shard: str, timeout_s: float, detail: str) -> None:
        super().__init__(shard, timeout_s, detail)
        self.shard, self.timeout_s, self.detail = shard, timeout_s, detail

    def __str__(self) -> str:
        return (
            f"no connection to shard {self.shard!r} became free within {self.timeout_s:g} s ({self.detail}); "
            "raise pool_size or max_connections, or hold transactions for less time"
        )


class LockTimeout(RetryableError):
    """A change of a shard's tables waited too long for a lock that other transactions hold.

    Nothing of it was applied there. Other shards may have their tables already.
    """

    def __init__(self, shard: str, timeout_s: float, holders: str) -> None:
        super().__init__(shard, timeout_s, holders)
        self.shard, self.timeout_s, self.holders = shard, timeout_s, holders

    def __str__(self) -> str:
        return (
            f"no lock on the tables of shard {self.shard!r} within {self.timeout_s:g} s: {self.holders}; "
            "end what holds them, or wait until it has ended, and run it again"
        )


class CommitOutcomeUnknown(ShardlibError):
    """COMMIT was sent and its answer did not come, or came without the guarantee asked for.

    The transaction may or may not be durable. It is never retried by shardlib, since that could apply it twice:
    read back what the transaction wrote (an id of yours in it tells), then decide.
    """

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(shard, reason)
        self.shard, self.reason = shard, reason

    def __str__(self) -> str:
        return (
            f"the outcome of a COMMIT on shard {self.shard!r} is unknown: {self.reason}; "
            "read back what it wrote before running it again"
        )


class BulkLoadIncomplete(ShardlibError):
    """A bulk load failed after a part of it was committed. Its `__cause__` is the first failure.

    Attributes:
        table: the table that was loaded.
        committed: shard name -> rows that are committed there, the first so many of that shard's rows.
        failed: names of the shards that had taken rows which are not committed.
        unknown: names of the shards whose last COMMIT has no known outcome; see `CommitOutcomeUnknown`.
        reason: the first failure, as text.
    """

    def __init__(
        self, table: str, committed: Mapping[str, int], failed: Sequence[str], unknown: Sequence[str], reason: str
    ) -> None:
        super().__init__(table, dict(committed), tuple(failed), tuple(unknown), reason)
        self.table, self.committed = table, dict(committed)
        self.failed, self.unknown, self.reason = tuple(failed), tuple(unknown), reason

    def __str__(self) -> str:
        committed = ", ".join(f"{name!r} ({rows} rows)" for name, rows in self.committed.items()) or "no shard"
        parts = [f"the bulk load of {self.table!r} is committed on {committed}"]
        if self.failed:
            parts.append(f"what was sent to {', '.join(map(repr, self.failed))} since is not")
        if self.unknown:
            parts.append(f"the outcome on {', '.join(map(repr, self.unknown))} is unknown")
        return (
            f"{', '.join(parts)}: {self.reason}; load again what is missing there, "
            "or delete what is committed and load everything again"
        )


class ShardKeyRequired(ShardlibError):
    """The statement, row or model names no shard key, so no shard can be chosen."""

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(what, way_out)
        self.what, self.way_out = what, way_out

    def __str__(self) -> str:
        return f"{self.what}; {self.way_out}"


class ShardKeyMismatch(ShardlibError):
    """A row or statement for another shard key than the one the session or connection is pinned to."""

    def __init__(self, pinned: object, found: object, where: str) -> None:
        super().__init__(pinned, found, where)
        self.pinned, self.found, self.where = pinned, found, where

    def __str__(self) -> str:
        return (
            f"{self.where} has shard key {_shown(self.found)}, but the session is pinned to {_shown(self.pinned)}; "
            "open a session for that key, or one without a key"
        )


class ShardKeyChanged(ShardlibError):
    """An UPDATE would change the shard key of a row, that is, move it."""

    def __init__(self, table: str, old: object, new: object) -> None:
        super().__init__(table, old, new)
        self.table, self.old, self.new = table, old, new

    def __str__(self) -> str:
        return (
            f"the shard key of a row of {self.table!r} cannot change from {_shown(self.old)} to {_shown(self.new)}; "
            "insert a row with the new key and delete the old one"
        )


class InvalidShardKey(ShardlibError):
    """A value that cannot be a shard key: wrong type, NULL, or no stable text in PostgreSQL."""

    def __init__(self, value: object, reason: str) -> None:
        super().__init__(value, reason)
        self.value, self.reason = value, reason

    def __str__(self) -> str:
        return f"{_shown(self.value)} ({type(self.value).__name__}) cannot be a shard key: {self.reason}"


class CrossShardTransaction(ShardlibError):
    """Writes of one transaction on several shards, without two-phase commit."""

    def __init__(self, shards: Sequence[str]) -> None:
        super().__init__(tuple(shards))
        self.shards = tuple(shards)

    def __str__(self) -> str:
        return (
            f"one transaction would write on the shards {', '.join(map(repr, self.shards))}; "
            "commit after each shard, or open the session with twophase=True"
        )


class UnsupportedCrossShardQuery(ShardlibError):
    """A statement over several shards whose answer would need a merge that is not done."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(reason, way_out)
        self.reason, self.way_out = reason, way_out

    def __str__(self) -> str:
        return f"{self.reason}; {self.way_out}"


class UnsupportedOperation(ShardlibError):
    """Something that the fence cannot protect, or that a sharded database cannot do."""

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(what, way_out)
        self.what, self.way_out = what, way_out

    def __str__(self) -> str:
        return f"{self.what}; {self.way_out}"


class InvalidTopology(ShardlibError):
    """A topology, catalog or shard database that is empty, damaged, foreign, or does not fit this client."""

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(problem, way_out)
        self.problem, self.way_out = problem, way_out

    def __str__(self) -> str:
        return f"{self.problem}; {self.way_out}"


class InvalidArgument(ShardlibError, ValueError):
    """An option or argument with a value that is not allowed."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(name, value, allowed)
        self.name, self.value, self.allowed = name, value, allowed

    def __str__(self) -> str:
        return f"{self.name}={_shown(self.value)} is not allowed: {self.allowed}"
