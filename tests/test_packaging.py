"""What is installed is what is written: the wheel is built, and looked at from a clean environment.

The other tests import the checkout, and would not notice a file that the wheel lacks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("shardlib", "shardlib_ops")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ran = subprocess.run(
        command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=110, check=False
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Wheel and sdist, made by the build backend that is installed here: nothing is downloaded."""
    target = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--directory", target, cwd=ROOT)
    return Built(next(target.glob("*.whl")), next(target.glob("*.tar.gz")))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a clean environment that has the wheel, and the dependencies of this one behind it."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    run(*pip, built.wheel, cwd=folder)
    # A plain path: .pth files of that folder, such as the one of an editable install, are not read.
    here = Path(run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "dependencies.pth").write_text(f"{here}\n")
    return python


def test_the_wheel_holds_every_file_of_the_packages(built: Built) -> None:
    here = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(built.wheel) as archive:
        there = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert there == here
    assert {"shardlib/py.typed", "shardlib_ops/py.typed"} <= there


def test_the_wheel_says_what_it_is(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        info = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(info["METADATA"]).decode()
        assert "MIT License" in archive.read(info["LICENSE"]).decode()
    assert "\nName: shardlib\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    assert "sh scripts/demo" in metadata, "the README is the page on the package index"
    assert "Requires-Dist: sqlalchemy" in metadata.replace("SQLAlchemy", "sqlalchemy")


def test_the_sdist_can_be_checked_by_those_who_get_it(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "pyproject.toml",
        "shardlib/errors.py",
        "tests/conftest.py",
    ):
        assert wanted in names


def test_the_wheel_imports_in_a_clean_environment(installed: Path, tmp_path: Path) -> None:
    code = """
import json, importlib.resources as resources, shardlib, shardlib_ops
from importlib.metadata import entry_points, version
print(json.dumps({
    "files": [shardlib.__file__, shardlib_ops.__file__],
    "versions": [shardlib.__version__, version("shardlib")],
    "typed": [resources.files(p).joinpath("py.typed").is_file() for p in ("shardlib", "shardlib_ops")],
    "plugins": [e.value for e in entry_points(group="pytest11") if e.name == "shardlib"],
    "names": [hasattr(shardlib, name) for name in shardlib.__all__],
}))
"""
    found = json.loads(run(installed, "-I", "-W", "error", "-c", code, cwd=tmp_path))
    prefix = str(installed.parent.parent)
    assert all(file.startswith(prefix) for file in found["files"]), found["files"]
    assert len(set(found["versions"])) == 1
    assert found["typed"] == [True, True]
    assert found["plugins"] == ["shardlib_ops.testing.plugin"]
    assert all(found["names"])


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    answer = run(installed.with_name("shardlib-ops"), "--help", cwd=tmp_path, NO_COLOR="1", TERM="dumb")
    assert "demo" in answer
    assert "local" in answer


def test_the_pytest_plugin_is_registered(installed: Path, tmp_path: Path) -> None:
    """An application's tests get the fixtures without any import."""
    (tmp_path / "test_empty.py").write_text("def test_nothing() -> None: ...\n")
    answer = run(installed, "-m", "pytest", "--fixtures", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    for fixture in ("sharded_cluster", "sharded_engine", "async_sharded_engine"):
        assert fixture in answer
