"""`shardlib-ops doctor`: what is wrong with a cluster, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from shardlib_ops.doctor import Report

__all__ = ["doctor"]


def doctor(
    catalog: given.CatalogUrl,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that one check of one shard may take.")] = 30.0,
    sample: Annotated[int, typer.Option(min=1, help="Rows of each table and shard whose place is looked at.")] = 1_000,
    as_json: given.AsJson = False,
) -> None:
    """Look at everything, and change nothing. The exit code is 1 if there is something to do."""
    from shardlib_ops.doctor import Doctor, Limits

    report = Doctor.look(given.lasting(catalog), limits=Limits(check_s=timeout, sample_rows=sample))
    if as_json:
        render.document({"fine": report.fine, **asdict(report)})
    else:
        _show(report)
    if not report.fine:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    out = render.console()
    for finding in report.findings:
        out.print(f"{finding.severity.value}: {finding.where}: {finding.what}", markup=False)
        out.print(f"    {finding.todo}\n", markup=False)
    version = "unknown" if report.version is None else report.version
    said = f"{len(report.findings)} findings" if report.findings else "nothing to do"
    out.print(
        f"{said}: {len(report.checks)} checks, {report.shards} shards, topology {version}, {report.elapsed_s:.1f} s",
        markup=False,
    )
