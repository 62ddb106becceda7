"""Servers that root starts as another account, from a process in which the etcd client is at work."""

from __future__ import annotations

import os
import subprocess

import pytest

from shardlib import ShardedEngine
from shardlib_ops import LocalCluster
from shardlib_ops.local.process import account, as_account

pytestmark = pytest.mark.fault


@pytest.mark.skipif(os.getuid() != 0, reason="only root starts servers as another account")
def test_programs_of_another_account_start_while_grpc_is_live() -> None:
    command, options = as_account(account(), ["/bin/true"])
    with LocalCluster(shards=1) as cluster:
        engines = [ShardedEngine(cluster.url) for _ in range(3)]
        codes = {subprocess.run(command, check=False, **options).returncode for _ in range(150)}  # type: ignore[call-overload]
        for engine in engines:
            engine.dispose()
    assert codes == {0}
