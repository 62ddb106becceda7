"""The calls of the guide, typed as they stand there: by curl, at a manager that was started by its command."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from shardlib import ShardedEngine
from shardlib_ops import LocalCluster, Resharder
from tests.support.eventually import eventually_async
from tests.support.manager_runner import started
from tests.support.models import Base, Customer
from tests.support.tokens import SECRET

GUIDE = (Path(__file__).parents[2] / "docs" / "how-to" / "manager.md").read_text(encoding="utf-8")
BLOCK = re.search(r"^## A shard's life\n\n```sh\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(
    shutil.which("curl") is None or shutil.which("openssl") is None, reason="no curl or no openssl on this machine"
)


async def test_the_calls_of_the_guide_do_what_it_says() -> None:
    assert BLOCK is not None
    lines = BLOCK[1].replace("\\\n", " ").splitlines()
    calls = [line for line in lines if line.startswith("call ")]
    assert len(calls) == 9
    with LocalCluster(shards=1, replicas=1) as cluster:
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(Base.metadata)
            with engine.session("a") as session:
                session.add(Customer(tenant_id="a", id=1, name="x"))
                session.commit()
        spares = {f"db-{number}": cluster.spare(f"spare-{number}").dsn for number in (2, 3)}
        environment = {**os.environ, "SHARDLIB_CATALOG": cluster.url, "SHARDLIB_JWT_SECRET": SECRET}
        with started(environment) as url:
            head = "\n".join(line for line in lines if not line.startswith("call "))
            head = head.replace("http://127.0.0.1:8081", url).replace("curl -sS", 'curl -sS -w "\\n%{http_code}"')
            head = head.replace("shardlib-ops", f"{sys.executable} -m shardlib_ops.cli.main")

            def typed(line: str) -> tuple[int, str]:
                for host, dsn in spares.items():
                    line = re.sub(rf'"postgresql://[^"]*@{host}/shop"', f'"{dsn}"', line)
                ran = subprocess.run(
                    ["sh", "-c", f"{head}\n{line}"],
                    env=environment, capture_output=True, text=True, timeout=60, check=True,
                )  # fmt: skip
                text, _, status = ran.stdout.rpartition("\n")
                return int(status), text

            async with Resharder(cluster.url) as resharder:
                running = asyncio.create_task(resharder.serve())
                told = []
                for line in calls:
                    if "/complete" in line:
                        await eventually_async(lambda: status_is(typed, url, "validation"), 100, every_s=0.5)
                    if "/promote" in line:
                        await eventually_async(lambda: status_is(typed, url, "completed"), 100, every_s=0.5)
                    status, text = await asyncio.to_thread(typed, line)
                    assert status < 300, f"{line}: {status} {text}"
                    told.append(status)
                running.cancel()
                await asyncio.wait([running])
            assert told == [201, 201, 200, 200, 202, 200, 200, 200, 204]
            refused = await asyncio.to_thread(httpx.get, f"{url}/api/v1/shards", timeout=20)
            assert refused.status_code == 401


async def status_is(typed: object, url: str, wanted: str) -> bool:
    """Whether the job of the guide is there."""
    assert callable(typed)
    status, text = await asyncio.to_thread(typed, "call $API/reshard/jobs/1")
    assert status == 200
    return f'"status":"{wanted}"' in text
