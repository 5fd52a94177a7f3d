"""Writes the report: ``report.html``, one file that loads nothing, and ``report.md`` with the same words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlaif.records import atomic_file
from rlaif.reporting.collect import Collection, Evaluation, collect
from rlaif.reporting.plots import PlotGroup, plot_groups
from rlaif.reporting.statement import (
    Line,
    audit_warnings,
    label_warnings,
    length_notes,
    pm_notes,
    pm_warnings,
    statement,
    warnings,
)
from rlaif.reporting.tables import (
    Example,
    Table,
    comparison,
    examples,
    failed_jobs,
    label_quality,
    preference_models,
    provenance,
    wall_times,
)
from rlaif.reporting.text import Safe, markdown, number
from rlaif.text import visible

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Report:
    """All that a report says, before it takes a format."""

    title: str
    statement: list[Line]
    details: list[Line]
    warnings: list[Line]
    comparison: Table
    plots: tuple[PlotGroup, ...]
    label_warnings: list[Line]
    label_quality: Table | None
    length_notes: list[Line]
    pm_warnings: list[Line]
    pm_notes: list[Line]
    preference_models: Table | None
    example_rows: list[Evaluation]
    examples: list[Example]
    examples_note: str
    failed_jobs: Table | None
    wall_times: Table | None
    provenance: Table | None


def write_report(
    roots: Sequence[Path], output: Path, title: str, baseline: str, examples: int, seed: int
) -> list[Path]:
    """Compare every run found below ``roots`` in ``output/report.html`` and ``output/report.md``.

    Args:
        roots: folders of runs, searched recursively.
        output: folder for the report.
        title: its heading.
        baseline: name of the row that the others are compared with.
        examples: number of prompts shown side by side.
        seed: draws these prompts.

    Raises:
        UserError: if a root is no folder or holds no evaluation.
    """
    report = _report(collect(roots), title, baseline, examples, seed)
    paths = []
    for name, text in (("report.html", _html(report)), ("report.md", _markdown(report))):
        with atomic_file(output / name) as file:
            file.write(text)
        paths.append(output / name)
    return paths


def _report(found: Collection, title: str, baseline: str, count: int, seed: int) -> Report:
    result, details = statement(found, baseline)
    example_rows, drawn = examples(found, baseline, count, seed)
    return Report(
        title=title,
        statement=result,
        details=details,
        warnings=warnings(found, baseline),
        comparison=comparison(found, baseline),
        plots=plot_groups(found, baseline),
        label_warnings=[*label_warnings(found), *audit_warnings(found)],
        label_quality=label_quality(found),
        length_notes=length_notes(found),
        pm_warnings=pm_warnings(found),
        pm_notes=pm_notes(found),
        preference_models=preference_models(found),
        example_rows=example_rows if count > 0 else [],
        examples=drawn,
        examples_note=_examples_note(len(drawn), seed),
        failed_jobs=failed_jobs(found),
        wall_times=wall_times(found),
        provenance=provenance(found),
    )


def _examples_note(count: int, seed: int) -> Safe:
    if count == 0:
        return Safe("No prompt was answered by every row.")
    return Safe(
        f"{count} prompts, drawn at random (seed {seed}) from those that every row answered, "
        "not chosen by hand. Each row shows the first completion of its first seed and its gold score."
    )


def _html(report: Report) -> str:
    from jinja2 import Environment, StrictUndefined

    def finalize(value: Any) -> Any:
        """Make invisible characters visible in everything that the template prints, before it is escaped."""
        return value if isinstance(value, Markup) else visible(str(value))

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=finalize, trim_blocks=True, lstrip_blocks=True
    )
    # Only our own SVG passes unescaped.
    environment.filters["svg"] = Markup
    environment.filters["number"] = number
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report)


def _markdown(report: Report) -> str:
    lines = [f"# {markdown(report.title)}", "", " ".join(_sentence(line) for line in report.statement), ""]
    lines += [*(f"- {_sentence(line)}" for line in report.details), ""]
    lines += [f"> **Note:** {_sentence(line)}\n" for line in report.warnings]
    lines += _section("Comparison", report.comparison)
    lines += _section("Label quality", report.label_quality, report.label_warnings, report.length_notes)
    lines += _section("Preference models", report.preference_models, report.pm_warnings, report.pm_notes)
    if report.example_rows:
        lines += ["## Sample completions", "", report.examples_note, "", *_samples(report)]
    lines += _section("Failed jobs", report.failed_jobs)
    lines += _section("Wall time by stage", report.wall_times)
    lines += _section("Provenance", report.provenance)
    return "\n".join(lines)


def _sentence(line: Line) -> str:
    return "".join(markdown(part) for part in line)


def _section(
    heading: str, table: Table | None, alarms: Sequence[Line] = (), notes: Sequence[Line] = ()
) -> Iterator[str]:
    if table is None:
        return
    yield from (f"## {heading}", "")
    for line in alarms:
        yield from ("> [!WARNING]", f"> **{_sentence(line)}**", "")
    yield from _grid(table.columns, [(row.cells, row.summary) for row in table.rows])
    yield from (f"- {_sentence(line)}" for line in notes)
    yield from (f"- **{term}**: {meaning}" for term, meaning in table.terms)
    yield ""


def _grid(columns: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]]) -> Iterator[str]:
    yield "| " + " | ".join(map(markdown, columns)) + " |"
    yield "|" + " --- |" * len(columns)
    for cells, strong in rows:
        texts = [markdown(cell) or " " for cell in cells]
        yield "| " + " | ".join(f"**{t}**" if strong and t.strip() else t for t in texts) + " |"
    yield ""


def _samples(report: Report) -> Iterator[str]:
    for index, example in enumerate(report.examples, 1):
        yield from (f"### Prompt {index}: {markdown(example.prompt_id)}", "")
        for role, content in example.prompt:
            yield from (f"- **{markdown(role)}**: {markdown(content)}", "")
        scores = [Safe(f"gold score {number(sample.gold_score)}") for sample in example.answers]
        cells = [sample.completion or Safe("(empty)") for sample in example.answers]
        yield from _grid([row.name for row in report.example_rows], [(cells, False), (scores, False)])
