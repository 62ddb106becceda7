"""All checks of a cluster, made side by side and within limits; what cannot be looked at is a finding like others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import psycopg
from psycopg import AsyncConnection

from shardlib.catalog import open_catalog
from shardlib.dsn import scrub
from shardlib.errors import CatalogUnavailable, ShardlibError, ShardUnavailable
from shardlib.topology import Shard
from shardlib_ops.doctor.across import Seen, across, look_structure, references_of
from shardlib_ops.doctor.cluster import catalog_findings, cluster_findings
from shardlib_ops.doctor.finding import Finding, Limits, Report, Severity
from shardlib_ops.doctor.replicas import replicas
from shardlib_ops.doctor.shard import SHARD_CHECKS, Check, identity
from shardlib_ops.doctor.view import View, read_view
from shardlib_ops.reshard.connect import connect

__all__ = ["Doctor"]

_SIDE_BY_SIDE: Final = 16
_LOOKS: Final = 3
_SETTLE_S: Final = 1.0
_CONNECT_S: Final = 5
_ORDER: Final = tuple(Severity)
_ALSO: Final = (
    "catalog", "members", "jobs", "promotions", "schema", "reach", "identity", "replicas", "clocks", "drift",
    "revisions", "references", "unknown tables",
)  # fmt: skip


class Doctor:
    """Looks at a cluster and changes nothing.

    Args:
        url: the catalog, such as `etcd://127.0.0.1:2379/shop`.
        limits: from where on something is a finding.
        timeout_s: limit for one answer of the catalog, in seconds.
    """

    def __init__(self, url: str, *, limits: Limits | None = None, timeout_s: float = 5.0) -> None:
        self._url, self._limits = url, limits or Limits()
        self._catalog = open_catalog(url, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the catalog; idempotent."""
        await asyncio.to_thread(self._catalog.close)

    @classmethod
    def look(cls, url: str, *, limits: Limits | None = None, timeout_s: float = 5.0) -> Report:
        """`examine`, for scripts. Not for code that runs in an event loop."""

        async def once() -> Report:
            async with cls(url, limits=limits, timeout_s=timeout_s) as doctor:
                return await doctor.examine()

        return asyncio.run(once())

    async def examine(self) -> Report:
        """Make every check. Never raises for what is wrong with the cluster: that is what it tells.

        When the topology or a job changes meanwhile, everything is looked at anew: what is found holds for one moment.
        """
        began = time.monotonic()
        checks = (*_ALSO, *(check.name for check in SHARD_CHECKS))
        try:
            found = await catalog_findings(self._catalog, self._url, self._limits)
            view = await read_view(self._catalog, self._limits)
            for _ in range(_LOOKS):
                of_shards = await self._shards(view)
                after = await read_view(self._catalog, self._limits)
                if after.mark == view.mark:
                    break
                view = after
        except CatalogUnavailable as error:
            todo = "clients route without it for now, and nothing can be changed: start it, or correct the URL"
            lost = Finding(Severity.ERROR, "catalog", "catalog", str(error), todo)
            return Report((lost,), None, 0, ("catalog",), time.monotonic() - began)
        except ShardlibError as error:
            todo = "restore the catalog, or upgrade this program"
            lost = Finding(Severity.ERROR, "catalog", "catalog", str(error), todo)
            return Report((lost,), None, 0, ("catalog",), time.monotonic() - began)
        found += [*cluster_findings(view), *of_shards]
        found.sort(key=lambda finding: (_ORDER.index(finding.severity), finding.where, finding.check))
        return Report(
            tuple(dict.fromkeys(found)),
            view.topology.version,
            len(view.topology.shards),
            checks,
            time.monotonic() - began,
        )

    async def _shards(self, view: View) -> list[Finding]:
        few = asyncio.Semaphore(_SIDE_BY_SIDE)
        seen: dict[str, Seen] = {}

        async def one(shard: Shard) -> list[Finding]:
            async with few:
                return await _examined(shard, view, seen)

        found = [finding for some in await asyncio.gather(*map(one, view.topology.shards)) for finding in some]
        together = across(view, seen)
        if any(finding.check == "references" for finding in together):
            # A load commits on one shard after the other: what differs a moment later as well does differ.
            await asyncio.sleep(_SETTLE_S)
            again = [shard for shard in view.topology.shards if shard.id in seen]
            await asyncio.gather(*(_asked(shard, view, "references", _references(seen)) for shard in again))
            together = across(view, seen)
        return found + together


def _references(seen: dict[str, Seen]) -> Callable[[AsyncConnection[Any], Shard, View], Awaitable[Any]]:
    async def ask(conn: AsyncConnection[Any], shard: Shard, view: View) -> list[Finding]:
        fresh = Seen()
        await references_of(conn, view, fresh)
        seen[shard.id].references = fresh.references
        return []

    return ask


async def _examined(shard: Shard, view: View, seen: dict[str, Seen]) -> list[Finding]:
    """Every check of one shard; a shard that cannot be reached, or is another one, is one finding."""
    found = await _asked(shard, view, "identity", identity)
    if any(finding.severity is Severity.ERROR for finding in found):
        return found
    mine = seen[shard.id] = Seen()

    async def structure(conn: AsyncConnection[Any], shard: Shard, view: View) -> list[Finding]:
        del shard
        await look_structure(conn, view, mine)
        return []

    more = (
        *SHARD_CHECKS,
        Check("replicas", replicas),
        Check("drift", structure),
        Check("references", _references(seen)),
    )
    for check in more:
        some = await _asked(shard, view, check.name, check.ask)
        found += some
        if any(finding.check == "reach" for finding in some):
            break  # it went away in the middle
    return found


async def _asked(
    shard: Shard,
    view: View,
    name: str,
    ask: Callable[[AsyncConnection[Any], Shard, View], Awaitable[list[Finding]]],
) -> list[Finding]:
    """One check of one shard, on a connection of its own, within its limit of time."""
    where, limit_s = f"shard {shard.name!r}", view.limits.check_s
    finding = partial(Finding, where=where)
    try:
        async with (
            asyncio.timeout(limit_s),
            await connect(shard.primary, shard=shard.name, application="shardlib doctor", timeout_s=_CONNECT_S) as conn,
        ):
            return await ask(conn, shard, view)
    except ShardUnavailable as error:
        todo = "start the server, promote a replica, or correct the DSN in the catalog"
        return [finding(Severity.ERROR, "reach", what=str(error), todo=todo)]
    except TimeoutError:
        if name == "identity":
            todo = "look whether the server is frozen or overloaded, and at the network; nothing else is asked of it"
            return [finding(Severity.ERROR, "reach", what=f"no answer within {limit_s:g} s", todo=todo)]
        todo = "look at the load and the locks of the server; this check tells nothing of the shard"
        return [finding(Severity.WARNING, name, what=f"the check {name!r} did not end within {limit_s:g} s", todo=todo)]
    except (psycopg.Error, ShardlibError) as error:
        said = scrub(" ".join(str(error).split()), shard.primary.reveal())
        if isinstance(error, psycopg.OperationalError) and (error.sqlstate or "08").startswith(("08", "57P")):
            return [
                finding(Severity.ERROR, "reach", what=f"the connection was lost: {said}", todo="look at the server")
            ]
        what = f"the check {name!r} could not be made: {said}"
        return [
            finding(Severity.WARNING, name, what=what, todo="give the role of the DSN the right to look, or see there")
        ]
