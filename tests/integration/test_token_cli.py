"""`shardlib-ops token`, as an operator types it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from shardlib_ops.auth import Role, Verifier
from shardlib_ops.cli.main import main
from shardlib_ops.settings import AuthSettings
from tests.support.tokens import SECRET, auth, key_pair


def run(*arguments: str, status: int = 0, **environ: str) -> str:
    """Run a command in this process: one of its own would import everything anew each time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHARDLIB_")}
    out, code = io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, {**kept, **environ}, clear=True),
        mock.patch.object(sys, "argv", ["shardlib-ops", "token", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    assert code == status, out.getvalue()
    assert SECRET not in out.getvalue()
    return out.getvalue()


async def test_the_token_alone_is_printed(tmp_path: Path) -> None:
    out = run("issue", "--role", "operator", "--subject", "ci", "--ttl", "60", SHARDLIB_JWT_SECRET=SECRET)
    assert out.count("\n") == 1
    found = await Verifier.from_settings(auth()).verify(out.strip())
    assert (found.subject, found.role) == ("ci", Role.OPERATOR)
    assert 0 < found.expires_at - time.time() <= 60

    private, public, _ = key_pair(tmp_path, "EdDSA")
    out = run("issue", "--role", "admin", "--subject", "ci", "--json", SHARDLIB_JWT_KEY_FILE=str(private))
    token = json.loads(out)["token"]
    assert (await Verifier.from_settings(AuthSettings(key_file=public)).verify(token)).role is Role.ADMIN


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (("--role", "admin"), {}, "SHARDLIB_JWT_SECRET"),
        (("--role", "admin"), {"SHARDLIB_JWT_SECRET": "short"}, "32 bytes"),
        (("--role", "root"), {"SHARDLIB_JWT_SECRET": SECRET}, "viewer, operator, admin"),
        (("--role", "admin", "--ttl", "99999999"), {"SHARDLIB_JWT_SECRET": SECRET}, "ttl_max_s"),
    ],
)
def test_no_token_is_made_that_no_server_would_believe(
    arguments: tuple[str, ...], environ: dict[str, str], said: str
) -> None:
    assert said in run("issue", "--subject", "ci", *arguments, status=1, **environ)


def test_deny_and_allow_are_entries_of_the_audit_log(etcd_url: str, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    environ = {"SHARDLIB_CATALOG": etcd_url, "SHARDLIB_AUDIT": f"file:{log}"}
    run("deny", "--id", "token-1", **environ)
    run("deny", "--subject", "bob", **environ)
    found = json.loads(run("denied", "--json", **environ))["denied"]
    assert [(each["token_id"], each["subject"]) for each in found] == [("token-1", None), (None, "bob")]
    assert found[0]["until"] > time.time()
    assert found[1]["until"] is None
    assert "bob" in run("denied", **environ)
    run("allow", "--subject", "bob", **environ)
    assert "was not denied" in run("allow", "--subject", "bob", status=3, **environ)
    assert "either" in run("deny", status=1, **environ)
    assert "either" in run("deny", "--id", "a", "--subject", "b", status=1, **environ)
    assert "SHARDLIB_CATALOG" in run("deny", "--id", "a", status=1)
    actions = [(entry["kind"], entry["action"]) for entry in map(json.loads, log.read_text().splitlines())]
    assert actions[:4] == [("intent", "token.deny"), ("outcome", "token.deny")] * 2
    assert ("outcome", "token.allow") in actions


def test_nothing_is_denied_that_is_not_in_the_log(etcd_url: str, tmp_path: Path) -> None:
    environ = {"SHARDLIB_CATALOG": etcd_url, "SHARDLIB_AUDIT": f"file:{tmp_path}/no/such/folder/audit"}
    assert "audit" in run("deny", "--subject", "bob", status=1, **environ)
    assert json.loads(run("denied", "--json", **environ))["denied"] == []
