"""Waiting in threads and in greenlets: the same promises, one body for both where the promise is the same."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy.util import greenlet_spawn

from shardlib.errors import InvalidArgument
from shardlib.waits import GreenletWaits, ThreadWaits, Ticker, Waits
from tests.support.eventually import eventually

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("NAME", default="unset")


class Facade:
    """A waits object and how to run a body that uses it."""

    def __init__(self, kind: str) -> None:
        self.waits: Waits = GreenletWaits() if kind == "asyncio" else ThreadWaits()

    def run(self, body: Callable[[], Any]) -> Any:
        return asyncio.run(greenlet_spawn(body)) if self.waits.is_async else body()


@pytest.fixture(params=["sync", "asyncio"])
def facade(request: pytest.FixtureRequest) -> Any:
    it = Facade(request.param)
    yield it
    it.waits.close()


def meeting(waits: Waits, guests: int) -> Callable[[], None]:
    """A call that returns only once `guests` of them are running at the same time."""
    lock, present, waiters = threading.Lock(), [0], list[Any]()

    def call() -> None:
        mine = waits.waiter()
        with lock:
            present[0] += 1
            waiters.append(mine)
            everybody = list(waiters) if present[0] == guests else []
        for waiter in everybody:
            waiter.wake()
        assert mine.wait(10), f"{present[0]} of {guests} calls ran side by side"

    return call


def test_calls_run_side_by_side_and_answer_in_order(facade: Facade) -> None:
    def body() -> None:
        meet = meeting(facade.waits, 6)

        def numbered(i: int) -> int:
            meet()
            return i

        assert facade.waits.run_all([partial(numbered, i) for i in range(6)]) == list(range(6))

    facade.run(body)


def test_no_call_and_one_call(facade: Facade) -> None:
    def body() -> None:
        assert facade.waits.run_all([]) == []
        here = threading.get_ident()
        NAME.set("before")
        assert facade.waits.run_all([lambda: (threading.get_ident(), NAME.set("inside"))[0]]) == [here]
        assert NAME.get() == "inside", "a single call runs in the caller's own context"

    facade.run(body)


def test_every_call_has_ended_before_the_first_error_by_position_is_raised(facade: Facade) -> None:
    ended = []

    def body() -> None:
        def call(i: int) -> None:
            facade.waits.sleep(0.05 * (3 - i))  # the last by position fails first
            ended.append(i)
            if i != 1:
                raise ValueError(f"shard {i}")

        with pytest.raises(ValueError, match="shard 0") as caught:
            facade.waits.run_all([partial(call, i) for i in range(4)])
        assert sorted(ended) == [0, 1, 2, 3]
        notes = caught.value.__notes__
        assert [("shard 2" in n, "shard 3" in n) for n in notes] == [(True, False), (False, True)]

    facade.run(body)


def test_context_variables_enter_and_do_not_leave(facade: Facade) -> None:
    def body() -> None:
        NAME.set("caller")

        def call(i: int) -> str:
            seen = NAME.get()
            NAME.set(f"call {i}")
            return seen

        assert facade.waits.run_all([partial(call, i) for i in range(5)]) == ["caller"] * 5
        assert NAME.get() == "caller"

    facade.run(body)


def test_calls_within_calls_never_starve(facade: Facade) -> None:
    """More nested calls than the pool has threads."""
    narrow: Waits = GreenletWaits(4) if facade.waits.is_async else ThreadWaits(2)

    def leaf(i: int) -> int:
        narrow.sleep(0.001)
        return i

    def inner() -> int:
        return sum(narrow.run_all([partial(leaf, i) for i in range(5)]))

    def body() -> None:
        assert narrow.run_all([inner] * 8) == [10] * 8

    facade.run(body)
    narrow.close()


def test_the_number_side_by_side_is_bounded(facade: Facade) -> None:
    bounded: Waits = GreenletWaits(3) if facade.waits.is_async else ThreadWaits(2)  # two, and the caller
    lock, running, most = threading.Lock(), [0], [0]

    def call() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        bounded.sleep(0.01)
        with lock:
            running[0] -= 1

    facade.run(lambda: bounded.run_all([call] * 12))
    assert most[0] == 3
    bounded.close()


def test_time_limit_leaves_out_what_has_not_begun(facade: Facade) -> None:
    bounded: Waits = GreenletWaits(2) if facade.waits.is_async else ThreadWaits(1)
    begun, ended = [], []

    def call(i: int) -> None:
        begun.append(i)
        try:
            bounded.sleep(0.6)
        finally:
            ended.append(i)

    def body() -> None:
        with pytest.raises(TimeoutError, match=r"of 6 calls finished within 0\.3 s"):
            bounded.run_all([partial(call, i) for i in range(6)], timeout_s=0.3)
        assert sorted(begun) == sorted(ended)
        assert sorted(begun) in ([0], [0, 1]), "two side by side at most, one if the machine was slow to begin it"

    facade.run(body)
    bounded.close()


def test_waiter(facade: Facade) -> None:
    def body() -> None:
        early = facade.waits.waiter()
        early.wake()
        early.wake()
        assert early.wait(0)
        late = facade.waits.waiter()
        assert not late.wait(0.02)
        threading.Timer(0.05, late.wake).start()
        assert late.wait(5), "woken from another thread"

    facade.run(body)


def test_call_lets_others_run() -> None:
    waits = GreenletWaits()

    async def main() -> None:
        release = threading.Event()
        asyncio.get_running_loop().call_later(0.05, release.set)
        assert await greenlet_spawn(waits.call, release.wait, 5), "the loop was blocked"

    asyncio.run(main())
    assert ThreadWaits().call(threading.get_ident) == threading.get_ident()


def test_readable(facade: Facade) -> None:
    def body() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert not facade.waits.readable(ours.fileno(), 0.02)
            threading.Timer(0.05, theirs.send, (b"x",)).start()
            assert facade.waits.readable(ours.fileno(), 5)

    facade.run(body)


def test_cancelled_caller_cancels_its_children_and_waits_for_them() -> None:
    waits = GreenletWaits()
    begun, cleaned = [], []
    all_begun = asyncio.Event()

    def call(i: int) -> None:
        begun.append(i)
        if len(begun) == 5:
            all_begun.set()
        try:
            waits.sleep(30)
        except asyncio.CancelledError:
            waits.sleep(0.05)  # as a driver that ends a query in an orderly way
            cleaned.append(i)
            raise

    async def main() -> None:
        calls = [partial(call, i) for i in range(5)]
        task = asyncio.create_task(greenlet_spawn(waits.run_all, calls))
        await all_begun.wait()
        task.cancel()
        await asyncio.sleep(0.02)
        task.cancel()  # an impatient caller
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(cleaned) == list(range(5))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_two_loops_share_one_object() -> None:
    waits, errors = GreenletWaits(), []

    def body() -> None:
        for _ in range(20):
            waits.run_all([lambda: waits.sleep(0.001)] * 3)
            waiter = waits.waiter()
            threading.Thread(target=waiter.wake).start()
            assert waiter.wait(5)

    def other() -> None:
        try:
            asyncio.run(greenlet_spawn(body))
        except BaseException as error:  # noqa: BLE001 - shown by the test's thread
            errors.append(error)

    threads = [threading.Thread(target=other) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors


def test_the_end_of_a_loop_is_noticed() -> None:
    waits = GreenletWaits()

    class Holder:
        def __init__(self) -> None:
            self.ended: list[tuple[object, bool]] = []

        def at_end(self, owner: object) -> None:
            self.ended.append((owner, waits.owner_gone(owner)))

    holder, forgotten = Holder(), Holder()

    async def main() -> asyncio.AbstractEventLoop:
        for each in (holder, forgotten, holder):
            await greenlet_spawn(waits.at_owner_end, each.at_end)
        return asyncio.get_running_loop()

    loop = asyncio.run(main())
    assert holder.ended == [(loop, False)], "once, while it still runs"
    assert waits.owner_gone(loop)
    reference = weakref.ref(loop)
    del loop
    holder.ended.clear()
    forgotten.ended.clear()
    gc.collect()
    assert reference() is None, "an ended loop is not kept"


def test_thread_waits_work_in_a_forked_child() -> None:
    waits = ThreadWaits(4)
    waits.run_all([lambda: time.sleep(0.01)] * 4)  # the parent's threads exist
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork, which is the point
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            meet = meeting(waits, 3)
            waits.run_all([meet] * 3)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    waits.close()


def test_closed_thread_waits_do_the_work_in_turn() -> None:
    waits = ThreadWaits()
    waits.close()
    assert waits.run_all([threading.get_ident] * 3) == [threading.get_ident()] * 3


def test_ctrl_c_in_a_call_waits_for_the_others_and_goes_first() -> None:
    waits, ended = ThreadWaits(2), []

    def slow() -> None:
        time.sleep(0.1)
        ended.append("slow")
        raise ValueError("an error by position before it")

    def interrupted() -> None:
        time.sleep(0.02)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waits.run_all([slow, interrupted])
    assert ended == ["slow"]
    waits.close()


def test_ticker_ticks_until_its_object_is_gone() -> None:
    class Owner:
        ticks = 0

        def tick(self) -> None:
            Owner.ticks += 1

    owner = Owner()
    ticker = Ticker(0.01, owner.tick, "test-ticker")
    assert not ticker.running
    ticker.start()
    ticker.start()
    assert sum(thread.name == "test-ticker" for thread in threading.enumerate()) == 1
    eventually(lambda: Owner.ticks >= 3, 5)
    ticker.stop()
    eventually(lambda: not any(t.name == "test-ticker" for t in threading.enumerate()), 5)
    ticker.start()
    before = Owner.ticks
    eventually(lambda: Owner.ticks > before, 5)
    del owner
    gc.collect()
    eventually(lambda: not any(t.name == "test-ticker" for t in threading.enumerate()), 5)


def test_ticker_outlives_an_error_and_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    class Owner:
        ticks = 0

        def tick(self) -> None:
            self.ticks += 1
            if self.ticks == 1:
                raise ValueError("the disk is full")

    owner = Owner()
    ticker = Ticker(0.01, owner.tick, "test-ticker")
    ticker.start()
    eventually(lambda: owner.ticks >= 3, 5)
    ticker.stop()
    assert "the disk is full" in caplog.text


@pytest.mark.parametrize("make", [lambda: ThreadWaits(0), lambda: GreenletWaits(0), lambda: Ticker(0, gc.enable, "x")])
def test_wrong_bounds_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument):
        make()


def test_awaiting_without_a_loop_says_so() -> None:
    coroutine = asyncio.sleep(0)
    with pytest.raises(TypeError, match="cannot be awaited by a blocking engine"):
        ThreadWaits().await_(coroutine)
    coroutine.close()
