"""P6: what several shards answer is what one database with all rows answers, also while rows move; or it is refused.

`tests/property/test_route_oracle.py` and `tests/integration/test_hidden_oracle.py` show the same of random statements,
`tests/faults/test_reshard_under_load.py` of a real job under load.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, distinct, exists, func, select, union_all

from shardlib.errors import UnsupportedCrossShardQuery
from shardlib_ops import LocalCluster
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.hidden import Moving

pytestmark = pytest.mark.promise("P6")

KEYS = [f"tenant-{number}" for number in range(40)]
KEY = {"shard_key": True}

metadata = MetaData()
person = Table(
    "person", metadata,
    Column("tenant", String, primary_key=True, info=KEY), Column("id", Integer, primary_key=True),
    Column("name", String), Column("age", Integer),
)  # fmt: skip
thing = Table(
    "thing", metadata,
    Column("tenant", String, primary_key=True, info=KEY), Column("id", Integer, primary_key=True),
    Column("owner", Integer), Column("kind", String),
)  # fmt: skip
kind = Table(
    "kind", metadata, Column("name", String, primary_key=True), Column("weight", Integer), info={"reference": True}
)


def rows_of(rng: random.Random) -> dict[Table, list[dict[str, Any]]]:
    def some(made: Any) -> list[dict[str, Any]]:
        return [made(tenant, number) for tenant in KEYS for number in range(rng.randint(0, 4))]

    return {
        person: some(
            lambda t, n: {"tenant": t, "id": n, "name": rng.choice(["a", "b", None]), "age": rng.choice([1, 2, None])}
        ),
        thing: some(
            lambda t, n: {"tenant": t, "id": n, "owner": rng.randint(0, 4), "kind": rng.choice(["x", "y", None])}
        ),
        kind: [{"name": name, "weight": weight} for weight, name in enumerate("xyz")],
    }


OWNED = (thing.c.tenant == person.c.tenant) & (thing.c.owner == person.c.id)
ACCEPTED = {
    "all rows": select(person),
    "criteria": select(person.c.tenant, person.c.age).where(person.c.name.is_(None) | (person.c.age > 1)),
    "some keys": select(person).where(person.c.tenant.in_(KEYS[3:20])),
    "one key": select(func.count(), func.min(person.c.name)).where(person.c.tenant == KEYS[5]),
    "join": select(person.c.tenant, person.c.id, thing.c.kind).join(thing, OWNED),
    "outer join": select(person.c.tenant, person.c.id, thing.c.id).outerjoin(thing, OWNED),
    "join of a reference table": select(thing.c.tenant, kind.c.weight).join(kind, kind.c.name == thing.c.kind),
    "exists": select(person.c.tenant).where(exists().where(OWNED)),
    "not exists": select(person.c.tenant).where(~exists().where(OWNED)),
    "a group a key": select(person.c.tenant, func.count(), func.max(person.c.age)).group_by(person.c.tenant),
    "having": select(person.c.tenant, func.sum(person.c.age)).group_by(person.c.tenant).having(func.count() > 2),
    "distinct with the key": select(person.c.tenant, person.c.name).distinct(),
    "union all": union_all(select(person.c.tenant), select(thing.c.tenant)),
    "reference table": select(kind),
}
REFUSED = {
    "order": select(person).order_by(person.c.name),
    "limit": select(person).limit(3),
    "distinct": select(person.c.name).distinct(),
    "count": select(func.count()).select_from(person),
    "count of distinct": select(func.count(distinct(person.c.name))),
    "groups over keys": select(person.c.name, func.count()).group_by(person.c.name),
    "window": select(person.c.tenant, func.rank().over(order_by=person.c.age)),
    "join beside the key": select(person.c.tenant).join(thing, thing.c.kind == person.c.name),
}


@pytest.fixture(scope="module")
def world() -> Iterator[Moving]:
    with LocalCluster(shards=2) as cluster:
        made = Moving(cluster, [metadata])
        made.fill(rows_of(random.Random(6)))
        yield made
        made.close()


@pytest.fixture(scope="module", params=["at rest", "copying", "switched", "given back"])
def moving(request: pytest.FixtureRequest, world: Moving) -> Moving:
    """One after the other: the module's fixtures keep pytest in this order."""
    steps = {"copying": world.copying, "switched": world.switched, "given back": world.given_back}
    if request.param in steps:
        steps[request.param]()
    return world


@pytest.fixture(params=[SyncFacade, AsyncFacade], ids=["sync", "asyncio"])
def facade(request: pytest.FixtureRequest, moving: Moving) -> Iterator[Any]:
    made = request.param(moving.cluster.url, pool_size=2)
    yield made
    made.close()


def test_p6_an_accepted_statement_answers_as_one_database(facade: Any, moving: Moving) -> None:
    for name, statement in ACCEPTED.items():
        with moving.plain.connect() as conn:
            expected = Counter(tuple(row) for row in conn.execute(statement))
        found = Counter(tuple(row) for row in facade.session(lambda s, of=statement: s.execute(of).all()))
        assert found == expected, name
        assert found, f"{name}: an answer without rows shows nothing"


@pytest.mark.parametrize("name", list(REFUSED))
def test_p6_what_would_need_a_merge_is_refused_with_the_way_out(facade: Any, name: str) -> None:
    statement = REFUSED[name]
    with pytest.raises(UnsupportedCrossShardQuery) as caught:
        facade.session(lambda s: s.execute(statement).all())
    assert "shard" in str(caught.value)
    assert ";" in str(caught.value), "what to write instead"
