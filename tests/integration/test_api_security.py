"""Security of the manager's API: who may do what, what is refused, and what is written of it."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Depends

from shardlib.catalog import Catalog, open_catalog
from shardlib.errors import InvalidArgument
from shardlib_ops.api import create_app
from shardlib_ops.audit import Audit, AuditUnavailable, Draft, Entry, open_audit, verify
from shardlib_ops.auth import Role
from shardlib_ops.serving.identity import anybody, check_routes, needs
from shardlib_ops.settings import AuditSettings, ServerSettings
from tests.support.eventually import eventually_async
from tests.support.managers import Api, fill, fill_job, manager_settings, serving, token
from tests.support.tokens import OTHER_SECRET, claims, forged

ROLES = ("viewer", "operator", "admin")
LEAST = {
    "POST /api/v1/shards": "admin",
    "GET /api/v1/shards": "viewer",
    "GET /api/v1/shards/{shard_id}": "viewer",
    "DELETE /api/v1/shards/{shard_id}": "admin",
    "POST /api/v1/shards/{shard_id}/promote": "operator",
    "GET /api/v1/shards/{shard_id}/promotion": "viewer",
    "GET /api/v1/ring": "viewer",
    "GET /api/v1/reshard/jobs/{job_id}/progress": "viewer",
    "POST /api/v1/reshard/split": "admin",
    "POST /api/v1/reshard/merge": "admin",
    "POST /api/v1/reshard/rebalance": "admin",
    "POST /api/v1/reshard/drain": "admin",
    "POST /api/v1/reshard/move-keys": "admin",
    "GET /api/v1/reshard/jobs": "viewer",
    "GET /api/v1/reshard/jobs/{job_id}": "viewer",
    "POST /api/v1/reshard/jobs/{job_id}/pause": "admin",
    "POST /api/v1/reshard/jobs/{job_id}/resume": "admin",
    "POST /api/v1/reshard/jobs/{job_id}/cancel": "admin",
    "POST /api/v1/reshard/jobs/{job_id}/rollback": "admin",
    "POST /api/v1/reshard/jobs/{job_id}/complete": "admin",
    "GET /health": "none",
}


@pytest.fixture
def catalog() -> str:
    url = f"memory://api-{uuid.uuid4().hex}"
    fill(url)
    return url


@pytest.fixture
async def api(catalog: str) -> AsyncIterator[Api]:
    async with serving(catalog) as made:
        yield made


def document() -> dict[str, Any]:
    found: dict[str, Any] = create_app(manager_settings("memory://nobody")).openapi()
    return found


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document()["paths"].items():
        for method, call in methods.items():
            yield method.upper(), path, call


CALLS = {f"{method} {path}": call for method, path, call in calls()}


def tokens() -> dict[str, str | None]:
    now = time.time()
    body = claims(now, role="admin")
    good = token("admin")
    head, payload, signature = good.split(".")
    risen = json.loads(base64.urlsafe_b64decode(payload + "=="))
    changed = base64.urlsafe_b64encode(json.dumps({**risen, "sub": "root"}).encode()).decode().rstrip("=")
    return {
        "none": None,
        "viewer": token("viewer"),
        "operator": token("operator"),
        "admin": good,
        "expired": token("admin", now=now - 3600, ttl_s=60),
        "not yet": token("admin", now=now + 3600),
        "forged": forged({}, body, OTHER_SECRET.encode()),
        "unsigned": f"{forged({'alg': 'none'}, body).rpartition('.')[0]}.",
        "changed": f"{head}.{changed}.{signature}",
        "other audience": forged({}, claims(now, role="admin", aud="elsewhere")),
        "unknown role": forged({}, claims(now, role="root")),
        "rubbish": "abc.def.ghi",
    }


def filled(path: str) -> str:
    return path.replace("{shard_id}", "shard-00001").replace("{job_id}", "999")


def body_of(call: dict[str, Any]) -> dict[str, Any] | None:
    """A body that is right in form, of a shard or job that there is not."""
    if "requestBody" not in call:
        return None
    reference = str(call["requestBody"]["content"]["application/json"]["schema"])
    there_is_not = {"shard_id": "nobody"}
    for name, found in {
        "CreateShardBody": {"name": "new", "primary_endpoint": "postgresql://u@127.0.0.1:1/d"},
        "PromoteBody": {},
        "SplitBody": {"source_shard_id": "nobody", "target_shards": [there_is_not]},
        "MergeBody": {"source_shard_ids": ["nobody"], "target_shard": there_is_not},
        "RebalanceBody": {"target_shard": there_is_not},
        "DrainBody": {"source_shard_id": "nobody"},
        "MoveKeysBody": {"keys": ["k"], "target_shard": there_is_not},
    }.items():
        if name in reference:
            return found
    raise AssertionError(f"no body is known for {reference}")


def test_s07_08_every_call_of_the_document_has_the_role_that_was_decided() -> None:
    assert {name: call["x-least-role"] for name, call in CALLS.items()} == LEAST
    assert all(("security" in call) == (LEAST[name] != "none") for name, call in CALLS.items())


@pytest.mark.parametrize("name", [name for name, least in LEAST.items() if least != "none"])
async def test_s07_08_a_call_lets_in_its_role_and_those_above_and_nobody_else(api: Api, name: str) -> None:
    for kind, given in tokens().items():
        await one_cell(api, name, kind, given)


async def one_cell(api: Api, name: str, kind: str, given: str | None) -> None:
    """One call by one caller, and what is written of it."""
    method, path = name.split()
    before = len(refused_of(api))
    headers = {} if given is None else {"Authorization": f"Bearer {given}"}
    answer = await api.call(method, filled(path), role=None, headers=headers, json=body_of(CALLS[name]))
    if kind not in ROLES:
        assert answer.status_code == 401, kind
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    elif ROLES.index(kind) < ROLES.index(LEAST[name]):
        assert answer.status_code == 403, kind
    else:
        assert answer.status_code in (200, 201, 202, 204, 404, 409, 503), answer.text
    if answer.status_code >= 400:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status_code
    assert len(refused_of(api)) - before == (answer.status_code in (401, 403)), kind


def refused_of(api: Api) -> list[Entry]:
    return [entry for entry in api.entries() if entry.kind == "refused"]


async def test_s07_08_whoever_may_not_come_in_learns_nothing_of_what_there_is(api: Api) -> None:
    """Not even whether the body was right."""
    for headers in ({}, {"Authorization": f"Bearer {token('viewer')}"}):
        told = set()
        for path, body in (
            ("/api/v1/shards", b'{"name": "shard-00001"}'),
            ("/api/v1/shards", b"{"),
            ("/api/v1/shards/nobody/promote", b"[[["),
            ("/api/v1/shards/shard-00001/promote", b"{}"),
        ):
            answer = await api.call(
                "POST", path, role=None, headers={**headers, "Content-Type": "application/json"}, content=body
            )
            told.add(answer.status_code)
        assert told == ({403} if headers else {401})


def test_s07_08_a_route_without_a_role_does_not_pass(catalog: str) -> None:
    app = create_app(manager_settings(catalog))
    assert len(check_routes(app)) == len(LEAST)
    router = APIRouter()

    @router.get("/api/v1/open")
    async def found() -> str:
        return "it has no role"

    app.include_router(router)
    with pytest.raises(InvalidArgument, match="/api/v1/open"):
        check_routes(app)

    @router.get("/api/v1/two", dependencies=[Depends(needs(Role.ADMIN)), Depends(anybody)])
    async def two() -> str:
        return "it has two"

    other = create_app(manager_settings(catalog))
    other.router.routes.append(router.routes[-1])
    with pytest.raises(InvalidArgument, match="/api/v1/two"):
        check_routes(other)


def test_a_manager_without_a_key_does_not_start() -> None:
    settings = manager_settings("memory://nobody")
    with pytest.raises(InvalidArgument, match="no key"):
        create_app(settings.model_copy(update={"auth": type(settings.auth)()}))
    with pytest.raises(InvalidArgument, match="catalog"):
        create_app(settings.model_copy(update={"catalog": ""}))


WRITABLE = [
    ("POST", "/api/v1/shards", {"name": "new", "primary_endpoint": "postgresql://u@127.0.0.1:1/d"}),
    ("POST", "/api/v1/shards/shard-00001/promote", {}),
    ("POST", "/api/v1/reshard/split", {"source_shard_id": "s1", "target_shards": [{"shard_id": "s2"}]}),
    ("POST", "/api/v1/reshard/rebalance", {"target_shard": {"shard_id": "s2"}}),
    ("POST", "/api/v1/reshard/drain", {"source_shard_id": "s1"}),
    ("POST", "/api/v1/reshard/move-keys", {"keys": ["a"], "target_shard": {"shard_id": "s2"}}),
]


async def test_s07_10_a_field_that_there_is_not_or_is_the_servers_is_refused(api: Api) -> None:
    for method, path, body in WRITABLE:
        for field in ("id", "status", "progress", "jobs", "vnodes_owned", "created_at", "__class__", ""):
            answer = await api.call(method, path, json={**body, field: "active"})
            assert answer.status_code == 422, (path, field)
            assert [fault["in"] for fault in answer.json()["errors"]] == [f"body.{field}"]
            assert api.entries()[-1].kind == "refused"
    assert {entry.kind for entry in api.entries()} == {"refused"}


@pytest.mark.parametrize("inner", [{"shard_id": "s2", "id": "s9"}, {"name": "n", "primary_endpoint": "x", "status": 1}])
async def test_s07_10_also_in_what_lies_in_a_body(api: Api, inner: dict[str, Any]) -> None:
    answer = await api.call("POST", "/api/v1/reshard/split", json={"source_shard_id": "s1", "target_shards": [inner]})
    assert answer.status_code == 422
    field = next(name for name in inner if name in ("id", "status"))
    assert any(fault["in"].endswith(f".{field}") for fault in answer.json()["errors"])


@pytest.mark.parametrize("path", ["/api/v1/shards", "/api/v1/reshard/jobs"])
async def test_s07_11_a_page_has_a_largest_size(api: Api, path: str) -> None:
    assert (await api.call("GET", path, role="viewer", params={"limit": 1000})).status_code == 200
    for limit in ("1001", "0", "-1", "x", "1e3", str(2**70)):
        answer = await api.call("GET", path, role="viewer", params={"limit": limit})
        assert answer.status_code == 422, limit
        assert answer.json()["errors"][0]["in"] == "query.limit"


async def test_s07_11_pages_follow_each_other_to_the_end(api: Api) -> None:
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(3):
        params = {"limit": 1, **({} if cursor is None else {"cursor": cursor})}
        found = (await api.call("GET", "/api/v1/shards", role="viewer", params=params)).json()
        seen += [shard["id"] for shard in found["items"]]
        cursor = found["next_cursor"]
    assert seen == ["s1", "s2", "s3"]
    assert cursor is None
    for wrong in ("abc", "YWZ0ZXIgLTE", "%00", "YWZ0ZXIgMQ==", "YWZ0ZXIgMDE"):
        answer = await api.call("GET", "/api/v1/shards", role="viewer", params={"cursor": wrong})
        assert answer.status_code == 422, wrong


async def test_s07_11_a_body_has_a_largest_size_and_depth(api: Api) -> None:
    large = await api.call("POST", "/api/v1/shards", content=b'{"name": "' + b"x" * 2**20 + b'"}')
    assert large.status_code == 413
    deep = await api.call("POST", "/api/v1/shards", content=b"[" * 33 + b"]" * 33)
    assert deep.status_code == 422


async def test_s07_20_methods_that_nothing_uses_are_refused(api: Api) -> None:
    for method in ("TRACE", "CONNECT", "PROPFIND"):
        for path in ("/api/v1/shards", "/health", "/nothing"):
            assert (await api.call(method, path)).status_code == 405


async def test_s07_20_a_route_takes_its_own_methods_only(api: Api) -> None:
    for path in {each.split()[1] for each in LEAST}:
        has = {each.split()[0] for each in LEAST if each.split()[1] == path}
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - has:
            answer = await api.call(method, filled(path))
            assert answer.status_code == 405, f"{method} {path}"
            assert answer.headers["Allow"] == ", ".join(sorted(has))
            assert answer.headers["Content-Type"] == "application/problem+json"


async def test_s07_20_documents_and_metrics_are_only_where_they_are_switched_on(api: Api, catalog: str) -> None:
    for path in ("/docs", "/redoc", "/openapi.json", "/metrics", "/docs/oauth2-redirect"):
        assert (await api.call("GET", path)).status_code == 404
    async with serving(catalog, manager=ServerSettings(docs=True)) as other:
        shown = await other.call("GET", "/openapi.json", role=None)
        assert shown.json()["paths"].keys() == document()["paths"].keys()
        assert (await other.call("GET", "/metrics")).status_code == 404


async def test_s07_20_health_tells_strangers_our_own_version_and_no_other(api: Api) -> None:
    found = (await api.call("GET", "/health", role=None)).json()
    assert found.keys() == {"status", "version", "uptime_seconds", "checks"}
    assert found["checks"] == {"catalog": True, "audit": True}


class Broken:
    """An audit log that takes a number of entries and then no more."""

    safe_url = "broken:"

    def __init__(self, inner: Any, takes: int) -> None:
        self._inner, self.takes = inner, takes

    def append(self, new: Draft) -> Entry:
        if self.takes <= 0:
            raise AuditUnavailable(self.safe_url, "the disk is full")
        self.takes -= 1
        entry: Entry = self._inner.append(new)
        return entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def state(catalog: Catalog) -> tuple[object, ...]:
    names = ("jobs", "wishes", "idempotency", "promotions", "audit")
    return catalog.load().version, *(catalog.list_documents(name) for name in names)


MUTATING = [name for name, least in LEAST.items() if not name.startswith("GET")]


@pytest.mark.parametrize("name", MUTATING)
async def test_s07_22_without_the_audit_log_nothing_is_done(catalog: str, name: str) -> None:
    """Neither what would be right nor what would be refused gets another answer than 503."""
    opened = open_catalog(catalog)
    before = state(opened)
    audit = Audit(Broken(open_audit("catalog:", opened), takes=0))  # type: ignore[arg-type]
    method, path = name.split()
    async with serving(catalog, audit=audit) as api:
        body = body_of(CALLS[name])
        for more in ({}, {"key": "k1"}):
            answer = await api.call(method, filled(path), json=body, **more)
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:shardlib:problem:audit-unavailable")
        for role, content in (("viewer", b"{}"), (None, b"{}"), ("admin", b"{")):
            if name.endswith(("promote", "pause", "resume", "cancel", "rollback", "complete")) or method == "DELETE":
                continue
            answer = await api.call(method, filled(path), role=role, content=content)
            assert answer.status_code == 503, (role, content)
    assert state(opened) == before
    await audit.close()
    opened.close()


async def test_s07_22_a_full_disk_stops_changes_until_there_is_room(catalog: str, tmp_path: Path) -> None:
    """A file system of the smallest kind, which is a limit of the kernel on this process's files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    url = f"file:{tmp_path / 'audit.jsonl'}"
    async with serving(catalog, audit=Audit(open_audit(url))) as api:
        assert (await api.call("POST", "/api/v1/reshard/jobs/7/pause")).status_code == 404
        size = (tmp_path / "audit.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
        try:
            told = [(await api.call("POST", "/api/v1/reshard/jobs/7/pause")).json()["type"] for _ in range(3)]
            reads = await api.call("GET", "/api/v1/shards", role="viewer")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert told == ["urn:shardlib:problem:audit-unavailable"] * 3
        assert reads.status_code == 200
        assert (await api.call("POST", "/api/v1/reshard/jobs/7/pause")).status_code == 404


async def test_s07_22_an_effect_whose_outcome_cannot_be_written_is_told_as_that(catalog: str) -> None:
    """Asked again with the same key, once there is a log, it is not done twice."""
    opened = open_catalog(catalog)
    fill_job(catalog)
    broken = Broken(open_audit("catalog:", opened), takes=1)
    audit = Audit(broken)  # type: ignore[arg-type]
    async with serving(catalog, audit=audit) as api:
        path = "/api/v1/reshard/jobs/1/pause"
        first = await api.call("POST", path, key="k")
        assert (first.status_code, first.json()["type"]) == (500, "urn:shardlib:problem:audit-incomplete")
        broken.takes = 100
        revision = opened.read_document("wishes/1")
        again = await api.call("POST", path, key="k")
        assert again.status_code == 200
        assert again.json()["asked"] == "pause"
        assert opened.read_document("wishes/1") == revision
    await audit.close()
    opened.close()


async def test_s07_23_every_attempt_is_written_with_all_that_is_known_of_it(api: Api) -> None:
    fill_job(api.catalog)
    name = "alice\\nrefused\tadmin"
    headers = {"X-Request-Id": "trace-0123456789"}
    await api.call("POST", "/api/v1/reshard/jobs/1/pause", subject="alice", headers=headers)
    await api.call("POST", "/api/v1/reshard/jobs/2/pause", subject="alice", headers=headers)
    await api.call("DELETE", "/api/v1/shards/shard-00001", role="operator", subject="bob", headers=headers)
    await api.call("DELETE", "/api/v1/shards/shard-00001", role=None, headers=headers)
    await api.call("POST", "/api/v1/shards", subject="alice", json={"name": name}, headers=headers)
    await api.call("GET", "/api/v1/shards", role="viewer", subject="carol")
    found = [
        (entry.kind, entry.subject, entry.role, entry.action, entry.target, entry.result.partition(":")[0])
        for entry in api.entries()
    ]
    assert found == [
        ("intent", "alice", "admin", "job.pause", "job 1", ""),
        ("outcome", "alice", "admin", "job.pause", "job 1", "ok"),
        ("intent", "alice", "admin", "job.pause", "job 2", ""),
        ("outcome", "alice", "admin", "job.pause", "job 2", "InvalidTopology"),
        ("refused", "bob", "operator", "shard.delete", "/api/v1/shards/shard-00001", "role"),
        ("refused", "anonymous", None, "shard.delete", "/api/v1/shards/shard-00001", "no-token"),
        ("refused", "alice", "admin", "shard.create", "/api/v1/shards", "invalid request"),
    ]
    for entry in api.entries():
        assert entry.address == "127.0.0.1"
        assert entry.request_id == "trace-0123456789"
        assert entry.via == "http"
        assert entry.at.endswith("Z")
        assert abs(time.time() - time.mktime(time.strptime(entry.at[:19], "%Y-%m-%dT%H:%M:%S")) + time.timezone) < 60


async def test_s07_23_what_a_caller_writes_cannot_forge_a_line_of_the_log(api: Api) -> None:
    await api.call("DELETE", "/api/v1/shards/x%0Aintent%1b%5B2J", subject="alice")
    await api.call("DELETE", "/api/v1/shards/shard-00001", role="viewer", headers={"X-Request-Id": "a b\\u2028c"})
    for entry in api.entries():
        text = json.dumps([entry.target, entry.request_id], ensure_ascii=False)
        assert text.isprintable()


async def test_an_interrupted_caller_does_not_interrupt_the_change(catalog: str) -> None:
    """The audit log has its outcome, though nobody waits for the answer."""
    fill_job(catalog)
    async with serving(catalog) as api:

        async def begun() -> bool:
            return bool(api.entries())

        async def over() -> bool:
            return [entry.kind for entry in api.entries()] == ["intent", "outcome"]

        asking = asyncio.create_task(api.call("POST", "/api/v1/reshard/jobs/1/pause"))
        await eventually_async(begun, 20, every_s=0)
        asking.cancel()
        with pytest.raises((asyncio.CancelledError, httpx.HTTPError)):
            await asking
        await eventually_async(over, 20)
        assert api.entries()[-1].result == "ok"


async def test_s07_24_the_manager_logs_signed_heads_by_which_a_cut_tail_is_found(
    catalog: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill_job(catalog)
    key = tmp_path / "key"
    key.write_text("k" * 48 + "\n")
    caplog.set_level("INFO", "shardlib.ops.audit.head")
    async with serving(catalog, audit_settings=AuditSettings(key_file=key)) as api:
        for _ in range(60):
            await api.call("POST", "/api/v1/reshard/jobs/1/pause")
        entries = api.entries()

        async def published() -> list[str]:
            return [record.getMessage() for record in caplog.records if record.name == "shardlib.ops.audit.head"]

        heads = await eventually_async(published, 30)
    assert not verify(entries, heads, key.read_bytes().strip())
    assert [finding.kind for finding in verify(entries[:50], heads, key.read_bytes().strip())] == ["truncated"]
    with pytest.raises(InvalidArgument, match="key_file"):
        create_app(manager_settings(catalog, audit_settings=AuditSettings(key_file=tmp_path / "none")))
