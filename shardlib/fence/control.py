"""Statements that end a transaction: sent as text, what follows them would run without a gate. Pure."""

from __future__ import annotations

import re

__all__ = ["ending_statement", "plain_start"]

_ENDS = re.compile(
    r"\s*(commit|end|abort|prepare\s+transaction|rollback(?!\s+(?:(?:work|transaction)\s+)?to\b))\b", re.IGNORECASE
)
_QUOTED = re.compile(
    r"""
    \b[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*"
    | \$(?P<tag>[A-Za-z_\u0080-\uffff][\w]*)?\$.*?\$(?(tag)(?P=tag))\$
    | --[^\n]* | /\*.*?\*/
    """,
    re.VERBOSE | re.DOTALL,
)
"""Literals, quoted names and comments, as PostgreSQL's lexer finds them. Of nested comments only the inner end counts,
which shows more of the text than the server reads, never less."""
_ATOMIC = re.compile(r"\bbegin\s+atomic\b", re.IGNORECASE)


_PLAIN_STARTS = frozenset("SIUDWsiudw")


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
    plain = _QUOTED.sub(lambda quoted: " " if quoted[0].startswith(("--", "/*")) else " '' ", query)
    for part in plain.split(";"):
        found = _ENDS.match(part)
        # A function's body in SQL ends with END: BEGIN ATOMIC ...; END
        if found is not None and not (found[1].lower() == "end" and _ATOMIC.search(plain)):
            return found[1].upper()
    return None
