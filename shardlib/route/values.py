"""Constants of a statement: where a value comes from, and the key values that a condition leaves possible.

A *formula* is a condition on nodes (columns), reduced to what it says about constants: an atom ("these columns are
one of these rows of values"), all of several formulas, or any of several. It over-approximates the condition: every
row that satisfies the condition satisfies the formula. Built once for each structure of statement; the values are
looked up at each execution.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy.sql.elements import BindParameter

from shardlib.errors import ShardKeyRequired, UnsupportedOperation

if TYPE_CHECKING:
    from shardlib.route.env import Node

__all__ = [
    "AllOf", "AnyOf", "Atom", "Converted", "Fixed", "Formula", "Listed", "One", "Parameter", "Rows", "Supplied",
    "Value", "assignments", "atoms_of", "coverage", "pruned",
]  # fmt: skip


class Supplied:
    """The values of one execution: the statement's own parameters and those given beside it."""

    __slots__ = ("extracted", "given")

    def __init__(self, extracted: Sequence[BindParameter[Any]], given: Mapping[str, Any]) -> None:
        self.extracted = extracted
        self.given = given


class Value(Protocol):
    """A value known at execution."""

    def of(self, supplied: Supplied) -> Any:
        """Look the value up."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A value that belongs to the structure of the statement."""

    value: Any

    def of(self, supplied: Supplied) -> Any:
        """Return the value."""
        return self.value


@dataclass(frozen=True, slots=True)
class Parameter:
    """A bound parameter, found as SQLAlchemy finds it: given by key, else its own value."""

    parameter: BindParameter[Any]
    index: int | None

    def of(self, supplied: Supplied) -> Any:
        """Return the value of this execution.

        Raises:
            ShardKeyRequired: the parameter needs a value and none is given.
        """
        given = supplied.given
        if given:
            key = self.parameter.key
            if key in given:
                return given[key]
        current = self.parameter if self.index is None else supplied.extracted[self.index]
        if current.required:
            raise ShardKeyRequired(
                f"the parameter {current.key!r}, which holds the shard key, has no value",
                f"give it: execute(statement, {{{current.key!r}: ...}})",
            )
        return current.effective_value


@dataclass(frozen=True, slots=True)
class Converted:
    """A value after a conversion that SQL would do the same way; None stays None."""

    value: Value
    convert: Callable[[Any], Any]

    def of(self, supplied: Supplied) -> Any:
        """Convert the value."""
        value = self.value.of(supplied)
        return None if value is None else self.convert(value)


class Rows(Protocol):
    """Rows of values for the nodes of an atom."""

    def rows(self, supplied: Supplied) -> Iterable[tuple[Any, ...]]:
        """Yield each row, as wide as the atom has nodes."""


@dataclass(frozen=True, slots=True)
class One:
    """Rows written out: `= value`, or a list of expressions."""

    values: tuple[tuple[Value, ...], ...]

    def rows(self, supplied: Supplied) -> Iterator[tuple[Any, ...]]:
        """Yield each row."""
        for row in self.values:
            yield tuple(value.of(supplied) for value in row)


@dataclass(frozen=True, slots=True)
class Listed:
    """Rows in the value of one parameter: `IN (...)`, a tuple IN, or `= ANY(array)`."""

    value: Value
    width: int

    def rows(self, supplied: Supplied) -> Iterator[tuple[Any, ...]]:
        """Yield each row. A tuple IN over one column takes bare values as well as 1-tuples, as SQLAlchemy does.

        Raises:
            UnsupportedOperation: the value is an iterator.
        """
        listed = self.value.of(supplied) or ()
        if isinstance(listed, Iterator):
            raise UnsupportedOperation(
                f"a {type(listed).__name__} as the values of IN is read once, and routing would leave nothing of it",
                "give a list",
            )
        for row in listed:
            yield tuple(row) if self.width > 1 else (row,)


@dataclass(frozen=True, slots=True)
class Atom:
    """These nodes, taken together, are one of these rows. A row with a None never matches."""

    nodes: tuple[Node, ...]
    source: Rows


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every part holds."""

    parts: tuple[Formula, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Some part holds."""

    parts: tuple[Formula, ...]


Formula = Atom | AllOf | AnyOf


def atoms_of(formula: Formula, *, certain: bool) -> Iterator[Atom]:
    """Yield the atoms of a formula; with `certain` only those that hold whenever it does (outside any AnyOf)."""
    if isinstance(formula, Atom):
        yield formula
    elif isinstance(formula, AllOf) or not certain:
        for part in formula.parts:
            yield from atoms_of(part, certain=certain)


Position = Callable[["Node"], int | None]
"""Which column of the wanted key a node is equal to, by class; None for none."""


def coverage(formula: Formula, position: Position) -> frozenset[int]:
    """Positions of the wanted key to which a formula gives values on every way through it."""
    if isinstance(formula, Atom):
        return frozenset(p for node in formula.nodes if (p := position(node)) is not None)
    parts = [coverage(part, position) for part in formula.parts]
    if isinstance(formula, AllOf):
        return frozenset().union(*parts)
    return parts[0].intersection(*parts[1:]) if parts else frozenset()


@dataclass(frozen=True, slots=True)
class _Choice:
    """An atom whose nodes are positions of the wanted key (None: a column that does not matter)."""

    positions: tuple[int | None, ...]
    source: Rows


@dataclass(frozen=True, slots=True)
class _Join:
    parts: tuple[Pruned, ...]


@dataclass(frozen=True, slots=True)
class _Union:
    wanted: frozenset[int]
    parts: tuple[Pruned, ...]


Pruned = _Choice | _Join | _Union


def pruned(formula: Formula, position: Position) -> Pruned | None:
    """Keep of a formula what speaks of the wanted key; None when nothing does."""
    wanted = coverage(formula, position)
    if not wanted:
        return None
    if isinstance(formula, Atom):
        return _Choice(tuple(position(node) for node in formula.nodes), formula.source)
    parts = tuple(kept for part in formula.parts if (kept := pruned(part, position)) is not None)
    if isinstance(formula, AnyOf):
        return _Union(wanted, parts)
    return parts[0] if len(parts) == 1 else _Join(parts)


Assignment = dict[int, Any]


def assignments(tree: Pruned, supplied: Supplied, *, exact: bool) -> list[Assignment]:
    """Return the values of the key that a pruned formula leaves possible, unique, in order of appearance.

    A contradiction (`k = 1 AND k = 2`) leaves its first value: no row can match, so any shard answers right, and
    values that SQL calls equal though Python does not are still looked for where one of them lives.

    Args:
        tree: what is said of the key.
        supplied: the values of this execution.
        exact: whether values that differ in Python differ in SQL; else no value is dropped for another.
    """
    if isinstance(tree, _Choice):
        return _unique(_chosen(tree, supplied, exact=exact))
    parts = [assignments(part, supplied, exact=exact) for part in tree.parts]
    if isinstance(tree, _Union):
        wanted = tree.wanted
        return _unique({p: row[p] for p in wanted} for rows in parts for row in rows)
    result = parts[0]
    for rows in parts[1:]:
        if not result or not rows:
            return []
        joined = [{**right, **left} for left in result for right in rows if not exact or _agree(left, right)]
        result = joined or [{**rows[0], **result[0]}]
    return result


def _chosen(choice: _Choice, supplied: Supplied, *, exact: bool) -> Iterator[Assignment]:
    positions = choice.positions
    for row in choice.source.rows(supplied):
        if len(row) != len(positions):
            raise ShardKeyRequired(
                f"{row!r} does not fit the {len(positions)} columns it is compared with",
                "give one value a column",
            )
        if None in row:  # compared with NULL: never true
            continue
        found: Assignment = {}
        fits = True
        for position, value in zip(positions, row, strict=True):
            if position is None:
                continue
            fits = fits and (not exact or position not in found or _may_equal(found[position], value))
            found.setdefault(position, value)
        if fits:
            yield found


def _agree(left: Assignment, right: Assignment) -> bool:
    return all(p not in right or _may_equal(value, right[p]) for p, value in left.items())


def _may_equal(one: Any, other: Any) -> bool:
    """Whether SQL may call two values equal. Of different types, or with and without a time zone: perhaps."""
    if type(one) is not type(other):
        return True
    if isinstance(one, dt.datetime) and (one.tzinfo is None) != (other.tzinfo is None):
        return True
    return bool(one == other)


def _unique(rows: Iterable[Assignment]) -> list[Assignment]:
    seen: set[Any] = set()
    result = []
    for row in rows:
        # A type is part of the mark: 1, True and Decimal(1) are equal in Python and different key bytes.
        mark = tuple(itertools.chain.from_iterable((p, type(row[p]), row[p]) for p in sorted(row)))
        try:
            known = mark in seen
        except TypeError:  # an unhashable value is no shard key either; encoding it says so
            return [row]
        if not known:
            seen.add(mark)
            result.append(row)
    return result
