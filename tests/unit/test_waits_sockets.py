"""The watch of a loop's sockets: it tells what arrives, and nobody waits for ever for a socket that is gone."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading

import pytest

from shardlib.waits.sockets import SocketWatch, watch_of

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="the system has no epoll")


def here() -> tuple[asyncio.AbstractEventLoop, SocketWatch]:
    loop = asyncio.get_running_loop()
    watch = watch_of(loop)
    assert watch is not None
    return loop, watch


async def arrives(watch: SocketWatch, descriptor: int, within_s: float = 5.0) -> bool:
    """As a connection waits: again and again until there is something."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while loop.time() < deadline:
        if await watch.readable(loop, descriptor):
            return True
    return False


async def test_each_of_many_sockets_is_told_of_what_it_gets_and_again_later() -> None:
    loop, watch = here()
    assert watch_of(loop) is watch
    pairs = [socket.socketpair() for _ in range(40)]
    try:
        for _ in range(3):
            waiting = [asyncio.create_task(arrives(watch, ours.fileno())) for ours, _ in pairs]
            for _, theirs in reversed(pairs):
                await asyncio.sleep(0)
                theirs.send(b"x")
            assert await asyncio.gather(*waiting) == [True] * 40
            assert [ours.recv(10) for ours, _ in pairs] == [b"x"] * 40
    finally:
        for pair in pairs:
            for each in pair:
                each.close()


async def test_what_is_left_unread_is_told_again() -> None:
    _, watch = here()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"xy")
        for _ in range(2):
            assert await arrives(watch, ours.fileno())
            ours.recv(1)
        assert not await arrives(watch, ours.fileno(), 0.05)
        theirs.close()
        assert await arrives(watch, ours.fileno()), "the end of the conversation"


async def test_a_wait_for_a_socket_that_another_thread_closes_ends() -> None:
    loop, watch = here()
    ours, theirs = socket.socketpair()
    with theirs:
        descriptor = ours.fileno()
        future = watch.readable(loop, descriptor)
        closing = threading.Thread(target=ours.close)
        closing.start()
        closing.join()
        assert await asyncio.wait_for(future, 5) is False
        with pytest.raises(OSError, match="Bad file descriptor"):
            watch.readable(loop, descriptor)


async def test_a_number_that_another_socket_has_now_is_told_to_the_new_one() -> None:
    loop, watch = here()
    ours, theirs = socket.socketpair()
    descriptor = ours.fileno()
    before = watch.readable(loop, descriptor)
    theirs.close()
    ours.close()
    new, its_peer = socket.socketpair()
    with its_peer:
        if new.fileno() != descriptor:
            os.dup2(new.fileno(), descriptor)
            new.close()
            new = socket.socket(fileno=descriptor)
        with new:
            after = asyncio.create_task(arrives(watch, descriptor))
            assert await asyncio.wait_for(before, 5) is False
            its_peer.send(b"x")
            assert await asyncio.wait_for(after, 5) is True
            assert new.recv(10) == b"x"


async def test_a_cancelled_wait_leaves_the_socket_to_the_next() -> None:
    loop, watch = here()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch.readable(loop, ours.fileno()).cancel()
        theirs.send(b"x")
        await asyncio.sleep(0)
        assert await arrives(watch, ours.fileno())


def test_each_loop_has_its_own_and_those_of_closed_loops_are_closed() -> None:
    async def both() -> tuple[asyncio.AbstractEventLoop, SocketWatch]:
        return here()

    (loop, first), (_, second) = asyncio.run(both()), asyncio.run(both())
    assert loop.is_closed()
    assert first is not second
    assert first._epoll.closed
    assert not second._epoll.closed


def test_a_forked_child_waits_anew_and_disturbs_no_wait_of_its_parent() -> None:
    async def in_parent() -> None:
        loop, watch = here()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            future = watch.readable(loop, ours.fileno())
            pid = os.fork()
            if pid == 0:
                os._exit(0 if watch._epoll.closed else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0  # noqa: ASYNC222 - it ends at once
            theirs.send(b"x")
            assert await future or await arrives(watch, ours.fileno())

    asyncio.run(in_parent())
