"""What an option may be, as tables of rules, and the one error that says so. Pure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardlib.errors import InvalidArgument

__all__ = [
    "FLAG", "FUNCTION", "PATH", "PRINTABLE", "Rule", "check", "check_fields", "either", "has_method", "instance",
    "listing", "seconds", "whole",
]  # fmt: skip

_LONGEST_S: Final = 10**8


@dataclass(frozen=True, slots=True)
class Rule:
    """What one option may be.

    Attributes:
        allowed: the end of the error's message.
        fits: whether a value is that. Asked for a value of any type.
    """

    allowed: str
    fits: Callable[[Any], bool]


FLAG: Final = Rule("True or False", lambda value: isinstance(value, bool))
PATH: Final = Rule(
    "a path, as a string or a Path", lambda value: isinstance(value, str | os.PathLike) and bool(os.fspath(value))
)
PRINTABLE: Final = Rule("printable text", lambda value: isinstance(value, str) and value.isprintable())
FUNCTION: Final = Rule("a function", callable)


def whole(least: int) -> Rule:
    """A whole number. True and False are none."""
    return Rule(
        f"a whole number, at least {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
    )


def seconds(*, zero: bool = False, most: float = _LONGEST_S) -> Rule:
    """A time in seconds, whole or not; `nan` is none."""
    bound = "" if most >= _LONGEST_S else f" and at most {most:g}"

    def fits(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 <= value <= most and (zero or value > 0)

    return Rule(f"seconds, {'0 or more' if zero else 'more than 0'}{bound}", fits)


def instance(kind: type, allowed: str) -> Rule:
    """A value of a class."""
    return Rule(allowed, lambda value: isinstance(value, kind))


def has_method(name: str, allowed: str) -> Rule:
    """A value with a method of that name."""
    return Rule(allowed, lambda value: callable(getattr(value, name, None)))


def listing(allowed: str, of: type = object) -> Rule:
    """Something that can be gone through again and again; a string, which would give its letters, is none."""

    def fits(value: Any) -> bool:
        several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
        # An iterator gives its values once: looking at them here would use them up.
        return several and iter(value) is not value and all(isinstance(each, of) for each in value)

    return Rule(allowed, fits)


def either(rule: Rule, *others: object) -> Rule:
    """What a rule says, or one of these values themselves."""
    shown = " or ".join(map(repr, others))
    return Rule(f"{rule.allowed}, or {shown}", lambda value: any(value is one for one in others) or rule.fits(value))


def check(rules: Mapping[str, Rule], values: Mapping[str, object]) -> None:
    """Refuse the first value that is not what its rule says. A value without a rule may be anything.

    Raises:
        InvalidArgument: it names the option, the value, and what is expected.
    """
    for name, value in values.items():
        rule = rules.get(name)
        if rule is not None and not rule.fits(value):
            raise InvalidArgument(name, value, rule.allowed)


def check_fields(rules: Mapping[str, Rule], options: object) -> None:
    """`check` for an object that carries the options as attributes."""
    check(rules, {name: getattr(options, name) for name in rules})
