"""The topologies that a resharding job goes through, one function for each step. Pure.

::

    announce ─► COPYING ──switch──► SWITCHED ─┐
                 ▲   │ ◄──────give_back────── │
                 │   └───────finish──────┐    └──finish──► (no move)
              renew_moving               ▼
                                    (no move)

A job is a number of moves that share its number. Each source holds the moving ranges behind one gate of their own
from `announce` on, so that closing it stops nobody else; a switch gives each target such a gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import TokenRange, merge_ranges, reassign
from shardlib.ring.ranges import intersect_ranges
from shardlib.topology.model import Gate, Move, MoveState, Topology

__all__ = ["announce", "finish", "give_back", "moves_of", "moving_gates", "renew_moving", "switch"]


def moves_of(topology: Topology, job: int) -> tuple[Move, ...]:
    """The moves of a job, in their order."""
    return tuple(move for move in topology.moves if move.job == job)


def moving_gates(topology: Topology, job: int) -> tuple[Gate, ...]:
    """The gates that cover the moving ranges of a job where they are served now, one for each shard."""
    ranges = merge_ranges(part for move in moves_of(topology, job) for part in move.ranges)
    return tuple(gate for gate in topology.gates if gate.ranges and intersect_ranges(gate.ranges, ranges))


def announce(topology: Topology, moves: Sequence[Move], *, nonce: str) -> Topology:
    """`moves` of one job are under way: their ranges are behind gates of their own, and are hidden on the targets.

    Every source and target also gets a new default gate: when the old ones are closed, nobody is left who does not
    know of the moves.

    Raises:
        InvalidTopology: a range is not its source's, or is moving already.
        InvalidArgument: the moves are of several jobs, or are not all `copying`.
    """
    if len({move.job for move in moves}) != 1 or any(move.state is not MoveState.COPYING for move in moves):
        raise InvalidArgument("moves", [(move.job, move.state.value) for move in moves], "of one job, all `copying`")
    if moves_of(topology, moves[0].job):
        raise InvalidTopology(f"job {moves[0].job} is under way already", "give the job a number of its own")
    after = _regated(
        topology, [(move.source, move.ranges) for move in moves], renew=_shards(moves), forget=(), nonce=nonce
    )
    return replace(after, moves=(*topology.moves, *moves))


def switch(topology: Topology, job: int, *, nonce: str) -> Topology:
    """The targets own the ranges, each behind a gate of its own; the old copies are hidden on the sources.

    Raises:
        InvalidTopology: the job has no moves, or they are switched already.
    """
    return _handed_over(topology, job, MoveState.COPYING, MoveState.SWITCHED, nonce)


def give_back(topology: Topology, job: int, *, nonce: str) -> Topology:
    """The reverse of `switch`: the sources own the ranges again, and the targets' copies are hidden.

    Raises:
        InvalidTopology: the job has no moves, or they are not switched.
    """
    return _handed_over(topology, job, MoveState.SWITCHED, MoveState.COPYING, nonce)


def renew_moving(topology: Topology, job: int, *, nonce: str) -> Topology:
    """The moving ranges get gates with new numbers where they are served now: how a closed gate is opened again.

    Raises:
        InvalidTopology: the job has no moves.
    """
    moves = _required(topology, job)
    served = [(move.owner, move.ranges) for move in moves]
    return _regated(topology, served, renew=(), forget=moving_gates(topology, job), nonce=nonce)


def finish(topology: Topology, job: int, *, nonce: str) -> Topology:
    """The topology without the job: its ranges are behind the default gates again, all of which are new.

    When the old gates are closed, nobody is left whose scans look at the job's key tables.

    Raises:
        InvalidTopology: the job has no moves.
    """
    moves = _required(topology, job)
    after = _regated(topology, (), renew=_shards(moves), forget=moving_gates(topology, job), nonce=nonce)
    return replace(after, moves=tuple(move for move in topology.moves if move.job != job))


def _handed_over(topology: Topology, job: int, before: MoveState, after: MoveState, nonce: str) -> Topology:
    moves = _required(topology, job)
    if any(move.state is not before for move in moves):
        raise InvalidTopology(f"the moves of job {job} are not `{before.value}`", "load the topology again")
    ring = topology.ring
    moved = tuple(replace(move, state=after) for move in moves)
    for move in moved:
        ring = reassign(ring, move.ranges, move.owner)
    others = tuple(move for move in topology.moves if move.job != job)
    # The ring is part of what the gates are checked against, so all of it changes in one step.
    base = replace(topology, ring=ring, moves=(*others, *moved), gates=_without(topology, moving_gates(topology, job)))
    return _regated(base, [(move.owner, move.ranges) for move in moved], renew=(), forget=(), nonce=nonce)


def _shards(moves: Iterable[Move]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(shard_id for move in moves for shard_id in (move.source, move.target)))


def _required(topology: Topology, job: int) -> tuple[Move, ...]:
    moves = moves_of(topology, job)
    if not moves:
        raise InvalidTopology(f"topology {topology.version} has no moves of job {job}", "the job is over")
    return moves


def _without(topology: Topology, gates: Iterable[Gate]) -> tuple[Gate, ...]:
    gone = {gate.number for gate in gates}
    return tuple(gate for gate in topology.gates if gate.number not in gone)


def _regated(
    topology: Topology,
    served: Sequence[tuple[str, tuple[TokenRange, ...]]],
    *,
    renew: Sequence[str],
    forget: Iterable[Gate],
    nonce: str,
) -> Topology:
    """The next version: one new gate for each shard's ranges of `served`, new default gates for `renew`."""
    by_shard: dict[str, list[TokenRange]] = {}
    for shard_id, ranges in served:
        by_shard.setdefault(shard_id, []).extend(ranges)
    number = topology.next_gate
    kept = [gate for gate in _without(topology, forget) if gate.ranges or gate.shard_id not in renew]
    for shard_id, parts in by_shard.items():
        if covered := [gate for gate in kept if intersect_ranges(gate.ranges, parts)]:
            raise InvalidTopology(
                f"gate {covered[0].number} covers some of the ranges already: another job moves them",
                "wait until that job is over, or leave its ranges out",
            )
        kept.append(Gate(number, shard_id, merge_ranges(parts)))
        number += 1
    for shard_id in renew:
        kept.append(Gate(number, shard_id))
        number += 1
    return topology.evolve(gates=tuple(kept), next_gate=number, nonce=nonce)
