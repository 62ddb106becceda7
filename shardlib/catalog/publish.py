"""A change of the stored topology, made anew when somebody else was faster."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Final

from shardlib.catalog.base import Catalog, Conflict, Lease
from shardlib.errors import InvalidTopology
from shardlib.topology import Topology

__all__ = ["SWAPS_MAX", "publish_change", "swap_pauses"]

SWAPS_MAX: Final = 20
"""How often a change is tried before it is given up: about eight seconds, if each try takes no time."""
_PAUSE_FIRST_S: Final = 0.02
_PAUSE_MAX_S: Final = 0.5


def swap_pauses(jitter: Callable[[], float] = random.random) -> Iterator[float]:
    """The seconds to wait before each try of a compare-and-swap: none before the first, then longer each time.

    Args:
        jitter: source of numbers in 0..1, which spreads those who collided.
    """
    yield 0.0
    for number in range(SWAPS_MAX - 1):
        yield min(_PAUSE_MAX_S, _PAUSE_FIRST_S * 2.0**number) * (0.5 + 0.5 * jitter())


def publish_change(
    catalog: Catalog,
    change: Callable[[Topology], Topology],
    *,
    newest: Callable[[], Topology] | None = None,
    lease: Lease | None = None,
) -> Topology:
    """Publish what `change` makes of the stored topology. Blocking; others may publish meanwhile.

    Args:
        catalog: where the topology is stored.
        change: makes the next topology out of the stored one, each time with a nonce of its own; called again after a
            swap that somebody else has won. The same object means that there is nothing to change. What it raises
            ends the call.
        newest: reads the stored topology; default is `catalog.load`. A `TopologyCache` has one that refuses what its
            engine would not follow.
        lease: if given, each swap also requires that it is still held.

    Returns:
        the published topology, or the stored one if there was nothing to change.

    Raises:
        CatalogUnavailable: no answer in time. The change may have been published.
        Conflict: the lease is lost.
        InvalidTopology: others published each time.
    """
    for pause_s in swap_pauses():
        time.sleep(pause_s)
        before = catalog.load() if newest is None else newest()
        after = change(before)
        if after is before:
            return before
        try:
            catalog.publish(after, expected=before.version, lease=lease)
        except Conflict:
            if lease is not None and not lease.alive():
                raise
            continue
        return after
    raise InvalidTopology(
        f"the topology was changed by others {SWAPS_MAX} times in a row", "run it again when they have finished"
    )
