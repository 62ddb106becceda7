"""Put virtual nodes into the arrays of a ring without sorting them again."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping

__all__ = ["insert_nodes", "turned"]


def insert_nodes(tokens: array[int], owners: array[int], nodes: Mapping[int, int]) -> tuple[array[int], array[int]]:
    """Tokens and owners with some virtual nodes more.

    Args:
        tokens: strictly rising.
        owners: as many.
        nodes: token to owner; none of the tokens is there yet.
    """
    grown, grown_owners = array("Q"), array("I")
    done = 0
    for token in sorted(nodes):
        at = bisect_left(tokens, token)
        grown.extend(tokens[done:at])
        grown_owners.extend(array("I", owners[done:at]))
        grown.append(token)
        grown_owners.append(nodes[token])
        done = at
    grown.extend(tokens[done:])
    grown_owners.extend(array("I", owners[done:]))
    return grown, grown_owners


def turned(tokens: array[int], owners: array[int]) -> tuple[array[int], array[int]]:
    """Tokens and owners in order again, after the first token went back past 0 or the last went on past 2**64."""
    if len(tokens) < 2 or tokens[0] < tokens[-1]:
        return tokens, owners
    start = 1 if tokens[0] > tokens[1] else -1
    return tokens[start:] + tokens[:start], owners[start:] + owners[:start]
