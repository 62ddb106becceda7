"""The manager's HTTP API: shards and resharding jobs by calls that any program can make."""

from shardlib_ops.api.app import create_app

__all__ = ["create_app"]
