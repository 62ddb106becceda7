"""A change that a caller asks for: how it is done, and how it is found again after a crash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import BaseModel

__all__ = ["Change", "Done"]


class Done:
    """What a change has come to.

    Attributes:
        status: of HTTP.
        answer: the body, None for none.
        path: of what was made, below `/api/v1`; or None.
        told: for the audit log.
    """

    def __init__(
        self,
        status: int,
        answer: BaseModel | None,
        *,
        path: str | None = None,
        told: Mapping[str, object] | None = None,
    ) -> None:
        self.status, self.answer, self.path, self.told = status, answer, path, dict(told or {})


class Change(Protocol):
    """One change."""

    action: str
    """For the audit log, such as `shard.create`."""
    target: str
    """On what."""
    details: Mapping[str, object]
    """Further values, without secrets."""

    async def check(self) -> None:
        """Refuse what may not be asked for, before anything is looked at in the cluster.

        Raises:
            InvalidArgument: an endpoint that is not allowed.
        """
        ...

    async def before(self) -> dict[str, Any]:
        """What the cluster is like now, as far as it tells later whether the effect is there. JSON."""
        ...

    async def apply(self) -> Done:
        """Do it."""
        ...

    async def settle(self, before: Mapping[str, Any]) -> Done | None:
        """After a crash: what it has come to, if the effect is there; None if it has to be done.

        Raises:
            Problem: 409, nobody can tell.
        """
        ...
