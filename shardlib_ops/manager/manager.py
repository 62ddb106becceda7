"""The control plane as coroutines: shards and jobs are made, listed and steered here, by the API, the CLI and tests."""

from __future__ import annotations

from shardlib_ops.manager.blocking import BlockingManager
from shardlib_ops.manager.passwords import PlainPasswords
from shardlib_ops.manager.planning import Planning
from shardlib_ops.manager.promotions import Promotions
from shardlib_ops.manager.steering import Steering
from shardlib_ops.manager.targets import Target

__all__ = ["Manager", "Target"]


class Manager(Planning, Steering, Promotions):
    """The control plane of one cluster; several may work at once, since every change is a compare-and-swap.

    Shards are named by name or id everywhere.

    Args:
        url: the catalog, such as `etcd://127.0.0.1:2379/shop`.
        timeout_s: limit for one answer of the catalog, in seconds.
        plain_passwords: what becomes of a password that a new endpoint holds in plain text: `allow`, `encrypt` or
            `refuse`; left out: what `SHARDLIB_ENDPOINTS__PLAIN_PASSWORDS` says, else `allow`.
    """

    @classmethod
    def sync(
        cls, url: str, *, timeout_s: float = 5.0, plain_passwords: PlainPasswords | None = None
    ) -> BlockingManager:
        """The blocking twin, for scripts."""
        return BlockingManager(cls(url, timeout_s=timeout_s, plain_passwords=plain_passwords))
