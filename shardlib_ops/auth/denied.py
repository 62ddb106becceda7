"""Tokens that count no more although their time is not over: a list in the catalog that every process reads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec

from shardlib.catalog import Catalog, Conflict
from shardlib.errors import CatalogUnavailable, InvalidArgument, InvalidTopology
from shardlib_ops.auth.model import Identity, Unauthenticated

__all__ = ["DOCUMENT", "Denied", "DeniedEntry", "allow", "denied_entries", "deny"]

_LOG = logging.getLogger("shardlib.ops.auth")

DOCUMENT: Final = "auth/denied"
ENTRIES_MAX: Final = 5000
FIRST_WAIT_S: Final = 10.0
WAIT_S: Final = 1.0
"""How long a request waits for the list while an older one is here, in seconds."""

AWAY_S: Final = 10.0
"""How long nobody waits for a catalog that has just not answered, in seconds."""

_TRIES: Final = 20
_TEXT_MAX: Final = 200


class DeniedEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One token, or all tokens of one subject.

    Attributes:
        token_id: `jti` of a token, or None.
        subject: `sub` of tokens, or None.
        at: when it was denied, in seconds since 1970.
        until: when no such token is valid any more, so that the entry can go; None keeps it until it is withdrawn.
    """

    token_id: str | None = None
    subject: str | None = None
    at: float
    until: float | None = None


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    format: int = 1
    denied: tuple[DeniedEntry, ...] = ()


class Denied:
    """The list as one process sees it: never older than `refresh_s` while the catalog answers.

    Args:
        catalog: where it lives.
        refresh_s: how often it is read, in seconds.
        stale_max_s: how long it counts after the last answer of the catalog, in seconds.
        monotonic: seconds of a clock that nobody sets.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        refresh_s: float = 2.0,
        stale_max_s: float = 3600.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog, self._refresh_s, self._stale_max_s = catalog, refresh_s, stale_max_s
        self._monotonic = monotonic
        self._tokens: frozenset[str | None] = frozenset()
        self._subjects: frozenset[str | None] = frozenset()
        self._read_at = self._failed_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def check(self, identity: Identity) -> None:
        """Refuse an identity that the list names.

        Raises:
            Unauthenticated: it is denied; or the list is too old to tell (`unavailable`).
        """
        await self._fresh()
        if identity.token_id in self._tokens or identity.subject in self._subjects:
            raise Unauthenticated("denied", identity.subject)

    async def aclose(self) -> None:
        """End a read that is under way; idempotent. The catalog is its owner's."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading], timeout=WAIT_S)

    async def _fresh(self) -> None:
        now = self._monotonic()
        if now - self._read_at <= self._refresh_s:
            return
        usable = now - self._read_at <= self._stale_max_s
        if self._reading is None and (not usable or now - self._failed_at >= self._refresh_s):
            self._reading = asyncio.get_running_loop().create_task(self._read())
        # A catalog that has just not answered must not slow every request down.
        if self._reading is not None and not (usable and now - self._failed_at < AWAY_S):
            await asyncio.wait([self._reading], timeout=WAIT_S if usable else FIRST_WAIT_S)
        if self._monotonic() - self._read_at > self._stale_max_s:
            raise Unauthenticated("denied-list-unavailable", unavailable=True)

    async def _read(self) -> None:
        try:
            entries = await asyncio.to_thread(denied_entries, self._catalog)
        except (CatalogUnavailable, InvalidTopology) as error:
            self._failed_at = self._monotonic()
            _LOG.warning("the list of denied tokens cannot be read: %s", error)
        except Exception:  # noqa: BLE001 - whatever it was: the list that is here counts on until it is too old
            self._failed_at = self._monotonic()
            _LOG.exception("the list of denied tokens cannot be read")
        else:
            self._tokens = frozenset(each.token_id for each in entries) - {None}
            self._subjects = frozenset(each.subject for each in entries) - {None}
            self._read_at, self._failed_at = self._monotonic(), float("-inf")
        finally:
            self._reading = None


def denied_entries(catalog: Catalog) -> tuple[DeniedEntry, ...]:
    """What is denied now. Blocks.

    Raises:
        CatalogUnavailable: no answer.
        InvalidTopology: the list cannot be read.
    """
    return _load(catalog)[0]


def deny(
    catalog: Catalog,
    *,
    token_id: str | None = None,
    subject: str | None = None,
    now: float,
    until: float | None = None,
) -> DeniedEntry:
    """Deny one token, or every token of a subject, on all processes within seconds. Blocks.

    Args:
        catalog: where the list lives.
        token_id: `jti` of the token.
        subject: `sub` of the tokens; also of those that are issued later, until it is withdrawn.
        now: seconds since 1970; entries whose `until` is past are dropped.
        until: for a token: when it has expired at the latest.

    Raises:
        InvalidArgument: neither or both are given, or the list is full.
        CatalogUnavailable: no answer; it may be denied.
        Conflict: others change the list without end.
    """
    entry = _entry(token_id, subject, now, until if token_id is not None else None)

    def with_it(entries: tuple[DeniedEntry, ...]) -> tuple[DeniedEntry, ...]:
        kept = tuple(each for each in entries if not _same(each, entry) and (each.until is None or each.until >= now))
        if len(kept) >= ENTRIES_MAX:
            raise InvalidArgument(
                "denied", len(kept), f"at most {ENTRIES_MAX} entries; change the key, which ends every token"
            )
        return (*kept, entry)

    _change(catalog, with_it)
    return entry


def allow(catalog: Catalog, *, token_id: str | None = None, subject: str | None = None) -> bool:
    """Withdraw a denial; whether there was one. Blocks.

    Raises:
        InvalidArgument: neither or both are given.
        CatalogUnavailable: no answer; it may be withdrawn.
        Conflict: others change the list without end.
    """
    entry = _entry(token_id, subject, 0.0, None)
    if not any(_same(each, entry) for each in denied_entries(catalog)):
        return False
    _change(catalog, lambda entries: tuple(each for each in entries if not _same(each, entry)))
    return True


def _entry(token_id: str | None, subject: str | None, at: float, until: float | None) -> DeniedEntry:
    if (token_id is None) == (subject is None):
        raise InvalidArgument("denied", None if token_id is None else "both", "either a token id or a subject")
    given = token_id if token_id is not None else subject
    if not given or len(given) > _TEXT_MAX or not given.isprintable():
        raise InvalidArgument("denied", given, f"1 to {_TEXT_MAX} printable characters")
    return DeniedEntry(token_id=token_id, subject=subject, at=at, until=until)


def _same(one: DeniedEntry, other: DeniedEntry) -> bool:
    return (one.token_id, one.subject) == (other.token_id, other.subject)


def _load(catalog: Catalog) -> tuple[tuple[DeniedEntry, ...], int | None]:
    found = catalog.read_document(DOCUMENT)
    if found is None:
        return (), None
    try:
        document = msgspec.json.decode(found.data, type=_Document)
    except msgspec.DecodeError as error:
        raise InvalidTopology(
            f"the list of denied tokens cannot be read ({error})", f"restore the catalog's document {DOCUMENT!r}"
        ) from None
    if document.format != 1:
        raise InvalidTopology(f"the list of denied tokens has format {document.format}", "this release reads format 1")
    return document.denied, found.revision


def _change(
    catalog: Catalog, change: Callable[[tuple[DeniedEntry, ...]], tuple[DeniedEntry, ...]], tries: int = _TRIES
) -> None:
    while True:
        entries, revision = _load(catalog)
        data = msgspec.json.encode(_Document(denied=change(entries)))
        try:
            catalog.write_document(DOCUMENT, data, expected=revision)
        except Conflict:
            tries -= 1
            if tries == 0:
                raise
        else:
            return
