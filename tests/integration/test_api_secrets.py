"""A secret in every place where one can be given is found in nothing that the manager says, writes or logs."""

from __future__ import annotations

import base64
import gc
import io
import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib_ops import LocalCluster, NewShard, create_cluster
from shardlib_ops.api import create_app
from shardlib_ops.api.models import CreateShardBody, PromoteBody, SplitBody
from shardlib_ops.auth import issue_token
from shardlib_ops.local import LocalServer
from shardlib_ops.manager.manager import Manager
from shardlib_ops.serving.server import listen
from shardlib_ops.settings import ServerSettings, TlsSettings, print_settings
from tests.support.certificates import Authority
from tests.support.managers import audit_entries, fill, manager_settings, serving, token
from tests.support.models import Base
from tests.support.tokens import OTHER_SECRET, SECRET, auth

PASSWORD = "c4nary/p@ss:w%rd"
WRONG = "wr0ng/c4nary@x"
SECRETS = (PASSWORD, WRONG, SECRET, OTHER_SECRET)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three servers whose role has the canary for a password: a catalog with the audit log, a shard, and a spare."""
    with LocalCluster(shards=3, bootstrap=False) as made:
        for server in made.servers:
            with server.connect() as conn:
                conn.execute("CREATE ROLE canary LOGIN SUPERUSER")
                conn.execute(f"ALTER ROLE canary PASSWORD '{PASSWORD}'")
        with closing(open_catalog(f"{dsn(made.servers[0])}?catalog=shop")) as catalog:
            create_cluster(catalog, [NewShard("first", Dsn(dsn(made.servers[1])))])
        with ShardedEngine(f"{dsn(made.servers[0])}?catalog=shop") as engine:
            engine.create_all(Base.metadata)
        yield made


def dsn(server: LocalServer, password: str = PASSWORD, *, port: str | None = None) -> str:
    found = Dsn(server.dsn)
    return f"postgresql://canary:{quote(password, safe='')}@127.0.0.1:{port or found.port}/{found.dbname}"


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """Everything that is logged meanwhile, at any level, with tracebacks."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    quiet = [logging.getLogger(name) for name in ("httpx", "httpcore")]  # the caller's own, which knows its tokens
    for each in quiet:
        each.setLevel(logging.CRITICAL)
    yield stream
    for each in quiet:
        each.setLevel(logging.NOTSET)
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


def forms(secret: str) -> set[str]:
    """As it is, percent-encoded, in base64, at each of the three offsets that base64 knows."""
    raw = secret.encode()
    found = {secret, quote(secret, safe=""), quote(secret), repr(secret)[1:-1]}
    for offset in range(3):
        text = base64.b64encode(b"\0" * offset + raw).decode()
        found.add(text[4 if offset else 0 : len(text) - 4])
    return {each for each in found if len(each) > 8}


def assert_clean(where: str, text: str, secrets: tuple[str, ...]) -> None:
    for secret in secrets:
        for form in forms(secret):
            assert form not in text, f"{where} holds a secret: ...{text[max(0, text.index(form) - 200) :][:300]}..."


def test_the_search_finds_what_it_looks_for() -> None:
    for hidden in (PASSWORD, quote(PASSWORD, safe=""), base64.b64encode(f"x:{PASSWORD}".encode()).decode()):
        with pytest.raises(AssertionError, match="holds a secret"):
            assert_clean("here", f"so {hidden} it is", (PASSWORD,))


async def exercise(client: httpx.AsyncClient, cluster: LocalCluster) -> list[httpx.Response]:
    """Every call with secrets in it, those that are done and those that are refused or fail."""
    spare = cluster.servers[2]
    good, nowhere = dsn(spare), dsn(spare, port="1")
    told: list[httpx.Response] = []

    async def ask(method: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
        answer = await client.request(method, f"/api/v1{path}", json=body, **more)
        told.append(answer)
        return answer

    def new(endpoint: str, **more: Any) -> dict[str, Any]:
        return {"name": "second", "primary_endpoint": endpoint, **more}

    # Refused for what they are.
    for endpoint in (
        f"postgresql://u:{PASSWORD}@h/d",  # not encoded: a DSN that cannot be read
        f"http://u:{quote(PASSWORD, safe='')}@h/d",
        f"postgresql://u:{quote(PASSWORD, safe='')}@169.254.169.254/d",
        f"host=h user=u password='{PASSWORD}' x=1",
        f"postgresql://u:{quote(PASSWORD, safe='')}@h/d?passfile=/x",
        f"password='{PASSWORD}'",
        PASSWORD,
    ):
        await ask("POST", "/shards", new(endpoint))
        await ask("POST", "/shards", new(good, replicas=[endpoint]))
        target = {"source_shard_id": "first", "target_shards": [new(endpoint)]}
        await ask("POST", "/reshard/split", target)
        await ask("POST", "/shards/first/promote", {"replica_endpoint": endpoint})
    await ask("POST", "/shards", {"unknown": PASSWORD})
    await ask("POST", "/shards", new(good, name=PASSWORD))
    await ask("POST", "/shards", new(good), headers={"Content-Type": "text/plain"})
    await ask("POST", "/shards", new(good), headers={"Idempotency-Key": f"a b {PASSWORD}"})
    # Refused by the servers.
    for endpoint in (nowhere, dsn(spare, WRONG), dsn(cluster.servers[1]), f"{good}?connect_timeout=1"):
        key = {"Idempotency-Key": f"key-{len(told)}"}
        for _ in range(2):
            await ask("POST", "/shards", new(endpoint, replicas=[nowhere]), headers=key)
        for dry_run in (True, False):
            body = {"target_shards": [new(endpoint, name="third")], "source_shard_id": "first", "dry_run": dry_run}
            await ask("POST", "/reshard/split", body)
        await ask("DELETE", "/shards/second")
    # Done.
    assert (await ask("POST", "/shards", new(good), headers={"Idempotency-Key": "done"})).status_code == 201
    assert (await ask("POST", "/shards", new(good), headers={"Idempotency-Key": "done"})).status_code == 201
    split = await ask("POST", "/reshard/split", {"source_shard_id": "first", "target_shards": [{"shard_id": "second"}]})
    assert split.status_code == 202, split.text
    job = f"/reshard/jobs/{split.json()['id']}"
    for step in ("pause", "resume", "rollback", "complete", "cancel"):
        await ask("POST", f"{job}/{step}")
    for path in ("/shards", "/shards/first", "/shards/second", "/reshard/jobs", job):
        assert (await ask("GET", path)).status_code == 200
    for path in ("/merge", "/rebalance", "/move-keys"):
        await ask("POST", f"/reshard{path}", {"keys": ["a"], "target_shard": new(good, name="fourth")})
    await ask("POST", "/shards/first/promote", {"replica_endpoint": nowhere})
    # Tokens that are not believed.
    for given in (
        f"Bearer {PASSWORD}",
        f"Bearer {token('admin', now=time.time() - 7200)}",
        f"Basic {base64.b64encode(f'u:{PASSWORD}'.encode()).decode()}",
        f"Bearer {issue_token(auth(secret=SecretStr(OTHER_SECRET)), subject='x', role='admin', ttl_s=9, now=0)}",
    ):
        answer = await ask("GET", "/shards", headers={"Authorization": given})
        assert answer.status_code == 401
    return told


async def test_s07_16_a_secret_is_in_nothing_that_comes_out(
    cluster: LocalCluster,
    tmp_path: Path,
    logged: io.StringIO,
    spans: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    authority = Authority(tmp_path, "authority")
    server = authority.issue("server", hosts=("127.0.0.1",))
    tls_key = "".join(server.key.read_text().splitlines()[1:-1])
    home = cluster.servers[0]
    catalog, audit = f"{dsn(home)}?catalog=shop", f"{dsn(home)}?log=shop"
    settings = manager_settings(
        catalog,
        audit={"url": audit},
        auth=auth(previous_secret=SecretStr(OTHER_SECRET[::-1])),
        manager=ServerSettings(
            port=0, metrics_port=0, docs=True, tls=TlsSettings(cert_file=server.cert, key_file=server.key)
        ),
    )
    mine = token("admin")
    app = create_app(settings)
    raised: list[str] = []
    headers = {"Authorization": f"Bearer {mine}"}
    async with (
        listen(app, settings.manager, limits=settings.limits, metrics=app.state.registry) as (listening, _),
        httpx.AsyncClient(verify=authority.context(), headers=headers, timeout=60) as client,
    ):
        client.base_url = httpx.URL(listening.url)
        told = await exercise(client, cluster)
        # What nobody expects, with a secret in its text, its cause and its frames.
        failing = httpx.Response(500)
        for error in (RuntimeError(dsn(home)), psycopg.OperationalError(f"password={PASSWORD}"), ValueError(mine)):

            async def fails(_: Manager, error: Exception = error) -> Any:
                local = dsn(home)  # a frame that holds it
                raise error from KeyError(local)

            monkeypatch.setattr(Manager, "list_jobs", fails)
            failing = await client.get("/api/v1/reshard/jobs")
            assert failing.status_code == 500
            assert failing.json()["error_id"] in logged.getvalue()
            told.append(failing)
        monkeypatch.undo()
        told += [await client.get("/openapi.json"), await client.get("/health")]
        metrics_url = str(listening.metrics_url)
        told.append(await client.get(f"{metrics_url}/metrics"))
        # The servers go away; and a job's runner meets that.
        cluster.servers[2].kill()
        told += [await client.get("/api/v1/shards"), await client.get("/health")]
        body = {"name": "fifth", "primary_endpoint": dsn(cluster.servers[2]).replace("/postgres", "/other")}
        told.append(await client.post("/api/v1/shards", json=body))
        assert told[-1].status_code == 503
        entries = audit_entries(catalog, audit)
        home.kill()
        for method, path in (
            ("GET", "/api/v1/shards"),
            ("POST", "/api/v1/reshard/jobs/1/pause"),
            ("GET", "/health"),
        ):
            told.append(await client.request(method, path, json={"source_shard_id": "first"}))
            assert told[-1].status_code == 503, told[-1].text
        try:
            Manager(catalog)._catalog.load()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not tell
            raised += [str(error), repr(error), "".join(traceback.format_exception(error))]

    secrets = (*SECRETS, OTHER_SECRET[::-1], mine, tls_key, *(tls_key[i : i + 40] for i in range(0, 120, 40)))
    assert len(told) > 80
    for number, answer in enumerate(told):
        assert_clean(f"answer {number}", f"{answer.text}\n{answer.headers}\n{answer.reason_phrase}", secrets)
    assert len(entries) > 50
    assert_clean("the audit log", repr(entries), secrets)
    assert logged.getvalue()
    assert_clean("the log", logged.getvalue(), secrets)
    assert_clean("spans", "".join(span.to_json() for span in spans.get_finished_spans()), secrets)
    shown = [repr(settings), str(settings), print_settings(settings), repr(app), repr(vars(app.state))]
    body = {"name": "n", "primary_endpoint": dsn(home), "replicas": [dsn(home)]}
    made = CreateShardBody.model_validate(body)
    split = SplitBody.model_validate({"source_shard_id": "s", "target_shards": [body]})
    promote = PromoteBody.model_validate({"replica_endpoint": dsn(home)})
    shown += [repr(made), str(made), made.model_dump_json(), repr(split), split.model_dump_json(), repr(promote)]
    # And whatever of ours is still there.
    ours = ("shardlib_ops.api", "shardlib_ops.settings", "shardlib.dsn", "shardlib.topology.model")
    shown += [repr(each) for each in gc.get_objects() if str(type(each).__module__).startswith(ours)]
    assert_clean("a repr", "\n".join([*shown, *raised]), secrets)
    assert raised
    printed = capfd.readouterr()
    assert_clean("what is printed", printed.out + printed.err, secrets)


async def test_s07_16_nothing_of_a_secret_is_kept_with_an_idempotency_key(cluster: LocalCluster) -> None:
    """The catalog holds DSNs where shards are, encrypted or not; beside them no password lies."""
    url = "memory://kept-secrets"
    fill(url)
    async with serving(url) as api:
        body = {"name": "new", "primary_endpoint": dsn(cluster.servers[1], port="1")}
        assert (await api.call("POST", "/api/v1/shards", json=body, key="k")).status_code == 503
        catalog = open_catalog(url)
        kept = b"".join(found.data for found in catalog.list_documents("idempotency").values()).decode()
        catalog.close()
        assert kept
        assert_clean("what is kept", kept, SECRETS)
