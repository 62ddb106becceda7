"""The page about the gateway's HTTP says what its OpenAPI document says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from shardlib_ops.gateway import create_gateway
from shardlib_ops.gateway.problems import GATEWAY_KINDS
from tests.support.gateways import gateway_settings

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "http-gateway.md").read_text(encoding="utf-8")


def document() -> dict[str, Any]:
    return create_gateway(gateway_settings("memory://document")).openapi()


def test_the_page_has_every_call_with_its_role() -> None:
    listed = set(re.findall(r"^\| `([A-Z]+ /\S+)` \| (\w+) \| (.+) \|$", PAGE, re.MULTILINE))
    paths = document()["paths"].items()
    assert listed == {
        (f"{method.upper()} {path}", call["x-least-role"], call["summary"])
        for path, calls in paths
        for method, call in calls.items()
    }


def test_the_page_has_every_field_and_problem() -> None:
    schemas = document()["components"]["schemas"]
    asked = schemas["Execute"]
    listed = dict(re.findall(r"^\| `(\w+)` \| (yes|no) \|", PAGE, re.MULTILINE))
    assert listed == {name: "yes" if name in asked["required"] else "no" for name in asked["properties"]}
    for answer in ("Executed", "Place"):
        assert all(f"`{name}`" in PAGE for name in schemas[answer]["properties"])
    problems = {(slug, int(status)) for slug, status in re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", PAGE, re.MULTILINE)}
    assert problems == {(slug, status) for slug, (status, _) in GATEWAY_KINDS.items()}
