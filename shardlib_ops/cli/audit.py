"""`shardlib-ops audit`: the log of what was asked of the control plane, read, verified and archived."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shardlib_ops.audit import AuditStore, Damaged, Entry, Report

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The log of what was asked of the control plane.")

_LOOK_S: Final = 1.0

Log = Annotated[
    str,
    typer.Option(
        "--audit", envvar="SHARDLIB_AUDIT", help="The log: catalog:, postgresql://...?log=NAME, or file:/path."
    ),
]
MaybeCatalog = Annotated[
    str | None,
    typer.Option(envvar="SHARDLIB_CATALOG", help="URL of the catalog; needed for the log `catalog:`."),
]
Heads = Annotated[
    list[str] | None,
    typer.Option(
        "--head",
        metavar="FILE|TEXT",
        help="Signed heads: a file that has some, such as a manager's log, or one itself.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(envvar="SHARDLIB_AUDIT_KEY_FILE", help="File with the key that signs heads, in its first line."),
]


@app.callback()
def _group() -> None:
    """The log of what was asked of the control plane."""


@app.command("list")
def list_(
    audit: Log = "catalog:",
    catalog: MaybeCatalog = None,
    last: Annotated[int, typer.Option(min=1, help="The newest entries, at most so many.")] = 50,
    subject: Annotated[str | None, typer.Option(help="Of this subject only.")] = None,
    action: Annotated[str | None, typer.Option(help="Of this action, or those that begin so.")] = None,
    target: Annotated[str | None, typer.Option(help="On this target only.")] = None,
    kind: Annotated[str | None, typer.Option(help="intent, outcome or refused.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Refused, or with an error.")] = False,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Not older, such as 2026-11-24T08:00Z.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Older than this.")] = None,
    request: Annotated[str | None, typer.Option(help="Of this request id only.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until interrupted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print lines of JSON, one for each entry.")] = False,
) -> None:
    """Show entries, oldest first.

    With a filter the whole log is read, and the newest entries that fit are shown. An entry that cannot be read is
    always shown.
    """
    from shardlib.errors import InvalidArgument
    from shardlib_ops.audit import Entry, walk

    if kind not in (None, "intent", "outcome", "refused"):
        raise InvalidArgument("kind", kind, "intent, outcome or refused")
    wanted = {"subject": subject, "target": target, "kind": kind, "request_id": request}
    earliest, latest = _time("since", since), _time("until", until)

    def fits(item: Entry | Damaged) -> bool:
        return not isinstance(item, Entry) or (
            all(value is None or getattr(item, name) == value for name, value in wanted.items())
            and (action is None or item.action == action or item.action.startswith(f"{action.rstrip('.')}."))
            and (earliest is None or item.at >= earliest)
            and (latest is None or item.at < latest)
            and not (failed and item.result in ("", "ok"))
        )

    with _opened(audit, catalog) as store:
        filtered = failed or any(value is not None for value in (*wanted.values(), action, earliest, latest))
        show = _lines_of_json if as_json else _table
        if not filtered and not follow:
            show(store.last(last).items)
            return
        if not follow:
            show(deque(filter(fits, walk(store)), maxlen=last))
            return
        page = store.last(last)
        show(filter(fits, page.items))
        try:
            _follow(store, page.after, lambda items: show(filter(fits, items)))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


@app.command()
def verify(
    audit: Log = "catalog:",
    catalog: MaybeCatalog = None,
    head: Heads = None,
    key_file: KeyFile = None,
    as_json: given.AsJson = False,
) -> None:
    """Look for entries that were removed, changed, swapped, duplicated or forked, and for a tail that was cut.

    The exit code is 1 if something is found. A cut tail, or a log that was written anew as a whole, is found by heads
    that were published elsewhere.
    """
    from shardlib_ops.audit import check, read_key, walk

    key = None if key_file is None else read_key(key_file)
    with _opened(audit, catalog) as store:
        report = check(walk(store), _heads(head or []), key)
        _show_report(report, store.safe_url, as_json=as_json, by_heads=bool(head))
    if report.findings:
        raise typer.Exit(1)


@app.command()
def archive(
    to: Annotated[Path, typer.Option(help="A new file for the entries.")],
    before: Annotated[str, typer.Option(metavar="TIME", help="Entries older than this, such as 2026-01-01T00:00Z.")],
    audit: Log = "catalog:",
    catalog: MaybeCatalog = None,
    head: Heads = None,
    key_file: KeyFile = None,
    yes: given.Yes = False,
    as_json: given.AsJson = False,
) -> None:
    """Move old entries to a file, and let an entry say so. The log must verify.

    The file is a log of its own: `audit list --audit file:/path`. Of several, `cat` makes one.
    """
    import asyncio
    import getpass

    from shardlib_ops.audit import Actor, Audit, read_key
    from shardlib_ops.audit import archive as move

    key = None if key_file is None else read_key(key_file)
    earliest = _time("before", before) or ""
    with _opened(audit, catalog) as store:
        given.agreed(f"Move the entries before {earliest} from {store.safe_url} to {to}?", yes=yes)

        async def run() -> Any:
            async with Audit(store) as log:
                actor = Actor(getpass.getuser(), via="cli")
                return await move(log, actor, earliest, to.absolute(), key=key, heads=_heads(head or []))

        done = asyncio.run(run())
    if as_json:
        found = {} if done is None else {"through": done.through.seq, "hash": done.through.hash, "sha256": done.sha256}
        render.document({"entries": 0 if done is None else done.entries, **found})
    elif done is None:
        render.console().print("no entry is as old; nothing was done", markup=False)
    else:
        render.facts(
            {"archived": f"{done.entries} entries, up to {done.through.seq}", "file": to, "sha256": done.sha256}
        )


@contextmanager
def _opened(audit: str, catalog: str | None) -> Iterator[AuditStore]:
    from contextlib import closing

    from shardlib.catalog import open_catalog
    from shardlib.errors import InvalidArgument
    from shardlib_ops.audit import open_audit

    with ExitStack() as stack:
        beside = None
        if audit == "catalog:":
            if catalog is None:
                raise InvalidArgument("catalog", None, "the URL of the catalog: --catalog, or SHARDLIB_CATALOG")
            beside = stack.enter_context(closing(open_catalog(given.lasting(catalog))))
        yield stack.enter_context(closing(open_audit(audit, beside)))


def _time(option: str, text: str | None) -> str | None:
    """A moment as entries have it.

    Raises:
        InvalidArgument: it is none.
    """
    from datetime import UTC, datetime

    from shardlib.errors import InvalidArgument

    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(option, text, "a time such as 2026-11-24 or 2026-11-24T08:00Z") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _heads(given_heads: list[str]) -> list[str]:
    """The texts with heads: what is given, or the file of that name.

    Raises:
        InvalidArgument: there is no signed head in one of them.
    """
    from shardlib.errors import InvalidArgument
    from shardlib_ops.audit import find_heads

    texts = []
    for one in given_heads:
        text = one
        if not any(find_heads(one)):
            try:
                text = Path(one).read_text(encoding="utf-8", errors="replace")
            except (OSError, ValueError):
                text = ""
        if not any(find_heads(text)):
            raise InvalidArgument("head", one, "a signed head, or a file in which there are some")
        texts.append(text)
    return texts


def _follow(store: AuditStore, after: int, show: Callable[[Iterable[Entry | Damaged]], None]) -> None:
    while True:
        page = store.read(after)
        after = page.after
        if page.items:
            show(page.items)
        if not page.more:
            time.sleep(_LOOK_S)


def _content(item: Entry | Damaged) -> dict[str, Any]:
    from msgspec import to_builtins

    from shardlib_ops.audit import Entry

    if isinstance(item, Entry):
        content: dict[str, Any] = to_builtins(item)
        return content
    return {"damaged": item.reason, "place": item.place}


def _lines_of_json(items: Iterable[Entry | Damaged]) -> None:
    for item in items:
        print(json.dumps(_content(item)), flush=True)


def _table(items: Iterable[Entry | Damaged]) -> None:
    from shardlib_ops.audit import Entry

    rows: list[list[object]] = []
    for item in items:
        if not isinstance(item, Entry):
            rows.append(["?", "", "", "", "", "", f"cannot be read: {item.reason}"])
            continue
        who = " ".join(filter(None, (item.subject, item.role and f"({item.role})", item.address)))
        said = " ".join(f"{name}={value}" for name, value in item.details.items())
        of = f" of {item.of}" if item.of is not None else ""
        what = " ".join(filter(None, (item.result, said)))
        rows.append([item.seq, item.at, f"{item.kind}{of}", who, item.action, item.target, what])
    if rows:
        render.table(("entry", "at", "kind", "who", "action", "target", "result"), rows)


def _show_report(report: Report, url: str, *, as_json: bool, by_heads: bool) -> None:
    if as_json:
        render.document(
            {
                "audit": url,
                "entries": report.entries,
                "archived_through": report.first.seq,
                "last": {"seq": report.last.seq, "hash": report.last.hash},
                "findings": [one._asdict() for one in report.findings],
            }
        )
        return
    for one in report.findings:
        render.console().print(f"{one.kind}: {one.text}", markup=False)
    archived = f", those up to {report.first.seq} archived" if report.first.seq else ""
    sound = f"{len(report.findings)} findings" if report.findings else "nothing wrong"
    if not report.entries and not report.findings:
        sound = "an empty log; is it the right one?"
    render.console().print(
        f"{url}: {report.entries} entries{archived}, the last is {report.last.seq}: {sound}", markup=False
    )
    if not by_heads:
        render.console().print("without --head a tail that was cut would not be noticed", markup=False)
