"""Every field of every call with what it may not be: the right status, a problem, nothing changed, an entry."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shardlib.catalog import open_catalog
from tests.support.managers import Api, fill, fill_job, serving

DSN = "postgresql://u:canary-1@127.0.0.1:1/d"
SHARDS = "/api/v1/shards"
SPLIT, MERGE = "/api/v1/reshard/split", "/api/v1/reshard/merge"
REBALANCE, DRAIN = "/api/v1/reshard/rebalance", "/api/v1/reshard/drain"
MOVE = "/api/v1/reshard/move-keys"
PROMOTE = "/api/v1/shards/shard-00001/promote"
NEW = {"name": "new", "primary_endpoint": DSN}
HERE, THERE = {"shard_id": "s1"}, {"shard_id": "s2"}

GOOD: dict[str, dict[str, Any]] = {
    SHARDS: {**NEW, "replicas": [], "vnode_count": 256},
    PROMOTE: {"replica_endpoint": "h:1", "budget_s": 5, "max_lag_bytes": 1},
    SPLIT: {"source_shard_id": "s1", "target_shards": [THERE], "keep": 1, "retention_s": 1, "dry_run": False},
    MERGE: {"source_shard_ids": ["s1"], "target_shard": THERE, "retention_s": 1, "dry_run": False},
    REBALANCE: {"target_shard": THERE, "retention_s": 1, "dry_run": False},
    DRAIN: {"source_shard_id": "s1", "retention_s": 1, "dry_run": False},
    MOVE: {"keys": ["a"], "target_shard": THERE, "retention_s": 1, "dry_run": False},
}
REFERENCES: list[Any] = [None, 1, True, [], {}, "", "x" * 64, "a b", "1a", "a\n", "ä", "a/../b", "\u0000", "a;--"]
WRONG_DSN: list[Any] = [
    None, 1, [], {}, "", "x", "postgresql://", "http://h/d", "mysql://u@h/d", "postgresql://u:p@/d", "a=b",
    "postgresql://h/d\n", "postgresql://u@h:1/d?x=1", "postgresql://" + "h" * 2000, "postgresql://h\u0000/d",
]  # fmt: skip
SSRF = [
    "postgresql://u:canary-1@169.254.169.254/d", "postgresql://u:canary-1@[fe80::1]/d",
    "postgresql://u:canary-1@[::ffff:169.254.169.254]/d", "postgresql://u:canary-1@0.0.0.0/d",
    "postgresql://u:canary-1@h/d?hostaddr=169.254.169.254", "host=/var/run dbname=d password=canary-1",
    "postgresql://u@127.0.0.1/d?passfile=/etc/passwd", "postgresql://u@127.0.0.1/d?service=x",
    "postgresql://u:file:%2Fetc%2Fshadow@127.0.0.1/d", "postgresql://u:env:SHARDLIB_JWT_SECRET@127.0.0.1/d",
    "postgresql://u:canary-1@no-such-host.invalid/d",
]  # fmt: skip
NUMBERS: list[Any] = ["1", True, 1.5, [], {}, -1, 2**80]
SECONDS: list[Any] = ["1", True, [], {}, -0.1, 1e18]
FLAGS: list[Any] = ["yes", 1, None, [], {}]
TARGETS: list[Any] = [
    None, 1, "s2", [], {}, {"shard_id": None}, {"name": "n"}, {"shard_id": "s2", "name": "n"},
    {**NEW, "vnode_count": 0}, {**NEW, "primary_endpoint": "x"}, {**NEW, "name": ""}, {**NEW, "replicas": "x"},
]  # fmt: skip

WRONG: dict[str, dict[str, list[Any]]] = {
    SHARDS: {
        "name": REFERENCES,
        "primary_endpoint": [*WRONG_DSN, *SSRF],
        "replicas": [None, "x", {}, [1], ["x"], [None], [DSN] * 17, ["postgresql://169.254.169.254/d"]],
        "vnode_count": [*NUMBERS, None, 0, 100_000_000],
    },
    PROMOTE: {
        "replica_endpoint": [1, True, [], {}, "", "x" * 2001, "h:1\n", "x", "http://h", "postgresql://\u0000"],
        "budget_s": [*SECONDS, None, 0, 61, "5"],
        "max_lag_bytes": [*NUMBERS, None],
    },
    SPLIT: {
        "source_shard_id": REFERENCES,
        "target_shards": [None, {}, "s2", [], [THERE] * 65, *[[each] for each in TARGETS]],
        "keep": NUMBERS,
        "retention_s": SECONDS,
        "dry_run": FLAGS,
    },
    MERGE: {
        "source_shard_ids": [None, {}, "s1", [], ["s1"] * 65, *[[each] for each in REFERENCES]],
        "target_shard": TARGETS,
        "retention_s": SECONDS,
        "dry_run": FLAGS,
    },
    REBALANCE: {"target_shard": TARGETS, "retention_s": SECONDS, "dry_run": FLAGS},
    DRAIN: {"source_shard_id": REFERENCES, "retention_s": SECONDS, "dry_run": FLAGS},
    MOVE: {
        "keys": [None, {}, "a", [], [None], [1.5], [True], [[]], [""], ["a" * 1001], ["a"] * 1001, [2**63]],
        "target_shard": TARGETS,
        "retention_s": SECONDS,
        "dry_run": FLAGS,
    },
}
REQUIRED = {
    SHARDS: ["name", "primary_endpoint"],
    SPLIT: ["source_shard_id", "target_shards"],
    MERGE: ["source_shard_ids", "target_shard"],
    REBALANCE: ["target_shard"],
    DRAIN: ["source_shard_id"],
    MOVE: ["keys", "target_shard"],
}


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    url = f"memory://bad-{uuid.uuid4().hex}"
    fill(url)
    fill_job(url)
    async with serving(url) as made:
        yield made


def state(api: Api) -> tuple[object, ...]:
    opened = open_catalog(api.catalog)
    try:
        return opened.load().version, *(
            opened.list_documents(each) for each in ("jobs", "wishes", "promotions", "idempotency")
        )
    finally:
        opened.close()


def test_every_field_of_every_body_is_here(api: Api) -> None:
    document = api.app.openapi()
    for path, calls in document["paths"].items():
        for call in calls.values():
            if "requestBody" in call:
                schema = call["requestBody"]["content"]["application/json"]["schema"]
                reference = json.dumps(schema).partition("schemas/")[2].partition('"')[0]
                filled = path.replace("{shard_id}", "shard-00001")
                assert set(document["components"]["schemas"][reference]["properties"]) == set(WRONG[filled]), path


CASES = [(path, field) for path, fields in WRONG.items() for field in fields]


@pytest.mark.parametrize(("path", "field"), CASES, ids=[f"{path} {field}" for path, field in CASES])
async def test_a_field_that_is_not_valid_changes_nothing(api: Api, path: str, field: str) -> None:
    before = state(api)
    for value in WRONG[path][field]:
        written = len(api.entries())
        answer = await api.call("POST", path, json={**GOOD[path], field: value}, key="k")
        assert answer.status_code == 422, f"{value!r}: {answer.text}"
        told = answer.json()
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert (told["type"], told["status"]) == ("urn:shardlib:problem:invalid", 422)
        # Named by its field, unless it is refused by what it leads to.
        assert field in told["detail"], f"{value!r}: {told}"
        assert "canary-1" not in answer.text
        assert len(api.entries()) > written
    assert state(api) == before


@pytest.mark.parametrize("path", REQUIRED)
async def test_a_field_that_is_missing_changes_nothing(api: Api, path: str) -> None:
    before = state(api)
    for field in REQUIRED[path]:
        answer = await api.call("POST", path, json={name: v for name, v in GOOD[path].items() if name != field})
        assert answer.status_code == 422
        assert any(fault["in"] == f"body.{field}" for fault in answer.json()["errors"])
    assert state(api) == before


BODIES: list[tuple[bytes, str, int]] = [
    (b"", "application/json", 422),
    (b"{", "application/json", 422),
    (b"null", "application/json", 422),
    (b"[]", "application/json", 422),
    (b'"x"', "application/json", 422),
    (b"\xff\xfe", "application/json", 422),
    (b'{"name": "\\ud800", "primary_endpoint": "x"}', "application/json", 422),
    (b'{"name": NaN}', "application/json", 422),
    (b'{"vnode_count": 1e999}', "application/json", 422),
    (b'{"vnode_count": ' + b"9" * 10_000 + b"}", "application/json", 422),
    (b"name=x", "application/x-www-form-urlencoded", 415),
    (b"<a/>", "application/xml", 415),
    (b"{}", "text/plain", 415),
    (b" " * (2**20 + 1), "application/json", 413),
    (b"[" * 100_000, "application/json", 422),
]


async def test_a_body_that_is_none_changes_nothing(api: Api) -> None:
    before = state(api)
    for body, kind, status in BODIES:
        for path in (SHARDS, SPLIT):
            answer = await api.call("POST", path, content=body, headers={"Content-Type": kind})
            assert answer.status_code == status, (body[:40], answer.text)
            assert answer.headers["Content-Type"] == "application/problem+json"
    assert state(api) == before


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "word"),
    [
        ("POST", SHARDS, {**NEW, "name": "shard-00001"}, 422, "name"),
        ("POST", SHARDS, {**NEW, "name": "s7"}, 422, "name"),
        ("POST", SHARDS, NEW, 503, "new"),
        ("GET", f"{SHARDS}/nobody", None, 404, "nobody"),
        ("GET", f"{SHARDS}/s99", None, 404, "s99"),
        ("GET", f"{SHARDS}/%00", None, 422, "shard_id"),
        ("GET", f"{SHARDS}/{'x' * 64}", None, 422, "shard_id"),
        ("DELETE", f"{SHARDS}/nobody", None, 404, "nobody"),
        ("DELETE", f"{SHARDS}/s3", None, 409, "owns ranges"),
        ("DELETE", f"{SHARDS}/s1", None, 409, "job 1"),
        ("POST", f"{SHARDS}/nobody/promote", {}, 404, "nobody"),
        ("POST", PROMOTE, {}, 409, "no replica"),
        ("POST", SPLIT, {"source_shard_id": "nobody", "target_shards": [THERE]}, 404, "nobody"),
        ("POST", SPLIT, {"source_shard_id": "s3", "target_shards": [{"shard_id": "s9"}]}, 404, "s9"),
        ("POST", SPLIT, {"source_shard_id": "s3", "target_shards": [THERE, THERE]}, 422, "each shard once"),
        ("POST", SPLIT, {"source_shard_id": "s3", "target_shards": [THERE]}, 409, "job 1"),
        ("POST", MERGE, {"source_shard_ids": ["s1"], "target_shard": {"shard_id": "s3"}}, 409, "job 1"),
        ("POST", REBALANCE, {"target_shard": {"shard_id": "s3"}}, 409, "shard-00003"),
        ("POST", DRAIN, {"source_shard_id": "s1"}, 409, "job 1"),
        ("GET", "/api/v1/reshard/jobs/99", None, 404, "99"),
        ("GET", "/api/v1/reshard/jobs/0", None, 422, "job_id"),
        ("GET", "/api/v1/reshard/jobs/-1", None, 422, "job_id"),
        ("GET", "/api/v1/reshard/jobs/x", None, 422, "job_id"),
        ("GET", f"/api/v1/reshard/jobs/{2**64}", None, 422, "job_id"),
        ("GET", "/api/v1/reshard/jobs/1?wait_s=nan", None, 422, "wait_s"),
        ("GET", "/api/v1/reshard/jobs?status=done", None, 422, "status"),
        ("POST", "/api/v1/reshard/jobs/99/cancel", None, 404, "99"),
        ("POST", "/api/v1/reshard/jobs/1/rollback", None, 409, "pending"),
        ("POST", "/api/v1/reshard/jobs/1/complete", None, 409, "pending"),
        ("GET", "/api/v1/nothing", None, 404, ""),
        ("GET", "/api/v1/shards/", None, 404, ""),
    ],
)
async def test_what_the_cluster_does_not_allow_changes_nothing(
    api: Api, method: str, path: str, body: dict[str, Any] | None, status: int, word: str
) -> None:
    before = state(api)
    answer = await api.call(method, path, json=body)
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert told["status"] == status
    assert word in told["detail"] or word in json.dumps(told)
    assert "canary" not in answer.text
    assert state(api) == before
    if method != "GET":
        assert [entry.kind for entry in api.entries()] == ["intent", "outcome"]
        assert api.entries()[-1].result != "ok"


async def test_a_key_that_is_none_is_refused(api: Api) -> None:
    for key in ("", " ", "a b", "x" * 201, "ü"):
        answer = await api.call("POST", "/api/v1/reshard/jobs/1/pause", headers={"Idempotency-Key": key.encode()})
        assert answer.status_code == 422, key
        assert "Idempotency-Key" in answer.json()["detail"]


async def test_a_catalog_that_does_not_answer_is_told_as_that() -> None:
    """And nothing of where it is."""
    async with serving("etcd://user:canary-1@127.0.0.1:1/shop", audit=None) as api:
        for path in (SHARDS, "/api/v1/reshard/jobs"):
            answer = await api.call("GET", path, role="viewer")
            assert answer.status_code in (401, 503)
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert "127.0.0.1" not in answer.text
            assert "canary" not in answer.text
        answer = await api.call("GET", "/health", role=None)
        assert (answer.status_code, answer.json()["status"]) == (503, "degraded")
