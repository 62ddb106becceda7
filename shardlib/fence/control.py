"""Statements that end a transaction: sent as text, what follows them would run without a gate. Pure."""

from __future__ import annotations

import re

__all__ = ["ending_statement", "plain_start", "undoes_savepoint"]

_ENDS = re.compile(
    r"\s*(commit|end|abort|prepare\s+transaction|rollback(?!\s+(?:(?:work|transaction)\s+)?to\b))\b", re.IGNORECASE
)
_QUOTED = re.compile(
    r"""
    \b[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*"
    | \$(?P<tag>[A-Za-z_\u0080-\uffff][\w]*)?\$.*?\$(?(tag)(?P=tag))\$
    | --[^\n]* | /\*
    """,
    re.VERBOSE | re.DOTALL,
)
"""Literals, quoted names and comments, as PostgreSQL's lexer finds them; of a comment in /* */ its start only."""
_COMMENT = re.compile(r"/\*|\*/")
_ATOMIC = re.compile(r"\bbegin\s+atomic\b", re.IGNORECASE)
_ROLLBACK = re.compile(r"\brollback\b", re.IGNORECASE)
_PLAIN_STARTS = frozenset("SIUDWsiudw")


def undoes_savepoint(query: str) -> bool:
    """Whether a query that ends no transaction may hold `ROLLBACK TO`: a comment or literal that says so counts too."""
    return _ROLLBACK.search(query) is not None


def plain_start(query: str) -> bool:
    """Whether a query is one statement with the first letter of SELECT, INSERT, UPDATE, DELETE or WITH.

    None that ends a transaction begins like that, so `ending_statement` need not look at it.
    """
    return query[:1] in _PLAIN_STARTS and ";" not in query


def ending_statement(query: str) -> str | None:
    """The first statement of a query that ends the transaction (`COMMIT`, `ROLLBACK AND CHAIN`, ...), if any.

    `ROLLBACK TO` a savepoint does not, nor does what stands inside of a literal. A lone `PREPARE TRANSACTION` is let
    through: it keeps its gate, and what is sent next finds no transaction and is refused.
    """
    start = query.lstrip()
    if ";" not in query and not start.startswith(("--", "/*")):
        found = _ENDS.match(start)
        return None if found is None or found[1].lower().startswith("prepare") else found[1].upper()
    plain = _unquoted(query)
    for part in plain.split(";"):
        found = _ENDS.match(part)
        # A function's body in SQL ends with END: BEGIN ATOMIC ...; END
        if found is not None and not (found[1].lower() == "end" and _ATOMIC.search(plain)):
            return found[1].upper()
    return None


def _unquoted(query: str) -> str:
    """The query with an empty literal for each literal and quoted name, and a blank for each comment."""
    parts: list[str] = []
    at = 0
    while (found := _QUOTED.search(query, at)) is not None:
        parts.append(query[at : found.start()])
        at = found.end()
        if found[0] == "/*":
            at = _comment_end(query, at)
        parts.append(" " if found[0].startswith(("--", "/*")) else " '' ")
    return "".join(parts) + query[at:]


def _comment_end(query: str, at: int) -> int:
    """Where a comment ends whose start ends at `at`. Comments nest; one that does not end takes all of the rest."""
    depth = 1
    for mark in _COMMENT.finditer(query, at):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(query)
