"""`shardlib-ops shard promote`: checks, asks, promotes, and tells what is left to do by hand."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from shardlib_ops.cli.reach import Asking, Way
    from shardlib_ops.client.views import PromotionView
    from shardlib_ops.manager.promote import Demoted, Rejoin

__all__ = ["promote"]

_REJOIN_S = 3600.0


def promote(
    shard: str,
    way: Way,
    *,
    replica: str | None,
    budget_s: float,
    max_lag_bytes: int,
    rejoin_command: str | None,
    check: bool,
    resume: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """See `shardlib_ops.cli.shard.promote`."""
    rejoin = None if rejoin_command is None else _by_command(rejoin_command)

    async def told(step: str) -> None:
        if not as_json:
            render.console(error=True).print(f"  {step.replace('_', ' ')}", markup=False)

    with way.asking() as ask:
        client = ask.client
        if check:
            _check(ask, shard, replica, max_lag_bytes, as_json=as_json)
            return
        if resume:
            _show(ask(client.resume_promotion(shard, rejoin=rejoin, on_step=told)), as_json=as_json)
            return
        found = ask(client.shard(shard))
        given.agreed(f"Promote a replica of shard {found.name!r} (primary now: {found.primary})?", yes=yes)
        record = ask(
            client.promote(shard, replica, budget_s=budget_s, max_lag_bytes=max_lag_bytes, rejoin=rejoin, on_step=told)
        )
    if record is not None:
        _show(record, as_json=as_json)


def _check(ask: Asking, shard: str, replica: str | None, max_lag_bytes: int, *, as_json: bool) -> None:
    faults = ask(ask.client.check_promotion(shard, replica, max_lag_bytes=max_lag_bytes))
    if as_json:
        render.document({"faults": faults})
    elif faults:
        render.table(("what stands in the way", "what to do"), [(one.problem, one.way_out) for one in faults])
    else:
        render.console().print("nothing stands in the way", markup=False)
    if faults:
        raise typer.Exit(1)


def _show(record: PromotionView, *, as_json: bool) -> None:
    if as_json:
        render.document(record)
        return
    said = {
        "shard": f"{record.name} ({record.id})",
        "promotion": record.stage,
        "old primary": record.old,
        "new primary": record.new,
        "closed for": "unknown" if record.pause_s is None else f"{record.pause_s:.3f} s",
        "left to do": record.error or "nothing",
    }
    render.facts(said)


def _by_command(command: str) -> Rejoin:
    """A command of the operator's, told by its environment what to do."""

    async def rejoin(demoted: Demoted) -> None:
        from shardlib.errors import UnsupportedOperation

        told = {
            "SHARDLIB_SHARD": demoted.shard,
            "SHARDLIB_OLD_HOST": demoted.old.host,
            "SHARDLIB_OLD_PORT": demoted.old.port,
            "SHARDLIB_NEW_HOST": demoted.new.host,
            "SHARDLIB_NEW_PORT": demoted.new.port,
        }
        ran = await asyncio.create_subprocess_shell(command, env={**os.environ, **told})
        try:
            async with asyncio.timeout(_REJOIN_S):
                code = await ran.wait()
        except BaseException:
            if ran.returncode is None:
                ran.terminate()
            raise
        if code:
            raise UnsupportedOperation(f"the rejoin command ended with {code}", "see what it printed")

    return rejoin
