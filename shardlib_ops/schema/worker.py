"""`python -m shardlib_ops.schema.worker alembic.ini`: runs migrations as it is told, one shard after the other.

A process of its own, since Alembic keeps its context in its modules, so that two shards at once need two of them; and
since the application's migrations print, log, and may hang. It ends when its starter is gone, after the shard that it
is at.
"""

from __future__ import annotations

import os
import sys

import msgspec

from shardlib_ops.schema.migrate import carry_out
from shardlib_ops.schema.order import Order

__all__ = ["main"]


def main(config: str) -> None:
    """Read orders from standard input and write an answer to each on standard output, until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a migration prints is for people
    for line in sys.stdin.buffer:
        answer = carry_out(config, msgspec.json.decode(line, type=Order))
        try:
            answers.write(msgspec.json.encode(answer) + b"\n")
            answers.flush()
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main(sys.argv[1])
