"""What the commands print is only text."""

from __future__ import annotations

import logging

import pytest

from rlaif import cli

HOSTILE = "a\x1b[2J\u202e\x9bb"
SHOWN = "a\\u001b[2J\\u202e\\u009bb"


def test_the_last_line_holds_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._stop(f"error: {HOSTILE}", 2)
    assert capsys.readouterr().err == f"error: {SHOWN}\n"


def test_neither_do_log_lines() -> None:
    record = logging.LogRecord("rlaif", logging.WARNING, "", 0, "%s failed", (HOSTILE,), None)
    assert cli._Plain("%(message)s").format(record) == f"{SHOWN} failed"
