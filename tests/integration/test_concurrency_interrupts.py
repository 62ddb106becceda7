"""Ctrl-C at every point of a checkout and a checkin where Python can raise it: no permit is lost, nothing hangs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import insert, select

from shardlib import ShardedEngine
from shardlib.shard.breaker import BreakerState
from shardlib_ops import LocalCluster
from tests.support.models import Base, Customer
from tests.support.quiet import assert_quiet, out

POOL_FILES = (
    *(f"shardlib/shard/{name}.py" for name in ("pool", "entry", "accounts", "allotment", "budget")),
    "sqlalchemy/pool/base.py",
)


class Interrupt:
    """Raises KeyboardInterrupt once, at point number `at` of the pool's code.

    CPython looks for signals when a function begins and when a C function has returned, which is when a profile
    function is called.
    """

    def __init__(self, at: int) -> None:
        self.left = at
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.endswith(POOL_FILES):
            return
        if event == "c_return" and arg in (sys.setprofile, sys.getprofile):
            return
        self.left -= 1
        if self.left == 0:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}, {event} {arg}"
            sys.setprofile(None)
            raise KeyboardInterrupt

    @property
    def done(self) -> bool:
        return bool(self.where)


def interrupted(work: Callable[[], None], at: int) -> Interrupt:
    interrupt = Interrupt(at)
    sys.setprofile(interrupt)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return interrupt


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt within a destructor
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of a connection that was interrupted as it opened
@pytest.mark.parametrize("cold", [False, True], ids=["an idle connection", "a new connection"])
def test_interrupted_at_each_point(cold: bool) -> None:
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout_s": 2}
    with LocalCluster(shards=1) as cluster, ShardedEngine(cluster.url, **options) as engine:
        engine.create_all(Base.metadata)

        def write() -> None:
            with engine.session("key") as session:
                session.execute(insert(Customer).values(tenant_id="key", id=at, name="interrupted"))

        at, lost = 0, list[str]()
        write()
        while not lost[3:]:
            at += 1
            if cold:
                for pool in (each.pool for each in engine._core.pools._engines.values()):
                    pool.dispose()
            interrupt = interrupted(write, at)
            if not interrupt.done:
                break
            gc.collect(0)
            if engine._core.pools.budget.lock.locked():
                pytest.fail(f"the lock is held for ever: {interrupt.where}")
            out(engine)  # what came back while somebody else held the lock is seen to by the next who takes it
            if left := out(engine):
                lost.append(f"{interrupt.where}: {left}")
        assert not lost, "\n".join(lost)
        assert at > (60 if cold else 40), "there are more points than that"
        assert_quiet(engine, cluster.servers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_interrupted_probe_lets_the_next_one_probe() -> None:
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout_s": 2}
    with LocalCluster(shards=1) as cluster, ShardedEngine(cluster.url, **options) as engine:
        engine.create_all(Base.metadata)

        def read() -> None:
            with engine.session("key") as session:
                session.execute(select(Customer).where(Customer.tenant_id == "key"))

        read()
        (pool,) = (each.pool for each in engine._core.pools._engines.values())
        breaker: Any = pool.member.breaker  # type: ignore[attr-defined]
        at, stuck = 0, list[str]()
        while True:
            at += 1
            pool.dispose()
            breaker.state, breaker._until = BreakerState.OPEN, 0.0  # as after failures whose wait is over
            interrupt = interrupted(read, at)
            if not interrupt.done:
                break
            gc.collect(0)
            out(engine)  # a permit that was lost on its way comes back
            if breaker.state is BreakerState.PROBING:
                stuck.append(interrupt.where)
        assert not stuck, "\n".join(stuck)
        assert breaker.state is BreakerState.CLOSED
        assert at > 60, "there are more points than that"
