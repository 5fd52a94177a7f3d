"""Answers of an engine -> the verdict in a label, or the reason why there is none. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from rlaif.engines.base import Failure, Likelihood, OptionMass, Sampled
from rlaif.labeling.prompts import SCALE
from rlaif.records import Label

Answer = OptionMass | Sampled | Likelihood | Failure
Blank = Callable[..., Label]
"""Makes a label, given what there is to say of its verdict."""


def smoothed(share: float, replies: int, options: int) -> float:
    """The probability of an option that ``share`` of so many replies name: (k + 1 / options) / (replies + 1).

    That is as if one more reply were shared evenly between the options (Perks 1947). Of two it makes the logit
    log((k + 1/2) / (n - k + 1/2)), the estimate with the least bias (Haldane 1956; Anscombe 1956). Without it one reply
    would be as certain as a thousand.

    >>> [round(smoothed(share, 1, 2), 3) for share in (0.0, 1.0)], round(smoothed(0.75, 8, 2), 4)
    ([0.25, 0.75], 0.7222)
    """
    return (share * replies + 1 / options) / (replies + 1)


def counted(answer: OptionMass) -> int:
    """How many replies name an option; 0 where masses come from log-probabilities."""
    return round(answer.replies * answer.mass) if answer.replies else 0


def probability(blank: Blank, answers: Sequence[Answer], minimum: float, clamp: float = 0.0) -> Label:
    """The share of the first of two options, the mean over several answers; of replies, :func:`smoothed`.

    Args:
        blank: all of the label but its verdict.
        answers: one, or one after each rationale, which holds the rationale; where such an answer failed, the rationale
            stands before it. What was said and read counts whether or not there is a verdict.
        minimum: option mass below which an answer is uncovered.
        clamp: each share is clipped to [clamp, 1 - clamp].
    """
    said = [
        (answer.text, answer.prompt_tokens, answer.tokens)
        if isinstance(answer, Sampled)
        else (answer.reply, answer.prompt_tokens, answer.completion_tokens)
        for answer in answers
        if isinstance(answer, Sampled | OptionMass)
    ]
    read: dict[str, Any] = {
        "reply": "\n\n".join(reply for reply, _, _ in said if reply is not None) or None,
        "prompt_tokens": total_count([count for _, count, _ in said]),
        "completion_tokens": total_count([count for _, _, count in said]),
    }
    failed = [answer for answer in answers if isinstance(answer, Failure)]
    if failed:
        return blank(method="none", reason=failed[0].reason, **read)
    found = [answer for answer in answers if isinstance(answer, OptionMass)]
    known = [(yes, no, answer) for answer in found for yes, no in [answer.masses] if yes is not None and no is not None]
    finite = all(math.isfinite(yes + no) for yes, no, _ in known)
    covered = [row for row in known if row[0] + row[1] > 0 and row[2].mass >= minimum] if finite else []
    verdicts = [yes / (yes + no) for yes, no, _ in covered]
    if clamp:
        verdicts = [min(max(p, clamp), 1 - clamp) for p in verdicts]
    p = sum(verdicts) / len(verdicts) if verdicts else None
    replies = sum(counted(answer) for *_, answer in covered)
    return blank(
        method=found[0].method,
        p=smoothed(p, replies, 2) if p is not None and replies else p,
        replies=replies or None,
        reason=None if verdicts else _missing(bool(known), finite),
        option_mass=round(sum(answer.mass for *_, answer in known) / len(known), 6) if known and finite else None,
        **read,
    )


def distribution(blank: Blank, answer: Answer, minimum: float) -> Label:
    """The share of each of many options in their mass; of replies, :func:`smoothed`.

    An option that the engine cannot see makes it unknown.
    """
    if isinstance(answer, Failure):
        return blank(method="none", reason=answer.reason)
    assert isinstance(answer, OptionMass)
    known = [mass for mass in answer.masses if mass is not None]
    seen, total = len(known) == len(answer.masses), sum(known)
    finite = math.isfinite(total)
    covered = seen and finite and total > 0 and answer.mass >= minimum
    replies = counted(answer) if covered else 0
    shares = [mass / total for mass in known] if covered else []
    if replies:
        shares = [smoothed(share, replies, len(shares)) for share in shares]
    return blank(
        method=answer.method,
        probs=tuple(shares) or None,
        replies=replies or None,
        reason=None if covered else _missing(seen, finite),
        option_mass=round(answer.mass, 6) if seen and finite else None,
        reply=answer.reply,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
    )


def expected_score(blank: Blank, answer: Answer, minimum: float) -> Label:
    """E[score] = sum over k from 1 to 9 of k p(k), with the distribution that it is the mean of."""
    label = distribution(blank, answer, minimum)
    if label.probs is None:
        return label
    return replace(label, score=sum(k * p for k, p in zip(SCALE, label.probs, strict=True)))


def likelihood_ratio(blank: Blank, answers: Sequence[Answer], normalize: bool) -> Label:
    """log P(completion | encouraged) - log P(completion | discouraged), in nats, or in nats a token."""
    failed = [answer for answer in answers if isinstance(answer, Failure)]
    if failed:
        return blank(method="none", reason=failed[0].reason)
    encouraged, discouraged = (answer for answer in answers if isinstance(answer, Likelihood))
    read = total_count(part for answer in (encouraged, discouraged) for part in (answer.prompt_tokens, answer.tokens))
    ratio = encouraged.logp - discouraged.logp
    if normalize and encouraged.tokens:
        ratio /= encouraged.tokens
    reason = "empty_completion" if not encouraged.tokens else None if math.isfinite(ratio) else "not_finite"
    return blank(method="logprob", prompt_tokens=read, reason=reason, score=None if reason else ratio)


_UNKNOWN = "option_unknown"
SAY_THE_REST = (
    "where words of several tokens are why, labeler.prefill=true or labeler.endpoint=completions asks for their rest"
)


def advice(reasons: Iterable[str | None]) -> str:
    """What helps against verdicts that are missing for these reasons, to end a sentence with; empty: nothing known."""
    return f"; {_UNKNOWN}: the server does not list enough tokens; {SAY_THE_REST}" if _UNKNOWN in reasons else ""


def _missing(seen: bool, finite: bool) -> str:
    """Why there is no verdict in what an engine said. A model that overflows says NaN, which must not be a label."""
    return _UNKNOWN if not seen else "uncovered" if finite else "not_finite"


def total_count(counts: Iterable[int | None]) -> int | None:
    """Sum of those that are known; None if none is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
