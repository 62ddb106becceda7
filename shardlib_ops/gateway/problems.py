"""What went wrong with a statement, as a problem: told by PostgreSQL's code, in its own words, and nothing beside them.

Of PostgreSQL's message only the first line is shown: its DETAIL holds values of rows, its CONTEXT the text of
functions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import psycopg
from sqlalchemy.exc import DBAPIError

from shardlib.errors import CommitOutcomeUnknown, InvalidTopology
from shardlib.fence.verdict import lost_connection
from shardlib_ops.gateway.execute import ResultTooLarge, StatementTimeout
from shardlib_ops.gateway.roles import RoleTooStrong
from shardlib_ops.serving.problem import KINDS, Problem, problem_of, public_text

__all__ = ["GATEWAY_KINDS", "StatementProblem", "known_problem"]

_LOG = logging.getLogger("shardlib.ops.gateway")

GATEWAY_KINDS: Final[Mapping[str, tuple[int, str]]] = {
    "read-only": (403, "The role may only read"),
    "constraint-violated": (409, "A constraint does not allow it"),
    "transaction-conflict": (409, "Another transaction was in the way"),
    "statement-invalid": (422, "PostgreSQL does not take the statement"),
    "result-too-large": (422, "The result is too large"),
    "commit-unknown": (504, "Whether it was committed is unknown"),
    "statement-timeout": (504, "The statement took too long"),
}
"""The problems that only the gateway has, by the end of their `type`: status and title."""

_RETRY: Final = {"Retry-After": "1"}
_NOT_KEPT: Final = "nothing of it is kept"
# unique_violation, exclusion_violation, foreign_key_violation: of two programs, both may have been right.
_CONFLICTS: Final = frozenset({"23503", "23505", "23P01"})
_READ_ONLY: Final = "25006"
_CANCELLED: Final = "57014"
# protocol_violation: what PostgreSQL says of too few or too many parameters
_WRONG_COUNT: Final = "08P01"
# lock_not_available, object_in_use
_IN_THE_WAY: Final = frozenset({"55P03", "55006"})
# connection, resources, operator intervention
_AWAY: Final = ("08", "53", "57")
# system error, configuration file error, internal error: PostgreSQL's own trouble
_BROKEN: Final = ("58", "F0", "XX")


class StatementProblem(Problem):
    """A problem that PostgreSQL told of: with its code, and the constraint, table or column it names."""

    def __init__(self, slug: str, error: psycopg.Error, detail: str, headers: Mapping[str, str] | None = None) -> None:
        status, title = {**KINDS, **GATEWAY_KINDS}[slug]
        super().__init__(status, title, detail, slug, headers)
        told = error.diag
        self.told = {
            "sqlstate": error.sqlstate,
            "constraint": told.constraint_name,
            "table": told.table_name,
            "column": told.column_name,
        }

    def content(self, request_id: str | None = None) -> dict[str, Any]:
        """The members of the document, PostgreSQL's among them."""
        found = super().content(request_id)
        found.update({name: value for name, value in self.told.items() if value is not None})
        return found


def known_problem(error: Exception) -> Problem | None:
    """The problem that an error of a statement is; None for one that nobody expected."""
    if isinstance(error, DBAPIError) and isinstance(error.orig, psycopg.Error):
        error = error.orig  # what came at COMMIT, such as a deferred constraint, came through SQLAlchemy
    if isinstance(error, psycopg.Error):
        return _of_postgres(error)
    slug, detail, headers = "", "", None
    match error:
        case CommitOutcomeUnknown():
            slug = "commit-unknown"
            detail = (
                f"COMMIT was sent to shard {error.shard!r} and its answer did not come: read back what the statement "
                "wrote before sending it again"
            )
        case StatementTimeout():
            slug, detail = "statement-timeout", f"{error}; {_NOT_KEPT}"
        case ResultTooLarge():
            slug, detail = "result-too-large", f"{error}; {_NOT_KEPT}"
        case RoleTooStrong() | InvalidTopology():
            _LOG.error("%s", error)
            slug, headers = "shard-unavailable", {"Retry-After": "60"}
            detail = "the gateway may not work on the shard as it is set up; its operator must look at it"
        case UnicodeEncodeError():
            slug, detail = "invalid", "a text holds half of a surrogate pair, which is no character"
        case _:
            found = problem_of(error)
            return None if found.slug == "internal" else found
    return _kind(slug, detail, headers)


def _of_postgres(error: psycopg.Error) -> Problem | None:
    state = error.sqlstate or ""
    if lost_connection(error) and state != _WRONG_COUNT:
        return _kind("shard-unavailable", f"the connection was lost; {_NOT_KEPT}, ask again", _RETRY)
    if not state or state.startswith(_BROKEN):
        return None
    said = public_text(error.diag.message_primary or "PostgreSQL gives no reason")
    slug, headers = "statement-invalid", None
    if state == _READ_ONLY:
        slug = "read-only"
    elif state == _CANCELLED:
        slug, said = "statement-timeout", f"{said}; {_NOT_KEPT}"
    elif state.startswith(_AWAY) and state != _WRONG_COUNT:
        slug, headers = "shard-unavailable", _RETRY
    elif state.startswith("40") or state in _IN_THE_WAY:
        slug, said, headers = "transaction-conflict", f"{said}; {_NOT_KEPT}, ask again", _RETRY
    elif state in _CONFLICTS:
        slug = "constraint-violated"
    return StatementProblem(slug, error, said, headers)


def _kind(slug: str, detail: str, headers: Mapping[str, str] | None = None) -> Problem:
    status, title = {**KINDS, **GATEWAY_KINDS}[slug]
    return Problem(status, title, detail, slug, headers)
