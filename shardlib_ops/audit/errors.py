"""What is raised when the audit log takes no entry."""

from __future__ import annotations

from shardlib.errors import RetryableError

__all__ = ["AuditUnavailable"]


class AuditUnavailable(RetryableError):  # noqa: N818 - named as the errors of the library are
    """The audit log took no entry, or could not be read. Without an entry nothing is done.

    Attributes:
        store: the log, without secrets.
        reason: why, without secrets.
        done: False: nothing was done, and asking again is safe. True: the work itself is over, done or failed, and only
            the entry of its outcome is missing: look at what came of it before asking again.
    """

    def __init__(self, store: str, reason: str, done: bool = False) -> None:
        super().__init__(store, reason, done)
        self.store, self.reason, self.done = store, reason, done

    def __str__(self) -> str:
        if self.done:
            return (
                f"the audit log {self.store} took no entry of the outcome ({self.reason}), though the work is over: "
                "mend the log, and look at what came of the work before asking for it again"
            )
        return f"the audit log {self.store} gave no answer ({self.reason}); nothing was done: mend it and ask again"
