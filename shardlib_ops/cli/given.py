"""What several commands take: the catalog, targets, shards and jobs, said in one way and checked in one place."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shardlib_ops.cli import completing

if TYPE_CHECKING:
    from shardlib_ops.manager.manager import Target

__all__ = [
    "REFERENCE", "AsJson", "CatalogUrl", "JobNumber", "ShardName", "Yes", "agreed", "lasting", "named", "shard",
    "targets",
]  # fmt: skip

REFERENCE: Final = "A password in it can be a reference, env:NAME or file:/path."
"""What the help says of everything that can hold one, since other users of the machine see what is typed."""

CatalogUrl = Annotated[
    str,
    typer.Option(
        envvar="SHARDLIB_CATALOG",
        help=f"URL of the catalog: etcd://... or postgresql://...?catalog=NAME. {REFERENCE}",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
ShardName = Annotated[
    str, typer.Argument(metavar="SHARD", help="Name or id of a shard.", autocompletion=completing.shards)
]
JobNumber = Annotated[
    int, typer.Argument(metavar="JOB", min=1, help="Number of a job.", autocompletion=completing.jobs)
]

# What may be shown of `NAME=DSN`: without a name, what stands before the first `=` can hold a password.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}")


def lasting(catalog: str) -> str:
    """The URL, if it is of a catalog that outlives this command.

    Raises:
        InvalidArgument: it is one in memory.
    """
    from shardlib.errors import InvalidArgument

    if catalog.startswith("memory:"):
        raise InvalidArgument("catalog", catalog, "a catalog that outlives this command: etcd:// or postgresql://")
    return catalog


def named(option: str, text: str) -> tuple[str, str]:
    """Name and DSN of `NAME=DSN`.

    Raises:
        InvalidArgument: it is something else; the message does not hold it.
    """
    from shardlib.errors import InvalidArgument

    name, equals, dsn = text.partition("=")
    if not _NAME.fullmatch(name) or not equals or not dsn:
        raise InvalidArgument(option, "***", "NAME=DSN, such as shard-01=postgresql://app@db1/shop")
    return name, dsn


def shard(text: str, what: str = "shard") -> str:
    """A shard's name or id.

    Raises:
        InvalidArgument: it cannot be one, and may be a DSN; the message does not hold it.
    """
    from shardlib.errors import InvalidArgument

    if not _NAME.fullmatch(text):
        raise InvalidArgument(what, "***", "the name or id of a shard")
    return text


def targets(texts: list[str]) -> list[Target]:
    """Each `--target` as the manager takes it: a shard there is, or one to be made.

    Raises:
        InvalidArgument: neither; the message does not hold a DSN.
    """
    found: list[Target] = []
    for text in texts:
        if "=" in text:
            name, dsn = named("target", text)
            found.append({"name": name, "primary_endpoint": dsn})
        else:
            found.append({"shard_id": shard(text, "target")})
    return found


def agreed(question: str, *, yes: bool) -> None:
    """Go on only if the operator agrees; asked on standard error, so that `--json` stays one document.

    Raises:
        typer.Abort: the operator does not, or nobody is there to be asked. The exit code is 1.
    """
    if not yes:
        typer.confirm(question, abort=True, err=True)
