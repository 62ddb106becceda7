"""The end of a bulk load: its transactions are committed one after the other, and what came of each is kept."""

from __future__ import annotations

from collections.abc import Sequence

from shardlib.engine.bulk_copy import CopyLeg
from shardlib.errors import BulkLoadIncomplete, CommitOutcomeUnknown
from shardlib.waits import Waits

__all__ = ["Commits"]


class Commits:
    """What of one load is committed, and where.

    Args:
        waits: of the engine.
        table: name of the table, for messages.
    """

    def __init__(self, waits: Waits, table: str) -> None:
        self._waits, self._table = waits, table
        self.committed: dict[str, int] = {}
        """Shard name -> rows that are committed there."""
        self._unknown: list[str] = []

    def commit(self, legs: Sequence[CopyLeg]) -> None:
        """Let all of these shards accept their rows, side by side; then commit them one after the other,
        in the order of their names.

        As long as none of them is committed, the first failure ends it. Once one is, the others go forward: they
        have accepted everything, and the fewer are left out, the less is to be repaired.

        Raises:
            The first failure.
        """
        self._waits.run_all([leg.finish for leg in legs])
        failure: Exception | None = None
        forward = False
        for leg in sorted(legs, key=lambda leg: leg.shard.name):
            try:
                self._commit_one(leg)
                forward = True
            except Exception as error:  # noqa: BLE001 - raised below
                failure = failure or error
                if not forward:
                    break
        if failure is not None:
            raise failure

    def _commit_one(self, leg: CopyLeg) -> None:
        name, rows = leg.shard.name, leg.rows
        self._unknown.append(name)
        try:
            leg.commit()
        except CommitOutcomeUnknown:
            leg.rows = 0  # no longer among those that are certainly not committed
            raise
        except Exception:
            self._unknown.remove(name)
            raise
        leg.rows = 0
        self._unknown.remove(name)
        self.committed[name] = self.committed.get(name, 0) + rows

    def incomplete(self, error: Exception, left: Sequence[str]) -> BulkLoadIncomplete | None:
        """The error that tells what is committed and what is not; None if nothing is, so that `error` says it all.

        Args:
            error: why the load failed.
            left: names of the shards that have taken rows which are not committed.
        """
        if not self.committed and (not self._unknown or not left):
            return None
        reason = f"{type(error).__name__}: {error}"
        return BulkLoadIncomplete(self._table, self.committed, left, self._unknown, reason)

    def tell(self, error: BaseException) -> None:
        """Note on an interruption, which stays what it is, that a part was committed before it."""
        if self.committed or self._unknown:
            error.add_note(str(BulkLoadIncomplete(self._table, self.committed, (), self._unknown, "interrupted")))
