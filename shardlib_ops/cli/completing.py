"""What the shell offers for a shard or a job: those of the catalog that was named, if it answers at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Final

import typer

if TYPE_CHECKING:
    from shardlib.catalog import Catalog

__all__ = ["jobs", "shards"]

_WAIT_S: Final = 2.0

Offers = list[tuple[str, str]]
"""Each with what the shell says of it."""


def shards(ctx: typer.Context, incomplete: str) -> Offers:
    """The shards whose names begin so."""

    def found(catalog: Catalog) -> Iterable[tuple[str, str]]:
        return ((shard.name, f"{shard.id}, {shard.status.value}") for shard in catalog.load().shards)

    return _offered(ctx, incomplete, found)


def jobs(ctx: typer.Context, incomplete: str) -> Offers:
    """The jobs whose numbers begin so."""

    def found(catalog: Catalog) -> Iterable[tuple[str, str]]:
        from shardlib_ops.reshard.store import JobStore

        return ((str(job.id), f"{job.kind.value}, {job.status.value}") for job in JobStore(catalog).all())

    return _offered(ctx, incomplete, found)


def _offered(ctx: typer.Context, incomplete: str, found: Callable[[Catalog], Iterable[tuple[str, str]]]) -> Offers:
    from shardlib.catalog import open_catalog

    url = ctx.params.get("catalog") or os.environ.get("SHARDLIB_CATALOG")
    if not url or url.startswith("memory:"):
        return []
    try:
        with closing(open_catalog(url, timeout_s=_WAIT_S)) as catalog:
            return [one for one in found(catalog) if one[0].startswith(incomplete)]
    except Exception:  # noqa: BLE001 - who presses a key is offered nothing then; the command itself says why
        return []
