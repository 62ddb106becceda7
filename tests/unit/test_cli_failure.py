"""An error of the library, said to who typed a command: in commands and options."""

from __future__ import annotations

import json
import sys

import pytest

from shardlib.errors import InvalidArgument, InvalidTopology, ShardlibError
from shardlib_ops.cli import render


@pytest.mark.parametrize(
    ("typed", "error", "said"),
    [
        ("reshard show 9", InvalidTopology("there is no job 9", "`list_jobs` shows those there are"), "`reshard list`"),
        ("shard promote a", InvalidTopology("x", "`shard promote a --resume`, or `resume_promotion`"), "--resume`"),
        ("shard promote a", InvalidTopology("x", "`check_promotion` tells more"), "`shard promote --check` tells"),
        ("resharder run --max-slot-wal much", InvalidArgument("max_slot_wal", "much", "a size"), "--max-slot-wal 'mu"),
        ("reshard drain a --retention=-1", InvalidArgument("retention_s", -1, "0 or more"), "--retention -1 is not"),
        ("shard create a --primary x", InvalidArgument("name", "a", "another shard has it"), "name='a' is not allowed"),
    ],
)
def test_methods_and_arguments_are_commands_and_options(
    typed: str, error: ShardlibError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shardlib-ops", *typed.split()])
    render.failure(error, as_json=True)
    render.failure(error, as_json=False)
    out, err = capsys.readouterr()
    for text in (json.loads(out)["message"], err):
        assert said in text
        assert "`list_jobs`" not in text
        assert "_promotion`" not in text
        assert "_s=" not in text
