"""How much a request may take (line 11 of the security list), told without a network."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from shardlib_ops.serving.limits import RateLimiter, json_too_deep
from shardlib_ops.settings import LimitSettings
from tests.support.served import Served, problem_in

SMALL = LimitSettings(body_bytes=2048, json_depth=5, requests_max=2)


def nested(depth: int) -> object:
    found: object = 1
    for level in range(depth):
        found = [found] if level % 2 else {"a": found}
    return found


async def test_s07_11_the_size_of_a_body() -> None:
    served = Served(limits=SMALL)
    admin = served.headers("admin")
    async with served.client() as client:
        fits = json.dumps({"name": "a"}).ljust(2048)
        head = {**admin, "Content-Type": "application/json"}
        assert (await client.post("/create", headers=head, content=fits)).status_code == 201
        answer = await client.post("/create", headers=head, content=fits + " ")
        problem_in(answer, 413, "body-too-large")
        assert answer.headers["connection"] == "close"


async def test_s07_11_reading_stops_at_the_first_byte_too_many() -> None:
    served = Served(limits=SMALL)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b"x" * 1000

    async with served.client() as client:
        answer = await client.post("/create", headers=served.headers("admin"), content=endless())
        problem_in(answer, 413, "body-too-large")
    assert sent <= 4000


async def test_s07_11_of_strangers_no_body_is_read() -> None:
    served = Served(limits=SMALL)

    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("it was read")
        yield b""

    async with served.client() as client:
        answer = await client.post("/create", content=unread())
        problem_in(answer, 401, "unauthenticated")
        assert answer.headers["connection"] == "close"


async def test_s07_11_the_depth_of_a_body() -> None:
    served = Served(limits=SMALL)
    admin = served.headers("admin")
    async with served.client() as client:
        for depth, status in ((4, 201), (5, 422), (100, 422)):
            answer = await client.post("/create", headers=admin, json={"name": "a", "tree": nested(depth)})
            assert answer.status_code == status, (depth, answer.text)
        deep = '{"name": "a", "tree": ' + "[" * 1000
        head = {**admin, "Content-Type": "application/json"}
        problem_in(await client.post("/create", headers=head, content=deep), 422, "invalid")


def test_the_depth_is_that_of_a_parser(rng: random.Random) -> None:
    def depth_of(value: object) -> int:
        if isinstance(value, dict):
            return 1 + max(map(depth_of, value.values()), default=0)
        return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0

    def made(levels: int) -> object:
        if not levels or rng.random() < 0.2:
            return rng.choice([1, "", '"', "[[[{{{", "\\", '\\"]', "]}", None])
        items = [made(levels - 1) for _ in range(rng.randrange(4))]
        return items if rng.random() < 0.5 else {f"{number}[\\": item for number, item in enumerate(items)}

    for _ in range(300):
        value = made(rng.randrange(9))
        body, depth = json.dumps(value).encode(), depth_of(value)
        assert not json_too_deep(body, max(1, depth))
        assert depth < 2 or json_too_deep(body, depth - 1)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 2**20, b'"' * 2**20, b'"\\' * 2**19, b'\\"' * 2**19, b"[]" * 2**19, b'["' * 2**19, b"{[" * 2**19,
        b'"\\"' + b'\\"' * 2**19 + b"[" * 50,
    ],
)  # fmt: skip
def test_telling_the_depth_takes_no_longer_than_reading(body: bytes) -> None:
    started = time.perf_counter()
    json_too_deep(body, 32)
    assert time.perf_counter() - started < 5, "a megabyte takes milliseconds; seconds would be a way to stop the server"


async def test_s07_11_a_body_that_comes_too_slowly() -> None:
    served = Served(limits=LimitSettings(body_timeout_s=0.3))

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"name":'
        await asyncio.sleep(60)

    async with served.client() as client:
        answer = await client.post("/create", headers=served.headers("admin"), content=slow())
        problem_in(answer, 408, "request-timeout")
        assert answer.headers["connection"] == "close"


async def test_a_request_that_takes_too_long() -> None:
    served = Served(limits=LimitSettings(request_timeout_s=3))
    async with served.client() as client:
        problem_in(await client.get("/wait", headers=served.headers()), 504, "timeout")
        served.waits.set()
        assert (await client.get("/wait", headers=served.headers())).status_code == 200


async def test_more_requests_at_one_time_than_allowed() -> None:
    served = Served(limits=SMALL)
    async with served.client() as client:
        waiting = [asyncio.ensure_future(client.get("/wait", headers=served.headers())) for _ in range(2)]
        await asyncio.wait_for(served.entered.wait(), 20)
        answer = await client.get("/view/1", headers=served.headers())
        problem_in(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == "1"
        served.waits.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
        assert (await client.get("/view/1", headers=served.headers())).status_code == 200


async def test_an_answer_that_breaks_off_cannot_pass_for_a_whole_one() -> None:
    served = Served()
    parts = []

    async def receive() -> dict[str, object]:
        await asyncio.wait_for(asyncio.Future(), 60)
        raise AssertionError("nothing comes")

    async def send(message: dict[str, object]) -> None:
        parts.append(message)

    token = served.headers()["Authorization"].encode()
    scope = {
        "type": "http", "method": "GET", "path": "/broken", "raw_path": b"/broken", "query_string": b"",
        "headers": [(b"authorization", token)], "client": ("127.0.0.1", 1), "asgi": {"version": "3.0"},
    }  # fmt: skip
    await served.asgi(scope, receive, send)  # type: ignore[arg-type]
    assert parts[0]["status"] == 200
    assert all(part.get("more_body") for part in parts[1:]), "no last part was sent"


def test_a_bucket_fills_again_and_does_not_overflow() -> None:
    now = [0.0]
    limiter = RateLimiter(60, monotonic=lambda: now[0], keys_max=3)
    assert [limiter.take("a") for _ in range(60)] == [0.0] * 60
    assert limiter.take("a") == pytest.approx(1)
    now[0] = 0.5
    assert limiter.take("a") == pytest.approx(0.5)
    now[0] = 10_000
    assert [limiter.take("a") for _ in range(60)] == [0.0] * 60
    assert limiter.take("a") > 0
    for key in "bcdefg":
        limiter.take(key)
    assert len(limiter) == 3


async def test_s07_16_no_answer_may_be_kept_by_a_cache() -> None:
    served = Served()
    async with served.client() as client:
        answers: list[httpx.Response] = [
            await client.get("/view/1", headers=served.headers()),
            await client.get("/view/1"),
            await client.get("/health"),
        ]
    assert {answer.headers["cache-control"] for answer in answers} == {"no-store"}
