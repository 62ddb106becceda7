"""How commands show jobs and plans: what moves, how far it is, what it waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardlib_ops.cli import render

if TYPE_CHECKING:
    from shardlib.topology import Topology
    from shardlib_ops.reshard.job import Job, Leg, Wish
    from shardlib_ops.reshard.plan import Plan

__all__ = ["job_content", "line", "names_of", "plan_content", "show_job", "show_jobs", "show_plan", "waiting_for"]

Names = Mapping[str, str]
"""Shard id -> name."""


def names_of(topology: Topology, new: Sequence[str] = ()) -> Names:
    """The names of the shards; those to be made get the ids that come next, in their order."""
    coming = {f"s{number}": name for number, name in enumerate(new, topology.next_shard)}
    return {**coming, **{shard.id: shard.name for shard in topology.shards}}


def _shard(names: Names, shard_id: str) -> dict[str, str | None]:
    return {"id": shard_id, "name": names.get(shard_id)}


def _leg(names: Names, leg: Leg) -> dict[str, Any]:
    from shardlib.ring.ranges import TOKEN_COUNT

    return {
        "number": leg.number,
        "source": _shard(names, leg.source),
        "target": _shard(names, leg.target),
        "ranges": len(leg.ranges),
        "share_of_all": sum(one.last - one.first + 1 for one in leg.ranges) / TOKEN_COUNT,
    }


def plan_content(plan: Plan, names: Names) -> dict[str, Any]:
    """A plan as a document."""
    legs = [{**_leg(names, one.leg), "share_of_source": one.share_of_source} for one in plan.legs]
    return {
        "dry_run": True,
        "kind": plan.kind.value,
        "legs": legs,
        "in_the_way": list(plan.in_the_way),
        "notes": list(plan.notes),
    }


def job_content(job: Job, names: Names, wish: Wish | None = None) -> dict[str, Any]:
    """A job as a document. `asked` is what an operator asked of it last, while that can still count."""
    return {
        "id": job.id,
        "kind": job.kind.value,
        "status": job.status.value,
        "outcome": None if job.outcome is None else job.outcome.value,
        "asked": None if wish is None or job.status.over else wish.value,
        "paused": job.paused,
        "error": job.error,
        "attempts": job.attempts,
        "legs": [_leg(names, leg) for leg in job.legs],
        "created_at": job.created_at,
        "started_at": job.started_at,
        "switched_at": job.switched_at,
        "completed_at": job.completed_at,
        "retention_s": job.retention_s,
    }


def waiting_for(job: Job, wish: Wish | None = None) -> str:
    """What the job waits for, or what made it fail; empty if nothing is to be said."""
    from shardlib_ops.reshard.job import Status
    from shardlib_ops.reshard.job import Wish as Wishes

    if job.paused and wish in (None, Wishes.PAUSE):
        return "paused: `resume` lets it go on"
    if job.error:
        return job.error
    if not job.status.over and (job.paused or wish not in (None, Wishes.RUN)):
        asked = "go on" if wish in (None, Wishes.RUN) else wish.value
        return f"asked to {asked}; the resharder that runs it does that"
    if job.started_at is None and not job.status.over:
        return f"no resharder has taken it yet: {render.program()} resharder run {job.id}"
    if job.status is Status.VALIDATION:
        return "the targets serve; both sides are in step while a resharder runs: `complete` or `rollback`"
    return ""


def line(job: Job, wish: Wish | None = None) -> str:
    """The state of a job in one line."""
    status = job.status.value + (
        f" (then {job.outcome.value})" if job.outcome is not None and not job.status.over else ""
    )
    attempts = f", attempt {job.attempts}" if job.attempts else ""
    said = waiting_for(job, wish)
    return f"job {job.id}: {status}{attempts}{': ' + said if said else ''}"


def _way(names: Names, leg: Leg) -> str:
    return f"{names.get(leg.source, leg.source)} -> {names.get(leg.target, leg.target)}"


def show_plan(plan: Plan, names: Names) -> None:
    """Print a plan."""
    render.console().print(f"{plan.kind.value}: nothing is changed by this\n", markup=False)
    rows = [
        [_way(names, one.leg), len(one.leg.ranges), f"{one.share_of_source:.1%}", f"{one.share_of_all:.1%}"]
        for one in plan.legs
    ]
    render.table(("from -> to", "ranges", "of the source's keys", "of all keys"), rows)
    for title, lines in (("in the way:", plan.in_the_way), ("to be known:", plan.notes)):
        if lines:
            render.console().print(f"\n{title}", markup=False)
        for text in lines:
            render.console().print(f"- {text}", markup=False, soft_wrap=True)


def show_job(job: Job, names: Names, wish: Wish | None = None) -> None:
    """Print one job."""
    from shardlib_ops.reshard.job import Status

    said = {
        "job": f"{job.id} ({job.kind.value})",
        "status": job.status.value if job.outcome is None else f"{job.status.value}, outcome {job.outcome.value}",
        "waits for" if not job.status.over else "error": waiting_for(job, wish) or "nothing",
        "attempts": job.attempts,
        "created": job.created_at,
        "started": job.started_at or "not yet",
        "switched": job.switched_at or "not yet",
        "over": job.completed_at or "not yet",
        "completes": "when asked" if job.retention_s is None else f"{job.retention_s:g} s after the switch, by itself",
    }
    if job.status.over and job.status is not Status.COMPLETED:
        targets = ", ".join(dict.fromkeys(names.get(leg.target, leg.target) for leg in job.legs))
        said["stays"] = f"tables that the job has made on {targets}, without its rows"
    render.facts(said)
    render.console().print()
    rows = [(_leg(names, leg), _way(names, leg)) for leg in job.legs]
    render.table(
        ("leg", "from -> to", "ranges", "of all keys"),
        [[one["number"], way, one["ranges"], f"{one['share_of_all']:.1%}"] for one, way in rows],
    )


def show_jobs(jobs: Sequence[Job], names: Names) -> None:
    """Print jobs, one a line."""
    rows = [
        [job.id, job.kind.value, job.status.value, ", ".join(_way(names, leg) for leg in job.legs), waiting_for(job)]
        for job in jobs
    ]
    render.table(("job", "kind", "status", "from -> to", "waits for"), rows)
