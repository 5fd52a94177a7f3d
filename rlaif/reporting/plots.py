"""Plots as inline SVG: small, one a figure, so that the page can arrange them for its width.

Axes and text take the page's text colour; data colours are Okabe and Ito's, which colour-blind readers can
tell apart. Each name keeps its colour and marker in every plot.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif.reporting.collect import Collection, Curve, Estimate, Evaluation
from rlaif.reporting.text import cut
from rlaif.text import visible

NEUTRAL = {"gold_gain": 0.0, "win_rate": 0.5}
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_BASELINE = "#808080"
_MARKERS = "osD^vPX*"
_STYLES = ("-", "--", ":", "-.")
_INK = "#010203"
"""Stands for the page's text colour until the SVG is done."""
_POINTS = 400
_LARGEST = 1e300
"""What diverged beyond it has no place on an axis: the distance between two such figures is infinite."""
PPO_CURVES = (
    *("score", "kl", "reward", "validation_score", "validation_kl", "validation_objective"),
    *("entropy", "clip_fraction", "value_loss", "explained_variance", "length", "eos_rate"),
)


@dataclass(frozen=True)
class Look:
    """How one name is drawn; ``symbol`` is its marker as SVG for the legend."""

    name: str
    color: str
    marker: str
    symbol: str = ""


@dataclass(frozen=True)
class Figure:
    caption: str
    svg: str


@dataclass(frozen=True)
class PlotGroup:
    """Figures under one heading that share a legend."""

    title: str
    legend: tuple[Look, ...]
    figures: tuple[Figure, ...]
    note: str = ""


def plot_groups(found: Collection, baseline: str) -> tuple[PlotGroup, ...]:
    """Estimates with intervals, the KL frontier and the training curves, as far as they were recorded."""
    looks = _looks(found, baseline)
    groups = (_estimates(found, baseline, looks), _frontier(found, baseline, looks), *_curves(found, looks))
    return tuple(group for group in groups if group.figures)


def _looks(found: Collection, baseline: str) -> dict[str, Look]:
    names = found.names(baseline)
    others = [name for name in names if name != baseline]
    others += sorted({curve.name for curve in found.curves} - set(names))
    looks = {baseline: _look(baseline, _BASELINE, _MARKERS[0])}
    for index, name in enumerate(others):
        looks[name] = _look(name, _PALETTE[index % len(_PALETTE)], _MARKERS[(index + 1) % len(_MARKERS)])
    return looks


def _look(name: str, color: str, marker: str) -> Look:
    def draw(axes: Any) -> None:
        axes.plot([0], [0], marker=marker, color=color, markersize=6)
        axes.axis("off")

    return Look(name, color, marker, _svg(draw, 0.2, 0.2, f"marker of {name}"))


def _estimates(found: Collection, baseline: str, looks: dict[str, Look]) -> PlotGroup:
    own = not any(found.over(e, baseline).figures for e in found.evaluations if e.name != baseline)
    whom = "the policy that each started from" if own else "the baseline"
    captions = {
        "gold_score": "gold score",
        "gold_gain": f"gold gain over {whom}",
        "win_rate": f"win rate against {whom}",
    }
    figures = []
    for key, caption in captions.items():
        over = key in NEUTRAL and not own

        def measured(e: Evaluation, key: str = key, over: bool = over) -> Estimate | None:
            return _drawn(found.over(e, baseline).figures.get(key) if over else e.estimate(key))

        rows = [
            (looks[name], e.seed, estimate)
            for name in found.names(baseline)
            if not over or name != baseline
            for e in found.group(name)
            if (estimate := measured(e)) is not None
        ]

        def draw(axes: Any, rows: list[Any] = rows, key: str = key) -> None:
            for y, (look, _, x) in enumerate(rows):
                _point(axes, look, (x.value, x.low, x.high), (y, None, None))
            axes.set_yticks(range(len(rows)), [_tick(look.name, seed) for look, seed, _ in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            if key in NEUTRAL:
                axes.axvline(NEUTRAL[key], color=_INK, linestyle="--", linewidth=1, alpha=0.6)

        if rows:
            height = 0.9 + 0.24 * len(rows)
            caption += ", 95 % intervals" + "; the dashed line is no difference" * (key in NEUTRAL)
            figures.append(Figure(caption, _svg(draw, 4.4, height, caption)))
    return PlotGroup("Estimates", (), tuple(figures))


def _drawn(estimate: Estimate | None) -> Estimate | None:
    if estimate is None or not _on_axis(estimate.value, estimate.low or 0.0, estimate.high or 0.0):
        return None
    return estimate


def _on_axis(*values: float) -> bool:
    return all(abs(value) <= _LARGEST for value in values)


def _tick(name: str, seed: int | None) -> str:
    return cut(name, 22) if seed is None else f"{cut(name, 22)} · {seed}"


def _point(axes: Any, look: Look, x: Sequence[float | None], y: Sequence[float | None]) -> None:
    """A marker at the values with lines from low to high where these are known."""

    def reach(value: float | None, low: float | None, high: float | None) -> list[list[float]] | None:
        if value is None or low is None or high is None:
            return None
        return [[max(0.0, value - low)], [max(0.0, high - value)]]

    axes.errorbar(
        [x[0]],
        [y[0]],
        xerr=reach(*x),
        yerr=reach(*y),
        color=look.color,
        marker=look.marker,
        markersize=6,
        linewidth=2,
        capsize=3,
    )


def _frontier(found: Collection, baseline: str, looks: dict[str, Look]) -> PlotGroup:
    points = [
        (looks[e.name], kl, gold)
        for e in found.evaluations
        if (kl := _drawn(e.estimate("kl"))) is not None and (gold := _drawn(e.estimate("gold_score"))) is not None
    ]

    def draw(axes: Any) -> None:
        for look, kl, gold in points:
            _point(axes, look, (kl.value, kl.low, kl.high), (gold.value, gold.low, gold.high))
        axes.set_xlabel("KL to the reference (nats per completion)")
        axes.set_ylabel("gold score")

    caption = "gold score against KL, one point a row and seed, 95 % intervals; up and to the left is better"
    figures = (Figure(caption, _svg(draw, 4.4, 3.2, caption)),) if points else ()
    used = {look.name for look, _, _ in points}
    return PlotGroup("KL against gold score", tuple(looks[n] for n in looks if n in used), figures)


def _curves(found: Collection, looks: dict[str, Look]) -> list[PlotGroup]:
    groups = []
    kinds = sorted({curve.kind for curve in found.curves}, key=lambda kind: (kind != "ppo", kind))
    for kind in kinds:
        curves = [curve for curve in found.curves if curve.kind == kind]
        keys = PPO_CURVES if kind == "ppo" else ("loss",)
        figures = [figure for key in keys if (figure := _curve(curves, key, kind, looks))]
        seeds = _seeds(curves)
        note = f"At most {_POINTS} points a curve are drawn, none beyond {_LARGEST:g}."
        if len(seeds) > 1:
            drawn = ("solid", "dashed", "dotted", "dash-dotted")
            which = ", ".join(f"{drawn[i % len(drawn)]}: seed {s}" for i, s in enumerate(seeds))
            note = f"Lines by seed: {which}. {note}"
        used = {curve.name for curve in curves}
        legend = tuple(looks[n] for n in looks if n in used)
        groups.append(PlotGroup(f"Training curves: {kind.upper()}", legend, tuple(figures), note))
    return groups


def _seeds(curves: Sequence[Curve]) -> list[int]:
    return sorted({curve.seed for curve in curves if curve.seed is not None})


def _points(curve: Curve, key: str) -> list[tuple[float, float]]:
    return [point for point in curve.points(key) if _on_axis(*point)]


def _curve(curves: Sequence[Curve], key: str, kind: str, looks: dict[str, Look]) -> Figure | None:
    seeds = _seeds(curves)

    def draw(axes: Any) -> None:
        for curve in curves:
            points = _points(curve, key)
            points = points[:: -(-len(points) // _POINTS) or 1]
            style = _STYLES[seeds.index(curve.seed) % len(_STYLES)] if curve.seed is not None else "-"
            look = looks[curve.name]
            # A single point makes no line, so it gets its marker.
            marker = look.marker if len(points) == 1 else None
            x, y = [p[0] for p in points], [p[1] for p in points]
            axes.plot(x, y, color=look.color, linestyle=style, marker=marker, linewidth=1.5)
        axes.set_xlabel("iteration" if kind == "ppo" else "step")

    if not any(_points(curve, key) for curve in curves):
        return None
    caption = key.replace("_", " ")
    return Figure(caption, _svg(draw, 3.4, 2.2, f"{kind} {caption}"))


def reliability_diagram(points: Sequence[Mapping[str, float]]) -> str:
    """Observed frequency against mean label, as an SVG file of its own; circles grow with the number of pairs."""
    most = max(point["n"] for point in points)

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, linestyle="--", linewidth=1, alpha=0.6)
        sizes = [20 + 130 * point["n"] / most for point in points]
        axes.scatter([p["p"] for p in points], [p["observed"] for p in points], s=sizes, color=_PALETTE[0], alpha=0.8)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("label: P(a is better)")
        axes.set_ylabel("share where people prefer a")

    return _file(_svg(draw, 3.4, 3.2, "reliability diagram"))


def budget_curves(curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]], xlabel: str, ylabel: str) -> str:
    """What is reached for how much, one line a name, as an SVG file of its own.

    Args:
        curves: of each name its points: x, and y with its interval (value, low, high).
        xlabel: what x is.
        ylabel: what y is.
    """
    looks = [Look(name, _PALETTE[i % len(_PALETTE)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(curves)]

    def draw(axes: Any) -> None:
        for look in looks:
            points = sorted(curves[look.name])
            for x, y in points:
                _point(axes, look, (x, None, None), y)
            xs, ys = [x for x, _ in points], [y[0] for _, y in points]
            axes.plot(xs, ys, color=look.color, marker=look.marker, linewidth=1, label=look.name)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.legend(loc="lower right", frameon=False, fontsize=8)

    return _file(_svg(draw, 5.6, 3.8, f"{ylabel} by {xlabel}"))


def _file(svg: str) -> str:
    """An inline SVG as a file."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg", f'<svg {names} style="color: #222; background: #fff"', 1)


def _svg(draw: Callable[[Any], None], width: float, height: float, label: str) -> str:
    """What ``draw`` puts on the axes, as SVG for inlining in HTML."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    salt = hashlib.sha256(f"{label} {width} {height}".encode("utf-8", "replace")).hexdigest()[:8]
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": ["sans-serif"],
        "font.size": 9,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), _INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Names may have characters that the font for measuring lacks; the reader's browser draws them.
        warnings.simplefilter("ignore")
        canvas = Canvas(figsize=(width, height), facecolor="none", layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot(facecolor="none")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(alpha=0.2, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), label, salt)


def _inline(svg: str, label: str, salt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{salt}-", svg).replace(_INK, "currentColor")
    name = re.sub(r'[<>&"]', " ", visible(label))
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
