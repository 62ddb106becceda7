"""What a schedule is made of, by its seed alone: the jobs, how each ends, and what breaks when. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

BEFORE = (
    "claimed", "schema_copied", "sides_prepared", "announced", "status_precopy", "leg_copied", "schema_finished",
    "status_deltasync", "leg_compared", "reverse_slots", "status_cutover",
)  # fmt: skip
SWITCHING = ("gates_closed", "guarded", "drained", "compared", "handed_over", "gates_opened", "switched")
AFTER = ("status_validation", "forward_stopped")
CLEANING = ("status_cleanup", "slots_dropped", "shard_purged", "finished", "retired")

FAULTS = {
    "runner killed": 5, "runner frozen": 3, "runner cut off from etcd": 2, "runner's connections cut": 2,
    "runner's commit reply lost": 4, "runner's commit not sent": 2,
    "postgres killed": 4, "postgres stopped": 1, "postgres paused": 1,
    "etcd killed": 2, "etcd stopped": 1, "etcd paused": 1,
    "client frozen": 3, "clients cut off from etcd": 3, "clients' connections cut": 2, "clients' commit reply lost": 3,
}  # fmt: skip
"""Fault -> how often, against the others."""

LASTS_S = {
    "runner killed": (0.0, 1.5), "runner frozen": (2.5, 4.5), "runner cut off from etcd": (2.5, 4.5),
    "postgres killed": (0.1, 1.0), "postgres stopped": (0.1, 1.0), "postgres paused": (0.2, 2.0),
    "etcd killed": (0.1, 1.5), "etcd stopped": (0.1, 1.5), "etcd paused": (0.2, 2.5),
    "client frozen": (0.5, 4.0), "clients cut off from etcd": (1.0, 5.0),
}  # fmt: skip
"""Fault -> from when it strikes to when it is mended, in seconds; the others are over at once."""

KINDS = ("split", "merge", "move_keys", "rebalance", "drain")
ENDINGS = ("complete", "complete", "rollback", "rollback", "cancel")


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault: at a step of the job's runner, or some seconds after the job began."""

    fault: str
    step: str | None
    nth: int
    """Which time that the step is reached."""
    at_s: float
    lasts_s: float
    pick: float
    """Chooses among equals, in 0..1."""

    def __str__(self) -> str:
        when = f"at {self.at_s:.2f} s" if self.step is None else f"at {self.step}" + f" ({self.nth})" * (self.nth > 1)
        return f"{self.fault} {when}" + f" for {self.lasts_s:.1f} s" * (self.lasts_s > 0)


@dataclass(frozen=True, slots=True)
class JobPlan:
    """One job. What it moves depends on who owns what when it begins."""

    kind: str
    ending: str
    cancel_step: str
    dwell_s: float
    """From the switch to the operator's decision."""
    picks: tuple[float, ...]
    strikes: tuple[Strike, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """One run."""

    seed: int
    owners: int
    hash_function: str
    two_phase: bool
    isolation: str | None
    jobs: tuple[JobPlan, ...]

    def __str__(self) -> str:
        jobs = "; ".join(f"{job.kind} to {job.ending} [{', '.join(map(str, job.strikes))}]" for job in self.jobs)
        more = " two-phase" * self.two_phase + (f" {self.isolation}" if self.isolation else "")
        return f"seed {self.seed}: {self.owners} owners, {self.hash_function}{more}: {jobs}"


def make(seed: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(f"schedule {seed}")
    return Schedule(
        seed=seed,
        owners=rng.choice((1, 2, 2, 3)),
        hash_function=rng.choice(("murmur3", "xxhash")),
        two_phase=rng.random() < 0.4,
        isolation=rng.choice((None, None, "REPEATABLE READ")),
        jobs=tuple(_job(rng) for _ in range(rng.choice((1, 1, 1, 2)))),
    )


def _job(rng: random.Random) -> JobPlan:
    ending = rng.choice(ENDINGS)
    cancel_step = rng.choice((*BEFORE, *SWITCHING[:4]))
    steps = {"cancel": (*BEFORE, *SWITCHING[:3], *CLEANING[1:])}.get(ending, (*BEFORE, *SWITCHING, *AFTER, *CLEANING))
    at_steps = [_strike(rng, rng.choice((rng.choice(steps), rng.choice(SWITCHING))), ending)
                for _ in range(rng.choice((1, 1, 2, 2, 3)))]  # fmt: skip
    at_times = [_strike(rng, None, ending) for _ in range(rng.choice((0, 1, 1, 2)))]
    return JobPlan(
        kind=rng.choice(KINDS),
        ending=ending,
        cancel_step=cancel_step,
        dwell_s=rng.uniform(0.2, 1.5),
        picks=tuple(rng.random() for _ in range(8)),
        strikes=(*at_steps, *at_times),
    )


def _strike(rng: random.Random, step: str | None, ending: str) -> Strike:
    (fault,) = rng.choices(list(FAULTS), list(FAULTS.values()))
    # A rollback goes through the steps of the switch once more.
    again = ending == "rollback" and step in SWITCHING and rng.random() < 0.6
    return Strike(
        fault, step, 2 if again else 1, rng.uniform(0.1, 4.0), rng.uniform(*LASTS_S.get(fault, (0, 0))), rng.random()
    )
