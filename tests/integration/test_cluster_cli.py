"""`shardlib-ops cluster create`: a cluster out of servers that exist, usable at once."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from typer.testing import CliRunner, Result

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology, ShardlibError, ShardUnavailable, UnsupportedOperation
from shardlib_ops.cli.main import app
from shardlib_ops.local import LocalServer
from tests.support.pgbouncer import MISSING, PgBouncer, find_pgbouncer


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    __tablename__ = "parcel"

    sender: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


@pytest.fixture
def catalog(etcd_url: str) -> str:
    return etcd_url


def create(catalog: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["cluster", "create", "--catalog", catalog, *arguments])


def refused(catalog: str, *arguments: str) -> ShardlibError:
    result = create(catalog, *arguments)
    assert isinstance(result.exception, ShardlibError), result.output
    return result.exception


def password_of(dsn: str) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(dsn)["password"])


def has_schema(dsn: str) -> bool:
    with psycopg.connect(dsn) as connection:
        return connection.execute("SELECT to_regnamespace('shardlib') IS NOT NULL").fetchone() == (True,)


def test_servers_become_a_cluster_that_an_application_can_use(
    catalog: str, database: str, second_database: str
) -> None:
    result = create(
        catalog, "--shard", f"north={database}", "--shard", f"south={second_database}", "--replica",
        f"south={second_database}", "--vnode-count", "south=64", "--vnode-count", "128", "--hash-function", "xxhash",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = json.loads(result.output)
    assert [(one["id"], one["name"], one["vnode_count"]) for one in made["shards"]] == [
        ("s1", "north", 128),
        ("s2", "south", 64),
    ]
    assert made["shards"][0]["primary"] == Dsn(database).safe()
    assert made["shards"][1]["replicas"] == [Dsn(second_database).safe()]
    assert (made["version"], made["hash_function"], made["catalog"]) == (1, "xxhash", catalog)
    assert password_of(database) not in result.output
    with ShardedEngine(catalog) as engine:
        engine.create_all(Base.metadata)
        homes = set()
        for key in map(str, range(30)):
            homes.add(engine.shard_for(key).name)
            with engine.session(key) as session:
                session.add(Parcel(sender=key, number=1))
                session.commit()
        assert homes == {"north", "south"}
        with engine.session() as session:
            assert len(session.scalars(select(Parcel)).all()) == 30


def test_it_tells_people_what_was_made(catalog: str, database: str) -> None:
    result = create(catalog, "--shard", f"only={database}")
    assert result.exit_code == 0, result.output
    assert f"in the catalog {catalog}" in result.output
    assert Dsn(database).safe() in result.output
    assert "256" in result.output
    assert password_of(database) not in result.output


@pytest.fixture
def roles(database: str) -> Iterator[tuple[str, str]]:
    """An owner that may create schemas in the database, and an application that may do nothing yet."""
    owner, application = (f"{kind}_{uuid.uuid4().hex[:8]}" for kind in ("owner", "app"))
    with psycopg.connect(database, autocommit=True) as admin:
        for role in (owner, application):
            admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'pw-{role}'")
        admin.execute(f"GRANT CREATE ON DATABASE {Dsn(database).dbname} TO {owner}")
        admin.execute(f"GRANT CREATE ON SCHEMA public TO {owner}")
        yield owner, application
        for role in (application, owner):
            admin.execute(f"DROP OWNED BY {role} CASCADE")
            admin.execute(f"DROP ROLE {role}")


def test_the_operator_and_the_application_may_be_two_roles(
    catalog: str, database: str, roles: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DSN without a user leaves it to each process; the grants are those of the how-to page."""
    owner, application = roles
    where = Dsn(database)

    def become(role: str) -> None:
        monkeypatch.setenv("PGUSER", role)
        monkeypatch.setenv("SHOP_PASSWORD", f"pw-{role}")

    # libpq takes the user from the environment, and the reference is looked up by each process for itself.
    shard = f"only=postgresql://:env%3ASHOP_PASSWORD@{where.host}:{where.port}/{where.dbname}"
    become(owner)
    result = create(catalog, "--shard", shard, "--app-role", application)
    assert result.exit_code == 0, result.output
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(
            f"ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {application}"
        )
    with ShardedEngine(catalog) as engine:
        engine.create_all(Base.metadata)
    become(application)
    with ShardedEngine(catalog) as engine, engine.session("a") as session:
        session.add(Parcel(sender="a", number=1))
        session.commit()
        user = session.connection().exec_driver_sql("SELECT current_user").scalar()
        assert user == application
    with closing(open_catalog(catalog)) as opened:
        assert "pw-" not in opened.load().shards[0].primary.reveal()


@pytest.mark.skipif(find_pgbouncer() is None, reason=MISSING)
def test_it_works_through_pgbouncer(catalog: str, server: LocalServer, tmp_path: Path) -> None:
    name = f"through_{uuid.uuid4().hex[:8]}"
    home = tmp_path / "pgbouncer"
    home.mkdir()
    with server.connect() as admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            behind = SimpleNamespace(name="behind", dsn=server.dsn.rpartition("/")[0] + f"/{name}")
            with PgBouncer(home, [behind]) as pooler:  # type: ignore[list-item]
                result = create(catalog, "--shard", f"only={pooler.dsns['behind']}")
                assert result.exit_code == 0, result.output
                with ShardedEngine(catalog, pgbouncer=True) as engine:
                    engine.create_all(Base.metadata)
                    with engine.session("a") as session:
                        session.add(Parcel(sender="a", number=1))
                        session.commit()
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_role_that_may_not_prepare_a_shard_is_told_what_it_needs(
    catalog: str, database: str, second_database: str, roles: tuple[str, str]
) -> None:
    _, application = roles
    where = Dsn(database)
    poor = f"postgresql://{application}:pw-{application}@{where.host}:{where.port}/{where.dbname}"
    error = refused(catalog, "--shard", f"rich={second_database}", "--shard", f"poor={poor}")
    assert isinstance(error, UnsupportedOperation)
    assert f'GRANT CREATE ON DATABASE "{where.dbname}" TO "{application}"' in str(error)
    assert "'poor'" in str(error)
    assert not has_schema(second_database), "what was prepared is taken back"


def test_an_application_role_that_does_not_exist_is_named(catalog: str, database: str) -> None:
    error = refused(catalog, "--shard", f"only={database}", "--app-role", "nobody_such")
    assert isinstance(error, InvalidArgument)
    assert "nobody_such" in str(error)
    assert not has_schema(database)


def test_a_catalog_that_holds_a_cluster_is_refused(catalog: str, database: str, second_database: str) -> None:
    assert create(catalog, "--shard", f"only={database}").exit_code == 0
    assert isinstance(refused(catalog, "--shard", f"other={second_database}"), InvalidTopology)


def test_a_server_that_is_away_is_named_and_nothing_is_touched(catalog: str, database: str) -> None:
    error = refused(
        catalog, "--shard", f"near={database}", "--shard", "far=postgresql://u:s3cr3t@127.0.0.1:1/d", "--timeout", "2"
    )
    assert isinstance(error, ShardUnavailable)
    assert "'far'" in str(error)
    assert "s3cr3t" not in str(error)
    assert not has_schema(database)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shard", "postgresql://u:s3cr3t@h/d?sslmode=disable"], "NAME=DSN"),
        (["--shard", "a"], "NAME=DSN"),
        (["--shard", "a=redis://u:s3cr3t@h/d"], "postgresql://"),
        (["--shard", "a=postgresql://u:s3cr3t@h/d", "--shard", "a=postgresql://u:s3cr3t@i/d"], "each shard once"),
        (["--shard", "a=postgresql://u:s3cr3t@h/d", "--replica", "b=postgresql://u:s3cr3t@h/d"], "replica='b'"),
        (["--shard", "a=postgresql://u:s3cr3t@h/d", "--vnode-count", "b=5"], "vnode_count='b'"),
        (["--shard", "a=postgresql://u:s3cr3t@h/d", "--vnode-count", "many"], "vnode_count='many'"),
        (["--shard", "a=postgresql://u:s3cr3t@h/d", "--vnode-count", "0"], "vnode_count=0"),
        (["--shard", "s1=postgresql://u:s3cr3t@h/d"], "names like s1"),
        (["--shard", "a=postgresql://u:s3cr3t@h/d", "--hash-function", "md5"], "md5"),
        (["--shard", "a=postgresql://u:s3cr3t@h/d", "--timeout", "0"], "timeout=0"),
    ],
)
def test_wrong_options_are_named_without_a_dsn(catalog: str, arguments: list[str], said: str) -> None:
    error = refused(catalog, *arguments)
    assert isinstance(error, InvalidArgument)
    assert said in str(error)
    assert "s3cr3t" not in f"{error!r} {error}"


def test_a_catalog_in_memory_would_be_lost() -> None:
    assert "outlives" in str(refused("memory://x", "--shard", "a=postgresql://h/d"))
