"""An audit as Markdown and as plain text: the same tables, with the verdict where it is read first and last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlaif.reporting.text import MISSING, Safe, cut, markdown

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
_PARTS = (("agreement_subset_", "subset"), ("agreement_principle_", "principle"))
_SINGLE = (
    ("kappa", "Cohen's kappa"),
    ("ece", "expected calibration error"),
    ("temperature", "temperature that calibrates the labels"),
)
# Key, what it counts, and of what it is a share.
_COUNTS = (
    ("n_comparisons", "pairs", None),
    ("n_labelled", "labelled", "n_comparisons"),
    ("n_partial", "labelled by some of their principles", "n_labelled"),
    ("missing", "without a label", "n_comparisons"),
    ("human_ties", "ties of people (left out)", "n_comparisons"),
    ("labeler_ties", "ties of the labeler (count half)", "n_labelled"),
    ("n_verdicts", "verdicts asked", None),
    ("uncovered", "uncovered verdicts", "n_verdicts"),
    ("unlisted", "verdicts that the listed options leave open", "n_verdicts"),
    ("content_filter", "verdicts that a content filter withheld", "n_verdicts"),
    ("failed", "failed verdicts, unparsed ones included", "n_verdicts"),
)
_COST = (
    ("prompt_tokens", "tokens read", "{:,}"),
    ("completion_tokens", "tokens written", "{:,}"),
    ("tokens_per_usable_label", "tokens per usable label", "{:,.1f}"),
    ("usd", "US dollars", "{:.4f}"),
    ("usd_per_usable_label", "US dollars per usable label", "{:.6f}"),
)


class _Grid(NamedTuple):
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def audit_markdown(result: Mapping[str, Any]) -> str:
    """The audit's page."""
    lines = [
        f"# Audit of {markdown(str(result['labeler']))}",
        "",
        f"**{markdown(result['verdict'])}**",
        "",
        f"Mode {markdown(str(result['mode']))}, constitution {markdown(str(result['constitution']))}. Intervals are "
        "95 %, for the draw of prompts; n counts prompts.",
    ]
    for head, rows in _grids(result):
        lines += ["", f"| {' | '.join(map(markdown, head))} |", "|" + " --- |" * len(head)]
        lines += [f"| {' | '.join(map(markdown, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def audit_text(result: Mapping[str, Any]) -> str:
    """The audit for a terminal, the verdict last; nobody's names can move the cursor or begin a line."""
    name, mode, constitution = (cut(str(result[key]), 80) for key in ("labeler", "mode", "constitution"))
    lines = [f"audit of {name}, mode {mode}, constitution {constitution}; [95 % interval], n counts prompts"]
    for head, rows in _grids(result):
        cells = [[cut(cell, 60) for cell in row] for row in (head, *rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines.append("")
        for row in cells:
            first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(["", first, *others]).rstrip())
    return "\n".join([*lines, "", cut(result["verdict"], 1000)])


def _grids(result: Mapping[str, Any]) -> list[_Grid]:
    rows: list[Sequence[str]] = [_estimate(result, key, name, _percent) for key, name in _ROWS if key in result]
    rows += [_estimate(result, key, name, _signed) for key, name in _LOGITS if key in result]
    for prefix, what in _PARTS:
        keys = sorted(key for key in result if key.startswith(prefix) and f"{key}_n" in result)
        rows += [_estimate(result, key, f"{what} {key.removeprefix(prefix)}", _percent) for key in keys]
    rows += [(name, Safe(f"{result[key]:.3f}"), "", "") for key, name in _SINGLE if result.get(key) is not None]
    counts = [(name, Safe(result[key]), _share(result, key, whole)) for key, name, whole in _COUNTS if key in result]
    counts += [(f"failed: {reason}", Safe(count), "") for reason, count in result.get("failed_reasons", {}).items()]
    cost = [(name, Safe(form.format(result[key])), "") for key, name, form in _COST if result.get(key)]
    if spent := result.get("spent"):
        cost.append(("requests of every run into this folder", Safe(spent["requests"]), ""))
        if spent["usd"]:
            cost.append(("US dollars of every run into this folder", Safe(f"{spent['usd']:.4f}"), ""))
    grids = [_Grid(("figure", "value", "interval", "n"), rows), _Grid(("count", "", "share"), [*counts, *cost])]
    if points := result.get("reliability"):
        bins = [(Safe(f"{p['p']:.2f}"), Safe(f"{p['observed']:.2f}"), Safe(p["n"])) for p in points]
        grids.append(_Grid(("mean label", "people agree", "pairs"), bins))
    if len(result.get("labelers", ())) > 1:
        grids.append(_matrix(result))
    return grids


def _matrix(result: Mapping[str, Any]) -> _Grid:
    """How often every two labelers take the same side."""
    labelers = result["labelers"]
    cells = {(pair["one"], pair["other"]): pair for pair in result["between_labelers"]}
    folders = [labeler["folder"] for labeler in labelers]
    rows = []
    for place, labeler in enumerate(labelers):
        name = f"{place + 1} {labeler['labeler']}, {labeler['mode']} ({labeler['folder']})"
        pairs = [cells.get((folders[place], other)) or cells.get((other, folders[place])) for other in folders]
        rows.append((name, *(Safe(MISSING) if pair is None else _cell(pair) for pair in pairs)))
    return _Grid(("same side as labeler", *(Safe(number + 1) for number in range(len(rows)))), rows)


def _cell(pair: Mapping[str, Any]) -> Safe:
    if "agreement" not in pair:
        return Safe("no common pair")
    return Safe(f"{pair['agreement']:.1%} {_interval(pair, 'agreement', _percent)} n={pair['agreement_n']}")


def _estimate(
    result: Mapping[str, Any], key: str, name: str, form: Callable[[float], str]
) -> tuple[str, Safe, Safe, Safe]:
    return name, Safe(form(result[key])), _interval(result, key, form), Safe(result[f"{key}_n"])


def _interval(result: Mapping[str, Any], key: str, form: Callable[[float], str]) -> Safe:
    low, high = result[f"{key}_low"], result[f"{key}_high"]
    return Safe(MISSING if low is None or high is None else f"[{form(low)}, {form(high)}]")


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _share(result: Mapping[str, Any], key: str, whole: str | None) -> str:
    return Safe(_percent(result[key] / result[whole])) if whole and result.get(whole) else ""
