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


def positive_or_null(config: Any, where: str, name: str) -> None:
    value = getattr(config, name)
    key = f"{where}.{name}" if where else name
    require(value is None or value > 0, f"{key}={value}: must be above 0 or null")


def fraction(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{where}.{name}={value}: must be between 0 and 1")
