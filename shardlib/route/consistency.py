"""How fresh a read must be."""

from __future__ import annotations

from enum import StrEnum

from shardlib.errors import InvalidArgument

__all__ = ["Consistency"]


class Consistency(StrEnum):
    """How fresh a read must be; for an engine, a session, or one statement (`execution_options(consistency=...)`).

    The weaker levels allow a replica, and never require one: the primary satisfies them all.
    """

    STRONG = "strong"
    """The primary (default)."""
    SESSION = "session"
    """A replica that has replayed this session's last commit, else the primary."""
    EVENTUAL = "eventual"
    """A replica within the allowed lag, else the primary."""

    @classmethod
    def of(cls, word: object) -> Consistency:
        """The level that a user's word means.

        Raises:
            InvalidArgument: the word is none of `strong`, `session`, `eventual`.
        """
        try:
            return cls(str(word))
        except ValueError:
            raise InvalidArgument("consistency", word, "one of 'strong', 'session', 'eventual'") from None
