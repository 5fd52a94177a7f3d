"""Checks that settings share: each raises ``ValueError`` with what is wrong and what would be right."""

from __future__ import annotations

import math
from typing import Any


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0 and math.isfinite(value), f"{where}.{name}={value}: must be a finite number above 0")


_TEMPLATES_OWN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}


def template_variables(config: Any, where: str, name: str) -> None:
    """A mapping of variables for a chat template, as plain values."""
    for variable, value in getattr(config, name).items():
        key = f"{where}.{name}: {variable!r}"
        require(str(variable).isidentifier(), f"{key}: is no name that a template could use")
        require(variable not in _TEMPLATES_OWN, f"{key}: is made here and can't be set")
        plain = isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
        require(plain, f"{key}: must be true, false, a number or text, not {value!r}")


def positive_or_null(config: Any, where: str, name: str) -> None:
    value = getattr(config, name)
    key = f"{where}.{name}" if where else name
    require(value is None or value > 0, f"{key}={value}: must be above 0 or null")


def fraction(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{where}.{name}={value}: must be between 0 and 1")
