"""A command whose extra is not installed says what to install."""

from __future__ import annotations

import sys

import pytest

from shardlib_ops.cli import main


@pytest.mark.parametrize(("package", "extra"), [("jwt.exceptions", "server"), ("alembic", "schema")])
def test_a_missing_extra_is_named(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(main, "app", absent)
    monkeypatch.setattr(sys, "argv", ["shardlib-ops", "token", "issue"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    assert f"[{extra}]" in "".join(capsys.readouterr())


def test_another_missing_module_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'x'", name="x")

    monkeypatch.setattr(main, "app", absent)
    with pytest.raises(ModuleNotFoundError):
        main.main()
