"""Plain passwords on their way into the catalog: let in, encrypted or refused."""

from __future__ import annotations

import logging
import os
from typing import Final, Literal, cast, get_args

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument
from shardlib.secrets.keys import SecretKey, read_keys
from shardlib.secrets.sealed import seal

__all__ = ["PLAIN_VARIABLE", "PlainPasswords", "encrypted", "kept", "plain_passwords", "sealed"]

_log = logging.getLogger("shardlib.ops.manager")

PlainPasswords = Literal["allow", "encrypt", "refuse"]
PLAIN_VARIABLE: Final = "SHARDLIB_ENDPOINTS__PLAIN_PASSWORDS"
"""The setting `endpoints.plain_passwords` in the environment."""


def plain_passwords(given: PlainPasswords | None = None) -> PlainPasswords:
    """What becomes of plain passwords: what is given, else what the environment says, else `allow`.

    Raises:
        InvalidArgument: it is none of the three.
    """
    rule = os.environ.get(PLAIN_VARIABLE, "allow") if given is None else given
    if rule not in get_args(PlainPasswords):
        raise InvalidArgument("endpoints.plain_passwords", rule, f"one of {', '.join(get_args(PlainPasswords))}")
    return cast("PlainPasswords", rule)


def encrypted(dsn: Dsn) -> Dsn:
    """The DSN with its plain password encrypted under the first key of this process. Reads the file of the keys.

    Raises:
        InvalidArgument: it has no plain password, or this process has no key, or `cryptography` is missing.
    """
    if not dsn.plain_password:
        raise InvalidArgument("dsn", str(dsn), "a DSN with a plain password, which is to be encrypted")
    return sealed(dsn, dsn.secret(), read_keys()[0])


def sealed(dsn: Dsn, password: str, key: SecretKey) -> Dsn:
    """The DSN with this password, encrypted under this key.

    Raises:
        InvalidArgument: a password that no server takes, or `cryptography` is missing.
    """
    return dsn.with_password(seal(password, dsn.bound(), key))


def kept(dsn: Dsn, rule: PlainPasswords, place: str = "endpoint") -> Dsn:
    """The DSN as the catalog is to hold it. What holds no plain password stays as it is.

    Args:
        dsn: what somebody named.
        rule: what is to become of a plain password. One that is let in is noted in the log.
        place: what errors call it.

    Raises:
        InvalidArgument: a plain password is refused, or cannot be encrypted.
    """
    if not dsn.plain_password:
        return dsn
    if rule == "encrypt":
        return encrypted(dsn)
    if rule == "refuse":
        raise InvalidArgument(
            place, str(dsn),
            "a DSN without a plain password (endpoints.plain_passwords): write a reference, or encrypt it by "
            "`shardlib-ops secret encrypt`",
        )  # fmt: skip
    _log.warning("the catalog will hold the password of %s for every client to read; a reference or --encrypt hides it",
                 dsn)  # fmt: skip
    return dsn
