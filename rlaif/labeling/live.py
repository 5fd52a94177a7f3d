"""What a labeling run shows while it works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rlaif.engines.base import CONTENT_FILTER, Engine, Failure, OptionMass, OptionRequest
from rlaif.gold import gold_score
from rlaif.labeling.verdicts import SAY_THE_REST
from rlaif.progress import progress

if TYPE_CHECKING:
    from rlaif.labeling.audit import Comparison

_JUDGED_EVERY = 10
"""Beyond the first thousand, one verdict in so many is compared with the truth: judging takes time too."""

_REFRESH_S = 0.2
UNLISTED = 0.05
"""Beyond this share of verdicts that the listed tokens leave open, the summary says what to do."""
_RATE_S = 5
"""So long a rate is measured before it foretells the end."""


class Truth(NamedTuple):
    """What verdicts are compared with while they come in. ``prefers``: above 0 is the first text, 0 is neither."""

    name: str
    prefers: Callable[[str, str], float]


def agreement_with_gold(gold: str) -> Truth:
    """A gold judge."""
    return Truth(gold, lambda first, second: gold_score(gold, first) - gold_score(gold, second))


def agreement_with_people(comparisons: Iterable[Comparison]) -> Truth:
    """What people said of labelled pairs; pairs of the same two texts on which they differ count as neither."""
    said: dict[tuple[str, str], int] = {}
    for row in comparisons:
        known = said.setdefault((row.a, row.b), row.truth)
        said[row.a, row.b] = row.truth if known == row.truth else 0
    return Truth("people", lambda first, second: said.get((first, second), 0) - said.get((second, first), 0))


class LiveView:
    """Progress with rate, time left and time of the end; tokens a second, money, unusable verdicts, agreement so far.

    Use as a context manager.

    Args:
        total: how many answers are expected; None where that is not known.
        what: what is being done, and in what unit.
        engine: whose spending is shown, if it keeps account of it.
        minimum: option mass below which a verdict is not usable.
        truth: what to compare verdicts on two completions with; without it no agreement is shown.
        prompts: how many there are; where ``total`` is not known, it is estimated from what those so far have taken.
    """

    def __init__(
        self,
        total: int | None,
        what: tuple[str, str],
        engine: Engine,
        minimum: float = 0.0,
        truth: Truth | None = None,
        prompts: int = 0,
    ) -> None:
        self._bar = progress(total, *what)
        self._estimated, self._prompts, self._seen, self._asked = total is None, prompts, 0, 0
        self._engine, self._minimum, self._truth = engine, minimum, truth
        self._started: float | None = None
        self._waited = engine.waited_s
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

    def prompt(self, requests: int) -> None:
        """One prompt more was looked at, and so much of it is asked now."""
        self._seen += 1
        self._asked += requests

    def add(self, request: Any, answer: Any) -> None:
        """One answer."""
        if self._started is None:
            self._started = time.monotonic()
        self._skip_outages()
        self._answers += 1
        # Of rationales and likelihoods ``tokens`` are those of the completion.
        for kind in ("prompt_tokens", "completion_tokens", "tokens"):
            self._tokens += getattr(answer, kind, 0) or 0
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
            if self._estimated and self._prompts and self._seen:
                self._bar.total = max(self._asked * self._prompts // self._seen, self._bar.n + 1)
            self._bar.set_postfix_str(self.figures(), refresh=False)
        self._bar.update()

    def _skip_outages(self) -> None:
        """Time in which the server was down says nothing of how fast it is."""
        waited, self._waited = self._engine.waited_s - self._waited, self._engine.waited_s
        if waited and self._started is not None:
            self._started += waited
            self._bar.last_print_t += waited

    def _judge(self, request: OptionRequest, masses: list[float]) -> None:
        meta: Mapping[str, Any] = request.meta or {}
        shown = meta.get("completions") or [meta[name] for name in ("first", "second") if name in meta]
        if self._truth is None or len(shown) != 2:
            return
        truth = self._truth.prefers(*shown)
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
        if self._judged and self._truth is not None:
            parts.append(f"{self._agreed / self._judged:.0%} like {self._truth.name}")
        left = (self._bar.total or 0) - self._bar.n
        if seconds > _RATE_S and left > 0:
            end = time.localtime(time.time() + left * seconds / self._answers)
            parts.append(time.strftime("round ends %H:%M" if self._estimated else "ends %H:%M", end))
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
        kept = {name: quality.get(name, 0) for name in ("uncovered", "unlisted", CONTENT_FILTER)}
        lost = {**kept, **quality["failed_reasons"]}
        missing = ", ".join(f"{count} {reason}" for reason, count in lost.items() if count)
        mass = quality["option_mass_mean"]
        lines.append(
            f"verdicts: {quality['n_verdicts']}, missing: {missing or 'none'}"
            + (f"; mean option mass {mass:.2f}" if mass is not None else "")
        )
        by_method = quality["methods"]
        if set(by_method) - {"logprob"}:
            lines.append("found by " + ", ".join(f"{name}: {count}" for name, count in by_method.items()))
        if quality["unlisted"] > UNLISTED * quality["n_verdicts"]:
            share = quality["unlisted"] / quality["n_verdicts"]
            lines.append(
                f"WARNING: {share:.0%} of the verdicts are left open by the tokens that the server lists; "
                f"{SAY_THE_REST}"
            )
    if quality.get("n_partial"):
        lines.append(
            f"{quality['n_partial']} pairs are labelled by some of their principles (missing weight, over all pairs: "
            f"{quality['missing_weight_mean']:.1%})"
        )
    if quality.get("truncated"):
        lines.append(f"WARNING: {quality['truncated']} verdicts saw a long text without its middle")
    if any(quality.get("saved", {}).values()):
        lines.append(
            "not asked: " + ", ".join(f"{count} ({what})" for what, count in quality["saved"].items() if count)
        )
    if quality.get("verdicts_per_s"):
        tokens = f", {_short(quality['prompt_tokens'])} prompt tokens" if quality["prompt_tokens"] else ""
        lines.append(f"speed: {quality['verdicts_per_s']:.1f} verdicts/s{tokens}")
    if spent := quality.get("spent"):
        tokens = spent["prompt_tokens"] + spent["completion_tokens"]
        usd = f", ${spent['usd']:.4f}" if spent["usd"] else ""
        lines.append(f"spent by every run into this folder: {spent['requests']} requests, {tokens:,} tokens{usd}")
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
    if "audit_verdict" in quality:
        lines.append(f"audited on pairs that people labelled: {quality['audit_verdict']}")
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])
