"""A full disk is nobody's fault and passes: said so that the operator knows which one it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import errors as pg

from shardlib_ops.reshard.world import Lost

__all__ = ["no_room"]


@contextmanager
def no_room(shard: str) -> Iterator[None]:
    """What is written inside goes to this shard.

    Raises:
        Lost: its disk is full. What was being written is not there; the same is tried again later.
    """
    try:
        yield
    except pg.DiskFull as error:
        raise Lost(
            f"the disk of shard {shard!r} is full ({str(error).strip().partition(chr(10))[0]}): make room there, and "
            "the job goes on by itself, or cancel it"
        ) from error
