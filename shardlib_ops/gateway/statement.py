"""Which statements the gateway passes on. Whether one reads or writes is for PostgreSQL to tell, not for these."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from shardlib.errors import InvalidArgument
from shardlib.fence.control import statements

__all__ = ["check_statement", "leaves_traces"]

_ALLOWED: Final = frozenset({"select", "insert", "update", "delete", "merge", "with", "values", "table", "explain"})
_REMEMBERED_CHARS: Final = 4_000
_TRACES: Final = re.compile(r"set_config|advisory|\binto\b|dblink|\\", re.IGNORECASE)


def check_statement(query: str) -> None:
    """Let one statement that reads or writes rows through.

    Everything else that PostgreSQL would do for the gateway's role, such as COPY, DO, SET ROLE, LOCK or CREATE, is not
    what the gateway is for.

    Raises:
        InvalidArgument: it is another statement, none, or there are several.
    """
    if len(query) > _REMEMBERED_CHARS:
        _check(query)
    else:
        _check_again(query)


def _check(query: str) -> None:
    found = [words for words in statements(query) if words]
    if not found:
        raise InvalidArgument("query", query[:80], "one SQL statement")
    if len(found) > 1:
        raise InvalidArgument("query", query[:80], "one statement a request; several in one transaction need a client")
    first = next((word for word in found[0] if word), "")
    if first not in _ALLOWED:
        raise InvalidArgument(
            "query", query[:80], "SELECT, INSERT, UPDATE, DELETE, MERGE, VALUES, TABLE, WITH or EXPLAIN"
        )


# Programs send the same texts again and again; what is refused is not remembered.
_check_again: Final = lru_cache(maxsize=1024)(_check)


def leaves_traces(query: str) -> bool:
    """Whether a statement may change the session of the connection it runs on, so that nobody else should get it.

    By the words in it, so that many a harmless one counts, such as `INSERT INTO`'s word in a SELECT's literal.
    """
    return query.lstrip()[:6].lower() != "insert" and _TRACES.search(query) is not None
