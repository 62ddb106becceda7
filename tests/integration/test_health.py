"""What the health controller sees of real servers: dead, wrong and hanging ones; and who of several publishes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from uuid import uuid4

import pytest

from shardlib.catalog import Conflict, open_catalog, publish_change
from shardlib.dsn import Dsn
from shardlib.topology import Shard, Topology
from shardlib_ops import HealthController, LocalCluster
from shardlib_ops.health.model import Health, ShardHealth
from shardlib_ops.health.publish import HealthStore
from tests.support import failover
from tests.support.eventually import eventually, eventually_async

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2, replicas=1, settings={"wal_receiver_timeout": "3s"}) as made:
        yield made


@pytest.fixture
async def health(cluster: LocalCluster) -> AsyncIterator[HealthController]:
    async with HealthController(cluster.url, deadline_s=20.0, failures=1) as made:
        yield made


@asynccontextmanager
async def changed(cluster: LocalCluster, primary: Dsn | None = None, replica: Dsn | None = None) -> AsyncIterator[None]:
    """The first shard has other servers by the catalog meanwhile."""
    with closing(open_catalog(cluster.url)) as catalog:
        before = catalog.load().shards[0]
        after = replace(before, primary=primary or before.primary, replicas=(replica or before.replicas[0],))

        def put(shard: Shard) -> None:
            def change(now: Topology) -> Topology:
                shards = tuple(shard if one.id == shard.id else one for one in now.shards)
                return now.evolve(shards=shards, nonce=uuid4().hex)

            publish_change(catalog, change)

        put(after)
        try:
            yield
        finally:
            put(before)


async def until(health: HealthController, status: Health, shard: int = 0) -> ShardHealth:
    async def there() -> ShardHealth | None:
        found = (await health.turn())[shard]
        return found if found.status is status else None

    found = await eventually_async(there, 60, f"the shard is {status}")
    assert found is not None
    return found


async def test_a_cluster_that_is_well(cluster: LocalCluster, health: HealthController) -> None:
    async def in_step() -> ShardHealth | None:
        one = await until(health, Health.HEALTHY)
        return one if (one.servers[1].lag_bytes, one.servers[1].lag_s) == (0, 0.0) else None

    # A server writes something by itself now and then.
    found = await eventually_async(in_step, 60, "the replica has all that its primary has written")
    assert found is not None
    assert (found.primary_up, found.replicas_up) == (True, 1)
    primary, replica = found.servers
    assert (primary.lag_bytes, primary.lag_s) == (None, None)
    assert primary.latency_s is not None
    assert primary.xid_age is not None
    assert primary.slot_lag_bytes is not None
    assert primary.disk_free is not None, "it runs on this machine"
    text = health.metrics()
    assert f'shard_health_status{{shard="{found.name}",status="healthy"}} 1' in text
    assert f'shard_replication_lag_seconds{{shard="{found.name}",server="{replica.endpoint}"}} 0.0' in text
    with closing(open_catalog(cluster.url)) as catalog:
        kept = HealthStore(catalog).load(found.shard)
    assert kept is not None
    assert (kept.status, kept.sentence) == (found.status, found.sentence)


@pytest.mark.parametrize("wrong", ["password", "shard", "system", "primary"])
async def test_a_wrong_server_is_a_state_of_that_server(
    cluster: LocalCluster, health: HealthController, wrong: str
) -> None:
    first, second = (cluster.primary(f"shard-0{number}") for number in (1, 2))
    secret = "not-the-password-" + uuid4().hex
    replica, said = {
        "password": (Dsn(cluster.replicas("shard-01")[0].dsn).with_password(secret), "does not answer"),
        "shard": (Dsn(second.dsn), "its database is of shard"),
        "system": (Dsn(cluster.spare("stranger").dsn), "is no copy of the primary"),
        "primary": (Dsn(first.dsn + "?application_name=other"), "takes writes"),
    }[wrong]
    async with changed(cluster, replica=replica):
        found = await until(health, Health.DEGRADED)
        assert found.primary_up
        assert found.replicas_up == 0
        assert said in str(found.servers[1].problem)
        assert secret not in found.sentence + health.metrics()
        other = health.shards()[1]
        assert (other.primary_up, other.replicas_up) == (True, 1), "the other shard is looked at all the same"
    await until(health, Health.HEALTHY)


async def test_a_primary_that_is_a_replica(cluster: LocalCluster, health: HealthController) -> None:
    async with changed(cluster, primary=Dsn(cluster.replicas("shard-01")[0].dsn)):
        found = await until(health, Health.UNHEALTHY)
        assert "it takes no writes" in str(found.servers[0].problem)


async def test_a_hung_server_delays_no_view_of_the_others(cluster: LocalCluster) -> None:
    async with HealthController(cluster.url, interval_s=0.1, deadline_s=5.0, failures=1) as health:
        await until(health, Health.HEALTHY)
        with closing(open_catalog(cluster.url)) as catalog:
            shard_id = catalog.load().shards[1].id
        watch = health._watches[shard_id]
        replica = Dsn(cluster.replicas("shard-02")[0].dsn)
        running = asyncio.create_task(health.run())
        cluster.primary("shard-02").pause()
        try:
            await eventually_async(lambda: _unhealthy(health), 60)
            seen = set[float]()
            began = time.monotonic()

            async def often() -> bool:
                seen.add(watch.seen[replica].at)
                return len(seen) >= 10

            await eventually_async(often, 60, "the replica is looked at while its primary hangs")
            # Ten looks that each had to wait for the primary would take 45 s at least.
            assert time.monotonic() - began < 30
            assert watch.seen[replica].answered
        finally:
            cluster.primary("shard-02").resume()
            running.cancel()
            await asyncio.wait([running])
    assert running.cancelled()


async def _unhealthy(health: HealthController) -> bool:
    return health.shards()[1].status is Health.UNHEALTHY


async def test_one_of_two_publishes_and_one_that_has_slept_does_not(cluster: LocalCluster) -> None:
    async with (
        HealthController(cluster.url, lease_ttl_s=4) as one,
        HealthController(cluster.url, lease_ttl_s=4) as two,
    ):

        async def elected() -> bool:
            await one.turn()
            return one.elected

        await eventually_async(elected, 60, "one is elected")
        found = one.shards()[0]
        await two.turn()
        assert (one.elected, two.elected) == (True, False)
        assert "another controller is elected" in two.shards()[0].sentence
        asleep = one._lease
        assert asleep is not None
        # As a process that is stopped: nothing renews its lease, and its own clock tells it nothing.
        asleep._over.set()  # type: ignore[attr-defined]

        async def taken() -> bool:
            await two.turn()
            return two.elected

        await eventually_async(taken, 60, "the other one takes over")
        assert two._lease is not None
        assert two._lease.token > asleep.token
        asleep._over.clear()  # type: ignore[attr-defined]
        asleep._until = float("inf")  # type: ignore[attr-defined]
        assert asleep.alive(), "it believes that it holds the lease"
        with closing(open_catalog(cluster.url)) as catalog, pytest.raises(Conflict):
            HealthStore(catalog).save(found, asleep)


async def test_with_the_catalog_away_looks_go_on_and_nothing_is_done(cluster: LocalCluster) -> None:
    async with HealthController(cluster.url, deadline_s=20.0) as health:
        await until(health, Health.HEALTHY)
        cluster.etcd[0].pause()
        try:
            before = {shard_id: dict(watch.seen) for shard_id, watch in health._watches.items()}
            found = (await health.turn())[0]
            assert "the catalog does not answer" in found.sentence
            assert (found.status, found.replicas_up) == (Health.HEALTHY, 1)
            for shard_id, seen in before.items():
                for dsn, one in seen.items():
                    assert health._watches[shard_id].seen[dsn].at > one.at
        finally:
            cluster.etcd[0].resume()

        async def again() -> bool:
            return "the catalog does not answer" not in (await health.turn())[0].sentence

        await eventually_async(again, 60, "the catalog is back")


async def test_who_was_promoted_by_somebody_else_is_named() -> None:
    with LocalCluster(shards=1, replicas=1) as cluster:
        async with HealthController(cluster.url, failures=1) as health:
            await until(health, Health.HEALTHY)
            new = await asyncio.to_thread(failover.promote, cluster, "shard-01")

            async def named() -> bool:
                return f"127.0.0.1:{new.port} takes writes on timeline 2" in (await health.turn())[0].sentence

            await eventually_async(named, 60, "the sentence names the new primary")
            found = health.shards()[0]
            assert found.status is Health.UNHEALTHY
            assert "put it into the catalog" in found.sentence


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardlib_ops.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


async def test_maintenance_is_a_persons_act_in_the_audit_log(cluster: LocalCluster, health: HealthController) -> None:
    told = cli("health", "maintenance", "on", "shard-01", "--reason", "disk", "--catalog", cluster.url, "--json")
    assert told.returncode == 0, told.stderr
    found = (await health.turn())[0]
    assert found.maintenance
    assert "under maintenance (disk)" in found.sentence
    listed = cli("audit", "list", "--catalog", cluster.url, "--json")
    assert "health.maintenance" in listed.stdout
    assert cli("health", "maintenance", "off", "shard-01", "--catalog", cluster.url).returncode == 0
    assert not (await health.turn())[0].maintenance
    unknown = cli("health", "maintenance", "on", "shard-99", "--catalog", cluster.url)
    assert unknown.returncode == 1
    assert "shard-99" in unknown.stderr


def test_the_command_publishes_serves_metrics_and_ends_at_sigterm(cluster: LocalCluster) -> None:
    command = [sys.executable, "-m", "shardlib_ops.cli.main", "health", "run", "--catalog", cluster.url]
    running = subprocess.Popen([*command, "--metrics-port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        line = next(line for line in running.stderr if "metrics on" in line)
        import httpx

        url = line.split("metrics on ")[1].split(";")[0].strip()
        with httpx.Client() as client:
            text = eventually(lambda: found if "shard_primary_up{" in (found := client.get(url).text) else None, 60)
        assert text is not None
        assert "shard_replicas_up{" in text

        def shown() -> bool:
            ran = cli("health", "status", "--catalog", cluster.url, "--json")
            return ran.returncode == 0 and not json.loads(ran.stdout)["not_seen"]

        eventually(shown, 60, "every shard is healthy")
        running.terminate()
        running.communicate(timeout=60)
        assert running.returncode == 0
    finally:
        running.kill()
        running.communicate()
