"""Roles, identities, and the one answer to a token that is not believed. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = ["Identity", "Role", "Unauthenticated"]


class Role(StrEnum):
    """What a caller may do. Each role may do what the one before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def allows(self, least: Role) -> bool:
        """Whether this role may do what needs at least `least`."""
        return _RANK[self] >= _RANK[least]


_RANK: Final = {Role.VIEWER: 0, Role.OPERATOR: 1, Role.ADMIN: 2}


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a believed token names.

    Attributes:
        subject: `sub`; who calls.
        role: what they may do.
        token_id: `jti`; which of their tokens it was.
        expires_at: seconds since 1970 after which the token counts no more.
        cluster: the one cluster that the token is for; None is for any that believes its key.
    """

    subject: str
    role: Role
    token_id: str
    expires_at: float
    cluster: str | None = None


class Unauthenticated(Exception):  # noqa: N818 - it is an answer, not a fault of this process
    """A token is not believed. Callers are told no more than that; the reason is for the log and the audit.

    Attributes:
        reason_code: a word such as `expired`, never a part of the token.
        subject: whom the token names, where its signature holds.
        unavailable: nothing is wrong with the token, but what it must be compared with cannot be read.
    """

    def __init__(self, reason_code: str, subject: str | None = None, unavailable: bool = False) -> None:
        super().__init__(reason_code, subject, unavailable)
        self.reason_code, self.subject, self.unavailable = reason_code, subject, unavailable

    def __str__(self) -> str:
        return f"the token is not accepted ({self.reason_code})"
