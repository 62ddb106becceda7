"""The shop's cluster and facades, for the session tests."""

from tests.support.shop import facade, keys, shop

__all__ = ["facade", "keys", "shop"]
