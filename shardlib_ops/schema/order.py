"""What the process that runs migrations is asked, and what it answers: one line of JSON each."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Answer", "Order"]


class Order(msgspec.Struct, frozen=True):
    """Something to do with the migrations, on one shard or on none.

    Attributes:
        do: `heads` (only look at the files), `upgrade` or `stamp` a shard, or tell the `sql` of an upgrade.
        target: a revision as Alembic names it, such as `heads`.
        start: of `sql`: the revision to begin at; None: with nothing.
        shard: the shard's name.
        dsn: its primary, secrets included: it travels through a pipe, never in arguments.
        lock_timeout_s: how long one statement may wait for a lock, and hold up whoever comes after it.
        lock_wait_s: how long a shard is tried again and again when locks cannot be had.
    """

    do: Literal["heads", "upgrade", "stamp", "sql"]
    target: str = "heads"
    start: str | None = None
    shard: str = ""
    dsn: str = ""
    lock_timeout_s: float = 1.0
    lock_wait_s: float = 60.0

    def __repr__(self) -> str:
        return f"<Order to {self.do} {self.target!r} on shard {self.shard!r}>"  # never with the DSN


class Answer(msgspec.Struct, frozen=True):
    """What came out.

    Attributes:
        revisions: of `heads`: those that the target means; of `upgrade` and `stamp`: what the shard has now.
        sql: of `sql`: the statements.
        error: why it was not done; None: it was.
        kind: of an error: `failed`, `locked`, `away`, `files` (what stands in the folder of the migrations is wrong).
        way_out: of an error: what to do.
    """

    revisions: tuple[str, ...] = ()
    sql: str = ""
    error: str | None = None
    kind: str = ""
    way_out: str = ""
