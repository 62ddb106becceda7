"""The TLA+ models of docs/spec: what their check would not notice by itself."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

SPEC = Path(__file__).parents[2] / "docs" / "spec"
CONFIGS = sorted(SPEC.glob("*.cfg"))


@pytest.fixture(scope="module")
def check() -> ModuleType:
    found = importlib.util.spec_from_file_location("spec_check", SPEC / "check.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look there
    found.loader.exec_module(module)
    return module


def test_a_configuration_that_must_fail_names_a_fault_and_an_invariant_that_it_checks() -> None:
    module = (SPEC / "Reshard.tla").read_text()
    faults = set(re.findall(r'Fault\("([^"]+)"\)', module))
    used = set()
    for config in CONFIGS:
        text = config.read_text()
        (expected,) = re.findall(r"^\\\* expect: (\w+)$", text, re.MULTILINE)
        (named,) = re.findall(r"Faults = \{(.*)\}", text)
        names = set(re.findall(r'"([^"]+)"', named))
        if config.stem.startswith("ok_"):
            assert (expected, names) == ("holds", set()), config.name
        else:
            assert len(names) == 1, config.name
            assert expected in re.findall(r"^INVARIANTS (.*)$", text, re.MULTILINE)[0].split(), config.name
        used |= names
    assert used == faults


def test_the_page_lists_each_configuration_with_what_it_breaks() -> None:
    page = (SPEC / "index.md").read_text()
    listed = dict(re.findall(r"^\| `(bad_\w+)` \|.*\| `(\w+)` \|$", page, re.MULTILINE))
    listed |= dict.fromkeys(re.findall(r"^\| `(ok_\w+)` \|", page, re.MULTILINE), "holds")
    assert listed == {
        config.stem: re.findall(r"^\\\* expect: (\w+)$", config.read_text(), re.MULTILINE)[0] for config in CONFIGS
    }


def test_each_action_of_the_page_is_in_the_module() -> None:
    page, module = (SPEC / "index.md").read_text(), (SPEC / "Reshard.tla").read_text()
    table = page.partition("| action | code |")[2].partition("\n\n")[0]
    actions = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")}
    assert len(actions) > 20
    for action in actions:
        assert re.search(rf"^{action}(\(\w+(, \w+)*\))? ==", module, re.MULTILINE), action


def test_without_the_jar_nothing_is_checked_and_the_reason_is_told(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "find_java", lambda: "java")
    monkeypatch.setenv("TLA2TOOLS_JAR", str(tmp_path / "none.jar"))
    assert check.main([]) == check.SKIPPED
    assert "none.jar" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tlc(check: ModuleType) -> tuple[str, Path]:
    """Java and the jar, where both are there already: a test fetches nothing."""
    cached = Path.home() / ".cache" / "shardlib" / f"tla2tools-{check.SHA256[:12]}.jar"
    java = shutil.which("java")
    if java is None or not cached.is_file():
        pytest.skip("needs java, and the jar that `nox -s spec` fetches")
    return java, cached


def test_a_fault_is_found_and_another_expectation_is_not_taken_for_right(
    check: ModuleType, tlc: tuple[str, Path], tmp_path: Path
) -> None:
    config = SPEC / "bad_no_drain.cfg"
    assert check.check(config, *tlc).right
    other = tmp_path / "other.cfg"
    other.write_text(config.read_text().replace("expect: NothingLost", "expect: OneOwner"))
    done = check.check(other, *tlc)
    assert (done.found, done.right) == ("NothingLost", False)


def test_a_configuration_that_tlc_cannot_use_is_an_error(
    check: ModuleType, tlc: tuple[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.cfg"
    broken.write_text("\\* expect: holds\nSPECIFICATION Nowhere\n")
    with pytest.raises(RuntimeError, match="MaxTries is not assigned"):
        check.check(broken, *tlc)
