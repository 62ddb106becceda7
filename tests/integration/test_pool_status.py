"""`engine.pool_status`: the figures of the pools, on both faces of the engine."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from tests.support.models import Customer


def test_pool_status_follows_a_connection_from_use_to_idle(facade: Any) -> None:
    assert facade.engine.pool_status() == []

    def used(session: Any) -> list[Any]:
        session.scalars(select(Customer).where(Customer.tenant_id == "t")).all()
        status: list[Any] = facade.engine.pool_status()
        return status

    home = facade.engine.shard_for("t").id
    (busy,) = facade.session(used, "t")
    assert (busy.shard, busy.in_use, busy.idle) == (home, 1, 0)
    (after,) = facade.engine.pool_status()
    assert (after.shard, after.size, after.in_use, after.idle) == (home, 1, 0, 1)
