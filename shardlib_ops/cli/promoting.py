"""`shardlib-ops shard promote`: checks, asks, promotes, and tells what is left to do by hand."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from shardlib_ops.manager.blocking import BlockingManager
    from shardlib_ops.manager.promote import Demoted, Promotion, Rejoin

__all__ = ["promote"]

_REJOIN_S = 3600.0


def promote(
    shard: str,
    catalog: str,
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
    from shardlib_ops.manager.manager import Manager

    rejoin = None if rejoin_command is None else _by_command(rejoin_command)

    async def told(step: str) -> None:
        if not as_json:
            render.console(error=True).print(f"  {step.replace('_', ' ')}", markup=False)

    with Manager.sync(catalog) as manager:
        if check:
            _check(manager, shard, replica, max_lag_bytes, as_json=as_json)
            return
        if resume:
            _show(manager.resume_promotion(shard, rejoin=rejoin, on_step=told), as_json=as_json)
            return
        found = manager.get_shard(shard)
        given.agreed(f"Promote a replica of shard {found.name!r} (primary now: {found.primary})?", yes=yes)
        manager.promote_replica(
            shard, replica, budget_s=budget_s, max_lag_bytes=max_lag_bytes, rejoin=rejoin, on_step=told
        )
        record = manager.get_promotion(shard)
    if record is not None:
        _show(record, as_json=as_json)


def _check(manager: BlockingManager, shard: str, replica: str | None, max_lag_bytes: int, *, as_json: bool) -> None:
    faults = manager.check_promotion(shard, replica, max_lag_bytes=max_lag_bytes)
    if as_json:
        render.document({"faults": [{"problem": one.problem, "way_out": one.way_out} for one in faults]})
    elif faults:
        render.table(("what stands in the way", "what to do"), [(one.problem, one.way_out) for one in faults])
    else:
        render.console().print("nothing stands in the way", markup=False)
    if faults:
        raise typer.Exit(1)


def _show(record: Promotion, *, as_json: bool) -> None:
    said: dict[str, Any] = {
        "shard": f"{record.name} ({record.shard})",
        "promotion": record.stage.value,
        "old primary": str(record.old),
        "new primary": str(record.new),
        "closed for": "unknown" if record.pause_s is None else f"{record.pause_s:.3f} s",
        "left to do": record.error or "nothing",
    }
    if as_json:
        render.document(
            {
                "id": record.shard,
                "name": record.name,
                "stage": record.stage.value,
                "old": str(record.old),
                "new": str(record.new),
                "pause_s": record.pause_s,
                "error": record.error,
            }
        )
    else:
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
