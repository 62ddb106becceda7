"""Passwords encrypted in the catalog, by `secret`, `cluster create` and a manager; and how both engines use them."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import shlex
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import text
from typer.testing import CliRunner, Result

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.catalog.etcd_channel import Channels, EtcdTarget
from shardlib.catalog.etcd_proto import new
from shardlib.catalog.store import Deadline
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology, ShardUnavailable
from shardlib.secrets import command
from shardlib.secrets.keys import KEY_FILE_VARIABLE, read_keys
from shardlib_ops import LocalCluster
from shardlib_ops.cli.main import app
from shardlib_ops.local import LocalEtcd, LocalServer
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.passwords import PLAIN_VARIABLE, encrypted
from shardlib_ops.manager.promote.record import Promotion, PromotionStore, Stage
from tests.support.certificates import Authority

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
CANARY = "c4nary/p@ss:w%rd-é"
CREATED = "SELECT current_user"


def run(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=typed)


def ok(*arguments: str, typed: str | None = None) -> Any:
    result = run(*arguments, "--json", typed=typed)
    assert result.exit_code == 0, (result.output, result.exception)
    assert CANARY not in result.output
    return json.loads(result.stdout)


def refused(*arguments: str, typed: str | None = None) -> BaseException:
    result = run(*arguments, typed=typed)
    assert result.exception is not None, result.output
    assert result.exit_code != 0
    assert CANARY not in repr(result.exception) + str(result.exception) + result.output
    return result.exception


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with one key, which this process has."""
    path = tmp_path / "keys"
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(path))
    ok("secret", "new-key", "--file", str(path))
    return path


@pytest.fixture
def place(database: str, server: LocalServer) -> Iterator[Dsn]:
    """A role of its own, whose password is the canary, and its database."""
    role = f"canary_{uuid.uuid4().hex[:8]}"
    with server.connect() as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{CANARY}'")
    params = conninfo_to_dict(database)
    yield Dsn(f"postgresql://{role}@127.0.0.1:{params['port']}/{params['dbname']}")
    with server.connect() as admin:
        with server.connect(dbname=params["dbname"]) as inside:
            inside.execute(f"DROP OWNED BY {role} CASCADE")
        admin.execute(f"DROP ROLE {role}")


def plain(place: Dsn) -> str:
    return place.with_password(CANARY).reveal()


def point(url: str, *dsns: Dsn) -> None:
    with closing(open_catalog(url)) as catalog:
        before = catalog.load()
        shards = [replace(shard, primary=dsn) for shard, dsn in zip(before.shards, dsns, strict=True)]
        catalog.publish(before.evolve(shards=tuple(shards), nonce=uuid.uuid4().hex), expected=before.version)


def stored(url: str) -> Dsn:
    with closing(open_catalog(url)) as catalog:
        return catalog.load().shards[0].primary


def assert_not_in(etcd: LocalEtcd, url: str) -> None:
    """No byte of the cluster's records says the password, in any form."""
    prefix = f"/shardlib/{url.rpartition('/')[2]}/"
    asked = new("RangeRequest", key=prefix.encode(), range_end=prefix.removesuffix("/").encode() + b"0")
    channels = Channels(EtcdTarget((f"127.0.0.1:{etcd.port}",), "any"))
    try:
        found = b"".join(bytes(one.value) for one in channels.call("Range", asked, Deadline(20)).kvs)
    finally:
        channels.close()
    assert b"enc:" in found, "this looked at the wrong place"
    for form in (CANARY, quote(CANARY, safe=""), quote(CANARY, safe=":")):
        assert form.encode() not in found


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


async def user_by_asyncio(url: str) -> str:
    async with AsyncShardedEngine(url) as engine:
        conn = await engine.connect("t")
        try:
            return str((await conn.execute(text(CREATED))).scalar_one())
        finally:
            await conn.close()


def user(url: str) -> str:
    with ShardedEngine(url) as engine, engine.connect("t") as conn:
        return str(conn.execute(text(CREATED)).scalar_one())


def test_a_key_is_made(tmp_path: Path) -> None:
    printed = run("secret", "new-key").stdout.strip()
    assert len(printed) == 43
    path = tmp_path / "keys"
    first = ok("secret", "new-key", "--file", str(path))["ids"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    second = ok("secret", "new-key", "--file", str(path))["ids"]
    assert second[1:] == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["keys"]
    other = tmp_path / "notes"
    other.write_text("not a key")
    assert isinstance(refused("secret", "new-key", "--file", str(other)), InvalidArgument)
    assert other.read_text() == "not a key"


@pytest.mark.usefixtures("keys")
def test_a_password_is_read_from_standard_input_and_never_an_argument() -> None:
    dsn = Dsn(ok("secret", "encrypt", "postgresql://app@db/shop", typed=f"{CANARY}\n")["dsn"])
    assert conninfo_to_dict(dsn.conninfo())["password"] == CANARY
    assert run("secret", "encrypt", "host=db", typed=f"{CANARY}\n").stdout.startswith("host=db password=enc:")
    for given, typed in (
        (f"postgresql://app:{quote(CANARY, safe='')}@db/shop", "x\n"), ("postgresql://app:env:X@db/shop", "x\n"),
        ("postgresql://app@db/shop", ""), ("postgresql://app@db/shop", "env:X\n"), (dsn.reveal(), "x\n"),
    ):  # fmt: skip
        assert isinstance(refused("secret", "encrypt", given, typed=typed), InvalidArgument)


def test_without_a_key_nothing_is_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_FILE_VARIABLE, raising=False)
    assert KEY_FILE_VARIABLE in str(refused("secret", "encrypt", "host=db", typed=f"{CANARY}\n"))


def test_a_cluster_whose_catalog_holds_no_password(
    keys: Path, place: Dsn, etcd: LocalEtcd, etcd_url: str, logged: io.StringIO
) -> None:
    ok("cluster", "create", "--catalog", etcd_url, "--shard", f"one={plain(place)}", "--encrypt")
    assert stored(etcd_url).encrypted_password
    assert_not_in(etcd, etcd_url)
    assert user(etcd_url) == place.user
    assert asyncio.run(user_by_asyncio(etcd_url)) == place.user

    before = stored(etcd_url)
    old = keys.read_text()
    ok("secret", "new-key", "--file", str(keys))
    assert user(etcd_url) == place.user, "both keys live"
    done = ok("secret", "rotate", "--catalog", etcd_url)
    assert (done["changed"], done["plain"], done["key"]) == (1, 0, read_keys()[0].id)
    assert ok("secret", "rotate", "--catalog", etcd_url)["changed"] == 0, "nothing is left to do"
    assert stored(etcd_url) != before
    both = keys.read_text()
    keys.write_text(both.removesuffix(old))
    assert user(etcd_url) == place.user

    keys.write_text(old)
    with pytest.raises(InvalidArgument, match="no such key"):
        user(etcd_url)
    assert isinstance(refused("secret", "rotate", "--catalog", etcd_url), InvalidArgument)
    keys.write_text(both)
    point(etcd_url, Dsn(stored(etcd_url).reveal().replace("127.0.0.1", "localhost")))
    with pytest.raises(InvalidArgument, match="another user, host, port"):
        user(etcd_url)
    assert CANARY not in logged.getvalue()


@pytest.mark.usefixtures("keys")
def test_plain_passwords_are_let_in_noted_refused_or_encrypted(
    monkeypatch: pytest.MonkeyPatch, place: Dsn, second_database: str, etcd_url: str, logged: io.StringIO
) -> None:
    monkeypatch.setenv(PLAIN_VARIABLE, "refuse")
    create = ("cluster", "create", "--catalog", etcd_url, "--shard", f"one={plain(place)}")
    assert "plain_passwords" in str(refused(*create))
    monkeypatch.setenv(PLAIN_VARIABLE, "maybe")
    assert "allow, encrypt, refuse" in str(refused(*create))
    monkeypatch.delenv(PLAIN_VARIABLE)
    ok(*create)
    assert stored(etcd_url).plain_password
    assert "for every client to read" in logged.getvalue()
    assert CANARY not in logged.getvalue()
    assert ok("secret", "rotate", "--catalog", etcd_url) | {"key": ""} == {
        "version": 1, "key": "", "changed": 0, "plain": 1,
    }  # fmt: skip
    assert ok("secret", "rotate", "--plain", "--catalog", etcd_url)["changed"] == 1
    assert user(etcd_url) == place.user

    with Manager.sync(etcd_url, plain_passwords="refuse") as manager:
        with pytest.raises(InvalidArgument, match="plain_passwords"):
            manager.create_shard("two", primary_endpoint=second_database)
        with pytest.raises(InvalidArgument, match="plain_passwords"):
            manager.add_replica("one", plain(place))
    with Manager.sync(etcd_url, plain_passwords="encrypt") as manager:
        made = manager.create_shard("two", primary_endpoint=second_database)
        assert made.primary.encrypted_password
        assert made.primary.bound() == Dsn(second_database).bound()


@pytest.mark.usefixtures("keys")
def test_no_rotation_while_a_promotion_is_open(place: Dsn, etcd_url: str) -> None:
    ok("cluster", "create", "--catalog", etcd_url, "--shard", f"one={plain(place)}")
    dsn = Dsn(plain(place))
    with closing(open_catalog(etcd_url)) as catalog:
        store = PromotionStore(catalog)
        record = Promotion(shard="s1", name="one", old=dsn, new=dsn, upstreams=(dsn,), stage=Stage.CLOSING)
        with catalog.acquire("promote-s1", ttl_s=30, holder="test") as lease:  # type: ignore[union-attr]
            store.save(record, lease)
            assert "at work" in str(refused("secret", "rotate", "--plain", "--catalog", etcd_url))
        error = refused("secret", "rotate", "--plain", "--catalog", etcd_url)
        assert isinstance(error, InvalidTopology)
        assert "promotion" in str(error)
        assert stored(etcd_url).plain_password
        with catalog.acquire("promote-s1", ttl_s=30, holder="test") as lease:  # type: ignore[union-attr]
            store.save(record.changed(stage=Stage.DONE), lease)
        assert ok("secret", "rotate", "--plain", "--catalog", etcd_url)["changed"] == 1
        left = store.load("s1")
        assert left is not None
        assert not any(one.secret() for one in (left.old, left.new, *left.upstreams))


def allow(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    command._kept.clear()
    monkeypatch.setenv("SHARDLIB_SECRET_COMMAND_VAULT", f"{sys.executable} -c {shlex.quote(code)}")


async def test_a_program_gives_the_password_and_no_loop_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, place: Dsn, etcd_url: str, tmp_path: Path, logged: io.StringIO
) -> None:
    at_work = tmp_path / "at-work"
    secret = tmp_path / "secret"
    secret.write_text(CANARY)
    allow(
        monkeypatch,
        f"import pathlib, time; pathlib.Path({str(at_work)!r}).touch(); time.sleep(2);"
        f" print(pathlib.Path({str(secret)!r}).read_text())",
    )
    shard = f"one={place.with_password('exec:VAULT').reveal()}"
    made = await asyncio.to_thread(run, "cluster", "create", "--catalog", etcd_url, "--shard", shard)
    assert made.exit_code == 0, made.output
    command._kept.clear()
    at_work.unlink()
    beats: list[float] = []

    async def beat() -> None:
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.01)

    async with AsyncShardedEngine(etcd_url) as engine:
        beating = asyncio.create_task(beat())
        conn = await engine.connect("t")
        beating.cancel()
        assert (await conn.execute(text(CREATED))).scalar_one() == place.user
        await conn.close()
    assert at_work.exists()
    gaps = [after - before for before, after in pairwise(beats)]
    assert max(gaps) < 1.5, "the loop stood still while the program ran for 2 s"

    allow(monkeypatch, f"print('{CANARY}'); raise SystemExit(4)")
    async with AsyncShardedEngine(etcd_url) as engine:
        with pytest.raises(ShardUnavailable, match="ended with 4") as caught:
            await engine.connect("t")
    assert not caught.value.final, "the next time it may do"
    assert CANARY not in repr(caught.value) + str(caught.value)
    assert CANARY not in logged.getvalue()


def test_a_program_is_asked_anew_when_the_server_refuses(
    monkeypatch: pytest.MonkeyPatch, place: Dsn, server: LocalServer, etcd_url: str, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(CANARY)
    allow(monkeypatch, f"import pathlib; print(pathlib.Path({str(secret)!r}).read_text())")
    monkeypatch.setenv("SHARDLIB_SECRET_CACHE_S", "3600")
    ok("cluster", "create", "--catalog", etcd_url, "--shard", f"one={place.with_password('exec:VAULT').reveal()}")
    assert user(etcd_url) == place.user
    with server.connect() as admin:
        admin.execute(f"ALTER ROLE {place.user} PASSWORD 'rotated'")
    secret.write_text("rotated")
    command._kept["VAULT"].since -= 5
    with pytest.raises(ShardUnavailable, match="password authentication failed"):
        user(etcd_url)
    assert user(etcd_url) == place.user


@pytest.mark.skipif(not DEBIAN_15.exists(), reason=f"no PostgreSQL that speaks TLS in {DEBIAN_15}")
@pytest.mark.usefixtures("keys")
def test_certificates_of_each_shard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, etcd_url: str) -> None:
    """`verify-full`, an authority for each shard, and a password that is encrypted for just that."""
    dsns = []
    with LocalCluster(shards=2, bootstrap=False, pg_bin=DEBIAN_15) as cluster:
        for server in cluster.servers:
            authority = Authority(tmp_path, f"{server.name}-ca")
            certificate = authority.issue(server.name, hosts=("localhost",))
            with server.connect() as admin:
                for setting, path in (("ssl_cert_file", certificate.cert), ("ssl_key_file", certificate.key)):
                    there = server.data / path.name
                    there.write_bytes(path.read_bytes())
                    there.chmod(0o600)
                    os.chown(there, server.data.stat().st_uid, server.data.stat().st_gid)
                    admin.execute(f"ALTER SYSTEM SET {setting} = '{there}'")
                admin.execute("ALTER SYSTEM SET ssl = on")
                admin.execute("SELECT pg_reload_conf()")
                admin.execute(f"CREATE ROLE canary LOGIN SUPERUSER PASSWORD '{CANARY}'")
            port = Dsn(server.dsn).port
            dsns.append(
                Dsn(f"postgresql://canary@localhost:{port}/postgres?sslmode=verify-full&sslrootcert={authority.ca}")
            )
        encrypted_ones = [encrypted(dsn.with_password(CANARY)) for dsn in dsns]
        shards = [f"--shard={name}={dsn.reveal()}" for name, dsn in zip(("one", "two"), encrypted_ones, strict=True)]
        ok("cluster", "create", "--catalog", etcd_url, *shards)
        query = text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        with ShardedEngine(etcd_url) as engine:
            for shard in engine.topology.shards:
                with psycopg.connect(shard.primary.conninfo()) as conn:
                    assert conn.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone() == (
                        True,
                    )
            with engine.connect("t") as conn:
                assert conn.execute(query).scalar_one() is True

        # The authority of the other shard, with a password that was encrypted for that: TLS refuses.
        wrong = [str(dsns[1 - at]._params["sslrootcert"]) for at in (0, 1)]
        crossed = [
            encrypted(Dsn(dsn.reveal().replace(str(dsn._params["sslrootcert"]), ca)).with_password(CANARY))
            for dsn, ca in zip(dsns, wrong, strict=True)
        ]
        point(etcd_url, *crossed)
        with pytest.raises(ShardUnavailable, match="certificate verify failed"):
            user(etcd_url)
        # TLS taken away, or another authority, in the catalog alone: the password is not even read.
        for was, now in (("verify-full", "disable"), ("verify-full", "require")):
            point(etcd_url, *(Dsn(dsn.reveal().replace(was, now)) for dsn in encrypted_ones))
            with pytest.raises(InvalidArgument, match="database or TLS"):
                user(etcd_url)
        # A reference beside `verify-full`.
        monkeypatch.setenv("SHOP_PASSWORD", CANARY)
        point(etcd_url, *(dsn.with_password("env:SHOP_PASSWORD") for dsn in dsns))
        assert user(etcd_url) == "canary"


def test_threads_of_one_process_share_an_answer(monkeypatch: pytest.MonkeyPatch, place: Dsn, etcd_url: str) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", CANARY)
    ok(
        "cluster",
        "create",
        "--catalog",
        etcd_url,
        "--shard",
        f"one={place.with_password('env:SHOP_PASSWORD').reveal()}",
    )
    allow(monkeypatch, f"print('{CANARY}')")
    point(etcd_url, place.with_password("exec:VAULT"))
    found: list[str] = []
    with ShardedEngine(etcd_url) as engine:

        def ask() -> None:
            with engine.connect("t") as conn:
                found.append(str(conn.execute(text(CREATED)).scalar_one()))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == [place.user] * 4
