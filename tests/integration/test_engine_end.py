"""The end of an engine: in the middle of its start, while the catalog hangs, and in a forked child."""

from __future__ import annotations

import asyncio
import gc
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from weakref import ref

import pytest

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.catalog.memory import MemoryStore
from shardlib.catalog.stored import StoredCatalog
from shardlib.errors import InvalidArgument
from shardlib.topology import Topology
from tests.support.eventually import eventually
from tests.support.forks import in_child
from tests.support.topologies import make_topology


class Slow(StoredCatalog):
    """A catalog whose reads wait for `gate`."""

    def __init__(self, name: str) -> None:
        super().__init__(MemoryStore(name))
        self.gate, self.reading, self.closed = threading.Event(), threading.Event(), threading.Event()

    def load(self, known: Topology | None = None) -> Topology:
        self.reading.set()
        assert self.gate.wait(20)
        return super().load(known)

    def close(self) -> None:
        super().close()
        self.closed.set()


@pytest.fixture
def url() -> Iterator[str]:
    url = f"memory://end-{uuid.uuid4().hex}"
    with closing(open_catalog(url)) as catalog:
        catalog.publish(make_topology(), expected=None)
        yield url


@pytest.fixture
def slow(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """The catalog of the engines of this test."""
    catalog = Slow(url.removeprefix("memory://"))
    monkeypatch.setattr("shardlib.engine.engine.open_catalog", lambda *_, **__: catalog)
    yield catalog
    catalog.gate.set()


def ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("shardlib-")}


@pytest.mark.parametrize("late", [False, True])
async def test_an_open_that_is_cancelled_leaves_nothing(slow: Slow, url: str, *, late: bool) -> None:
    before = ours()
    opening = asyncio.create_task(AsyncShardedEngine.open(url))
    await asyncio.to_thread(slow.reading.wait, 10)
    if late:  # the engine is there, and the loop has not heard of it yet
        slow.gate.set()
        eventually(lambda: len(ours() - before) == 3, 10, "the engine follows the catalog")
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    slow.gate.set()
    assert await asyncio.to_thread(slow.closed.wait, 10)
    await asyncio.to_thread(eventually, lambda: not ours() - before, 10, "its threads end")


async def test_an_open_that_fails_says_why(slow: Slow, url: str) -> None:
    slow.gate.set()
    with pytest.raises(InvalidArgument, match="pool_size='many'"):
        await AsyncShardedEngine.open(url, pool_size="many")


async def test_the_loop_goes_on_while_an_engine_waits_for_its_catalog_to_let_go(slow: Slow, url: str) -> None:
    slow.gate.set()
    engine = await AsyncShardedEngine.open(url)
    slow.gate.clear()
    slow.reading.clear()
    engine.sync_engine._cache.ask()
    await asyncio.to_thread(slow.reading.wait, 10)
    disposing = asyncio.create_task(engine.dispose())
    turns = 0
    while not disposing.done():
        await asyncio.sleep(0.01)
        turns += 1
    await disposing
    assert turns > 10
    assert slow.closed.is_set()


async def test_a_cancelled_dispose_is_carried_to_its_end(slow: Slow, url: str) -> None:
    slow.gate.set()
    engine = await AsyncShardedEngine.open(url)
    slow.gate.clear()
    slow.reading.clear()
    engine.sync_engine._cache.ask()
    await asyncio.to_thread(slow.reading.wait, 10)
    disposing = asyncio.create_task(engine.dispose())
    await asyncio.sleep(0.05)
    disposing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await disposing
    assert slow.closed.is_set()


def test_an_engine_disposed_while_the_catalog_hangs_is_forgotten(slow: Slow, url: str) -> None:
    slow.gate.set()
    engine = ShardedEngine(url)
    slow.gate.clear()
    slow.reading.clear()
    engine._cache.ask()
    assert slow.reading.wait(10)
    engine.dispose()
    itself, pools = ref(engine), ref(engine._core.pools)
    del engine
    gc.collect()
    assert (itself(), pools()) == (None, None)


def test_the_fault_of_one_engine_in_a_child_leaves_the_others_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("this one cannot")

    with ShardedEngine(url) as one, ShardedEngine(url) as other:
        # Which of the two comes first is not known: each has its turn.
        for broken, sound in ((one, other), (other, one)):

            def follows(sound: ShardedEngine = sound) -> None:
                thread = sound._cache._thread
                assert thread is not None
                assert thread.is_alive()

            with monkeypatch.context() as patch:
                patch.setattr(broken._cache, "after_fork", fails)
                in_child(follows)()
