"""The HTTP gateway: statements of programs in other languages, routed and fenced as those of Python are."""

from shardlib_ops.gateway.app import Gateway, create_gateway

__all__ = ["Gateway", "create_gateway"]
