"""What a labeling run shows while it works."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rlaif.engines.base import Engine, Failure, OptionMass, OptionRequest
from rlaif.gold import gold_score
from rlaif.progress import progress

_JUDGED_EVERY = 10
"""Beyond the first thousand, one verdict in so many is compared with the gold judge: judging takes time too."""

_REFRESH_S = 0.2


class LiveView:
    """Progress with rate, time left and time of the end; tokens a second, money, unusable verdicts, agreement so far.

    Use as a context manager.

    Args:
        total: how many answers are expected; None where that is not known.
        what: what is being done, and in what unit.
        engine: whose spending is shown, if it keeps account of it.
        minimum: option mass below which a verdict is not usable.
        gold: a gold judge to compare pairwise verdicts with; without one no agreement is shown.
    """

    def __init__(
        self, total: int | None, what: tuple[str, str], engine: Engine, minimum: float = 0.0, gold: str | None = None
    ) -> None:
        self._bar = progress(total, *what)
        self._engine, self._minimum, self._gold = engine, minimum, gold
        self._started: float | None = None
        self._shown = 0.0
        self.skipped = 0
        """Answers that were known."""
        self._answers = self._tokens = self._unusable = self._judged = 0
        self._agreed = 0.0

    def __enter__(self) -> LiveView:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def known(self, count: int) -> None:
        """Answers that need not be asked; they count as done, but not towards the rate."""
        self.skipped += count
        self._bar.initial += count
        self._bar.n += count

    def add(self, request: Any, answer: Any) -> None:
        """One answer."""
        if self._started is None:
            self._started = time.monotonic()
        self._answers += 1
        self._tokens += (getattr(answer, "prompt_tokens", 0) or 0) + (getattr(answer, "completion_tokens", 0) or 0)
        if isinstance(answer, Failure):
            self._unusable += 1
        elif isinstance(answer, OptionMass):
            known = [mass for mass in answer.masses if mass is not None]
            if len(known) < len(answer.masses) or answer.mass < self._minimum:
                self._unusable += 1
            elif self._answers <= 1000 or self._answers % _JUDGED_EVERY == 0:
                self._judge(request, known)
        now = time.monotonic()
        if now - self._shown > _REFRESH_S:
            self._shown = now
            self._bar.set_postfix_str(self.figures(), refresh=False)
        self._bar.update()

    def _judge(self, request: OptionRequest, masses: list[float]) -> None:
        meta: Mapping[str, Any] = request.meta or {}
        if self._gold is None or "first" not in meta:
            return
        truth = gold_score(self._gold, meta["first"]) - gold_score(self._gold, meta["second"])
        if truth:
            difference = masses[0] - masses[1]
            self._judged += 1
            self._agreed += 0.5 if difference == 0 else float((difference > 0) == (truth > 0))

    def figures(self) -> str:
        """What is known so far, in a few words."""
        parts = []
        seconds = time.monotonic() - (self._started or time.monotonic())
        if self._tokens and seconds > 1:
            parts.append(f"{_short(self._tokens / seconds)} tok/s")
        usd = getattr(self._engine.spent, "usd", 0)
        if usd:
            parts.append(f"${usd:.2f}")
        if self._answers:
            parts.append(f"{self._unusable / self._answers:.1%} unusable")
        if self._judged:
            parts.append(f"{self._agreed / self._judged:.0%} like {self._gold}")
        left = (self._bar.total or 0) - self._bar.n
        if seconds > 60 and left > 0:
            parts.append(time.strftime("ends %H:%M", time.localtime(time.time() + left * seconds / self._answers)))
        return ", ".join(parts)


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def summary(quality: Mapping[str, Any]) -> str:
    """A labeling run in a few lines: what came out, what was lost and why, how far the labels can be trusted."""
    lines = [f"{quality['n_preferences']} preferences from {quality['n_pairs']} pairs"]
    if quality.get("dropped"):
        lines.append("dropped: " + ", ".join(f"{count} {reason}" for reason, count in quality["dropped"].items()))
    if "n_verdicts" in quality:
        lost = {"uncovered": quality["uncovered"], "unlisted": quality["unlisted"], **quality["failed_reasons"]}
        missing = ", ".join(f"{count} {reason}" for reason, count in lost.items() if count)
        mass = quality["option_mass_mean"]
        lines.append(
            f"verdicts: {quality['n_verdicts']}, missing: {missing or 'none'}"
            + (f"; mean option mass {mass:.2f}" if mass is not None else "")
        )
        by_method = quality["methods"]
        if set(by_method) - {"logprob"}:
            lines.append("found by " + ", ".join(f"{name}: {count}" for name, count in by_method.items()))
    if quality.get("truncated"):
        lines.append(f"WARNING: {quality['truncated']} verdicts saw a long text without its middle")
    if any(quality.get("saved", {}).values()):
        lines.append(
            "not asked: " + ", ".join(f"{count} ({what})" for what, count in quality["saved"].items() if count)
        )
    if quality.get("verdicts_per_s"):
        tokens = f", {_short(quality['prompt_tokens'])} prompt tokens" if quality["prompt_tokens"] else ""
        lines.append(f"speed: {quality['verdicts_per_s']:.1f} verdicts/s{tokens}")
    if "same_position_rate" in quality:
        lines.append(
            f"position: the same in both orders for {quality['same_position_rate']:.0%} of pairs, "
            f"bias {quality['position_bias']:+.2f} logits"
        )
    if "agreement" in quality:
        low, high = quality["agreement_low"], quality["agreement_high"]
        interval = "" if low is None else f" [{low:.1%}, {high:.1%}]"
        lines.append(
            f"agreement with {quality['gold']}: {quality['agreement']:.1%}{interval}; "
            f"the longer one wins: {quality['longer_wins']:.1%}"
        )
        if low is None or low <= 0.5:
            lines.append("WARNING: no better than chance; do not train on these labels")
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])
