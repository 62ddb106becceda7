"""The one place of the library that waits: in threads, or in greenlets over an event loop.

Everything above is written once, as plain functions. An engine chooses `ThreadWaits` or `GreenletWaits` when
it is made and hands it down; no other module on the way of a statement sleeps, starts a thread for work, or asks
whether it runs under asyncio. Below it, the catalog blocks, in threads of its own or in those of `call`.
"""

from shardlib.waits.contract import Waiter, Waits
from shardlib.waits.forks import forget_after_fork
from shardlib.waits.greenlets import GreenletWaits
from shardlib.waits.threads import ThreadWaits
from shardlib.waits.ticker import Ticker

__all__ = ["GreenletWaits", "ThreadWaits", "Ticker", "Waiter", "Waits", "forget_after_fork"]
