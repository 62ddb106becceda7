"""The same commands by the catalog and by a manager that listens: the same output, the same topology, both audited."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from shardlib.catalog import open_catalog
from shardlib.errors import InvalidTopology, ShardlibError, UnsupportedOperation
from shardlib_ops import LocalCluster
from shardlib_ops.audit import AuditUnavailable
from shardlib_ops.cli.main import app
from shardlib_ops.client import ManagerRefused, ManagerUnavailable, os_user
from tests.support.manager_runner import running
from tests.support.managers import audit_entries, token

pytestmark = pytest.mark.timeout(300)

COMMANDS = (
    "shard list",
    "shard show shard-01",
    "ring show",
    "reshard list",
    "shard create extra --primary SPARE --vnode-count 128",
    "shard show extra",
    "shard create extra --primary SPARE",
    "shard create s9 --primary SPARE",
    "shard create other --primary SPARE --vnode-count 0",
    "shard show nowhere",
    "shard delete shard-01 --yes",
    "reshard split shard-01 --target extra --dry-run",
    "reshard split nowhere --target extra",
    "reshard split shard-01 --target shard-01",
    "reshard merge shard-02 --target shard-01 --dry-run",
    "reshard rebalance --target extra --dry-run",
    "reshard show 9",
    "reshard pause 9",
    "shard promote shard-01 --yes",
    "shard delete extra --yes",
    "shard list",
)


class Side:
    """A cluster, and one way to it."""

    def __init__(self, cluster: LocalCluster, spare: str, env: dict[str, str]) -> None:
        self.cluster, self.spare, self.env = cluster, spare, env

    def __call__(self, command: str, *more: str, **env: str) -> Result:
        arguments = [self.spare if part == "SPARE" else part for part in command.split()]
        result = CliRunner().invoke(app, [*arguments, *more], env={**CLEAN, **self.env, **env})
        if isinstance(result.exception, Exception) and not isinstance(result.exception, ShardlibError):
            raise result.exception
        return result

    def told(self, command: str) -> tuple[Any, ...]:
        """What a command comes to, without what no two clusters have alike."""
        result = self(command, "--json")
        error = result.exception if isinstance(result.exception, ShardlibError) else None
        said = result.stdout if error is None else f"{type(error).__name__}: {error}"
        said = re.sub(r"postgresql://[^\s\",;')]*|\b[0-9a-f]{32}\b|127\.0\.0\.1:\d+", "***", said)
        return result.exit_code, said


CLEAN: dict[str, Any] = dict.fromkeys(
    ("SHARDLIB_CATALOG", "SHARDLIB_MANAGER", "SHARDLIB_TOKEN", "SHARDLIB_AUDIT", "SHARDLIB_CONFIG")
)


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Side, Side]]:
    with LocalCluster(shards=2) as one, LocalCluster(shards=2) as other, running(other.url) as (url, _):
        by_catalog = {"SHARDLIB_CATALOG": one.url}
        by_manager = {"SHARDLIB_MANAGER": url, "SHARDLIB_TOKEN": token("admin")}
        yield Side(one, one.spare("spare-1").dsn, by_catalog), Side(other, other.spare("spare-1").dsn, by_manager)


def test_both_ways_say_and_do_the_same(sides: tuple[Side, Side]) -> None:
    direct, http = sides
    for command in COMMANDS:
        assert http.told(command) == direct.told(command), command
    versions = []
    for side in sides:
        with closing(open_catalog(side.cluster.url)) as catalog:
            found = catalog.load()
        versions.append(
            (found.version, [(one.id, one.name) for one in found.shards], found.next_shard, found.next_gate)
        )
    assert versions[0] == versions[1]


def test_a_change_by_the_catalog_is_in_the_audit_log_as_one_by_a_manager(sides: tuple[Side, Side]) -> None:
    logs = []
    for side, via in zip(sides, ("cli", "http"), strict=True):
        side("shard create audited --primary SPARE --json")
        side("shard delete audited --yes --json")
        entries = [one for one in audit_entries(side.cluster.url) if one.via == via][-4:]
        logs.append([(one.kind, one.action, one.result) for one in entries])
        assert all("password" not in str(one.details) for one in entries)
        if via == "cli":
            assert {one.subject for one in entries} == {os_user()}
    assert logs[0] == logs[1]
    assert [kind for kind, _, _ in logs[0]] == ["intent", "outcome"] * 2


def test_nothing_is_changed_without_an_entry(sides: tuple[Side, Side], tmp_path: Path) -> None:
    direct, _ = sides
    before = direct("shard list --json").stdout
    nowhere = f"file:{tmp_path}/missing/audit.log"
    result = direct("shard create silent --primary SPARE", "--audit", nowhere)
    assert isinstance(result.exception, AuditUnavailable)
    assert not result.exception.done
    assert direct("shard list --json").stdout == before


def test_what_a_manager_does_not_do_says_so(sides: tuple[Side, Side]) -> None:
    _, http = sides
    for command in (
        "shard promote shard-01 --check",
        "shard add-replica shard-01 SPARE",
        "reshard drain shard-01 --run",
        "reshard cancel 1 --yes --run",
    ):
        error = http(command).exception
        assert isinstance(error, UnsupportedOperation), command
        assert "needs --catalog" in str(error)
    assert json.loads(http("reshard list --json").stdout) == {"jobs": []}


def test_who_may_not_is_refused_and_the_token_is_not_shown(sides: tuple[Side, Side], tmp_path: Path) -> None:
    _, http = sides
    weak = token("viewer")
    held = tmp_path / "token"
    held.write_text(f"{weak}\n")
    assert http("shard list --json", "--token-file", str(held), SHARDLIB_TOKEN="").exit_code == 0
    refused = http("shard create x --primary SPARE", "--token-file", str(held))
    assert isinstance(refused.exception, ManagerRefused)
    nobody = http("shard list", SHARDLIB_TOKEN="not.a.token")
    assert isinstance(nobody.exception, ManagerRefused)
    assert "SHARDLIB_TOKEN" in str(nobody.exception)
    assert weak not in f"{refused.exception!r} {refused.output} {nobody.output}"


def test_a_url_that_would_show_the_token_is_refused() -> None:
    result = CliRunner().invoke(app, ["shard", "list", "--manager", "http://manager.example:8081"], env=CLEAN)
    assert isinstance(result.exception, ValueError)
    assert "unencrypted" in str(result.exception)


def test_a_manager_that_is_not_there_is_asked_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardlib_ops.client.link import Reach

    monkeypatch.setattr(Reach.__init__, "__defaults__", (*(Reach.__init__.__defaults__ or ())[:-1], 1.0))
    result = CliRunner().invoke(app, ["shard", "list", "--manager", "http://127.0.0.1:1"], env=CLEAN)
    assert isinstance(result.exception, ManagerUnavailable)
    assert "nothing was changed" in str(result.exception)


def test_the_catalog_and_a_manager_are_not_both_meant() -> None:
    both = {**CLEAN, "SHARDLIB_CATALOG": "etcd://127.0.0.1:1/a", "SHARDLIB_MANAGER": "http://127.0.0.1:1"}
    assert CliRunner().invoke(app, ["shard", "list"], env=both).exit_code == 2
    assert CliRunner().invoke(app, ["shard", "list"], env=CLEAN).exit_code == 2


def test_a_missing_job_is_the_same_error(sides: tuple[Side, Side]) -> None:
    for side in sides:
        error = side("reshard watch 99").exception
        assert isinstance(error, InvalidTopology)
        assert "there is no job 99" in str(error)
