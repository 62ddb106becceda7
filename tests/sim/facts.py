"""What the simulation claims of PostgreSQL, the streams and the catalog: each claim a script, played on both.

A script is written once, against `Stage`: `fake_stage` plays it on the simulated servers, `real_stage` on real ones
with the production code. `test_facts` does both. Who leans on which:

========================================  ===========================================================================
fact                                      where the simulation relies on it
========================================  ===========================================================================
closing_gives_way                         `FakeSide.close_gate`: attempts within a budget; the gate is as it was
newcomers_pass_between_attempts           `FakeSide._attempt`, `FakeShard.enter`: held up for one attempt at a time
nothing_commits_after_the_closing         `FakeShard.holders`, `end_flight`: `Simulation._look_at_commit`
who_is_late_is_refused                    `FakeShard.enter` raises `Closed`; closing and opening are idempotent
a_gate_number_can_be_made_again           `FakeShard.open_gate`: no shard remembers, so `gates.reserve` has to
a_lower_token_is_refused                  `FakeShard.claim`, `claimed`: a runner that wakes up has no effect
an_earlier_round_is_refused               `Process.call(late=True)`, `_with`: what was sent bears the token of then
a_retired_job_is_refused                  `FakeShard.retire` forgets the token, and all that the job had made
the_guard_refuses_moved_keys_alone        `FakeShard.write`; `write_now`: stream and purge pass the guard
who_wrote_before_the_guard_may_pass       `Transaction.guarded`, `FakeSide.foreign_writers`: `Cutover._drain` waits
old_writers_are_found_by_age              `FakeSide.old_writers`
a_slot_waits_for_writers                  `FakeFlow.settled`
a_copy_and_its_stream_are_exact           `FakeShard.snapshot`, `Slot.point`, `FakeFlow.apply_now`
a_taken_over_stream_goes_on_exactly       `FakeFlow._start`: rows and position are one transaction, the slot is behind
a_barrier_follows_all_that_was_let_in     `FakeShard.message`, `FakeFlow.heard`: `Cutover._drain`
a_commit_is_sent_before_it_is_seen        `FakeShard.commit`: the WAL first, then visible, then the locks
the_way_back_begins_where_it_is_told      `FakeWorld.start_reverse`, `FakeShard.position`
a_lost_slot_is_noticed                    `Slot.lost`, `FakeFlow.usable`, `FakeFlow._check_slot`
a_sink_set_back_is_noticed                `FakeFlow._start`: a slot that is ahead of the position
a_replica_that_lags_holds_the_switch      `FakeSide.replayed`
a_swap_wants_the_version_it_expects       `FakeCatalog.swap`
a_lost_answer_hides_a_swap                `FakeCatalog.swap`: the same nonce again is no conflict
a_late_swap_may_still_happen              `Process.call(late=True)`: `reopen` publishes a version against it
a_newer_version_ends_a_late_swap          the same: `gates._settled` too
a_swap_of_a_former_holder_is_refused      `FakeCatalog.holds` in `swap`
a_record_is_its_holders_alone             `FakeCatalog.save`
a_lease_has_one_holder                    `FakeCatalog.grant`, `release`: tokens rise
a_lease_that_is_cut_off_runs_out          `Lease.alive`: by its holder's clock, not after the catalog's
========================================  ===========================================================================
"""

from __future__ import annotations

from tests.sim.facts_catalog import (
    a_late_swap_may_still_happen,
    a_lease_has_one_holder,
    a_lease_that_is_cut_off_runs_out,
    a_lost_answer_hides_a_swap,
    a_newer_version_ends_a_late_swap,
    a_record_is_its_holders_alone,
    a_swap_of_a_former_holder_is_refused,
    a_swap_wants_the_version_it_expects,
)
from tests.sim.facts_shard import (
    a_gate_number_can_be_made_again,
    a_lower_token_is_refused,
    a_retired_job_is_refused,
    an_earlier_round_is_refused,
    closing_gives_way,
    newcomers_pass_between_attempts,
    nothing_commits_after_the_closing,
    old_writers_are_found_by_age,
    the_guard_refuses_moved_keys_alone,
    who_is_late_is_refused,
    who_wrote_before_the_guard_may_pass,
)
from tests.sim.facts_stream import (
    a_barrier_follows_all_that_was_let_in,
    a_commit_is_sent_before_it_is_seen,
    a_copy_and_its_stream_are_exact,
    a_lost_slot_is_noticed,
    a_replica_that_lags_holds_the_switch,
    a_sink_set_back_is_noticed,
    a_slot_waits_for_writers,
    a_taken_over_stream_goes_on_exactly,
    the_way_back_begins_where_it_is_told,
)
from tests.sim.stage import Fact

__all__ = ["FACTS"]

FACTS: tuple[Fact, ...] = (
    closing_gives_way,
    newcomers_pass_between_attempts,
    nothing_commits_after_the_closing,
    who_is_late_is_refused,
    a_gate_number_can_be_made_again,
    a_lower_token_is_refused,
    an_earlier_round_is_refused,
    a_retired_job_is_refused,
    the_guard_refuses_moved_keys_alone,
    who_wrote_before_the_guard_may_pass,
    old_writers_are_found_by_age,
    a_slot_waits_for_writers,
    a_copy_and_its_stream_are_exact,
    a_taken_over_stream_goes_on_exactly,
    a_barrier_follows_all_that_was_let_in,
    a_commit_is_sent_before_it_is_seen,
    the_way_back_begins_where_it_is_told,
    a_lost_slot_is_noticed,
    a_sink_set_back_is_noticed,
    a_replica_that_lags_holds_the_switch,
    a_swap_wants_the_version_it_expects,
    a_lost_answer_hides_a_swap,
    a_late_swap_may_still_happen,
    a_newer_version_ends_a_late_swap,
    a_swap_of_a_former_holder_is_refused,
    a_record_is_its_holders_alone,
    a_lease_has_one_holder,
    a_lease_that_is_cut_off_runs_out,
)
