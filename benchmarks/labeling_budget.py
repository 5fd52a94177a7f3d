"""What fewer labeler calls cost: calls against agreement with a planted utility, for every way of saving them.

    python -m benchmarks.labeling_budget [--quick]

The scripted labeler answers on generated candidates, six to a prompt: its logit is the difference in utility (words,
0.1 logits each), plus a position bias of 1 logit for the completion shown first, plus Gaussian noise of 1 logit that
is drawn for each request. Every policy sees the same candidates and gets the same answers to the same requests.
All labels are Bradley-Terry labels of all 15 pairs (``labeling.rank=true``).

``agreement`` is the share of all pairs that the labels order as the utility does; ``best_worst`` the share of prompts
whose best and worst candidate are both found. ``calls_saved_at_equal_agreement`` is the largest saving among the
policies whose agreement is not below that of all pairs in both orders by more than one percentage point: the lower end
of the 95 % interval of the difference (paired by prompt) must be above -0.01. Because the largest of many
is chosen on the prompts it is measured on, the same policy is measured again on as many new prompts (``confirmed_*``).
Policies for several principles are compared with all principles. --quick takes a tenth of the prompts.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, finish, parser, say
from rlaif.config import LabelingConfig, Pairs, ScriptedConfig
from rlaif.constitution import Constitution, Principle
from rlaif.engines.scripted import ScriptedEngine
from rlaif.evaluation.statistics import Estimate, clustered_mean, clustered_share
from rlaif.labeling.aggregate import Calibration
from rlaif.labeling.audit import Comparison
from rlaif.labeling.calibration import measure
from rlaif.labeling.label import Labeling, label_candidates
from rlaif.labeling.modes import Setup
from rlaif.labeling.ranking import ranked_pairs, scores_of
from rlaif.labeling.store import VerdictStore
from rlaif.records import Candidates, Completion, Prompt
from rlaif.reporting.plots import budget_curves

PROMPTS, CANDIDATES = 400, 6
PAIRS = CANDIDATES * (CANDIDATES - 1) // 2
LABELED = 100
"""Pairs with a human choice that the calibrated policies learn the labeler's bias from."""
LABELER = ScriptedConfig(utility="length", sharpness=0.1, position_bias=1.0, noise=1.0)
MARGIN = 0.01
ONE = Constitution("one", "1", "", (Principle("longer", 1.0, "Which reply is longer?"),))
# The same utility under each, with noise of its own.
THREE = Constitution(
    "three",
    "1",
    "",
    tuple(Principle(f"longer{weight}", float(weight), f"Which reply is longer ({weight})?") for weight in (4, 2, 1)),
)


@dataclass(frozen=True)
class Policy:
    """A way of asking, on one line of the table."""

    family: str
    name: str
    config: LabelingConfig
    constitution: Constitution = ONE
    calibrated: bool = False


@dataclass
class Outcome:
    """What a policy took and reached: calls in all, and two shares of each prompt."""

    calls: int
    agreement: list[float] = field(default_factory=list)
    best_worst: list[float] = field(default_factory=list)


def policies() -> list[Policy]:
    """All of them; the first of each constitution is what the others are compared with."""
    adaptive = [
        Policy("adaptive", f"adaptive, {'no budget' if pairs is None else f'{pairs} pairs'}",
               LabelingConfig(pairs=Pairs.adaptive, pairs_per_prompt=pairs))
        for pairs in (5, 6, 7, 8, 10, 12, None)
    ]  # fmt: skip
    second = [
        Policy("second order" + ", calibrated" * known, f"second order below {below:g}" + ", calibrated" * known,
               LabelingConfig(second_order_below=below), calibrated=known)
        for known in (False, True)
        for below in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    ]  # fmt: skip
    both = [
        Policy("adaptive + second order, calibrated", f"adaptive, second order below {below:g}, calibrated",
               LabelingConfig(pairs=Pairs.adaptive, second_order_below=below), calibrated=True)
        for below in (0.5, 1.0, 2.0, 3.0)
    ]  # fmt: skip
    stops = [
        Policy("principles", f"stop principles above {bound:g}", LabelingConfig(stop_principles_above=bound), THREE)
        for bound in (0.5, 1.0, 2.0, 4.0, 8.0, 13.9)
    ]
    return [
        Policy("all pairs", "all pairs, both orders", LabelingConfig()),
        Policy("all pairs", "all pairs, one order", LabelingConfig(both_orders=False)),
        Policy("against best", "against best", LabelingConfig(pairs=Pairs.against_best)),
        *adaptive,
        *second,
        *both,
        Policy("principles", "all pairs, both orders, all principles", LabelingConfig(), THREE),
        *stops,
    ]


def prompts(count: int, seed: int) -> list[Candidates]:
    """Prompts whose candidates have lognormal lengths of about 20 words."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(("word", "and", "more", "of", "it"), k=max(1, round(rng.lognormvariate(3, 0.6)))))

    return [
        Candidates(
            Prompt(f"p{seed}-{number}", ({"role": "user", "content": f"question {seed} {number}"},)),
            tuple(Completion(f"c{place}", text()) for place in range(CANDIDATES)),
        )
        for number in range(count)
    ]


def utility(candidate: Completion) -> float:
    return LABELER.sharpness * len(candidate.completion.split())


def calibration(store: VerdictStore, constitution: Constitution) -> Calibration:
    """From pairs on which people chose by the utility: P = sigmoid(difference)."""
    rng = random.Random(7)
    comparisons = []
    for line in prompts(LABELED, seed=99):
        a, b = line.candidates[:2]
        truth = 1 if rng.random() < 1 / (1 + math.exp(utility(b) - utility(a))) else -1
        comparisons.append(Comparison(line.prompt.prompt_id, line.prompt, a.completion, b.completion, truth))
    lines = [comparison.candidates() for comparison in comparisons if comparison.a != comparison.b]
    labels = label_candidates(lines, constitution, ScriptedEngine(LABELER, 0), LabelingConfig(), store)
    weights = {principle.id: principle.weight for principle in constitution.principles}
    found, record = measure("scripted", comparisons, labels, weights)
    say(f"calibration on {LABELED} pairs: bias {record['bias']:.2f}, temperature {record['single_temperature']:.2f}")
    return found


def apply(policy: Policy, lines: Sequence[Candidates], store: VerdictStore, known: Calibration) -> Outcome:
    """Label by a policy and compare with the utility."""
    setup = Setup(policy.constitution, "scripted", policy.config, 0, known if policy.calibrated else Calibration())
    labeling = Labeling(lambda: lines, setup, ScriptedEngine(LABELER, 0), store)
    labeling.ask(0)
    outcome = Outcome(0)
    for line, labels in labeling.labels():
        outcome.calls += len(labels)
        names = [candidate.candidate_id for candidate in line.candidates]
        pairs, _ = ranked_pairs(line.prompt.prompt_id, names, setup.pairs(labels)[0])
        truth = {candidate.candidate_id: utility(candidate) for candidate in line.candidates}
        scores = scores_of(pairs)
        right = [
            0.5 if pair.logit == 0 else float((pair.logit > 0) == (truth[pair.one] > truth[pair.other]))
            for pair in pairs
            if truth[pair.one] != truth[pair.other]
        ]
        # A pair without a label is a coin that was not thrown.
        decided = sum(truth[one] != truth[other] for place, one in enumerate(names) for other in names[:place])
        outcome.agreement.append((sum(right) + 0.5 * (decided - len(right))) / decided if decided else 0.5)
        ends = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
        found = truth[ends[0]] == max(truth.values()) and truth[ends[1]] == min(truth.values())
        outcome.best_worst.append(float(found))
    return outcome


def difference(one: Sequence[float], other: Sequence[float]) -> Estimate:
    """Of two policies on the same prompts."""
    result = clustered_mean([left - right for left, right in zip(one, other, strict=True)])
    assert result is not None
    return result


def row(policy: Policy, outcome: Outcome, reference: Outcome) -> dict[str, Any]:
    """One line of the table; the saving is against ``reference``."""
    agreement, ends = clustered_share(outcome.agreement), clustered_share(outcome.best_worst)
    assert agreement is not None
    assert ends is not None
    return {
        "policy": policy.name,
        "family": policy.family,
        "calls": outcome.calls,
        "saved": round(1 - outcome.calls / reference.calls, 4),
        **agreement.flat("agreement"),
        **difference(outcome.agreement, reference.agreement).flat("difference"),
        **ends.flat("best_worst"),
    }


def largest(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row with the largest saving among those that agree as well as all pairs; that is the first at worst."""
    equal = [found for found in rows if found["difference_low"] > -MARGIN]
    return max(equal, key=lambda found: found["saved"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'policy':52} {'calls':>7} {'saved':>6}  {'agreement':>22} {'difference':>18}  best and worst"]
    for found in rows:
        agreement = f"{found['agreement']:.3f} [{found['agreement_low']:.3f}, {found['agreement_high']:.3f}]"
        interval = f"[{found['difference_low']:+.3f}, {found['difference_high']:+.3f}]"
        ends = f"{found['best_worst']:.3f} [{found['best_worst_low']:.3f}, {found['best_worst_high']:.3f}]"
        lines.append(
            f"{found['policy']:52} {found['calls']:7} {found['saved']:6.1%}  {agreement:>22} {interval:>18}  {ends}"
        )
    return "\n".join(lines)


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    count = PROMPTS // 10 if quick else PROMPTS
    ratios: dict[str, Any] = {}
    details: dict[str, Any] = {"prompts": count, "candidates": CANDIDATES, "labeler": vars(LABELER), "margin": MARGIN}
    curves: dict[str, list[tuple[float, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder, VerdictStore(Path(folder) / "store.sqlite") as store:
        lines, fresh = prompts(count, 1), prompts(count, 2)
        for name, constitution in (("", ONE), ("principles_", THREE)):
            known = calibration(store, constitution)
            tried = [policy for policy in policies() if policy.constitution is constitution]
            outcomes = [apply(policy, lines, store, known) for policy in tried]
            rows = [row(policy, outcome, outcomes[0]) for policy, outcome in zip(tried, outcomes, strict=True)]
            say(table(rows))
            best = largest(rows)
            chosen = next(policy for policy in tried if policy.name == best["policy"])
            again, all_again = (apply(policy, fresh, store, known) for policy in (chosen, tried[0]))
            confirmed = row(chosen, again, all_again)
            say(f"chosen: {table([best])}\non new prompts: {table([confirmed])}")
            ratios[f"{name}calls_saved_at_equal_agreement"] = best["saved"]
            ratios[f"{name}policy"] = best["policy"]
            ratios[f"{name}confirmed_saved"] = confirmed["saved"]
            ratios[f"{name}confirmed_difference"] = [confirmed[f"difference{end}"] for end in ("", "_low", "_high")]
            details[f"{name}rows"] = rows
            if constitution is ONE:
                for found in rows:
                    point = (found["calls"] / count, [found[f"agreement{end}"] for end in ("", "_low", "_high")])
                    curves.setdefault(found["family"], []).append(point)
    if not quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        svg = budget_curves(curves, "labeler calls a prompt", "agreement with the planted utility")
        (RESULTS / "labeling_budget.svg").write_text(svg, encoding="utf-8")
    finish("labeling_budget", ratios, details, ["numpy"], quick)


if __name__ == "__main__":
    main()
