"""The page of the HTTP calls says what the OpenAPI document says, and that says all it should."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from shardlib_ops.api import create_app
from shardlib_ops.serving.problem import KINDS, MEDIA_TYPE
from tests.support.managers import manager_settings

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "http.md").read_text(encoding="utf-8")
DOCUMENT: dict[str, Any] = create_app(manager_settings("memory://nobody")).openapi()
CALLS = {
    f"{method.upper()} {path}": call for path, calls in DOCUMENT["paths"].items() for method, call in calls.items()
}
MANAGER = PAGE.partition("\n## Manager\n")[2]


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def listed() -> dict[str, tuple[str, str]]:
    """Each call of the page, with its least role and what it says."""
    rows = re.findall(r"^\| `((?:GET|POST|DELETE) [^`]+)` \| (.+?) \| (\w+) \|$", MANAGER, re.MULTILINE)
    return {call: (role, text) for call, text, role in rows}


def test_every_call_is_listed_with_its_role() -> None:
    assert {call: role for call, (role, _) in listed().items()} == {
        name: call["x-least-role"] for name, call in CALLS.items()
    }


@pytest.mark.parametrize("name", CALLS)
def test_every_field_of_a_body_and_every_parameter_is_named(name: str) -> None:
    text = listed()[name][1]
    fields: set[str] = set()
    if "requestBody" in CALLS[name]:
        fields |= set(resolved(CALLS[name]["requestBody"]["content"]["application/json"]["schema"])["properties"])
    fields |= {each["name"] for each in CALLS[name].get("parameters", ()) if each["in"] == "query"}
    everywhere = {"retention_s", "dry_run", "limit", "cursor"}  # told once, below the table
    assert not [field for field in fields - everywhere if f"`{field}`" not in text and f"{field}" not in text]
    assert all(f"`{field}`" in MANAGER for field in fields & everywhere)


@pytest.mark.parametrize("model", ["ShardAnswer", "JobAnswer", "PlanAnswer", "ShardPage", "JobPage", "ProblemAnswer"])
def test_every_field_of_an_answer_is_named(model: str) -> None:
    shown = DOCUMENT["components"]["schemas"][model]["properties"]
    assert not [field for field in shown if f"`{field}`" not in PAGE]


def test_every_problem_is_listed_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", PAGE, re.MULTILINE))
    assert rows == {slug: str(status) for slug, (status, _) in KINDS.items()}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_has_a_name_a_summary_and_its_errors(name: str) -> None:
    call = CALLS[name]
    assert call["operationId"]
    assert call["summary"]
    assert call["tags"]
    if name == "GET /health":
        return
    assert {"401", "403", "422", "429", "500", "503", "504"} <= call["responses"].keys()
    for status, answer in call["responses"].items():
        assert answer["description"]
        if int(status) >= 400:
            assert list(answer["content"]) == [MEDIA_TYPE]
    if "requestBody" in call:
        assert {"413", "415"} <= call["responses"].keys()
        schema = resolved(call["requestBody"]["content"]["application/json"]["schema"])
        shown = schema.get("examples") or [each.get("examples") for each in schema["properties"].values()]
        assert any(shown), "a body has an example"
    if name.startswith("POST"):
        assert any(each["name"] == "Idempotency-Key" for each in call["parameters"])


def test_names_of_calls_are_each_given_once() -> None:
    names = [call["operationId"] for call in CALLS.values()]
    assert len(set(names)) == len(names)


def test_no_schema_is_left_over_and_none_is_missing() -> None:
    text = str(DOCUMENT)
    for model in DOCUMENT["components"]["schemas"]:
        assert f"schemas/{model}'" in text, model
    for reference in set(re.findall(r"#/components/schemas/(\w+)", text)):
        assert reference in DOCUMENT["components"]["schemas"]
