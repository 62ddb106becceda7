"""A DSN: what it shows, and where its password may come from."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import pytest

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument

SECRET = "canary-77f0"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql://u:{SECRET}@h:5/d?sslmode=require", "postgresql://u@h:5/d"),
        (f"host=h user=u password={SECRET}", "postgresql://u@h/"),
        ("postgresql://h", "postgresql://h/"),
        ("service=shop", "postgresql:///"),
    ],
)
def test_it_shows_what_it_gives_and_no_more(text: str, shown: str) -> None:
    assert str(Dsn(text)) == shown
    assert repr(Dsn(text)) == f"Dsn({shown!r})"


@pytest.mark.parametrize("text", [
    f"postgres://u:p@ss:{SECRET}@h/d",
    f"postgres://u:p@{SECRET}@h/d",
    f"postgres://u:p/{SECRET}@h/d",
    f"postgres://u:12/{SECRET}@h/d",
    f"postgres://u:p@{SECRET},x@h:5432/d",
])  # fmt: skip
def test_a_password_with_a_character_of_urls_is_refused_unseen(text: str) -> None:
    with pytest.raises(InvalidArgument, match="%40") as caught:
        Dsn(text)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


def refusal(reference: str) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        Dsn(f"host=h password={reference}").conninfo()
    # What an error report would show of it, with the errors that it came from.
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in "".join(traceback.format_exception(error))
        assert SECRET not in repr(vars(error))
        assert SECRET.encode() not in getattr(error, "object", b"")
        error = error.__cause__ or error.__context__
    return caught.value


def test_a_password_of_a_file_that_is_not_utf_8_stays_unseen(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(SECRET.encode() + b"\xff")
    assert "not UTF-8" in str(refusal(f"file:{path}"))
    path.write_bytes(f"{SECRET}-ü\nmore".encode())
    assert f"password={SECRET}-ü" in Dsn(f"host=h password=file:{path}").conninfo()


def test_a_password_of_the_environment_that_is_not_utf_8_stays_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", os.fsdecode(SECRET.encode() + b"\xff"))
    assert "not UTF-8" in str(refusal("env:SHOP_PASSWORD"))


@pytest.mark.parametrize("content", [None, b""])
def test_a_file_that_is_away_or_empty_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in str(refusal(f"file:{path}"))


def test_a_dsn_that_no_server_can_be_told_is_refused_unseen() -> None:
    with pytest.raises(InvalidArgument) as caught:
        Dsn(f"host=h password={SECRET}\udcff")
    assert caught.value.__context__ is None
    assert SECRET not in str(caught.value)
