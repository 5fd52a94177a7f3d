"""What the commands print is only text."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif import cli
from rlaif.records import UserError

HOSTILE = "a\x1b[2J\u202e\x9bb"
SHOWN = "a\\u001b[2J\\u202e\\u009bb"


def test_the_last_line_holds_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._stop(f"error: {HOSTILE}", 2)
    assert capsys.readouterr().err == f"error: {SHOWN}\n"


def test_neither_do_log_lines() -> None:
    record = logging.LogRecord("rlaif", logging.WARNING, "", 0, "%s failed", (HOSTILE,), None)
    assert cli._Plain("%(message)s").format(record) == f"{SHOWN} failed"


def test_options_may_stand_between_overrides() -> None:
    given = ["a=1", "--config-dir", "here", "-m", "b=2", "-c", "job", "c=3"]
    assert cli._normalise(given) == (["a=1", "b=2", "c=3", "--config-dir=here", "-c=job"], True)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--api-key=hunter2", "there is no option --api-key: settings are key=value, without dashes"),
        ("--", "there is no option --"),
        ("-1", "there is no option -1"),
        ("--cfg", "--cfg: its value is missing"),
        ("--cfg=all of it", "--cfg=all of it: must be one of job, hydra, all"),
        ("--resolve=yes", "--resolve: takes no value"),
    ],
)
def test_what_is_no_option_is_refused_without_its_value(argument: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        cli._normalise(["a=1", argument])
    assert str(refused.value).startswith(message)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("raised", "status", "said"), [("KeyboardInterrupt", 130, "interrupted"), ("OSError", 1, "Trace")]
)
def test_an_interrupt_while_modules_load_is_no_traceback(raised: str, status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text(f"raise {raised}\n")
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"
    command = [sys.executable, "-m", "rlaif.sample", "--help"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == status
    assert ended.stderr.strip().startswith(said)
