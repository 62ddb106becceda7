"""What the documentation shows has run: its code, its links, its lists."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardlib import AsyncShardedEngine, ShardedEngine, errors
from shardlib.engine.options import EngineOptions
from shardlib.route.consistency import Consistency
from shardlib.route.retry import RetryPolicy
from shardlib.shard.options import PoolOptions
from shardlib.telemetry import TelemetryOptions
from shardlib_ops import LocalCluster
from shardlib_ops.testing.cleaning import cleaned

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]

# Blocks that begin with ```python are run; ```{code-block} python is only shown.
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
URL = "etcd://127.0.0.1:2379/shop"
SHARDS = 3


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUN = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=SHARDS) as cluster:
        yield cluster


def test_the_pages_with_code_are_found() -> None:
    assert {"README.md", "docs/tutorial.md", "docs/how-to/transactions.md"} <= set(map(name, RUN))


@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_code_of_a_page_runs(page: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    """From top to bottom, in one module; a block that begins with a file's name is that file."""
    text = page.read_text(encoding="utf-8").replace(URL, cluster.url)
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    module.__file__ = str(page)
    sys.modules[module.__name__] = module
    try:
        with cleaned(cluster.url):
            for block in BLOCK.finditer(text):
                code = block[1]
                if file := FILE.match(code):
                    (tmp_path / file[1]).write_text(code)
                    continue
                # Line numbers are those of the page, so a failure leads there.
                before = text.count("\n", 0, block.start(1))
                tree = ast.increment_lineno(ast.parse(code, str(page)), before)
                exec(compile(tree, str(page), "exec"), vars(module))
            dispose(module)
            if files := sorted(tmp_path.glob("*.py")):
                run_as_tests(files, cluster.url)
    finally:
        dispose(module)
        del sys.modules[module.__name__]


def dispose(module: types.ModuleType) -> None:
    for value in vars(module).values():
        if isinstance(value, ShardedEngine):
            value.dispose()
        assert not isinstance(value, AsyncShardedEngine), "a page closes its asyncio engines itself"


def run_as_tests(files: list[Path], url: str) -> None:
    """As a reader would: pytest in a folder of its own, with the plugin that comes with the distribution."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--shardlib-url={url}"]
    ran = subprocess.run(
        [*command, *files], cwd=files[0].parent, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def headings(page: Path) -> set[str]:
    """Anchors as myst-parser and code hosts make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in headings(there)):
            broken.append(target)
    assert not broken


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = set()
    for page in PAGES:
        for tree in re.findall(
            r"^```\{toctree\}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    assert listed == {page for page in PAGES if DOCS in page.parents} - {DOCS / "index.md"}


@pytest.mark.parametrize("error", errors.__all__)
def test_each_error_has_its_place_on_the_errors_page(error: str) -> None:
    text = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {error}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"docs/reference/errors.md has no heading '### {error}'"
    assert f"shardlib.errors.{error}\n" in section[1]
    cls = getattr(errors, error)
    if cls not in (errors.ShardlibError, errors.RetryableError):
        for attribute in inspect.signature(cls).parameters:
            assert f"`{attribute}`" in section[1], f"its attribute {attribute!r} is not named"


def listed_options(heading: str) -> dict[str, str]:
    text = (DOCS / "reference" / "options.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section[1], re.MULTILINE))


def defaults_of(options: Any) -> dict[str, str]:
    found = {}
    for field in dataclasses.fields(options):
        value = field.default
        shown = f'"{value.value}"' if isinstance(value, Consistency) else repr(value)
        if isinstance(value, str) and not isinstance(value, Consistency):
            shown = f'"{value}"'
        whole = isinstance(value, RetryPolicy | TelemetryOptions)  # described in a section of its own
        found[field.name] = f"{type(value).__name__}()" if whole else shown
    return found


@pytest.mark.parametrize(
    ("heading", "options", "extra"),
    [
        ("The engine", EngineOptions, {}),
        ("Connections", PoolOptions, {}),
        ("Retries", RetryPolicy, {}),
        ("Telemetry", TelemetryOptions, {}),
    ],
)
def test_the_options_and_their_defaults_are_listed(heading: str, options: Any, extra: dict[str, str]) -> None:
    assert listed_options(heading) == {**defaults_of(options), **extra}


def test_the_engine_takes_the_options_that_are_listed() -> None:
    named = {
        parameter.name: parameter.default
        for parameter in inspect.signature(ShardedEngine).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    own = {field.name: field.default for field in dataclasses.fields(EngineOptions)}
    # Both classes have defaults of their own, which stand for None in the signature.
    assert named == {**own, "retry": None, "telemetry": None}
    assert set(named) == set(listed_options("The engine"))
    shown = str(inspect.getdoc(ShardedEngine))
    assert not [name for name in named if f"\n    {name}: " not in shown]


@pytest.mark.parametrize("method", ["bulk_load", "create_all", "drop_all", "settle", "refresh", "register"])
def test_both_engines_take_the_same_with_the_same_defaults(method: str) -> None:
    def keywords(engine: type) -> dict[str, object]:
        taken = inspect.signature(getattr(engine, method)).parameters.values()
        return {one.name: one.default for one in taken if one.kind is one.KEYWORD_ONLY}

    assert keywords(ShardedEngine) == keywords(AsyncShardedEngine)


@pytest.mark.parametrize("script", ["demo", "test"])
def test_the_two_commands_of_the_readme_exist(script: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```sh\nsh scripts/{script}\n```" in text
    path = ROOT / "scripts" / script
    assert path.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    assert os.access(path, os.X_OK)
    subprocess.run(["sh", "-n", str(path)], check=True, timeout=10)


def test_the_changelog_has_the_usual_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    for title in titles[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", title), title
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_version_and_the_supported_pythons_are_told_alike() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = [each.rpartition(" ")[2] for each in project["classifiers"] if "Python :: 3." in each]
    assert project["requires-python"] == f">={pythons[0]}"
    limits = (DOCS / "why" / "limits.md").read_text(encoding="utf-8")
    assert f"Python {pythons[0]} to {pythons[-1]}" in limits
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert all(f'"{version}"' in noxfile for version in pythons)
