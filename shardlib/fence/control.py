"""Statements that end a transaction: sent as text, what follows them would run without a gate. Pure."""

from __future__ import annotations

import re

__all__ = ["ending_statement"]

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
