"""`shardlib-ops audit`: list, verify, archive; and what an archive leaves."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import signal
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shardlib.catalog import open_catalog
from shardlib.errors import InvalidArgument, ShardlibError
from shardlib_ops.audit import (
    Actor,
    Audit,
    AuditUnavailable,
    Entry,
    Unsound,
    archive,
    open_audit,
    sign_head,
    verify,
    walk,
)
from shardlib_ops.cli.main import app
from tests.support.audits import ALICE, some_draft

KEY = b"k" * 32
START = datetime(2026, 11, 1, tzinfo=UTC)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def lines(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(params=["etcd", "PostgreSQL", "file"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ...]:
    """The options that name a log."""
    if request.param == "etcd":
        return "--catalog", request.getfixturevalue("etcd_url")
    url = request.getfixturevalue("database") if request.param == "PostgreSQL" else f"file:{tmp_path / 'audit'}"
    return "--audit", url


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    return path


def work(where: tuple[str, ...], days: int) -> list[Entry]:
    """A shard created each day, and a refusal; the log as it is then."""

    async def main() -> list[Entry]:
        moments = iter([START + timedelta(days=number // 3) for number in range(days * 3)])
        catalog = open_catalog(where[1]) if where[0] == "--catalog" else None
        async with Audit(
            open_audit("catalog:" if catalog else where[1], catalog), clock=lambda: next(moments)
        ) as audit:
            for number in range(days):
                async with audit.attempt(ALICE, "shard.create", f"shard-{number}", {"vnode_count": 256}):
                    pass
                await audit.refused(Actor("mallory", via="http"), "shard.delete", f"shard-{number}", "forbidden")
            found = [item for item in walk(audit.store) if isinstance(item, Entry)]
        if catalog is not None:
            catalog.close()
        return found

    return asyncio.run(main())


def test_entries_are_listed_for_people_and_for_programs(where: tuple[str, ...]) -> None:
    assert done("list", *where, "--json") == ""
    assert "an empty log" in done("verify", *where)
    entries = work(where, 4)
    shown = lines(done("list", *where, "--json"))
    assert [one["seq"] for one in shown] == list(range(1, 13))
    assert shown[0]["details"] == {"vnode_count": "256"}
    assert shown[0]["hash"] == entries[0].hash
    assert [one["seq"] for one in lines(done("list", *where, "--json", "--last", 2))] == [11, 12]
    table = done("list", *where)
    assert "alice (admin) 192.0.2.7" in table
    assert "outcome of 1" in table
    assert "vnode_count=256" in table


@pytest.mark.parametrize("where", ["file"], indirect=True)
@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--subject", "mallory"], [3, 6, 9, 12]),
        (["--action", "shard"], list(range(1, 13))),
        (["--action", "shard.delete", "--last", "2"], [9, 12]),
        (["--action", "shar"], []),
        (["--target", "shard-1"], [4, 5, 6]),
        (["--kind", "intent"], [1, 4, 7, 10]),
        (["--failed"], [3, 6, 9, 12]),
        (["--since", "2026-11-03"], [7, 8, 9, 10, 11, 12]),
        (["--since", "2026-11-03T01:00+01:00", "--until", "2026-11-04T00:00Z"], [7, 8, 9]),
        (["--request", "r-1", "--subject", "mallory"], []),
    ],
)
def test_filters(where: tuple[str, ...], options: list[str], found: list[int]) -> None:
    work(where, 4)
    assert [one["seq"] for one in lines(done("list", *where, "--json", *options))] == found


def test_a_log_is_verified(where: tuple[str, ...], key_file: Path, tmp_path: Path) -> None:
    entries = work(where, 2)
    head = sign_head(KEY, entries[-1].head)
    told = json.loads(done("verify", *where, "--head", head, "--key-file", key_file, "--json"))
    assert (told["entries"], told["last"], told["findings"]) == (6, {"seq": 6, "hash": entries[-1].hash}, [])
    assert "nothing wrong" in done("verify", *where)
    log = tmp_path / "manager.log"
    log.write_text(f"INFO started\nINFO {sign_head(KEY, entries[2].head)}\nINFO {head}\n")
    assert "nothing wrong" in done("verify", *where, "--head", log)
    forged = sign_head(KEY, entries[-1].head._replace(seq=9))
    cut = run("verify", *where, "--head", forged, "--head", log, "--json")
    assert cut.exit_code == 1
    assert [(one["kind"], one["seq"]) for one in json.loads(cut.output)["findings"]] == [("truncated", 7)]
    strange = run("verify", *where, "--head", sign_head(b"m" * 32, entries[-1].head), "--key-file", key_file)
    assert (strange.exit_code, "signature" in strange.output) == (1, True)


@pytest.mark.parametrize("where", ["file"], indirect=True)
def test_what_was_changed_is_shown_with_an_exit_code(where: tuple[str, ...]) -> None:
    work(where, 2)
    path = Path(where[1].removeprefix("file:"))
    path.write_text(path.read_text().replace('"subject":"alice"', '"subject":"mallory"', 1))
    result = run("verify", *where)
    assert result.exit_code == 1
    assert "changed: entry 1 does not have the hash that it bears" in result.output


def test_old_entries_are_archived_and_the_rest_verifies(where: tuple[str, ...], key_file: Path, tmp_path: Path) -> None:
    entries = work(where, 4)
    head = sign_head(KEY, entries[-1].head)
    options = ("--before", "2026-11-03", "--key-file", key_file, "--head", head, "--yes", "--json")
    file = tmp_path / "until-november-3.jsonl"
    told = json.loads(done("archive", *where, "--to", file, *options))
    assert told == {
        "entries": 6,
        "through": 6,
        "hash": entries[5].hash,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert [one["seq"] for one in lines(done("list", "--audit", f"file:{file}", "--json"))] == [1, 2, 3, 4, 5, 6]
    left = lines(done("list", *where, "--json"))
    assert [one["seq"] for one in left] == list(range(7, 15))
    assert [one["action"] for one in left[-2:]] == ["audit.archive"] * 2
    assert left[-1]["details"] == {"cut": "6"}
    told = json.loads(done("verify", *where, "--head", head, "--key-file", key_file, "--json"))
    assert (told["archived_through"], told["findings"]) == (6, [])
    # The second one: `cat` of the files and the log is the whole log.
    second = tmp_path / "until-november-4.jsonl"
    done("archive", *where, "--to", second, *options[2:], "--before", "2026-11-04")
    assert [one["seq"] for one in lines(done("list", *where, "--json"))] == list(range(10, 17))
    assert json.loads(done("verify", *where, "--key-file", key_file, "--json"))["archived_through"] == 9
    whole = tmp_path / "whole"
    whole.write_bytes(file.read_bytes() + second.read_bytes() + done("list", *where, "--json").encode())
    assert "16 entries, the last is 16: nothing wrong" in done("verify", "--audit", f"file:{whole}", "--head", head)


def test_nothing_old_enough_leaves_no_file(where: tuple[str, ...], tmp_path: Path) -> None:
    work(where, 1)
    file = tmp_path / "old"
    assert "nothing was done" in done("archive", *where, "--to", file, "--before", "2020-01-01", "--yes")
    assert not file.exists()


@pytest.mark.parametrize("where", ["file"], indirect=True)
def test_a_log_that_does_not_verify_is_not_cut(where: tuple[str, ...], tmp_path: Path) -> None:
    work(where, 3)
    path = Path(where[1].removeprefix("file:"))
    path.write_text(path.read_text().replace('"subject":"alice"', '"subject":"mallory"', 1))
    before = path.read_bytes()
    result = run("archive", *where, "--to", tmp_path / "old", "--before", "2026-11-03", "--yes")
    assert isinstance(result.exception, Unsound)
    assert [one.kind for one in pickle.loads(pickle.dumps(result.exception)).findings] == ["changed"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("where", ["file"], indirect=True)
def test_a_file_that_is_there_is_not_written_over(where: tuple[str, ...], tmp_path: Path) -> None:
    work(where, 3)
    (tmp_path / "old").write_text("mine")
    result = run("archive", *where, "--to", tmp_path / "old", "--before", "2026-11-03", "--yes")
    assert isinstance(result.exception, InvalidArgument)
    assert (tmp_path / "old").read_text() == "mine"
    refused = CliRunner().invoke(
        app, ["audit", "archive", *where, "--to", str(tmp_path / "new"), "--before", "2026-11-03"], input="n\n"
    )
    assert refused.exit_code == 1
    assert not (tmp_path / "new").exists()


async def test_an_archive_that_was_interrupted_verifies_and_is_completed_by_the_next(
    etcd_url: str, tmp_path: Path
) -> None:
    """Killed between two documents: some of what the checkpoint says is gone, and some not yet."""
    await asyncio.to_thread(work, ("--catalog", etcd_url), 4)
    with closing(open_catalog(etcd_url)) as catalog:
        async with Audit(open_audit("catalog:", catalog)) as audit:
            store = audit.store
            cut = store.cut

            def interrupted(through: int) -> int:
                cut(through - 2)
                raise AuditUnavailable(store.safe_url, "killed")

            store.cut = interrupted  # type: ignore[method-assign]
            with pytest.raises(AuditUnavailable):
                await archive(audit, ALICE, "2026-11-03", tmp_path / "a", key=KEY)
            store.cut = cut  # type: ignore[method-assign]
            left = [item.seq for item in await asyncio.to_thread(lambda: list(walk(store))) if isinstance(item, Entry)]
            assert left == list(range(5, 15))
            assert await asyncio.to_thread(lambda: verify(walk(store), [], KEY)) == []
            again = await archive(audit, ALICE, "2026-11-03", tmp_path / "b", key=KEY)
            assert again is not None
            assert (again.entries, again.through.seq) == (2, 6)
            assert await asyncio.to_thread(lambda: verify(walk(store), [], KEY)) == []


@pytest.mark.parametrize("where", ["file"], indirect=True)
def test_what_comes_is_followed_until_interrupted(where: tuple[str, ...]) -> None:
    entries = work(where, 1)
    command = [sys.executable, "-m", "shardlib_ops.cli.main", "audit", "list", *where, "--json", "--follow"]
    running = subprocess.Popen([*command, "--subject", "alice"], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        shown = [json.loads(running.stdout.readline())["seq"] for _ in range(2)]
        assert shown == [1, 2]
        with closing(open_audit(where[1])) as store:
            new = store.append(some_draft())
        assert new.seq == len(entries) + 1
        assert json.loads(running.stdout.readline())["hash"] == new.hash
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 130
    finally:
        running.kill()
        running.wait(20)
        if running.stdout is not None:
            running.stdout.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("list", "--audit", "nonsense"),
        ("list", "--catalog", "memory://x"),
        ("list", "--audit", "file:/a", "--since", "yesterday"),
        ("list", "--audit", "file:/a", "--kind", "intents"),
        ("verify", "--audit", "file:/a", "--head", "no head"),
        ("verify", "--audit", "file:/a", "--key-file", "/none"),
    ],
)
def test_wrong_options_are_said(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDLIB_CATALOG", raising=False)
    result = run(*arguments)
    assert isinstance(result.exception, ShardlibError), result.output
