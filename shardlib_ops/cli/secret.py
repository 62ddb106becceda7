"""`shardlib-ops secret`: keys, and passwords that are encrypted in the catalog."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from shardlib_ops.cli import given, render

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Passwords of shards that are encrypted in the catalog.")


@app.command("new-key")
def new_key(
    file: Annotated[
        Path | None,
        typer.Option(help="Write it there instead, before the keys that it holds already.", show_default=False),
    ] = None,
    as_json: given.AsJson = False,
) -> None:
    """Make a key and print it; or put it into a file that only its owner can read (mode 0600), and print the ids.

    Give every process that connects to shards the file (SHARDLIB_SECRET_KEY_FILE), or the keys (SHARDLIB_SECRET_KEY).
    """
    from shardlib.secrets.keys import new_key as make
    from shardlib.secrets.keys import parse_keys

    key = make()
    if file is None:
        if as_json:
            render.document({"key": key, "id": parse_keys(key, "key", "***")[0].id})
        else:
            print(key)
        return
    before = file.read_text(encoding="ascii") if file.exists() else ""
    if before:
        parse_keys(before, "file", str(file))  # also so that nothing else is overwritten
    text = f"{key}\n{before}"
    _write(file, text)
    ids = [each.id for each in parse_keys(text, "file", str(file))]
    if as_json:
        render.document({"file": str(file), "ids": ids})
    else:
        later = f"; it also holds {', '.join(ids[1:])}" if ids[1:] else ""
        render.console().print(f"key {ids[0]} is in {file}{later}", markup=False)


@app.command()
def encrypt(
    dsn: Annotated[str, typer.Argument(metavar="DSN", help="Without its password.")],
    as_json: given.AsJson = False,
) -> None:
    """Print a DSN with its password encrypted for it. The password is asked for, or the first line of standard input.

    It is of no use in a DSN with another user, host, port, database or TLS.
    """
    from shardlib.dsn import Dsn
    from shardlib.errors import InvalidArgument
    from shardlib_ops.manager.passwords import encrypted

    bare = Dsn(dsn)
    if bare.secret():
        raise InvalidArgument("dsn", str(bare), "a DSN without its password: others can read the arguments of programs")
    plain = bare.with_password(_asked())
    if not plain.plain_password:
        raise InvalidArgument("password", "***", "the password itself, and no reference to it")
    found = encrypted(plain).reveal()
    if as_json:
        render.document({"dsn": found})
    else:
        print(found)


@app.command()
def rotate(
    catalog: given.CatalogUrl,
    plain: Annotated[bool, typer.Option("--plain", help="Encrypt passwords that are plain as well.")] = False,
    as_json: given.AsJson = False,
) -> None:
    """Encrypt the passwords of all shards under the first key of this process, in one change of the topology.

    Every client needs that key beforehand, beside the old one.
    """
    from shardlib.catalog import open_catalog
    from shardlib_ops.manager.rotating import rotate_passwords

    with closing(open_catalog(given.lasting(catalog))) as opened:
        found = rotate_passwords(opened, plain=plain)
    if as_json:
        render.document(
            {
                "version": found.topology.version,
                "key": found.key_id,
                "changed": found.changed,
                "plain": found.plain,
            }
        )
        return
    render.console().print(
        f"{found.changed} passwords encrypted under key {found.key_id}; topology {found.topology.version}", markup=False
    )
    if found.plain:
        render.console().print(f"{found.plain} DSNs hold a plain password; --plain encrypts them too", markup=False)


def _asked() -> str:
    """The password, which never is an argument.

    Raises:
        InvalidArgument: standard input is empty.
    """
    from shardlib.errors import InvalidArgument

    if sys.stdin.isatty():
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    line = sys.stdin.readline().rstrip("\r\n")
    if not line:
        raise InvalidArgument("password", "", "the first line of standard input")
    return line


def _write(file: Path, text: str) -> None:
    """Replace a file as a whole, with the mode that it had, 0600 if it is new."""
    target = file.resolve()
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o600
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as made:
            os.fchmod(made.fileno(), mode)
            made.write(text)
            made.flush()
            os.fsync(made.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
