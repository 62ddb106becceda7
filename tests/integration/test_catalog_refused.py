"""Changes of the tables while the catalog holds what the engine refuses to follow; and changes that collide."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import psycopg
import pytest
from sqlalchemy import Column, MetaData, String, Table

from shardlib import ShardedEngine
from shardlib.catalog import Catalog, Conflict, Lease, open_catalog, publish_change
from shardlib.catalog.publish import SWAPS_MAX, swap_pauses
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology, UnsupportedOperation
from shardlib.topology import Topology
from shardlib_ops.manager.bootstrap import NewShard, create_cluster
from tests.support.topologies import changed, make_topology


@pytest.fixture
def metadata() -> MetaData:
    made = MetaData()
    Table("thing", made, Column("k", String, primary_key=True, info={"shard_key": True}))
    return made


@pytest.fixture
def engine(database: str) -> Iterator[ShardedEngine]:
    url = f"memory://refused-{uuid.uuid4().hex}"
    with closing(open_catalog(url)) as catalog:
        create_cluster(catalog, [NewShard("only", Dsn(database))])
        with ShardedEngine(url) as engine:
            yield engine


@pytest.mark.parametrize("what", [{"cluster_id": "another"}, {"hash_function": "xxhash"}, {"version": 1}])
def test_no_change_of_the_tables_follows_a_catalog_that_the_engine_refuses(
    engine: ShardedEngine,
    database: str,
    metadata: MetaData,
    monkeypatch: pytest.MonkeyPatch,
    what: dict[str, object],
) -> None:
    published: list[Topology] = []
    before = engine.topology
    wrong = changed(before, **what)
    # What a catalog restored from elsewhere, or a URL that now leads elsewhere, answers.
    monkeypatch.setattr(engine._catalog, "load", lambda known=None: wrong)
    monkeypatch.setattr(engine._catalog, "publish", lambda topology, **kw: published.append(topology))
    for change in (engine.register, engine.create_all, engine.drop_all):
        with pytest.raises(InvalidTopology, match=r"this process goes on|other content"):
            change(metadata)
    with pytest.raises(InvalidTopology):
        engine.refresh()
    assert published == []
    assert engine.topology is before
    with psycopg.connect(database) as conn:
        assert conn.execute("SELECT to_regclass('thing')").fetchone() == (None,)


def test_create_all_explains_what_a_server_refuses_as_the_bootstrap_does(database: str, metadata: MetaData) -> None:
    dsn, role = Dsn(database), f"app_{uuid.uuid4().hex[:8]}"
    url = f"memory://refused-{uuid.uuid4().hex}"
    with psycopg.connect(database, autocommit=True) as admin, closing(open_catalog(url)) as catalog:
        create_cluster(catalog, [NewShard("only", dsn)])
        with ShardedEngine(url) as engine:
            with pytest.raises(InvalidArgument, match=r"app_roles=\['nobody_at_all'\].*exist on shard 'only'"):
                engine.create_all(metadata, app_roles=["nobody_at_all"])
            admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'canary-b1'".encode())
            try:
                poor = Dsn(f"postgresql://{role}:canary-b1@{dsn.host}:{dsn.port}/{dsn.dbname}")
                elsewhere = open_catalog(f"memory://refused-{uuid.uuid4().hex}")
                with closing(elsewhere), pytest.raises(UnsupportedOperation) as bootstrap:
                    create_cluster(elsewhere, [NewShard("only", poor)])
                now = catalog.load()
                catalog.publish(changed(now, shards=(replace(now.shards[0], primary=poor),)), expected=now.version)
                with pytest.raises(UnsupportedOperation) as caught:
                    engine.create_all(metadata)
                assert str(caught.value) == str(bootstrap.value)
                assert f"the role {role!r} may not prepare shard 'only'" in str(caught.value)
                assert f'GRANT CREATE ON DATABASE "{dsn.dbname}" TO "{role}"' in str(caught.value)
                assert "canary-b1" not in f"{caught.value} {caught.value!r}"
                admin.execute(f'GRANT CREATE ON DATABASE "{dsn.dbname}" TO {role}'.encode())
                with pytest.raises(UnsupportedOperation, match="owns the schema shardlib"):
                    engine.create_all(metadata)
                admin.execute(b"UPDATE shardlib.control SET schema_version = 999")
                admin.execute(f"GRANT ALL ON SCHEMA shardlib TO {role}".encode())
                admin.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA shardlib TO {role}".encode())
                with pytest.raises(InvalidTopology, match=r"version 999.*upgrade the shardlib"):
                    engine.create_all(metadata)
            finally:
                admin.execute(f"DROP OWNED BY {role}".encode())
                admin.execute(f"DROP ROLE {role}".encode())


class Contended:
    """A catalog where somebody else wins the first swaps."""

    def __init__(self, inner: Catalog, lost: int) -> None:
        self.inner, self.lost, self.tries = inner, lost, 0

    def load(self, known: Topology | None = None) -> Topology:
        return self.inner.load(known)

    def publish(self, topology: Topology, *, expected: int | None, lease: Lease | None = None) -> None:
        self.tries += 1
        if self.tries <= self.lost:
            self.inner.publish(changed(self.inner.load()), expected=expected)
            raise Conflict(expected, topology.version)
        self.inner.publish(topology, expected=expected, lease=lease)


@pytest.fixture
def contended() -> Iterator[Callable[[int], Contended]]:
    with closing(open_catalog(f"memory://{uuid.uuid4().hex}")) as catalog:
        catalog.publish(make_topology(), expected=None)
        yield lambda lost: Contended(catalog, lost)


def test_a_change_is_made_anew_of_what_another_has_published(contended: Callable[[int], Contended]) -> None:
    catalog = contended(3)
    made: list[int] = []

    def change(before: Topology) -> Topology:
        made.append(before.version)
        return changed(before)

    published = publish_change(catalog, change)  # type: ignore[arg-type]
    assert made == [1, 2, 3, 4]
    assert published.version == 5
    assert catalog.load().nonce == published.nonce


def test_no_change_publishes_nothing(contended: Callable[[int], Contended]) -> None:
    catalog = contended(0)
    assert publish_change(catalog, lambda before: before).version == 1  # type: ignore[arg-type]
    assert catalog.tries == 0


def test_the_tries_have_a_bound(contended: Callable[[int], Contended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardlib.catalog.publish._PAUSE_MAX_S", 0.001)
    catalog = contended(1000)
    with pytest.raises(InvalidTopology, match=f"{SWAPS_MAX} times in a row"):
        publish_change(catalog, changed)  # type: ignore[arg-type]
    assert catalog.tries == SWAPS_MAX


def test_the_pauses_grow_and_are_spread() -> None:
    least, most = list(swap_pauses(lambda: 0.0)), list(swap_pauses(lambda: 1.0))
    assert len(least) == len(most) == SWAPS_MAX
    assert least[0] == most[0] == 0
    assert most[1:] == sorted(most[1:])
    assert most[-1] == 0.5
    assert all(low == high / 2 for low, high in zip(least, most, strict=True))
