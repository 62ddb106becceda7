"""A PostgreSQL DSN that cannot print its password."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardlib.errors import InvalidArgument

__all__ = ["Dsn"]

_SECRET: Final = ("password", "sslpassword")
_SCHEMES: Final = ("postgresql", "postgres")
_REFERENCES: Final = ("env:", "file:", "exec:", "enc:")
_READ: Final = ("file:", "exec:", "enc:")
"""What may take a while to read: a file on a network, a program, the file of the keys."""

# What says neither who gets the password nor how it is sent. All else binds an encrypted one, also parameters that
# libpq gets one day.
_UNBOUND: Final = frozenset(
    {
        "application_name", "client_encoding", "connect_timeout", "fallback_application_name", "keepalives",
        "keepalives_count", "keepalives_idle", "keepalives_interval", "load_balance_hosts", "options", "password",
        "sslpassword", "target_session_attrs", "tcp_user_timeout",
    }
)  # fmt: skip

# A DSN of the catalog must not make this process send its keys to a server.
_RESERVED: Final = ("SHARDLIB_SECRET_KEY", "SHARDLIB_SECRET_COMMAND_")

# What is said to who may not come in, by PostgreSQL, libpq and PgBouncer: libpq gives the text of a failed login, not
# its code. Not "too many connections", which passes.
_NOBODY: Final = re.compile(
    r"password authentication failed|authentication failed for user|SASL authentication failed|no password supplied"
    r"|no pg_hba\.conf entry|pg_hba\.conf rejects|is not permitted to log in|no such (user|database)"
    r"|(role|database) \".*\" does not exist|permission denied for database",
    re.IGNORECASE,
)


class Dsn:
    """The address of one PostgreSQL database: a `postgresql://` URL or a libpq `key=value` string.

    The password may be a reference instead of the secret itself, read again at every new connection, so that a
    rotated one is picked up: ``env:NAME`` (a variable of the process), ``file:/path`` (first line of a file) or
    ``exec:NAME`` (what a program prints that the process allows). Or it is encrypted for this DSN: ``enc:…``.

    Printing it, in any way, shows user, host, port and database only, as far as the DSN gives them: libpq fills in
    the rest. `reveal()` gives the whole string.

    Raises:
        InvalidArgument: the text is not a PostgreSQL DSN. The message never holds the text itself, since a
            malformed DSN may hold a password anywhere.
    """

    __slots__ = ("_params", "_text")

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise InvalidArgument("dsn", type(text).__name__, "a PostgreSQL DSN is a string")
        scheme = text.split("://", 1)[0] if "://" in text else None
        if scheme is not None and "=" not in scheme and scheme not in _SCHEMES:
            raise InvalidArgument("dsn", f"{scheme}://...", "a PostgreSQL DSN starts with postgresql://")
        try:
            params = conninfo_to_dict(text)
        except (ProgrammingError, UnicodeError):
            params = {}
        if not params:
            raise InvalidArgument(
                "dsn", "***", "not a PostgreSQL DSN; write postgresql://user:password@host:port/database"
            )
        if not params.get("host") and not params.get("service"):
            raise InvalidArgument("dsn", "***", "a DSN names its host, as in postgresql://user@host:port/database")
        if _broken(params, url="://" in text):
            raise InvalidArgument(
                "dsn", "***",
                "the password holds a character that has a meaning in a URL; write @ as %40, / as %2F, : as %3A",
            )  # fmt: skip
        self._text = text
        self._params: dict[str, Any] = dict(params)

    @property
    def host(self) -> str:
        """Host name, address or socket folder (several, comma-separated, in a multi-host DSN)."""
        return str(self._params.get("host", ""))

    @property
    def port(self) -> str:
        """Port, as text; 5432 if the DSN names none, though PGPORT or a service may then name another to libpq."""
        return str(self._params.get("port", "5432"))

    @property
    def dbname(self) -> str:
        """Database name; the user's if the DSN names none, though PGDATABASE or a service may name another to libpq."""
        return str(self._params.get("dbname") or self.user)

    @property
    def user(self) -> str:
        """Role name, empty if the DSN leaves it to libpq."""
        return str(self._params.get("user", ""))

    def secret(self) -> str:
        """The password as it is written: a reference, an encrypted or a plain one. For storing, never for showing."""
        return str(self._params.get("password") or "")

    @property
    def plain_password(self) -> bool:
        """Whether it holds a password as it is, neither a reference nor encrypted."""
        password = self.secret()
        return bool(password) and not password.startswith(_REFERENCES)

    @property
    def encrypted_password(self) -> bool:
        """Whether it holds an encrypted password."""
        return self.secret().startswith("enc:")

    @property
    def slow(self) -> bool:
        """Whether `conninfo` reads a file or runs a program: not for the thread of an event loop."""
        return self.secret().startswith(_READ)

    def bound(self) -> dict[str, str]:
        """What an encrypted password is bound to: the parameters that say who gets it and how it is sent.

        User, hosts, ports, database, TLS and whatever else is given, as it is written, but for what concerns neither,
        such as `application_name`. A DSN that moves as a whole, as in a promotion, keeps it.
        """
        return {name: str(value) for name, value in self._params.items() if name not in _UNBOUND}

    def with_password(self, password: str | None) -> Dsn:
        """The same DSN with another password, a reference, an encrypted one, or with none."""
        params = {name: value for name, value in self._params.items() if name != "password"}
        if password is not None:
            params["password"] = password
        if "://" in self._text and "=" not in self._text.split("://", 1)[0]:
            scheme, _, rest = self._text.partition("://")
            login, at, after = rest.rpartition("@")
            user = login.partition(":")[0]
            word = "" if password is None else f":{quote(password, safe=':')}"
            candidate = f"{scheme}://{user}{word}{at}{after}" if at else self._text
            if _parsed(candidate) == params:
                return Dsn(candidate)
        return Dsn(make_conninfo("", **params))

    def reveal(self) -> str:
        """The DSN as it was given, secrets included. For storing, never for showing."""
        return self._text

    def conninfo(self, **overrides: object) -> str:
        """A libpq connection string with the password resolved and `overrides` added.

        May block, see `slow`.

        Raises:
            InvalidArgument: the password is a reference that leads nowhere (the reference is shown, it is no secret),
                or cannot be decrypted.
        """
        params = {**self._params, **overrides}
        if (password := params.get("password")) is not None:
            params["password"] = resolve_secret(str(password), self.bound())
        return make_conninfo("", **params)

    def refused(self) -> None:
        """A server refused the password: a program that gave it is asked anew the next time."""
        if self.secret().startswith("exec:"):
            from shardlib.secrets.command import forget

            forget(self.secret()[5:])

    def safe(self) -> str:
        """`postgresql://user@host:port/dbname` without what is not given, and without any secret."""
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self._params.get("port") else ""
        return f"postgresql://{user}{self.host}{port}/{self._params.get('dbname', '')}"

    def __str__(self) -> str:
        return self.safe()

    def __repr__(self) -> str:
        return f"Dsn({self.safe()!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dsn) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[type[Dsn], tuple[str]]:
        return (Dsn, (self._text,))


def _broken(params: Mapping[str, Any], *, url: bool) -> bool:
    """Whether a part of the password was taken for the host, the port or the database: it must not be shown."""
    port = str(params.get("port") or "")
    if not all(part.isdecimal() for part in port.split(",") if part) or "@" in str(params.get("host") or ""):
        return True
    return url and "@" in str(params.get("dbname") or "")


def _parsed(text: str) -> dict[str, Any]:
    try:
        return dict(conninfo_to_dict(text))
    except (ProgrammingError, UnicodeError):
        return {}


def resolve_secret(password: str, bound: Mapping[str, str] | None = None) -> str:
    """A password, or what it refers to: ``env:NAME``, ``file:/path``, ``exec:NAME``; or what is encrypted: ``enc:…``.

    Args:
        password: the text.
        bound: the DSN that an encrypted password is bound to; None where there is none.

    Raises:
        InvalidArgument: the reference leads nowhere; it is shown, since it is no secret. Or it cannot be decrypted.
    """
    if password.startswith("exec:"):
        from shardlib.secrets.command import printed_by

        return printed_by(password[5:])
    if password.startswith("enc:"):
        return _decrypted(password, bound)
    if password.startswith("env:"):
        name = password[4:]
        if name.startswith(_RESERVED):
            raise InvalidArgument("password", password, "what keeps the secrets of this process is no password")
        value = os.environ.get(name)
        if value is None:
            raise InvalidArgument("password", password, f"the environment has no variable {name}")
        if _utf8(os.fsencode(value)) is None:
            raise InvalidArgument("password", password, f"the variable {name} is not UTF-8 text")
        return value
    if password.startswith("file:"):
        return _first_line(password)
    return password


def _first_line(reference: str) -> str:
    from shardlib.secrets.keys import is_key_file

    path = reference[5:]
    if is_key_file(path):
        raise InvalidArgument("password", reference, "what keeps the secrets of this process is no password")
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError):
        content = b""
    if not content:
        raise InvalidArgument("password", reference, "the file cannot be read or is empty")
    text = _utf8(content)
    # A NUL: the environment of a process, in /proc, is one line of such text.
    if text is None or "\0" in text:
        raise InvalidArgument("password", reference, "the file is not UTF-8 text")
    return text.splitlines()[0]


def _decrypted(password: str, bound: Mapping[str, str] | None) -> str:
    from shardlib.secrets.keys import read_keys
    from shardlib.secrets.sealed import key_id_of, shown, unseal

    if bound is None:
        raise InvalidArgument("password", shown(password), "only a PostgreSQL DSN can hold an encrypted password")
    key_id_of(password)
    return unseal(password, bound, read_keys())


def _utf8(content: bytes) -> str | None:
    # Python's error holds the whole content, and would be the context of one that is raised while it is handled.
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def secrets_of(text: str) -> tuple[str, ...]:
    """The secret parts of a DSN or URL, as given and percent-decoded, for scrubbing messages of other libraries."""
    found: list[str] = []
    if "://" in text:
        try:
            if password := urlsplit(text).password:
                found += [password, unquote(password)]
        except ValueError:
            pass  # not a URL after all: the libpq form below
    try:
        params = conninfo_to_dict(text)
    except (ProgrammingError, UnicodeError):
        params = {}
    found += [str(params[name]) for name in _SECRET if params.get(name)]
    return tuple(dict.fromkeys(found))


def said_once(text: str) -> str:
    """A message of libpq in one line, without what it says again: it tries each address, some with and without TLS."""
    first, *attempts = re.split(r"(?=connection to server )", " ".join(text.split()))
    return f"{first}{', '.join(dict.fromkeys(part.strip() for part in attempts))}".strip()


def hopeless(error: BaseException) -> bool:
    """Whether the server refuses who we are, so that another attempt in a while would be refused like this one."""
    return _NOBODY.search(str(error)) is not None


def scrub(message: str, *texts: str) -> str:
    """`message` without any of the secrets of the given DSNs or URLs."""
    for text in texts:
        for secret in secrets_of(text):
            message = message.replace(secret, "***")
    return message
