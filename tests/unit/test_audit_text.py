"""What may stand in the audit log: one line, of bounded length, no secrets."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument
from shardlib_ops.audit import Actor, AuditUnavailable, Head, find_heads, open_audit, read_key, sign_head
from shardlib_ops.audit.entry import draft, encode, seal
from shardlib_ops.audit.text import cleaned, cleaned_details, outcome_of

SECRET = "c4nary-hunter2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("shard-04", "shard-04"),
        ("a\nb\r\n", r"a\nb\r\n"),
        ("\x1b[31mred\x00", r"\x1b[31mred\x00"),
        ("\u2028\u2029\x85\x7f", r"\u2028\u2029\x85\x7f"),
        ("\u202egnp", r"\u202egnp"),
        ("\ud800", r"\ud800"),
        (r"C:\new", r"C:\\new"),
        ("größe 日本", "größe 日本"),
        (7, "7"),
    ],
)
def test_s07_23_control_characters_are_escaped(text: object, shown: str) -> None:
    assert cleaned(text) == shown


@given(st.text())
def test_s07_23_the_log_has_one_printable_line_for_an_entry(text: str) -> None:
    assert cleaned(text).isprintable()
    assert len(cleaned(text)) <= 1000


def test_a_long_text_is_cut_and_says_so() -> None:
    assert cleaned("x" * 5000) == "x" * 997 + "..."
    many = cleaned_details({str(number): number for number in range(100)})
    assert len(many) == 65
    assert many["..."] == "36 more left out"


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://app:{SECRET}@db1:5432/shop",
        f"postgres://app:p@ss:{SECRET}@db1/shop",
        f"postgresql://app:{SECRET} with space@db1/shop",
        f"postgresql://db1/shop?user=app&password={SECRET}",
        f"host=db1 user=app password={SECRET}",
        f"host=db1 password='{SECRET} \\' more' user=app",
        f"cannot reach etcd://root:{SECRET}@e1:2379/shop: refused",
        f"cannot reach postgresql://a:{SECRET}@h/d, nor postgresql://b:{SECRET}@h/d",
        f"etcd://root:line\nend{SECRET}@e1:2379/shop",
        f'{{"password": "{SECRET}"}}',
        f"client_secret={SECRET}&x=1",
        f"Authorization: Bearer {SECRET}",
        f"Bearer {SECRET}",
        f"eyJhbGciOiJIUzI1NiJ9.{SECRET}.c2ln",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
        quote(f"postgresql://app:{SECRET}@db1/shop", safe=""),
        Dsn(f"postgresql://app:{SECRET}@db1/shop"),
    ],
)
def test_secrets_are_left_out(text: object) -> None:
    entry = seal(
        draft(id="1", at="2026", kind="refused", actor=Actor(str(text), request_id=str(text), address=str(text)),
              action="shard.create", target=str(text), details={"endpoint": text, "token": SECRET}, result=str(text)),
        Head(0, "0" * 64),
    )  # fmt: skip
    assert SECRET.encode() not in encode(entry)


def test_what_is_no_secret_stays() -> None:
    for text in ("postgresql://app@db1:5432/shop", "http://192.0.2.1/a?b=c", "token_id 42", "user@example.org"):
        assert cleaned(text) == text
    assert cleaned_details({"token_id": "42", "through": 7}) == {"token_id": "42", "through": "7"}


def test_only_the_text_of_our_own_errors_is_kept() -> None:
    assert (
        outcome_of(InvalidArgument("name", "x y", "letters")) == "InvalidArgument: name='x y' is not allowed: letters"
    )
    assert outcome_of(RuntimeError(f"SELECT '{SECRET}'")) == "RuntimeError"


@pytest.mark.parametrize(
    "url",
    ["", "catalog:", "file:relative", "file:", "file:/", "redis://x", f"postgresql://u:{SECRET}@", SECRET,
     "file:/a%00b", f"postgresql://u:{SECRET}@h/d?log="],
)  # fmt: skip
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        open_audit(url)
    assert SECRET not in str(raised.value)


def test_a_head_is_signed_and_found_again() -> None:
    key, head = b"k" * 32, Head(12, "a" * 64)
    text = sign_head(key, head)
    (found,) = find_heads(f"2026-11-24 INFO {text} and more")
    assert (found.head, str(found)) == (head, text)
    assert found.signed_by(key)
    assert not found.signed_by(b"x" * 32)
    with pytest.raises(InvalidArgument):
        sign_head(b"short", head)
    with pytest.raises(InvalidArgument):
        sign_head(key, Head(1, "no hash"))


def test_a_key_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"k" * 40 + b"\nmore")
    assert read_key(path) == b"k" * 40
    path.write_bytes(SECRET.encode())
    for wrong in (path, tmp_path / "none"):
        with pytest.raises(InvalidArgument) as raised:
            read_key(wrong)
        assert SECRET not in str(raised.value)


def test_the_error_says_whether_something_was_done() -> None:
    assert "nothing was done" in str(AuditUnavailable("file:/a", "no space left on device"))
    assert "nothing was done" not in str(AuditUnavailable("file:/a", "no space left on device", True))
