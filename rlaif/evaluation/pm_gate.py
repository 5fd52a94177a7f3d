"""May a preference model guide a policy? Only one that is shown to know more than a coin."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.config import Gate, PMConfig
from rlaif.evaluation.statistics import Estimate
from rlaif.records import UserError, read_json

log = logging.getLogger("rlaif")

PM_METRICS = "pm_metrics.json"
"""Beside a PM's folder: what it was measured at on held-out preferences."""
_CHANCE = 0.5


class PMGateError(UserError):
    """A PM would guide a policy by noise."""


@dataclass(frozen=True)
class PMGate:
    """What held-out preferences say of a PM; ``passed`` is None where nothing is known."""

    folder: Path
    passed: bool | None
    accuracy: Estimate | None
    gain_over_longer: Estimate | None
    why: str
    """Why it did not pass, or why nothing is known."""
    advice: str

    @property
    def text(self) -> str:
        """The verdict in one sentence."""
        if self.accuracy is None:
            return f"the preference model in {self.folder}: not measured ({self.why})"
        figures = f"accuracy {_shown(self.accuracy)} on {_prompts(self.accuracy.n)}"
        end = f"{self.why}; {self.advice}" if self.passed is False else "above chance"
        return f"the preference model in {self.folder}: {figures}, {end}"

    @property
    def not_above_length(self) -> str | None:
        """A sentence where the PM is not shown to know more than which completion is longer."""
        gain = self.gain_over_longer
        if gain is None or gain.low > 0:
            return None
        return (
            f"the preference model in {self.folder} is not shown to beat the rule that the longer completion wins: "
            f"its accuracy less that rule's is {_shown(gain, signed=True)} on the same pairs of {_prompts(gain.n)}"
        )

    def tell(self) -> None:
        """Log the verdict, and what it says of length."""
        if self.passed:
            log.info("pm: %s", self.text)
        else:
            log.warning("WARNING: %s", self.text)
        if self.not_above_length:
            log.warning("WARNING: %s", self.not_above_length)

    def flat(self) -> dict[str, str | float | int | None]:
        """What the metrics of a policy say of the PM that guided it."""
        verdict = {True: "passed", False: "failed", None: "unknown"}[self.passed]
        result: dict[str, str | float | int | None] = {"guide_gate": verdict}
        for name, estimate in (("accuracy", self.accuracy), ("gain_over_longer", self.gain_over_longer)):
            if estimate is not None:
                result |= estimate.flat(f"guide_{name}")
        return result


def examine_pm(folder: Path, config: PMConfig) -> PMGate:
    """Hold a PM's recorded metrics against ``pm.min_accuracy`` and chance.

    Above chance is an accuracy whose 95 % interval, in which prompts are independent, ends above one half: the rule
    that labels are held to, with an error of at most 2.5 % for a PM that knows nothing, however few the prompts.
    """
    try:
        metrics = _read_metrics(folder)
    except UserError as error:
        return PMGate(folder, None, None, None, str(error), "")
    accuracy = _estimate(metrics, "accuracy")
    if accuracy is None:
        reason = f"no {PM_METRICS} with an accuracy in it or beside it"
        return PMGate(folder, None, None, None, reason, "")
    why, minimum = "", config.min_accuracy
    if accuracy.low <= _CHANCE:
        why = "less often right than a coin" if accuracy.high < _CHANCE else "not shown to be above chance (50%)"
    elif minimum is not None and accuracy.value < minimum:
        why = f"below pm.min_accuracy={minimum}"
    return PMGate(folder, not why, accuracy, _estimate(metrics, "gain_over_longer"), why, _advice(accuracy))


def hold_to_gate(folder: Path, config: PMConfig, method: str) -> PMGate:
    """Examine the PM that is to guide ``method``.

    Raises:
        PMGateError: with ``pm.gate=stop``, if it did not pass, or is not measured although ``pm.min_accuracy`` is set.
    """
    found = examine_pm(folder, config)
    unmet = found.passed is False or (found.passed is None and config.min_accuracy is not None)
    if unmet and config.gate is Gate.stop:
        raise PMGateError(
            f"pm.gate=stop: {method} would be guided by {found.text}; pm.gate=warn goes on with this preference model"
        )
    found.tell()
    return found


def prompts_needed(accuracy: Estimate) -> int | None:
    """Held-out prompts on which this accuracy would be above chance, as its interval shrinks with their root."""
    above = accuracy.value - _CHANCE
    if above <= 0 or not math.isfinite(accuracy.low):
        return None
    return math.ceil(accuracy.n * ((accuracy.value - accuracy.low) / above) ** 2)


def _advice(accuracy: Estimate) -> str:
    needed = prompts_needed(accuracy)
    if needed is None or needed <= accuracy.n:
        return "more or better preferences, or other settings of pm, may mend that"
    return (
        f"an accuracy of {accuracy.value:.1%} shows on about {needed:,} validation prompts (data.validation_fraction); "
        "else more or better preferences, or other settings of pm, may mend that"
    )


def _read_metrics(folder: Path) -> Mapping[str, Any]:
    for file in (folder / PM_METRICS, folder.resolve().parent / PM_METRICS):
        if file.is_file():
            found = read_json(file)
            if not isinstance(found, dict):
                raise UserError(f"{file}: not a JSON object")
            return found
    return {}


def _estimate(metrics: Mapping[str, Any], name: str) -> Estimate | None:
    """An estimate of a metrics file; None unless it is one. An absent bound is an infinite one."""
    value, n, low, high = (metrics.get(name + suffix) for suffix in ("", "_n", "_low", "_high"))
    numbers = [x for x in (value, n, low, high) if x is not None]
    if value is None or n is None or any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
        return None
    if not all(map(math.isfinite, numbers)):
        return None
    return Estimate(value, int(n), -math.inf if low is None else low, math.inf if high is None else high)


def _shown(estimate: Estimate, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if not math.isfinite(estimate.low + estimate.high):
        return f"{estimate.value:{sign}.1%} [no interval]"
    return f"{estimate.value:{sign}.1%} [{estimate.low:{sign}.1%}, {estimate.high:{sign}.1%}]"


def _prompts(n: int) -> str:
    return f"{n:,} held-out prompt{'s' * (n != 1)}"
