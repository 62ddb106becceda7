"""The blocking twins: they offer what their managers offer, and end once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from shardlib.errors import UnsupportedOperation
from shardlib_ops.manager.blocking import Blocking, BlockingManager
from shardlib_ops.manager.manager import Manager
from shardlib_ops.schema import BlockingSchemaManager, SchemaManager

_PLANNED_ONLY = {"dry_run"}
"""The twin of `Manager` has `plan` for it."""


def _parameters(method: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(method).parameters.values()
    return [(each.name, each.kind, each.default) for each in found if each.name not in _PLANNED_ONLY]


@pytest.mark.parametrize(
    ("manager", "twin"), [(Manager, BlockingManager), (SchemaManager, BlockingSchemaManager)], ids=["manager", "schema"]
)
def test_a_twin_has_each_coroutine_of_its_manager_with_the_same_arguments(manager: type, twin: type) -> None:
    coroutines = {
        name: method
        for name, method in inspect.getmembers(manager, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    assert coroutines
    for name, method in coroutines.items():
        assert _parameters(getattr(twin, name)) == _parameters(method), name


@pytest.mark.parametrize("make", [Manager.sync, SchemaManager.sync], ids=["manager", "schema"])
def test_a_twin_may_be_closed_twice_and_does_nothing_afterwards(make: Callable[[str], Blocking[Any]]) -> None:
    with make("memory://blocking-twins") as twin:
        twin.close()
    with pytest.raises(UnsupportedOperation, match="closed"):
        twin.topology()
