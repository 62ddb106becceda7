"""What neither the linter nor the import contracts see: the shape that a reader of the code relies on."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("shardlib", "shardlib_ops")
OWN = ("shardlib", "shardlib_ops", "tests", "docs", "examples", "benchmarks", "scripts", ".ci")

SLEEPS_ALLOWED = {
    "shardlib/waits/threads.py": "the one place of the library that waits",
    "shardlib/waits/greenlets.py": "the same, over an event loop",
    "shardlib/waits/sockets.py": "lets the other tasks of the loop go on",
    "shardlib/fence/gate.py": "gives way between two attempts, by a function that its caller may replace",
    "shardlib/catalog/etcd_channel.py": "a blocking call pauses between its attempts, within its deadline",
    "shardlib/catalog/etcd_fork.py": "a fork waits for threads that tell nobody of their end, within its limit",
    "shardlib/catalog/postgres_door.py": "the same as etcd_channel",
    "shardlib/catalog/stored.py": "the same, and between two looks at a lease that another holds",
    "shardlib/catalog/cache.py": "the first load of a topology is tried again, within its time limit",
    "shardlib/catalog/publish.py": "a change that somebody else has overtaken pauses before it is made anew",
    "shardlib/engine/aio.py": "`run` pauses in the coroutine of its caller, outside of any greenlet",
}
"""Files of the library that may mention a sleep of any kind, each with its reason."""


def modules(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no Python files in {folders}: this test would check nothing"
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name that it calls; names imported under another name are resolved."""
    renamed = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            renamed.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            renamed.update({each.asname: each.name for each in node.names if each.asname})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, _, rest = ast.unparse(node.func).partition(".")
            first = renamed.get(first, first)
            yield f"{first}.{rest}" if rest else first, node


def test_every_package_and_module_says_what_it_is_for() -> None:
    folders = {path.parent for path in modules(*PACKAGES)}
    bare = [name(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()]
    assert not bare, f"folders without __init__.py, which wheels and type checkers overlook: {bare}"
    silent = [name(path) for path in modules(*PACKAGES) if len(ast.get_docstring(parsed(path)) or "") < 20]
    assert not silent, f"modules whose docstring does not say what they are for: {silent}"


def sleeps(tree: ast.AST) -> list[tuple[int, str]]:
    """Each mention of a sleep, called or handed on."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.sleep", "asyncio.sleep"):
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"(threading\.)?Event\(\)\.wait", ast.unparse(node)):
            found.append((node.lineno, "a wait for an event that nobody can set"))
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "asyncio"):
            found += [(node.lineno, f"{node.module}.sleep") for each in node.names if each.name == "sleep"]
    return found


def test_the_library_sleeps_in_one_place_only() -> None:
    found = {name(path): sleeps(parsed(path)) for path in modules("shardlib")}
    wrong = [
        f"{path}:{line} {called}" for path, hits in found.items() if path not in SLEEPS_ALLOWED for line, called in hits
    ]
    assert not wrong, f"wait for a condition, or through shardlib.waits: {wrong}"
    needless = [path for path in SLEEPS_ALLOWED if not found.get(path)]
    assert not needless, f"these need no exception any more: {needless}"


def test_the_library_prints_nothing() -> None:
    found = [
        f"{name(path)}:{node.lineno}"
        for path in modules("shardlib")
        for called, node in calls(parsed(path))
        if called in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not found, f"a library speaks through `logging`: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.sleep(1)",
        "from asyncio import sleep as rest",
        "import time\ndef f(nap=time.sleep): ...",
        "import threading\nthreading.Event().wait(1)",
    ],
)
def test_a_sleep_is_found(source: str) -> None:
    assert sleeps(ast.parse(source))


def skips_without_reason(tree: ast.AST) -> list[int]:
    wanted = {"pytest.skip": "reason", "pytest.mark.skip": "reason", "pytest.mark.skipif": "reason"}
    wanted["pytest.mark.xfail"] = "reason"
    lines = []
    for called, node in calls(tree):
        if called in wanted:
            given = {keyword.arg: keyword.value for keyword in node.keywords}.get(wanted[called])
            if given is None and called == "pytest.skip" and node.args:
                given = node.args[0]
            if given is None or (isinstance(given, ast.Constant) and not str(given.value).strip()):
                lines.append(node.lineno)
    for node in ast.walk(tree):
        decorators = getattr(node, "decorator_list", [])
        lines += [each.lineno for each in decorators if ast.unparse(each) in wanted]
    return lines


def test_no_test_is_skipped_without_a_reason() -> None:
    found = [f"{name(path)}:{line}" for path in modules("tests") for line in skips_without_reason(parsed(path))]
    assert not found, f"say why: {found}"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pytest\npytest.skip()", 1),
        ("from pytest import skip\nskip(reason='')", 1),
        ("import pytest\n@pytest.mark.skip\ndef test(): ...", 1),
        ("import pytest\npytest.skip('no such server here')", 0),
        ("import pytest\n@pytest.mark.skipif(True, reason='why')\ndef test(): ...", 0),
    ],
)
def test_a_skip_without_reason_is_found(source: str, count: int) -> None:
    assert len(skips_without_reason(ast.parse(source))) == count


def test_logger_names_begin_with_the_package() -> None:
    """An application turns the library's log up or down by one name."""
    wrong = []
    for path in modules(*PACKAGES):
        for called, node in calls(parsed(path)):
            given = node.args[0] if node.args else None
            if called == "logging.getLogger" and isinstance(given, ast.Constant | None):
                named = isinstance(given, ast.Constant) and re.match(r"(shardlib|shardlib_ops)(\.|$)", str(given.value))
                if not named:
                    wrong.append(f"{name(path)}:{node.lineno}")
    assert not wrong, f"loggers are named shardlib.… or shardlib_ops.…: {wrong}"


# Each contract of [tool.importlinter] is broken once on purpose: a contract that lets it pass checks nothing.
BREACHES = {
    "shardlib: from the engine down to the errors": ("shardlib/ring/breach.py", "import shardlib.catalog\n"),
    "shardlib_ops: from the commands down to the manager": (
        "shardlib_ops/local/breach.py",
        "import shardlib_ops.testing\n",
    ),
    "the library never imports the operators' package": (
        "shardlib/shard/breach.py",
        "import shardlib_ops.local\n",
    ),
    "deciding is pure: no clock, thread, socket, random source or server": (
        "shardlib/route/breach.py",
        "import time\n",
    ),
    "one door to etcd": ("shardlib/engine/breach.py", "import grpc\n"),
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imports")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint_imports(folder: Path) -> str:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert "Contracts: " in ran.stdout, ran.stdout + ran.stderr
    return ran.stdout


def test_the_import_contracts_hold(copied: Path) -> None:
    report = lint_imports(copied)
    assert report.count(" KEPT") == len(BREACHES), report


@pytest.mark.parametrize("contract", BREACHES)
def test_a_breach_of_an_import_contract_is_noticed(contract: str, copied: Path) -> None:
    path, source = BREACHES[contract]
    breach = copied / path
    breach.write_text(f'"""Breaks a contract on purpose."""\n{source}')
    try:
        assert f"{contract} BROKEN" in lint_imports(copied)
    finally:
        breach.unlink()


def test_a_new_folder_must_take_its_place(copied: Path) -> None:
    folder = copied / "shardlib" / "elsewhere"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""A package that no layer names."""\n')
    try:
        assert "shardlib: from the engine down to the errors BROKEN" in lint_imports(copied)
    finally:
        shutil.rmtree(folder)


LEFT_OVER = re.compile(
    r"^(<{7}|>{7}) "  # a conflict that was not resolved
    r"|[ \t]+$"
    r"|\b(TO(?:)DO|FIX(?:)ME|XX(?:)X)\b"
    r"|/(home|work|Users)/\w+",  # a path of somebody's machine
    re.MULTILINE,
)


def test_text_files_hold_no_leftovers() -> None:
    kinds = {".py", ".md", ".toml", ".rst", ".sql", ".json", ".css", ".svg", ""}
    files = [path for folder in OWN for path in sorted((ROOT / folder).rglob("*"))]
    files += sorted(ROOT.glob("*"))
    wrong = []
    for path in files:
        hidden = {"__pycache__", "_build"} & set(path.parts)
        if path.is_file() and path.suffix in kinds and not hidden and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            wrong += [
                f"{name(path)}:{text.count(chr(10), 0, hit.start()) + 1} {hit[0]!r}" for hit in LEFT_OVER.finditer(text)
            ]
    assert not wrong, "\n".join(wrong)
