"""Run folders -> comparison tables, plots, ``report.md`` and a self-contained ``report.html``."""

from rlaif.reporting.render import write_report

__all__ = ["write_report"]
