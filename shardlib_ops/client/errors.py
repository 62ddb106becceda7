"""What is raised when a manager does not answer, or lets the caller do nothing."""

from __future__ import annotations

from shardlib.errors import RetryableError, ShardlibError

__all__ = ["ManagerRefused", "ManagerUnavailable"]


class ManagerUnavailable(RetryableError):  # noqa: N818 - named as the errors of the library are
    """No answer of the manager in time, or none but that it cannot now.

    Attributes:
        url: of the manager.
        reason: what the last attempt came to.
        begun: whether it may be at work on what was asked: look at what came of it before asking again.
    """

    def __init__(self, url: str, reason: str, begun: bool = False) -> None:
        super().__init__(url, reason, begun)
        self.url, self.reason, self.begun = url, reason, begun

    def __str__(self) -> str:
        more = "it may have done what was asked: look before asking again" if self.begun else "nothing was changed"
        return f"the manager {self.url} gave no answer: {self.reason}; {more}"


class ManagerRefused(ShardlibError):  # noqa: N818 - named as the errors of the library are
    """The manager does not let this caller do that, or is none.

    Attributes:
        url: of the manager.
        reason: why.
        way_out: what to do.
    """

    def __init__(self, url: str, reason: str, way_out: str) -> None:
        super().__init__(url, reason, way_out)
        self.url, self.reason, self.way_out = url, reason, way_out

    def __str__(self) -> str:
        return f"the manager {self.url} refuses: {self.reason}; {self.way_out}"
