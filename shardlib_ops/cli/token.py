"""`shardlib-ops token`: tokens for the HTTP servers, and the list of those that count no more."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from shardlib_ops.settings import Settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Tokens for the HTTP servers.")

Config = Annotated[
    Path | None, typer.Option(envvar="SHARDLIB_CONFIG", help="A TOML file with settings.", show_default=False)
]
MaybeCatalog = Annotated[
    str | None,
    typer.Option(envvar="SHARDLIB_CATALOG", help="URL of the catalog: etcd://... or postgresql://...?catalog=NAME."),
]
TokenId = Annotated[
    str | None, typer.Option("--id", metavar="ID", help="One token: what its `jti` says.", show_default=False)
]
Subject = Annotated[str | None, typer.Option(help="Every token of somebody.", show_default=False)]


@app.command()
def issue(
    role: Annotated[str, typer.Option(help="viewer, operator or admin.")],
    subject: Annotated[str, typer.Option(help="Who will call with it.")],
    ttl: Annotated[int, typer.Option(min=1, help="Seconds until it expires.")] = 3600,
    cluster: Annotated[
        str | None, typer.Option(help="The one cluster that it is for; auth.cluster if left out.", show_default=False)
    ] = None,
    config: Config = None,
    as_json: given.AsJson = False,
) -> None:
    """Print a new token, and nothing else.

    It is signed with SHARDLIB_JWT_SECRET, or with the private key in SHARDLIB_JWT_KEY_FILE.
    """
    from shardlib_ops.auth import issue_token
    from shardlib_ops.settings import load_settings

    now = time.time()
    token = issue_token(load_settings(config).auth, subject=subject, role=role, ttl_s=ttl, now=now, cluster=cluster)
    if as_json:
        render.document({"token": token, "subject": subject, "role": role, "expires_at": int(now) + ttl})
    else:
        print(token)


@app.command()
def deny(
    token_id: TokenId = None,
    subject: Subject = None,
    catalog: MaybeCatalog = None,
    config: Config = None,
    as_json: given.AsJson = False,
) -> None:
    """Deny a token, or everybody's with that subject, on all servers within seconds.

    A subject stays denied, also with new tokens, until `token allow`. It is an entry of the audit log.
    """
    settings = _settings(catalog, config)
    asyncio.run(_change(settings, "token.deny", token_id, subject))
    _told(as_json, token_id, subject, "denied")


@app.command()
def allow(
    token_id: TokenId = None,
    subject: Subject = None,
    catalog: MaybeCatalog = None,
    config: Config = None,
    as_json: given.AsJson = False,
) -> None:
    """Withdraw a denial. It is an entry of the audit log."""
    settings = _settings(catalog, config)
    if not asyncio.run(_change(settings, "token.allow", token_id, subject)):
        _told(as_json, token_id, subject, "was not denied")
        raise typer.Exit(3)
    _told(as_json, token_id, subject, "allowed again")


@app.command()
def denied(catalog: MaybeCatalog = None, config: Config = None, as_json: given.AsJson = False) -> None:
    """Show what is denied."""
    from shardlib.catalog import open_catalog
    from shardlib_ops.auth import denied_entries

    with closing(open_catalog(_settings(catalog, config).catalog)) as opened:
        entries = denied_entries(opened)
    if as_json:
        fields = ("token_id", "subject", "at", "until")
        render.document({"denied": [{name: getattr(entry, name) for name in fields} for entry in entries]})
        return
    rows = [[each.token_id, each.subject, _time(each.at), _time(each.until)] for each in entries]
    render.table(("token", "subject", "since", "until"), rows)


async def _change(settings: Settings, action: str, token_id: str | None, subject: str | None) -> bool:
    """Change the list, with an entry of the audit log before and after."""
    import getpass

    from shardlib.catalog import open_catalog
    from shardlib_ops.audit import Actor, Audit, open_audit
    from shardlib_ops.auth import allow, deny

    now = time.time()
    with closing(open_catalog(settings.catalog)) as opened:
        async with Audit(open_audit(settings.audit.url, opened)) as audit:
            target = f"token {token_id}" if token_id is not None else f"subject {subject}"
            async with audit.attempt(Actor(getpass.getuser(), via="cli"), action, target) as attempt:
                if action == "token.allow":
                    found = await asyncio.to_thread(allow, opened, token_id=token_id, subject=subject)
                    attempt.result("allowed again" if found else "was not denied")
                    return found
                until = now + settings.auth.ttl_max_s + settings.auth.leeway_s
                await asyncio.to_thread(deny, opened, token_id=token_id, subject=subject, now=now, until=until)
    return True


def _settings(catalog: str | None, config: Path | None) -> Settings:
    from shardlib.errors import InvalidArgument
    from shardlib_ops.settings import load_settings

    found = load_settings(config, {"catalog": catalog})
    if not found.catalog:
        raise InvalidArgument("catalog", "", "a URL: --catalog or SHARDLIB_CATALOG")
    given.lasting(found.catalog)
    return found


def _told(as_json: bool, token_id: str | None, subject: str | None, what: str) -> None:
    if as_json:
        said: dict[str, Any] = {"token_id": token_id, "subject": subject, "result": what}
        render.document(said)
    else:
        whom = f"token {token_id}" if token_id is not None else f"subject {subject}"
        render.console().print(f"{whom}: {what}", markup=False)


def _time(at: float | None) -> str:
    return "" if at is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
