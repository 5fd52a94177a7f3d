"""Checks that settings share: each raises ``ValueError`` with what is wrong and what would be right."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

_LARGEST_FLOAT = 3.4e38
"""The largest number in single precision, in which models compute."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers, said to the user by ``str``.

    ``null``: there may also be none. ``largest``: a whole number above it is a typing mistake.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    null: bool = False
    largest: int = 2**31 - 1

    def of(self, *names: str) -> dict[str, Bounds]:
        """These bounds for the settings of these names."""
        return dict.fromkeys(names, self)

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"between {self.least} and {self.most}{' or null' if self.null else ''}"
        parts = [
            *([f"above {self.above}"] if self.above is not None else []),
            *([f"{self.least} or more"] if self.least is not None else []),
            *([f"at most {self.most}"] if self.most is not None else []),
            *([f"below {self.below}"] if self.below is not None else []),
        ]
        return " and ".join(parts) + (", or null" if self.least is not None else " or null") * self.null


ANY = Bounds()
NOT_NEGATIVE = Bounds(least=0)
POSITIVE = Bounds(above=0)
FRACTION = Bounds(least=0, most=1)
SHARE = Bounds(above=0, most=1)
BELOW_HALF = Bounds(least=0, below=0.5)


_UNCOUNTED = ("_idle", "_inputs")


class Settings:
    """Base of every group of settings: takes each field to its type, or refuses it.

    Text becomes the choice that it names, a mapping the group that it describes. Numbers are finite and within the
    field's bounds, which are ``NOT_NEGATIVE`` unless ``_bounds`` of the class says otherwise.
    """

    _group = ""
    """Where these settings stand on the command line."""
    _bounds: Mapping[str, Bounds] = {}
    _idle: frozenset[str] = frozenset()
    """Settings that change no number of what is made, only its cost, or what is told of it on the way."""
    _inputs: frozenset[str] = frozenset()
    """Settings that name what a stage counts among its inputs, by its content."""

    def idle(self) -> frozenset[str]:
        """What no fingerprint counts: of this class and of those that it extends."""
        return frozenset().union(*(vars(base).get(kind, ()) for base in type(self).__mro__ for kind in _UNCOUNTED))

    def extensible(self) -> frozenset[str]:
        """Settings of which a run with more goes on, exactly, from where one with less was interrupted."""
        return frozenset()

    def __post_init__(self) -> None:
        for name, kind, bounds in _fields(typing.cast(Any, type(self))):
            key = f"{self._group}.{name}" if self._group else name
            setattr(self, name, _checked(getattr(self, name), kind, key, bounds))


@functools.cache
def _fields(settings: Any) -> list[tuple[str, Any, Bounds]]:
    """Name, type and bounds of every field."""
    hints = typing.get_type_hints(settings)
    bounds: dict[str, Bounds] = {}
    for base in reversed(settings.__mro__):
        bounds |= vars(base).get("_bounds", {})
    fields = dataclasses.fields(settings)
    return [(field.name, hints[field.name], bounds.get(field.name, NOT_NEGATIVE)) for field in fields]


def _checked(value: Any, kind: Any, key: str, bounds: Bounds) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _checked(value, inner, key, dataclasses.replace(bounds, null=True))
    if origin is list:
        require(isinstance(value, list | tuple), f"{key}={_shown(value)}: must be a list")
        return [_checked(item, arguments[0], f"{key}[{index}]", bounds) for index, item in enumerate(value)]
    if origin is dict:
        require(isinstance(value, Mapping), f"{key}={_shown(value)}: must be a mapping")
        return {name: _checked(item, arguments[1], f"{key}.{name}", bounds) for name, item in value.items()}
    if kind is Any:
        _check_floats(value, key)
        return value
    if dataclasses.is_dataclass(kind):
        return _group(value, kind, key)
    if issubclass(kind, Enum):
        return _choice(value, kind, key)
    if kind is bool:
        require(isinstance(value, bool), f"{key}={_shown(value)}: must be true or false")
        return value
    if kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        require(isinstance(value, str), f"{key}={_shown(value)}: must be a text")
        require("\0" not in value, f"{key}: holds a NUL character")
        return value
    return _number(value, kind, key, bounds)


def _number(value: Any, kind: type, key: str, bounds: Bounds) -> Any:
    whole = kind is int
    number = not isinstance(value, bool) and isinstance(value, numbers.Integral if whole else numbers.Real)
    require(number, f"{key}={_shown(value)}: must be a {'whole ' if whole else ''}number")
    largest = max(bounds.largest, bounds.most or 0) if whole else _LARGEST_FLOAT
    require(isinstance(value, int) or math.isfinite(value), f"{key}={value}: must be a finite number {bounds}".rstrip())
    require(value in bounds, f"{key}={_shown(value)}: must be {bounds}")
    require(abs(value) <= largest, f"{key}={_shown(value)}: must be at most {largest}")
    return int(value) if whole else float(value)


def _shown(value: Any) -> str:
    """A value for a message."""
    if isinstance(value, int) and abs(value) >= 10**15:
        return f"{'-' if value < 0 else ''}10^{math.log10(abs(value)):.0f}"
    text = str(value) if isinstance(value, numbers.Number) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_floats(value: Any, key: str) -> None:
    """Refuse what is not finite among the numbers that a list or a mapping of the user's holds."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_floats(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_floats(item, key)
    elif isinstance(value, float):
        require(math.isfinite(value), f"{key}={value}: must be a finite number")


def _group(value: Any, kind: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        known = {field.name for field in dataclasses.fields(kind)}
        unknown = sorted(str(name) for name in value if name not in known)
        require(not unknown, f"{key}: has no setting {', '.join(unknown)} (there are {', '.join(sorted(known))})")
        return kind(**value)
    require(isinstance(value, kind), f"{key}={_shown(value)}: must be a {kind.__name__} or a mapping")
    return value


def _choice(value: Any, kind: type[Enum], key: str) -> Enum:
    if isinstance(value, kind):
        return value
    values = {choice.value: choice for choice in kind}
    name = value if isinstance(value, str) and not isinstance(value, Enum) else None
    require(name in values, f"{key}={_shown(value)}: must be one of {', '.join(values)}")
    return values[name]


_TEMPLATES_OWN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}


def template_variables(config: Any, where: str, name: str) -> None:
    """A mapping of variables for a chat template, as plain values."""
    for variable, value in getattr(config, name).items():
        key = f"{where}.{name}: {variable!r}"
        require(str(variable).isidentifier(), f"{key}: is no name that a template could use")
        require(variable not in _TEMPLATES_OWN, f"{key}: is made here and can't be set")
        require(isinstance(value, bool | int | float | str), f"{key}: must be true, false, a number or text")
