"""A FastAPI service: the tenant in the path is the shard key, and each request has one session.

    python examples/03_fastapi.py                    # starts a cluster of its own and sends itself requests
    python examples/03_fastapi.py etcd://host:2379/shop

To serve it: SHARDLIB_CATALOG=etcd://host:2379/shop uvicorn --app-dir examples --factory 03_fastapi:make_app
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import AsyncShardedEngine, AsyncShardedSession, errors


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "example_notes"

    tenant: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    text: Mapped[str]


class NewNote(BaseModel):
    text: str


class ShownNote(BaseModel):
    id: uuid.UUID
    text: str


async def one_session(tenant: str, request: Request) -> AsyncIterator[AsyncShardedSession]:
    """The session of a request, pinned to the tenant in its path: one shard, one transaction."""
    engine: AsyncShardedEngine = request.app.state.engine
    async with engine.session(tenant) as session:
        yield session


TenantSession = Annotated[AsyncShardedSession, Depends(one_session)]


def make_app(url: str | None = None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with await AsyncShardedEngine.open(url or os.environ["SHARDLIB_CATALOG"]) as engine:
            await engine.create_all(Base.metadata)
            app.state.engine = engine
            yield

    app = FastAPI(title="Notes", lifespan=lifespan)

    @app.exception_handler(errors.RetryableError)
    async def try_again(_request: Request, error: Exception) -> JSONResponse:
        """Nothing was applied: the client may send the request again."""
        return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": "1"})

    @app.post("/{tenant}/notes", status_code=201)
    async def add(tenant: str, new: NewNote, session: TenantSession) -> ShownNote:
        note = Note(tenant=tenant, text=new.text)
        session.add(note)
        await session.flush()
        shown = ShownNote(id=note.id, text=note.text)
        await session.commit()
        return shown

    @app.get("/{tenant}/notes")
    async def all_notes(tenant: str, session: TenantSession) -> list[ShownNote]:
        rows = await session.scalars(select(Note).where(Note.tenant == tenant).order_by(Note.text))
        return [ShownNote(id=row.id, text=row.text) for row in rows]

    @app.get("/{tenant}/notes/{note_id}")
    async def one_note(tenant: str, note_id: uuid.UUID, session: TenantSession) -> ShownNote:
        note = await session.get(Note, (tenant, note_id))
        if note is None:
            raise HTTPException(404, f"tenant {tenant!r} has no note {note_id}")
        return ShownNote(id=note.id, text=note.text)

    return app


async def main(url: str) -> None:
    """Send requests to the service, inside this process."""
    app = make_app(url)
    tenants = [f"tenant-{uuid.uuid4().hex[:8]}" for _ in range(6)]
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://notes") as client,
    ):
        texts = ["buy milk", "call the bank"]
        answers = await asyncio.gather(
            *(client.post(f"/{tenant}/notes", json={"text": text}) for tenant in tenants for text in texts)
        )
        assert [answer.status_code for answer in answers] == [201] * 12

        for tenant in tenants:
            found = (await client.get(f"/{tenant}/notes")).json()
            assert [note["text"] for note in found] == texts
            one = await client.get(f"/{tenant}/notes/{found[0]['id']}")
            assert one.json()["text"] == "buy milk"
        missing = await client.get(f"/{tenants[0]}/notes/{uuid.uuid4()}")
        assert missing.status_code == 404

        shards = {app.state.engine.shard_for(tenant).name for tenant in tenants}
        print(f"12 notes of {len(tenants)} tenants on {len(shards)} shards, written and read over HTTP")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("SHARDLIB_CATALOG")
    if url:
        asyncio.run(main(url))
    else:
        from shardlib_ops import LocalCluster

        with LocalCluster(shards=3) as cluster:
            asyncio.run(main(cluster.url))
