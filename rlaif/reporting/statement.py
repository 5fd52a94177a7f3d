"""The report's sentences, from the numbers alone: the result, and what speaks against trusting it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlaif.reporting.collect import Collection, Estimate, Evaluation
from rlaif.reporting.text import MISSING, Safe, estimate_text, feedback_text, origin_text, seeds_text

Line = tuple[str, ...]
"""A sentence in parts: ``Safe`` parts are ours, the others are names and messages to escape."""
CLAIMS = (
    ("gold_gain", "gold score gain over {}", 0.0),
    ("win_rate", "win rate against {}", 0.5),
    ("pm_gain", "gain over {} in the preference model’s score, which training optimised, so no proof", 0.0),
)
START = Safe("the policy it started from")
Figures = Sequence[tuple[Evaluation, Estimate]]
CHANCE = 0.5


def verdict(estimate: Estimate, neutral: float = 0.0) -> Safe:
    """``better``, ``worse`` or ``no clear difference``, by where the interval lies."""
    if estimate.low is None or estimate.high is None:
        return Safe("no verdict (no interval was recorded)")
    if estimate.low > neutral:
        return Safe("better")
    if estimate.high < neutral:
        return Safe("worse")
    return Safe(f"no clear difference (interval includes {'zero' if neutral == 0 else neutral})")


def seed_text(seed: int | None) -> Safe:
    return Safe(MISSING if seed is None else seed)


def distinct_seeds(group: Sequence[Evaluation]) -> bool:
    """Whether a mean over seeds means anything: several runs, each with a seed of its own."""
    seeds = {e.seed for e in group}
    return len(group) > 1 and len(seeds) == len(group) and None not in seeds


def judging_models(group: Sequence[Evaluation]) -> set[str]:
    """The PMs that scored some evaluations, by the hash of their files."""
    return {model for e in group if (model := e.text("preference_model_id")) is not None}


def averaged(group: Sequence[Evaluation], key: str) -> bool:
    """Whether a figure has a mean over seeds: scores have the unit of their PM, so those of several PMs have none."""
    return distinct_seeds(group) and not (key.startswith("pm_") and len(judging_models(group)) > 1)


def values(group: Sequence[Evaluation], key: str) -> list[float]:
    """The figure ``key`` of every evaluation that has it."""
    return [x.value for e in group if (x := e.estimate(key)) is not None]


def statement(found: Collection, baseline: str) -> tuple[list[Line], list[Line]]:
    """The result in sentences, one a row name and measure; and the figures of each seed, if several."""
    names = found.names(baseline)
    result: list[Line] = []
    details: list[Line] = []
    for name in names:
        if name != baseline:
            _claim(found, name, baseline, result, details)
    if not result:
        return [(Safe("Only "), baseline, Safe(" was evaluated: there is nothing to compare it with."))], []
    if any(distinct_seeds(found.group(name)) for name in names):
        result.append((Safe("Intervals cover the draw of prompts; ranges show the draw of seeds."),))
    else:
        result.append((Safe("Intervals cover the draw of prompts only, not what another seed would change."),))
    return result, details


def _claim(found: Collection, name: str, baseline: str, result: list[Line], details: list[Line]) -> None:
    """What a row gains over the baseline, by the samples of both; else over where it started, by its own evaluation."""
    group = found.group(name)
    origins = {origin_text(e) for e in group if e.text("feedback")}
    origin: Line = (Safe(" (feedback: "), origins.pop(), Safe(")")) if len(origins) == 1 else ()
    told = len(result)
    over = {e.folder: found.over(e, baseline) for e in group}
    problems = [x.problem for x in over.values() if x.problem]
    if problems and baseline in found.names(baseline):
        part = "" if len(problems) == len(group) else f" in {len(problems)} of {len(group)} runs"
        why = Safe(f"{part}: {'; '.join(dict.fromkeys(problems))}.")
        result.append((name, *origin, Safe(": not compared with "), baseline, why))
    by_samples = {(e.folder, key): x for e in group for key, x in over[e.folder].figures.items()}
    by_itself = {(e.folder, key): x for e in group for key, _, _ in CLAIMS if (x := e.estimate(key)) is not None}
    whom, figures = (baseline, by_samples) if by_samples else (START, by_itself)
    claimed = False
    for key, words, neutral in CLAIMS:
        measured = [(e, figures[e.folder, key]) for e in group if (e.folder, key) in figures]
        if not measured or (key == "pm_gain" and claimed):
            continue
        before, after = words.split("{}")
        what: Line = (Safe(f": {before}"), whom, Safe(after))
        text = _told(group, measured, key, neutral, (name, *what), details)
        result.append((name, *(origin if len(result) == told else ()), *what, Safe(f" {text}")))
        claimed = True
    if len(result) == told:
        result.append((name, *origin, Safe(": no comparison with "), baseline, Safe(" was recorded.")))


def _told(
    group: Sequence[Evaluation], measured: Figures, key: str, neutral: float, what: Line, details: list[Line]
) -> str:
    """The figure of a single run; of several their mean and verdicts, and each of them as a detail."""
    verdicts = [verdict(x, neutral) for _, x in measured]
    if len(measured) == 1:
        return f"{estimate_text(measured[0][1])}: {verdicts[0]}."
    each = (f"seed {seed_text(e.seed)} {estimate_text(x)}: {v}" for (e, x), v in zip(measured, verdicts, strict=True))
    details.append((*what, Safe(": " + "; ".join(each) + ".")))
    mean = f"{seeds_text([x.value for _, x in measured])} in the mean: " if averaged(group, key) else ""
    return f"{mean}{_count(verdicts, 'seeds' if distinct_seeds(group) else 'runs')}."


def _count(verdicts: Sequence[str], things: str) -> str:
    """``better in 1 of 2 seeds, worse in 1 of 2 seeds``."""
    kinds = dict.fromkeys(verdicts)
    return ", ".join(f"{kind} in {verdicts.count(kind)} of {len(verdicts)} {things}" for kind in kinds)


def warnings(found: Collection, baseline: str) -> list[Line]:
    """What a reader must know before trusting the comparison."""
    lines: list[Line] = []
    names = found.names(baseline)
    if baseline not in names:
        lines.append((Safe("No row is named "), baseline, Safe("; gains are over the policy that each started from.")))
    judges = sorted({judge for e in found.evaluations if (judge := e.text("gold"))})
    if len(judges) > 1:
        lines.append((Safe("Rows measured by different gold judges cannot be compared: "), ", ".join(judges)))
    for seed in sorted({e.seed for e in found.evaluations if e.seed is not None}):
        if len(judging_models([e for e in found.evaluations if e.seed == seed])) > 1:
            lines.append((Safe(f"Seed {seed}: rows were scored by different PMs, so their PM scores do not compare."),))
    for name in names:
        group = found.group(name)
        if len(group) > 1 and not distinct_seeds(group):
            lines.append((name, Safe(": several runs share a seed or have none, so no mean is given.")))
    lines.extend(dict.fromkeys(line for e in found.evaluations for line in _leaks(e)))
    if found.failures:
        jobs = "1 job" if len(found.failures) == 1 else f"{len(found.failures)} jobs"
        lines.append((Safe(f"{jobs} failed and may be missing here: see Failed jobs."),))
    if alarms := len(label_warnings(found)):
        folders = "1 labels folder agrees" if alarms == 1 else f"{alarms} labels folders agree"
        lines.append((Safe(f"{folders} with the gold judge no better than chance: see Label quality."),))
    if alarms := len(audit_warnings(found)):
        what = "1 labels folder comes" if alarms == 1 else f"{alarms} labels folders come"
        lines.append((Safe(f"{what} from a labeler whose audit says DO NOT TRAIN: see Label quality."),))
    if alarms := len(pm_warnings(found)):
        models = "1 preference model is" if alarms == 1 else f"{alarms} preference models are"
        lines.append((Safe(f"{models} not shown to be above chance: see Preference models."),))
    lines.extend(_misguided(found))
    lines.extend((Safe("Left out: "), problem) for problem in found.problems)
    return lines


def _leaks(evaluation: Evaluation) -> Iterator[Line]:
    """What a row's training data shared with the prompts that it was evaluated on."""
    if rows := evaluation.whole("leaked_rows"):
        told = f"{rows} rows of its training data resemble {evaluation.whole('leaked_prompts')} evaluation prompts"
        yield evaluation.name, Safe(f": {told}, so its figures flatter.")
    if dropped := evaluation.whole("dropped_leaked"):
        yield evaluation.name, Safe(f": {dropped} rows that resemble evaluation prompts were left out of its training.")


def _misguided(found: Collection) -> list[Line]:
    """Policies whose PM did not pass its gate, or was not measured."""
    words = {
        "failed": "a preference model that did not pass its gate (pm.gate=warn)",
        "unknown": "a preference model of which no held-out accuracy is known",
    }
    return [
        (e.name, Safe(f", seed {seed_text(e.seed)}, was guided by {words[gate]}."))
        for e in found.evaluations
        if (gate := e.text("guide_gate")) in words
    ]


def pm_warnings(found: Collection) -> list[Line]:
    """One warning for every PM whose accuracy on held-out preferences is not shown to be above chance."""
    lines: list[Line] = []
    for model in found.preference_models:
        accuracy = model.estimate("accuracy")
        if accuracy is None or (accuracy.low is not None and accuracy.low > CHANCE):
            continue
        lines.append(
            (
                Safe("This preference model is not shown to be above chance on held-out preferences: "),
                model.label,
                Safe(f". Accuracy {estimate_text(accuracy)}. What it guides is guided by noise."),
            )
        )
    return lines


def pm_notes(found: Collection) -> list[Line]:
    """PMs that are not measured, or not shown to beat picking the longer completion."""
    lines: list[Line] = []
    for model in found.preference_models:
        gain = model.estimate("gain_over_longer")
        if model.estimate("accuracy") is None:
            lines.append((model.label, Safe(": not measured, for want of validation preferences.")))
        elif gain and (gain.low is None or gain.low <= 0):
            rule = "is not shown to beat always preferring the longer completion"
            lines.append((model.label, Safe(f" {rule}: accuracy less that rule's is {estimate_text(gain)}.")))
    return lines


def label_warnings(found: Collection) -> list[Line]:
    """One warning for every labeler whose agreement is not shown to be above chance."""
    lines: list[Line] = []
    for quality in found.qualities:
        agreement = quality.estimate("agreement")
        if agreement is None or (agreement.value if agreement.low is None else agreement.low) > CHANCE:
            continue
        highest = agreement.value if agreement.high is None else agreement.high
        below = " It agrees less often than chance: its labels point the wrong way." * (highest < CHANCE)
        lines.append(
            (
                Safe("This labeler agrees with the gold judge no better than chance: "),
                quality.text("labeler") or quality.label,
                Safe(" (feedback: "),
                feedback_text(quality.text("feedback")),
                Safe("), labels in "),
                quality.label,
                Safe(f". Agreement {estimate_text(agreement)}.{below}"),
                Safe(" Do not trust what was trained on these labels."),
            )
        )
    return lines


def audit_warnings(found: Collection) -> list[Line]:
    """What the audit said of every labeler that was not shown to agree with people more often than a coin."""
    return [
        (
            Safe("Audited on pairs that people labelled, "),
            quality.text("labeler") or quality.label,
            Safe(" (labels in "),
            quality.label,
            Safe("): "),
            quality.text("audit_verdict") or Safe("not shown to be above chance."),
        )
        for quality in found.qualities
        if quality.values.get("audit_trainable") is False
    ]


def length_notes(found: Collection) -> list[Line]:
    """Labelers that do no better against the gold judge than picking the longer completion."""
    lines: list[Line] = []
    for record in found.qualities:
        agreement, longer = record.estimate("agreement"), record.estimate("longer_wins")
        if agreement and longer and agreement.value <= longer.value:
            rule = ": always preferring the longer completion would agree at least as often."
            lines.append((record.label, Safe(rule)))
    return lines
