"""How commands reach a cluster: its catalog directly, or a manager by HTTP. They need not know which."""

from __future__ import annotations

from shardlib_ops.client.base import Begun, Client, Told
from shardlib_ops.client.direct import DirectClient, os_user
from shardlib_ops.client.errors import ManagerRefused, ManagerUnavailable

__all__ = ["Begun", "Client", "DirectClient", "ManagerRefused", "ManagerUnavailable", "Told", "os_user"]
