"""How commands show jobs and plans: what moves, how far it is, what it waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardlib_ops.cli import render

if TYPE_CHECKING:
    from shardlib_ops.client.views import JobView, LegView, PlanView

__all__ = ["line", "show_job", "show_jobs", "show_plan", "waiting_for"]


def waiting_for(job: JobView) -> str:
    """What the job waits for, or what made it fail; empty if nothing is to be said."""
    from shardlib_ops.reshard.job import Status, Wish

    status, over = Status(job.status), Status(job.status).over
    if job.paused and job.asked in (None, Wish.PAUSE):
        return "paused: `resume` lets it go on"
    if job.error:
        return job.error
    if not over and (job.paused or job.asked not in (None, Wish.RUN)):
        asked = "go on" if job.asked in (None, Wish.RUN) else job.asked
        return f"asked to {asked}; the resharder that runs it does that"
    if job.started_at is None and not over:
        return f"no resharder has taken it yet: {render.program()} resharder run {job.id}"
    if status is Status.VALIDATION:
        return "the targets serve; both sides are in step while a resharder runs: `complete` or `rollback`"
    return ""


def line(job: JobView) -> str:
    """The state of a job in one line."""
    from shardlib_ops.reshard.job import Status

    status = job.status + (f" (then {job.outcome})" if job.outcome is not None and not Status(job.status).over else "")
    attempts = f", attempt {job.attempts}" if job.attempts else ""
    said = waiting_for(job)
    return f"job {job.id}: {status}{attempts}{': ' + said if said else ''}"


def _way(leg: LegView) -> str:
    return f"{leg.source.shown} -> {leg.target.shown}"


def show_plan(plan: PlanView) -> None:
    """Print a plan."""
    render.console().print(f"{plan.kind}: nothing is changed by this\n", markup=False)
    rows = [[_way(leg), leg.ranges, f"{leg.share_of_source:.1%}", f"{leg.share_of_all:.1%}"] for leg in plan.legs]
    render.table(("from -> to", "ranges", "of the source's keys", "of all keys"), rows)
    for title, lines in (("in the way:", plan.in_the_way), ("to be known:", plan.notes)):
        if lines:
            render.console().print(f"\n{title}", markup=False)
        for text in lines:
            render.console().print(f"- {text}", markup=False, soft_wrap=True)


def show_job(job: JobView) -> None:
    """Print one job."""
    from shardlib_ops.reshard.job import Status

    status = Status(job.status)
    said = {
        "job": f"{job.id} ({job.kind})",
        "status": job.status if job.outcome is None else f"{job.status}, outcome {job.outcome}",
        "waits for" if not status.over else "error": waiting_for(job) or "nothing",
        "attempts": job.attempts,
        "created": job.created_at,
        "started": job.started_at or "not yet",
        "switched": job.switched_at or "not yet",
        "over": job.completed_at or "not yet",
        "completes": "when asked" if job.retention_s is None else f"{job.retention_s:g} s after the switch, by itself",
    }
    if status.over and status is not Status.COMPLETED:
        targets = ", ".join(dict.fromkeys(leg.target.shown for leg in job.legs))
        said["stays"] = f"tables that the job has made on {targets}, without its rows"
    render.facts(said)
    render.console().print()
    rows = [[leg.number, _way(leg), leg.ranges, f"{leg.share_of_all:.1%}"] for leg in job.legs]
    render.table(("leg", "from -> to", "ranges", "of all keys"), rows)


def show_jobs(jobs: Sequence[JobView]) -> None:
    """Print jobs, one a line."""
    rows = [[job.id, job.kind, job.status, ", ".join(map(_way, job.legs)), waiting_for(job)] for job in jobs]
    render.table(("job", "kind", "status", "from -> to", "waits for"), rows)
