"""A server that refuses the login: told at once, and not asked again and again."""

from __future__ import annotations

import time
import uuid
from contextlib import closing
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import text

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import ShardUnavailable
from shardlib.route.retry import RetryPolicy
from shardlib_ops.manager.bootstrap import NewShard, create_cluster

PATIENT = RetryPolicy(attempts_max=8, wait_s_first=2.0, wait_s_max=2.0)


@pytest.fixture
def url(database: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    dsn = Dsn(database)
    url = f"memory://login-{uuid.uuid4().hex}"
    reference = f"postgresql://{dsn.user}:env%3ALOGIN_PASSWORD@{dsn.host}:{dsn.port}/{dsn.dbname}"
    monkeypatch.setenv("LOGIN_PASSWORD", str(conninfo_to_dict(database)["password"]))
    with closing(open_catalog(url)) as catalog:
        create_cluster(catalog, [NewShard("only", Dsn(reference))])
        monkeypatch.setenv("LOGIN_PASSWORD", "wr0ng")
        yield url


def check(error: ShardUnavailable, tries: list[int], took_s: float) -> None:
    assert error.final
    assert "lets nobody in" in str(error)
    assert str(error).count("password authentication failed") == 1
    assert "wr0ng" not in f"{error} {error!r}"
    assert tries == [1]
    assert took_s < 2


def test_run_lets_a_wrong_password_through_at_once(url: str) -> None:
    tries: list[int] = []

    def work(session: Any) -> None:
        tries.append(1)
        session.execute(text("SELECT 1"))

    with ShardedEngine(url, retry=PATIENT) as engine:
        began = time.monotonic()
        with pytest.raises(ShardUnavailable) as caught:
            engine.run(work, shard_key="a")
        check(caught.value, tries, time.monotonic() - began)


async def test_so_does_that_of_asyncio(url: str) -> None:
    tries: list[int] = []

    async def work(session: Any) -> None:
        tries.append(1)
        await session.execute(text("SELECT 1"))

    async with await AsyncShardedEngine.open(url, retry=PATIENT) as engine:
        began = time.monotonic()
        with pytest.raises(ShardUnavailable) as caught:
            await engine.run(work, shard_key="a")
        check(caught.value, tries, time.monotonic() - began)
