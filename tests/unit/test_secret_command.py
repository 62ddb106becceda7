"""`exec:NAME`: the environment says which program, and nothing of what goes wrong tells what it printed."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardlib.dsn import Dsn, resolve_secret
from shardlib.errors import InvalidArgument
from shardlib.secrets import command
from shardlib.secrets.command import CommandFailed, forget

CANARY = "c4nary-9d1e"
pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def fresh() -> Iterator[None]:
    command._kept.clear()
    yield
    command._kept.clear()


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("shardlib")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


def allow(monkeypatch: pytest.MonkeyPatch, code: str, name: str = "VAULT") -> None:
    monkeypatch.setenv(f"SHARDLIB_SECRET_COMMAND_{name}", f"{sys.executable} -c {shlex.quote(code)}")


def refusal(reference: str = "exec:VAULT") -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        Dsn(f"host=h password={reference}").conninfo()
    error: BaseException | None = caught.value
    while error is not None:
        assert CANARY not in "".join(traceback.format_exception(error))
        assert CANARY not in repr(vars(error)) + repr(error.args)
        error = error.__cause__ or error.__context__
    assert CANARY not in repr(command._kept)
    return caught.value


def test_the_first_line_is_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, f"print('{CANARY}-ü'); print('more')")
    assert f"password={CANARY}-ü" in Dsn("host=h password=exec:VAULT").conninfo()
    assert resolve_secret("exec:VAULT") == f"{CANARY}-ü", "also for the URL of a catalog"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("NONE", None, "allows no such program"),
        ("NONE", "  ", "allows no such program"),
        ("REL", "vault read", "absolute path"),
        ("QUOTE", "/bin/echo 'x", "absolute path"),
        ("A__B", "/bin/echo x", "single underscores"),
        ("../x", None, "single underscores"),
        ("/bin/echo x", None, "single underscores"),
        ("", None, "single underscores"),
    ],
)
def test_only_the_environment_says_what_runs(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, why: str
) -> None:
    if value is not None:
        monkeypatch.setenv(f"SHARDLIB_SECRET_COMMAND_{name}", value)
    with pytest.raises(InvalidArgument, match=why):
        resolve_secret(f"exec:{name}")


def test_no_shell_reads_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDLIB_SECRET_COMMAND_VAULT", f"/bin/echo a; touch {tmp_path}/made $HOME")
    assert resolve_secret("exec:VAULT") == f"a; touch {tmp_path}/made $HOME"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (f"import sys; print('{CANARY}'); print('{CANARY}', file=sys.stderr); sys.exit(3)", "ended with 3"),
        (f"print('{CANARY}' * 2000)", "more than 8192 bytes"),
        (f"import sys; sys.stdout.buffer.write(b'{CANARY}\\xff')", "no UTF-8 text"),
        (f"print('{CANARY}\\0x')", "no UTF-8 text"),
        (f"print(); print('{CANARY}')", "no first line"),
        ("pass", "no first line"),
    ],
)
def test_a_failure_is_told_without_what_was_printed(
    monkeypatch: pytest.MonkeyPatch, logged: io.StringIO, capfd: pytest.CaptureFixture[str], code: str, why: str
) -> None:
    allow(monkeypatch, code)
    error = refusal()
    assert isinstance(error, CommandFailed)
    assert why in str(error)
    assert why in logged.getvalue()
    assert CANARY not in logged.getvalue()
    assert CANARY not in "".join(capfd.readouterr())


def test_a_program_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDLIB_SECRET_COMMAND_VAULT", str(tmp_path / "none"))
    assert "cannot be started (No such file" in str(refusal())


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_program_that_hangs_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time, pathlib\n"
        f"ran = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(ran.pid)); print('{CANARY}', flush=True); time.sleep(600)"
    )
    allow(monkeypatch, code)
    monkeypatch.setenv("SHARDLIB_SECRET_TIMEOUT_S", "5")
    began = time.monotonic()
    assert "not ended within 5 s" in str(refusal())
    assert time.monotonic() - began < 30
    pid, until = int(child.read_text()), time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < until, "the child of the program lives on"
        threading.Event().wait(0.05)


def counting(folder: Path, then: str) -> str:
    return f"import os, pathlib; (pathlib.Path({str(folder)!r}) / str(os.getpid())).touch(); {then}"


def test_the_answer_is_kept_for_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allow(monkeypatch, counting(tmp_path, f"print('{CANARY}')"))
    for _ in range(3):
        assert resolve_secret("exec:VAULT") == CANARY
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setenv("SHARDLIB_SECRET_CACHE_S", "0")
    assert resolve_secret("exec:VAULT") == CANARY
    assert len(list(tmp_path.iterdir())) == 2


def test_another_command_under_the_name_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIB_SECRET_COMMAND_VAULT", "/bin/echo one")
    assert resolve_secret("exec:VAULT") == "one"
    monkeypatch.setenv("SHARDLIB_SECRET_COMMAND_VAULT", "/bin/echo two")
    assert resolve_secret("exec:VAULT") == "two"


def test_what_a_server_refused_is_asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allow(monkeypatch, counting(tmp_path, f"print('{CANARY}')"))
    dsn = Dsn("host=h password=exec:VAULT")
    dsn.conninfo()
    dsn.refused()
    dsn.conninfo()
    assert len(list(tmp_path.iterdir())) == 1, "it was printed just now: another run would say the same"
    command._kept["VAULT"].since -= 2
    dsn.refused()
    dsn.conninfo()
    assert len(list(tmp_path.iterdir())) == 2
    forget("NEVER")


@pytest.mark.parametrize("then", [f"import time; time.sleep(1); print('{CANARY}')", "import time; time.sleep(1); 1/0"])
def test_one_run_serves_all_that_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, then: str) -> None:
    allow(monkeypatch, counting(tmp_path, then))
    monkeypatch.setenv("SHARDLIB_SECRET_CACHE_S", "0")
    found: list[str] = []

    def ask() -> None:
        try:
            found.append(resolve_secret("exec:VAULT"))
        except CommandFailed:
            found.append("failed")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8
    assert len(set(found)) == 1
    # A thread that begins only after the first run has ended has another one.
    assert len(list(tmp_path.iterdir())) <= 2


@pytest.mark.parametrize(("variable", "value"), [("TIMEOUT_S", "0"), ("TIMEOUT_S", "soon"), ("CACHE_S", "-1")])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("SHARDLIB_SECRET_COMMAND_VAULT", "/bin/echo one")
    monkeypatch.setenv(f"SHARDLIB_SECRET_{variable}", value)
    with pytest.raises(InvalidArgument, match=f"SHARDLIB_SECRET_{variable}"):
        resolve_secret("exec:VAULT")


def test_a_program_does_not_get_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIB_SECRET_KEY", CANARY)
    allow(monkeypatch, "import os; print(os.environ.get('SHARDLIB_SECRET_KEY', 'none'))")
    assert resolve_secret("exec:VAULT") == "none"


def test_a_forked_child_asks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIB_SECRET_COMMAND_VAULT", "/bin/echo one")
    assert resolve_secret("exec:VAULT") == "one"
    kept = command._kept["VAULT"]
    with kept.lock:  # as if another thread were waiting for the program
        pid = os.fork()
        if pid == 0:
            os._exit(0 if resolve_secret("exec:VAULT") == "one" else 1)
        until = time.monotonic() + 30
        done = (0, 0)
        while done[0] == 0:
            if time.monotonic() > until:
                os.kill(pid, 9)
            done = os.waitpid(pid, os.WNOHANG)
            threading.Event().wait(0.02)
    assert os.waitstatus_to_exitcode(done[1]) == 0
