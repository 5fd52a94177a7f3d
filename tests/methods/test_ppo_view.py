"""What PPO shows while it runs: right figures, time left, and no power for the texts it shows."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rlaif.methods.ppo_view import View, cut, shown

LINE = {
    "iteration": 2,
    "score": 0.524,
    "reward": -0.31,
    "kl": 2.104,
    "entropy": 2.31,
    "clip_fraction": 0.0812,
    "value_loss": 0.01234,
    "length": 23.46,
    "eos_rate": 0.817,
}
FIGURES = "score +0.52, reward -0.31, kl 2.10, entropy 2.31, clipped 8.1%, value loss 0.0123, length 23.5, ended 82%"
HOSTILE = "a\x1b[2J\x1b]0;x\x07 b\r\nc\u202ed\u200b\x9b31m"


def sample(text: str = "yes", score: float = 1.0) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"ask {text}"}], "completion": text, "score": score}


class Screen(io.StringIO):
    """A terminal that keeps what it is sent."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal() -> Iterator[Screen]:
    """Standard error is a terminal of 120 columns."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(Screen()) as screen:
        patch.setenv("COLUMNS", "120")
        yield screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that is moved by hand."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr("rlaif.methods.ppo_view.time.monotonic", lambda: now.s)
    return now


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_terminal_gets_round_figures_and_a_sample() -> None:
    with terminal() as screen, View(10, first=2) as view:
        view.show(LINE | {"validation_score": 0.4, "validation_kl": 2.2}, [sample("one"), sample("two"), sample("x")])
        found = screen.getvalue()
    assert " 3/10 " in found
    for text in (*FIGURES.split(", "), "validation after 3: score +0.40, kl 2.20", "sample (score +1.00): ask x -> x"):
        assert text in found
    # Every line stays within the terminal, or it would be two.
    assert all(len(line) < 120 for line in re.split(r"[\r\n]|\x1b\[A", found))


def test_figures_of_validation_stay_until_there_are_new_ones() -> None:
    with terminal() as screen, View(10) as view:
        view.show(LINE | {"validation_score": 0.4, "validation_kl": 2.2}, [])
        view.show(LINE | {"iteration": 3}, [])
        assert "validation after 3" in screen.getvalue()
        assert any("validation after 3" in line.desc for line in view._lines)
        assert view._bar.n == 2


def test_a_log_gets_plain_lines_at_intervals(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rlaif")
    with View(10, first=2) as view:
        clock.s += 30
        view.show(LINE, [sample("first")])
        # 30 s for one round, seven are left.
        assert logged(caplog) == [
            f"ppo: 3 of 10, 3:30 left: {FIGURES}",
            "ppo: sample (score +1.00): ask first -> first",
        ]
        clock.s += 4
        view.show(LINE | {"iteration": 3}, [sample("second")])
        assert len(logged(caplog)) == 2
        clock.s += 8
        view.show(LINE | {"iteration": 4, "validation_score": 0.4, "validation_kl": 2.2}, [sample("third")])
        assert [text.split(":")[1] for text in logged(caplog)[2:]] == [" 5 of 10, 1", " validation after 5"]
        clock.s += 50
        view.show(LINE | {"iteration": 5}, [sample("fourth")])
        assert logged(caplog)[-1].endswith("ask fourth -> fourth")


def test_the_last_round_is_always_said(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rlaif")
    with View(2) as view:
        for iteration in (0, 1):
            clock.s += 1
            view.show(LINE | {"iteration": iteration}, [])
    assert [text.split(":")[1] for text in logged(caplog)] == [" 1 of 2, 1.0 s left", " 2 of 2, 0.0 s left"]


def test_texts_move_no_cursor() -> None:
    with terminal() as screen, View(10) as view:
        view.show(LINE, [sample(HOSTILE)])
        found = screen.getvalue()
    # tqdm goes up and down a line, and nothing else is left of what terminals obey.
    rest = found.replace("\x1b[A", "")
    assert "\\u001b[2J" in rest
    assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202e]", rest)
    assert "\n" not in shown(sample(HOSTILE))


def test_wide_letters_take_two_columns() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "ab…"
    assert cut("日本語", 6) == "日本語"
    assert cut("日本語", 5) == "日本…"


def test_only_the_main_process_shows(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rlaif")
    monkeypatch.setenv("RANK", "1")
    with terminal() as screen, View(10) as view:
        view.show(LINE, [sample()])
    assert (screen.getvalue(), logged(caplog)) == ("", [])
