"""`enc:…`: a password is read by who has the key, in the DSN that it was encrypted for, and nowhere else."""

from __future__ import annotations

import builtins
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlib.dsn import Dsn, resolve_secret
from shardlib.errors import InvalidArgument
from shardlib.secrets.keys import KEY_FILE_VARIABLE, KEY_VARIABLE, new_key, parse_keys, read_keys
from shardlib.secrets.sealed import key_id_of, seal, unseal

CANARY = "c4nary/p@ss:w%rd é"
ADDRESS = "postgresql://app@db-1:5432/shop?sslmode=verify-full&sslrootcert=/etc/ca.pem"

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=120)
bounds = st.dictionaries(st.sampled_from(["user", "host", "port", "dbname", "sslmode"]), st.text(max_size=20))


def keys(*texts: str) -> Any:
    return parse_keys("\n".join(texts), KEY_VARIABLE, "***")


KEY, OTHER = new_key(), new_key()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return KEY


def sealed(text: str = ADDRESS, password: str = CANARY, key: str = KEY) -> Dsn:
    plain = Dsn(text)
    return plain.with_password(seal(password, plain.bound(), keys(key)[0]))


def refusal(dsn: Dsn) -> str:
    with pytest.raises(InvalidArgument) as caught:
        dsn.conninfo()
    text = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    for secret in (CANARY, KEY, OTHER, dsn._params["password"][13:]):
        assert secret not in text
    return str(caught.value)


@settings(max_examples=200, deadline=None)
@given(words, bounds)
def test_what_goes_in_comes_out(password: str, bound: dict[str, str]) -> None:
    one, two = (seal(password, bound, keys(KEY)[0]) for _ in range(2))
    assert one != two, "a nonce of its own each time"
    assert unseal(one, bound, keys(OTHER, KEY)) == unseal(two, bound, keys(KEY)) == password


@settings(max_examples=100, deadline=None)
@given(words, bounds, bounds)
def test_it_is_of_no_use_elsewhere(password: str, bound: dict[str, str], other: dict[str, str]) -> None:
    if bound != other:
        with pytest.raises(InvalidArgument, match="another user, host, port, database"):
            unseal(seal(password, bound, keys(KEY)[0]), other, keys(KEY))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, by: int) -> None:
    import base64

    head, _, word = seal("s3cret", {"host": "h"}, keys(KEY)[0]).rpartition(":")
    raw = bytearray(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
    raw[at % len(raw)] ^= by
    with pytest.raises(InvalidArgument, match="changed"):
        unseal(f"{head}:{base64.urlsafe_b64encode(raw).decode().rstrip('=')}", {"host": "h"}, keys(KEY))


def test_the_length_does_not_tell_that_of_the_password() -> None:
    assert len({len(seal("x" * length, {}, keys(KEY)[0])) for length in range(1, 33)}) == 1


@pytest.mark.parametrize("text", [
    ADDRESS, "host=db-1,db-2 port=5432,5433 user='a b' dbname=shop", "postgresql://db-1/shop?user=app",
    "postgresql://a%40b@[::1]:5432,db-2/shop?target_session_attrs=read-write", "postgresql://app:old@db-1/shop",
    "postgresql://db-1/shop?password=old", "host=db-1 password=old",
])  # fmt: skip
@pytest.mark.usefixtures("key")
def test_a_dsn_of_any_form_can_hold_one(text: str) -> None:
    dsn = sealed(text)
    assert dsn.encrypted_password
    assert not dsn.plain_password
    assert dsn.bound() == Dsn(text).bound()
    assert Dsn(dsn.reveal()).conninfo() == Dsn(text).with_password(CANARY).conninfo()
    for shown in (dsn.reveal(), str(dsn), repr(dsn), dsn.safe()):
        assert CANARY not in shown
    assert Dsn(text).with_password(None).bound() == Dsn(text).bound()
    assert not Dsn(text).with_password(None).plain_password


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(("was", "now"), [
    ("app:", "eve:"), ("db-1", "evil"), ("5432", "5433"), ("/shop", "/other"), ("db-1:5432", "evil:1,db-1:5432"),
    ("verify-full", "disable"), ("/etc/ca.pem", "/tmp/ca.pem"), ("?", "?hostaddr=192.0.2.9&"),
    ("?sslmode=verify-full&", "?"), ("?", "?service=evil&"), ("?", "?require_auth=password&"),
])  # fmt: skip
def test_it_cannot_be_moved_to_another_address(was: str, now: str) -> None:
    text = sealed().reveal()
    assert text.count(was) == 1
    assert "another user, host, port" in refusal(Dsn(text.replace(was, now)))


@pytest.mark.usefixtures("key")
def test_a_multi_host_dsn_is_bound_to_all_of_them_in_their_order() -> None:
    text = sealed("postgresql://app@db-1:5432,db-2:5433/shop").reveal()
    Dsn(text).conninfo()
    for hosts in ("db-2:5433,db-1:5432", "db-1:5432", "db-1:5433,db-2:5432", "db-1:5432,db-2:5433,evil:1"):
        refusal(Dsn(text.replace("db-1:5432,db-2:5433", hosts)))


@pytest.mark.usefixtures("key")
def test_what_leads_nowhere_else_may_change() -> None:
    text = sealed().reveal()
    assert CANARY in resolve_secret(Dsn(text)._params["password"], Dsn(f"{text}&connect_timeout=3").bound())
    Dsn(f"{text}&application_name=x&keepalives_idle=5").conninfo(connect_timeout=9)


def test_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    dsn = sealed()
    monkeypatch.setenv(KEY_VARIABLE, OTHER)
    told = refusal(dsn)
    assert keys(KEY)[0].id in told
    assert keys(OTHER)[0].id in told
    monkeypatch.delenv(KEY_VARIABLE)
    assert KEY_FILE_VARIABLE in refusal(dsn)


def test_two_keys_live_while_one_follows_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(path))
    path.write_text(f"# of the shop\n{KEY}\n")
    before = sealed(key=KEY)
    path.write_text(f"{OTHER}\n\n{KEY}\n")  # read anew: no process starts again
    after = sealed(key=OTHER)
    assert [one.id for one in read_keys()] == [keys(OTHER)[0].id, keys(KEY)[0].id]
    assert CANARY in (before.conninfo() and resolve_secret(before._params["password"], before.bound()))
    after.conninfo()
    path.write_text(f"{OTHER}\n")
    after.conninfo()
    refusal(before)


@pytest.mark.parametrize(
    "text", ["enc:", "enc:0123abcd", "enc:0123abcd:", "enc:0123ABCD:aaaa", "enc:0123abcd:a b", "enc:x:y:z"]
)
@pytest.mark.usefixtures("key")
def test_what_is_no_ciphertext(text: str) -> None:
    with pytest.raises(InvalidArgument, match="enc:KEY ID"):
        Dsn("host=h").with_password(text).conninfo()


@pytest.mark.usefixtures("key")
def test_a_ciphertext_that_is_cut_off() -> None:
    text = str(sealed()._params["password"])
    with pytest.raises(InvalidArgument, match="cut off"):
        Dsn(ADDRESS).with_password(text[:40]).conninfo()
    with pytest.raises(InvalidArgument, match="enc:KEY ID"):
        key_id_of("plain")


def test_only_a_dsn_can_hold_one() -> None:
    with pytest.raises(InvalidArgument, match="only a PostgreSQL DSN"):
        resolve_secret(str(sealed()._params["password"]))


@pytest.mark.parametrize("content", ["", "# none\n", "short", f"{KEY}\n{KEY}", f"{KEY}x", "é", f"{KEY} {OTHER}"])
def test_a_file_that_holds_no_keys_is_told_unseen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(path))
    with pytest.raises(InvalidArgument, match=KEY_FILE_VARIABLE) as caught:
        read_keys()
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert KEY not in shown
    assert OTHER not in shown


def test_keys_have_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_keys()
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(InvalidArgument, match="not both"):
        read_keys()
    monkeypatch.delenv(KEY_FILE_VARIABLE)
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY},{OTHER}")
    assert len(read_keys()) == 2


@pytest.mark.parametrize("variable", [KEY_VARIABLE, KEY_FILE_VARIABLE, "SHARDLIB_SECRET_COMMAND_VAULT"])
def test_a_dsn_cannot_ask_for_the_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str) -> None:
    """Whoever writes the catalog must not make a client send them to a server as a password."""
    path = tmp_path / "keys"
    path.write_text(KEY)
    (tmp_path / "link").symlink_to(path)
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(InvalidArgument, match="no password"):
        resolve_secret(f"env:{variable}")
    if variable == KEY_FILE_VARIABLE:
        for name in (path, tmp_path / "link", tmp_path / "." / "keys", f"{tmp_path}/../{tmp_path.name}/keys"):
            with pytest.raises(InvalidArgument, match="no password"):
                resolve_secret(f"file:{name}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc on this system")
def test_a_dsn_cannot_ask_for_the_whole_environment() -> None:
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        resolve_secret("file:/proc/self/environ")


@pytest.mark.usefixtures("key")
def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    dsn = sealed()
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "cryptography":
            raise ImportError(name)
        return real(name, *arguments, **more)

    for name in [each for each in sys.modules if each.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert "shardlib[secrets]" in refusal(dsn)
    with pytest.raises(InvalidArgument, match=r"shardlib\[secrets\]"):
        seal("x", {}, keys(KEY)[0])


@pytest.mark.parametrize("password", ["", "a\0b", "x" * 5000])
def test_what_no_server_takes_is_not_encrypted(password: str) -> None:
    with pytest.raises(InvalidArgument, match="NUL"):
        seal(password, {}, keys(KEY)[0])


def test_a_key_shows_its_id_only() -> None:
    (key,) = keys(KEY)
    assert repr(key) == f"SecretKey({key.id})"
    assert len(key.reveal()) == 32
    assert key.id not in KEY


def test_what_may_block_is_known() -> None:
    slow = {text: Dsn("host=h").with_password(text).slow for text in ("exec:A", "file:/a", "enc:x", "env:A", "plain")}
    assert slow == {"exec:A": True, "file:/a": True, "enc:x": True, "env:A": False, "plain": False}
    assert not Dsn("host=h").slow
