"""An audit as Markdown: the verdict first, then the figures behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlaif.reporting.text import MISSING, markdown

_ROWS = (
    ("agreement", "agreement with people"),
    ("human_ceiling", "two annotators with each other"),
    ("longer_wins", "the longer completion wins"),
    ("gain_over_longer", "labeler minus the longer-wins rule, same pairs"),
    ("agreement_longer_preferred", "where people preferred the longer completion"),
    ("agreement_shorter_preferred", "where people preferred the shorter completion"),
    ("agreement_similar_length", "where lengths hardly differ"),
    ("same_position_rate", "same position named in both orders"),
)
_LOGITS = (
    ("position_bias", "position bias (logits, for the first)"),
    ("verdict_bias", "verdict bias (logits, for the favourable words)"),
    ("score_mean", "mean score"),
)
_COUNTS = (
    ("n_comparisons", "pairs"),
    ("n_labelled", "labelled"),
    ("missing", "without a label"),
    ("human_ties", "ties of people (left out)"),
    ("labeler_ties", "ties of the labeler (count half)"),
    ("n_verdicts", "verdicts asked"),
    ("uncovered", "uncovered verdicts"),
    ("unlisted", "verdicts with no option listed"),
    ("failed", "failed verdicts"),
    ("tokens_per_usable_verdict", "tokens per usable verdict"),
)


def audit_markdown(result: Mapping[str, Any]) -> str:
    """The audit's page."""
    lines = [
        f"# Audit of {markdown(str(result['labeler']))}",
        "",
        f"**{markdown(result['verdict'])}**",
        "",
        f"Mode {markdown(str(result['mode']))}, constitution {markdown(str(result['constitution']))}. Intervals are "
        "95 %, for the draw of prompts; n counts prompts.",
        "",
        "| | value | interval | n |",
        "| --- | --- | --- | --- |",
    ]
    lines += [_estimate(result, key, name, "{:.1%}") for key, name in _ROWS if key in result]
    lines += [_estimate(result, key, name, "{:+.2f}") for key, name in _LOGITS if key in result]
    for prefix, what in (("agreement_subset_", "subset"), ("agreement_principle_", "principle")):
        keys = [key for key in result if key.startswith(prefix) and f"{key}_n" in result]
        lines += [_estimate(result, key, f"{what} {key.removeprefix(prefix)}", "{:.1%}") for key in sorted(keys)]
    single = (
        ("kappa", "Cohen's kappa"),
        ("ece", "expected calibration error"),
        ("temperature", "temperature that calibrates the labels"),
    )
    for key, name in single:
        if result.get(key) is not None:
            lines.append(f"| {name} | {result[key]:.3f} | | |")
    lines += ["", "| count | |", "| --- | --- |"]
    lines += [f"| {name} | {result[key]} |" for key, name in _COUNTS if key in result]
    if spent := result.get("spent"):
        lines.append(f"| requests sent | {spent['requests']} |")
        lines += [f"| US dollars spent | {spent['usd']} |"] * bool(spent["usd"])
    if result.get("reliability"):
        lines += ["", "| mean label | people agree | pairs |", "| --- | --- | --- |"]
        lines += [f"| {point['p']:.2f} | {point['observed']:.2f} | {point['n']} |" for point in result["reliability"]]
    return "\n".join(lines) + "\n"


def _estimate(result: Mapping[str, Any], key: str, name: str, form: str) -> str:
    low, high = result[f"{key}_low"], result[f"{key}_high"]
    interval = MISSING if low is None or high is None else f"{form.format(low)} to {form.format(high)}"
    return f"| {markdown(name)} | {form.format(result[key])} | {interval} | {result[f'{key}_n']} |"
