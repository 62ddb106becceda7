"""Where a command finds its cluster, a catalog or a manager: the options, said once, and the client behind them."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from shardlib_ops.cli import given

if TYPE_CHECKING:
    from shardlib_ops.client import Client

__all__ = ["Asking", "Way", "reaches"]

T = TypeVar("T")

_PANEL: Final = "Where the cluster is"
_NEITHER: Final = "Missing option '--catalog' (or SHARDLIB_CATALOG), or '--manager' (or SHARDLIB_MANAGER)."
_BOTH: Final = "Give '--catalog' or '--manager', not both."


@dataclass(frozen=True)
class Way:
    """How the cluster is reached. One of `catalog` and `manager` is set."""

    catalog: str | None
    manager: str | None
    audit: str
    token_file: Path | None
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None

    def catalog_for(self, what: str) -> str:
        """The catalog's URL, for what no manager does.

        Raises:
            UnsupportedOperation: a manager was named.
            InvalidArgument: a catalog that is lost with this command.
        """
        from shardlib.errors import UnsupportedOperation

        if self.catalog is None:
            raise UnsupportedOperation(f"a manager does not do this: {what}", "it needs --catalog")
        return given.lasting(self.catalog)

    def opened(self) -> Client:
        """A client, which its caller closes.

        Raises:
            InvalidArgument: a URL or file that cannot be used.
        """
        if self.catalog is not None:
            from shardlib_ops.client.direct import DirectClient

            return DirectClient(given.lasting(self.catalog), audit=self.audit)
        from shardlib_ops.client.http import HttpClient
        from shardlib_ops.client.link import Reach

        reach = Reach(
            self.manager or "",
            token=os.environ.get("SHARDLIB_TOKEN"),
            token_file=self.token_file,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
        )
        return HttpClient(reach)

    @contextmanager
    def asking(self) -> Iterator[Asking]:
        """A client for a command that waits for each answer."""
        with asyncio.Runner() as runner:
            asking = Asking(self.opened(), runner)
            try:
                yield asking
            finally:
                asking(asking.client.close())


class Asking:
    """A client, and a way to wait for its coroutines: `asking(asking.client.shards())`."""

    def __init__(self, client: Client, runner: asyncio.Runner) -> None:
        self.client, self._runner = client, runner

    def __call__(self, call: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns."""
        return self._runner.run(call)


def _way(
    *,
    catalog: Annotated[
        str | None,
        typer.Option(
            envvar="SHARDLIB_CATALOG",
            help=f"URL of the catalog: etcd://... or postgresql://...?catalog=NAME. {given.REFERENCE}",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    manager: Annotated[
        str | None,
        typer.Option(
            envvar="SHARDLIB_MANAGER",
            help="URL of a manager instead: https://host:8081. It takes the token in SHARDLIB_TOKEN.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="SHARDLIB_TOKEN_FILE",
            help="A file with the token for the manager, instead of SHARDLIB_TOKEN.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            envvar="SHARDLIB_CA_FILE",
            help="PEM of the authorities that the manager's certificate is believed by.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    cert_file: Annotated[
        Path | None,
        typer.Option(
            envvar="SHARDLIB_CERT_FILE",
            help="PEM of this client's certificate (mutual TLS).",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="SHARDLIB_KEY_FILE",
            help="PEM of its key, if that is in a file of its own.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    audit: Annotated[
        str | None,
        typer.Option(
            envvar="SHARDLIB_AUDIT",
            help="With --catalog: the log of changes, catalog: (if left out), postgresql://...?log=NAME or "
            f"file:/path. {given.REFERENCE} A manager has its own.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="SHARDLIB_CONFIG",
            help="A TOML file with settings: of `catalog` and `audit` what is not given otherwise.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
) -> Way:
    catalog, manager = _one_of(catalog, manager)
    if config is not None and manager is None and (catalog is None or audit is None):
        from shardlib_ops.settings import load_settings

        settings = load_settings(config, {"catalog": catalog, "audit": {"url": audit}})
        catalog, audit = settings.catalog or None, settings.audit.url
    if catalog is None and manager is None:
        raise typer.BadParameter(_NEITHER)
    return Way(catalog, manager, audit or "catalog:", token_file, ca_file, cert_file, key_file)


def _one_of(catalog: str | None, manager: str | None) -> tuple[str | None, str | None]:
    """What was typed goes before what stands in the environment."""
    if catalog is None or manager is None:
        return catalog, manager
    standing = [
        catalog == os.environ.get("SHARDLIB_CATALOG"),
        manager == os.environ.get("SHARDLIB_MANAGER"),
    ]
    if standing[0] == standing[1]:
        raise typer.BadParameter(_BOTH)
    return (None, manager) if standing[0] else (catalog, None)


def reaches(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose argument `way` comes from the options that say where the cluster is."""
    own = {name: one for name, one in inspect.signature(command, eval_str=True).parameters.items() if name != "way"}
    common = inspect.signature(_way, eval_str=True).parameters

    @wraps(command)
    def run(**taken: Any) -> None:
        way = _way(**{name: taken.pop(name) for name in common})
        command(way=way, **taken)

    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own.values(), *common.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by typer
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
