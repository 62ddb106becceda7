"""Statements that end a transaction: sent as text, what follows them would run without a gate. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

__all__ = ["ending_statement", "plain_start", "statements", "undoes_savepoint"]

_ENDS = re.compile(
    r"\s*(commit|end|abort|prepare\s+transaction|rollback(?!\s+(?:(?:work|transaction)\s+)?to\b))\b", re.IGNORECASE
)
_TOKEN = re.compile(
    r"""
      (?P<string> [eEbBxX]?' )
    | (?P<word> [A-Za-z_\u0080-\U0010ffff] [A-Za-z0-9_$\u0080-\U0010ffff]* )
    | (?P<number> [0-9] [A-Za-z0-9_\u0080-\U0010ffff]* )
    | (?P<name> " [^"]*+ (?: "" [^"]*+ )*+ "? )
    | (?P<dollar> \$ (?: [A-Za-z_\u0080-\U0010ffff] [A-Za-z0-9_\u0080-\U0010ffff]* )? \$ )
    | (?P<comment> --[^\n\r]* | /\* )
    | (?P<mark> \S )
    """,
    re.VERBOSE,
)
"""What PostgreSQL's lexer (scan.l) tells apart, as far as it matters where a statement begins. Of literals and of
comments in /* */ their start only. Where a number runs into letters, it refuses the whole text."""
_STRING_END = re.compile(r"(?:[^']++|'')*+'")
_ESCAPED_END = re.compile(r"(?:[^'\\]++|\\.|'')*+'", re.DOTALL)
_STRING_GOES_ON = re.compile(r"(?:[ \t\f\v]|--[^\n\r]*+)*+[\n\r](?:[ \t\n\r\f\v]++|--[^\n\r]*+[\n\r])*+'")
_COMMENT = re.compile(r"/\*|\*/")
_ROLLBACK = re.compile(r"\brollback\b", re.IGNORECASE)
_PLAIN_STARTS = frozenset("SIUDWsiudw")
_WORDS_MAX: Final = 4
"""CREATE OR REPLACE FUNCTION"""


def undoes_savepoint(query: str) -> bool:
    """Whether a query that ends no transaction may hold `ROLLBACK TO`: a comment or literal that says so counts too."""
    return _ROLLBACK.search(query) is not None


def plain_start(query: str) -> bool:
    """Whether a query is one statement with the first letter of SELECT, INSERT, UPDATE, DELETE or WITH.

    None that ends a transaction begins like that, so `ending_statement` need not look at it.
    """
    return query[:1] in _PLAIN_STARTS and ";" not in query


def ending_statement(query: str, *, escapes: bool = False) -> str | None:
    """The first statement of a query that ends the transaction (`COMMIT`, `ROLLBACK AND CHAIN`, ...), if any.

    `ROLLBACK TO` a savepoint does not, nor does what stands inside of a literal. A lone `PREPARE TRANSACTION` is let
    through: it keeps its gate, and what is sent next finds no transaction and is refused.

    Args:
        query: any number of statements.
        escapes: whether a backslash escapes in every literal (`standard_conforming_strings` is off).
    """
    start = query.lstrip()
    if ";" not in query and not start.startswith(("--", "/*")):
        found = _ENDS.match(start)
        return None if found is None or found[1].lower().startswith("prepare") else found[1].upper()
    return next((word for words in statements(query, escapes) if (word := _ending(words)) is not None), None)


def _ending(words: list[str]) -> str | None:
    match words:
        case ["commit" | "end" | "abort" as word, *_]:
            return word.upper()
        case ["prepare", "transaction", *_]:
            return "PREPARE TRANSACTION"
        case ["rollback", "to", *_] | ["rollback", "work" | "transaction", "to", *_]:
            return None
        case ["rollback", *_]:
            return "ROLLBACK"
    return None


def statements(query: str, escapes: bool = False) -> Iterator[list[str]]:
    """Of each statement the first tokens: words in lower case, and what is no word as an empty one.

    The statements of a function's body in SQL (BEGIN ATOMIC ...; END) count as such. Its END does not.
    """
    words: list[str] = []
    depth, before, in_body = 0, "", False
    at = 0
    while (found := _TOKEN.search(query, at)) is not None:
        text = found[0]
        at = _end(query, found, escapes)
        if found.lastgroup == "comment":
            continue
        if text == ";":
            yield words
            words, depth, before = [], 0, ""
            continue
        word = text.lower() if found.lastgroup == "word" else ""
        depth += (text == "(") - (text == ")")
        if in_body and word == "end" and not words:
            in_body, word = False, ""  # the end of the body
        if len(words) < _WORDS_MAX:
            words.append(word)
        if word == "atomic" and before == "begin" and depth == 0 and _makes_routine(words):
            in_body, words, word = True, [], ""
        before = word
    yield words


def _makes_routine(words: list[str]) -> bool:
    match words:
        case ["create", "function" | "procedure", *_] | ["create", "or", "replace", "function" | "procedure", *_]:
            return True
    return False


def _end(query: str, found: re.Match[str], escapes: bool) -> int:
    """Where a token ends; a literal or comment that has no end takes all of the rest, and the server refuses it."""
    at = found.end()
    match found.lastgroup:
        case "string":
            escaped = found[0][0] in "eE" or (escapes and found[0] == "'")
            return _string_end(query, at, _ESCAPED_END if escaped else _STRING_END)
        case "dollar":
            end = query.find(found[0], at)
            return len(query) if end < 0 else end + len(found[0])
        case "comment" if found[0] == "/*":
            return _comment_end(query, at)
    return at


def _string_end(query: str, at: int, ends: re.Pattern[str]) -> int:
    while (found := ends.match(query, at)) is not None:
        more = _STRING_GOES_ON.match(query, found.end())
        if more is None:
            return found.end()
        at = more.end()  # a literal after a line break is the same one, and so is what a backslash does in it
    return len(query)


def _comment_end(query: str, at: int) -> int:
    """Where a comment ends whose start ends at `at`. Comments nest."""
    depth = 1
    for mark in _COMMENT.finditer(query, at):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(query)
