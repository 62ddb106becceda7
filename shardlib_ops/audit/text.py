"""Text that may stand in the audit log: of one line, of bounded length, without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, ShardlibError

__all__ = ["cleaned", "cleaned_details", "outcome_of"]

_CHARS_MAX: Final = 1_000
_RAW_MAX: Final = 20_000
_DETAILS_MAX: Final = 64
_HIDDEN: Final = "***"
_NAMES: Final = r"\w*(?:password|passwd|passphrase|secret|authorization|api_?key|private_?key)\w*"
_SECRET_NAME: Final = re.compile(rf"{_NAMES}|token|jwt|bearer", re.IGNORECASE)
# A value that is set: `password=...` of libpq or a query, `"secret": "..."` of JSON. In quotes it may hold spaces.
_SET: Final = re.compile(
    rf"""(\b{_NAMES}["']?\s*[=:]\s*)('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s&]+)""", re.IGNORECASE
)
# To the last @ of the word: a password that nobody encoded may hold : / and @ itself.
_LOGIN: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*):\S*@", re.IGNORECASE)
_ENCODED_LOGIN: Final = re.compile(r"%3A%2F%2F\S*%40", re.IGNORECASE)
_BEARER: Final = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_JWT: Final = re.compile(r"\beyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]*\.?[A-Za-z0-9_-]*")
_PEM: Final = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL)


def cleaned(value: object) -> str:
    r"""A value as text for the log.

    Whatever is not printable, line ends and marks of the direction of writing among it, is escaped as in Python
    (`\n`, `\x1b`, `\u2028`), and so is the backslash: two texts stay two. Passwords in URLs and DSNs, what is set to a
    name that tells of a secret, and tokens become `***`; it is a second guard, and no excuse for handing secrets in.
    At most 1000 characters are kept; `...` says that there were more.
    """
    if isinstance(value, Dsn):
        return _escaped(value.safe())
    text = str(value)
    if text.lstrip().startswith(("postgresql://", "postgres://")) and text.count("://") == 1 and text.count("@") < 2:
        # One DSN is read exactly; what cannot be read may hold a password anywhere.
        try:
            return _short(_escaped(Dsn(text.strip()).safe()))
        except InvalidArgument:
            return f"postgresql://{_HIDDEN}"
    text = _PEM.sub(_HIDDEN, text[:_RAW_MAX])
    # Escaped before it is searched: a line end within a password does not end the password.
    text = _LOGIN.sub(rf"\1:{_HIDDEN}@", _escaped(text))
    text = _ENCODED_LOGIN.sub(f"%3A%2F%2F{_HIDDEN}%40", text)
    text = _JWT.sub(_HIDDEN, _BEARER.sub(rf"\1 {_HIDDEN}", text))
    return _short(_SET.sub(rf"\1{_HIDDEN}", text))


def cleaned_details(details: Mapping[str, object] | None) -> dict[str, str]:
    """Details for an entry: names and values cleaned, the value of a name that tells of a secret left out."""
    found: dict[str, str] = {}
    for name, value in list((details or {}).items())[:_DETAILS_MAX]:
        found[cleaned(name)] = _HIDDEN if _SECRET_NAME.fullmatch(str(name)) else cleaned(value)
    if details is not None and len(details) > _DETAILS_MAX:
        found["..."] = f"{len(details) - _DETAILS_MAX} more left out"
    return found


def outcome_of(error: BaseException) -> str:
    """How an error stands in the log: its class, and its text if shardlib wrote it, which holds no secret then.

    What other libraries write may hold a statement with its values, or a host.
    """
    name = type(error).__name__
    return cleaned(f"{name}: {error}" if isinstance(error, ShardlibError) else name)


def _escaped(text: str) -> str:
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        one if one.isprintable() and one != "\\" else one.encode("unicode_escape").decode("ascii") for one in text
    )


def _short(text: str) -> str:
    return text if len(text) <= _CHARS_MAX else f"{text[: _CHARS_MAX - 3]}..."
