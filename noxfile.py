"""Every check of the project by name. `nox -l` lists them; `sh scripts/test` runs the default ones.

The sessions run in the environment that nox itself is installed in (`pip install -e '.[dev]'`), so that
nothing is installed twice. Only `tests-3.11` to `tests-3.13` make environments of their own, for the Pythons
that this machine has.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nox

ROOT = Path(__file__).parent
REPORTS = os.environ.get("SHARDLIB_REPORTS")
EXAMPLE_TIMEOUT_S = 180
TESTS_TIMEOUT_S = 2700
SPEC_SKIPPED = 3

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "none"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "imports", "docs", "examples", "bench", "tests", "faults"]


def python(session: nox.Session, *arguments: str, **env: str) -> None:
    """Run this environment's Python with arguments."""
    session.run(sys.executable, *arguments, env=env, external=True)


def pytest(session: nox.Session, *arguments: str, interpreter: str = sys.executable) -> None:
    """Run pytest, and leave a report for the total at the end when one is asked for."""
    report = [f"--junit-xml={Path(REPORTS) / session.name}.xml"] if REPORTS else []
    # A file that does not even import must not hide what the others say.
    rest = ["--continue-on-collection-errors", *report, *session.posargs]
    command = [interpreter, "-m", "pytest", *arguments, *rest]
    session.log(" ".join(command))
    try:
        # Also a thread that a test leaves behind, and that keeps Python from ending, must not hold up a build server.
        ended = subprocess.run(command, timeout=TESTS_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        session.error(f"pytest has not ended after {TESTS_TIMEOUT_S} s; was its summary printed above?")
    if ended.returncode:
        session.error(f"pytest ended with {ended.returncode}")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely faults, and the format."""
    python(session, "-m", "ruff", "check", ".")
    python(session, "-m", "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over the packages; what a user's code sees, by mypy and pyright."""
    python(session, "-m", "mypy")
    python(session, "-m", "mypy", "-p", "benchmarks")
    python(session, "-m", "mypy", "--no-warn-unused-configs", "tests/typing/api.py")
    python(session, "-m", "pyright", "--pythonpath", sys.executable, "tests/typing/api.py")


@nox.session
def imports(session: nox.Session) -> None:
    """Who may import whom (`[tool.importlinter]` in pyproject.toml)."""
    program = str(Path(sys.executable).with_name("lint-imports"))
    # Its cache goes by each file's time alone, and is wrong about importers of a package that came or went.
    session.run(program, "--no-logo", "--no-cache", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning or a reference to nowhere is an error."""
    target = ROOT / "docs" / "_build"
    shutil.rmtree(target, ignore_errors=True)
    python(session, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html", "docs", str(target / "html"))


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but those that break servers."""
    pytest(session, "-m", "not fault and not soak")


@nox.session
def faults(session: nox.Session) -> None:
    """Tests that kill, stop and cut real servers. SHARDLIB_SOAK_S: seconds of each long run (30)."""
    os.environ.setdefault("SHARDLIB_SOAK_S", "30")
    pytest(session, "-m", "fault or soak")


@nox.session
def sim(session: nox.Session) -> None:
    """The decisions of resharding in a simulated world: random schedules, and each await a crash.

    SHARDLIB_SIM_SCHEDULES: how many (20,000, less than ten minutes on two cores). A failing one is run again by
    `python -m tests.sim --seed N`.
    """
    python(session, "-m", "tests.sim", *session.posargs)


@nox.session
def schedules(session: nox.Session) -> None:
    """Random fault schedules of resharding on real servers. SHARDLIB_SCHEDULES: how many (50, some 15 s each).

    One of them again: `nox -s schedules -- --first 17 --count 1`. Whether faults put in on purpose are found:
    `nox -s schedules -- --plant "no drain"`.
    """
    python(session, "-m", "tests.support.schedules", *session.posargs)


@nox.session(default=False)
def spec(session: nox.Session) -> None:
    """Check the TLA+ models of docs/spec with TLC. It needs Java, and the jar: `TLA2TOOLS_JAR`, or from PyPI."""
    command = [sys.executable, str(ROOT / "docs" / "spec" / "check.py"), *session.posargs]
    ended = subprocess.run(command, timeout=TESTS_TIMEOUT_S, check=False).returncode
    if ended == SPEC_SKIPPED:
        session.skip("there is no Java or no tla2tools.jar, see above")
    if ended:
        session.error("a model did not come out as it says")


@nox.session
def examples(session: nox.Session) -> None:
    """Run each example as a user would; each starts its own cluster and checks its own results."""
    failed = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        if session.posargs and path.name not in session.posargs:
            continue
        session.log(f"python {path.name}")
        try:
            subprocess.run([sys.executable, "-W", "error", str(path)], check=True, timeout=EXAMPLE_TIMEOUT_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            session.warn(str(error))
            failed.append(path.name)
    if failed:
        session.error(f"failed: {', '.join(failed)}")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, and print the table. As one of all checks, at a small size: only to see that it works."""
    small = [] if session.posargs or not REPORTS else ["--small"]
    python(session, "-m", "benchmarks", *small, *session.posargs)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """The demo of the README."""
    python(session, "-m", "shardlib_ops.cli.main", "demo", *session.posargs)


def matrix(version: str) -> Callable[[nox.Session], None]:
    """A session that runs the tests on another Python, with the project installed there as a user would."""

    def run(session: nox.Session) -> None:
        session.install(f"{ROOT}[dev]")
        pytest(session, "-m", "not fault and not soak", interpreter=f"{session.bin}/python")

    run.__doc__ = f"The tests on Python {version}, in an environment of its own; skipped where there is none."
    return run


for _version in ("3.11", "3.12", "3.13"):
    nox.session(
        matrix(_version),
        name=f"tests-{_version}",
        python=_version,
        venv_backend="venv",
        reuse_venv=True,
        default=False,
    )
