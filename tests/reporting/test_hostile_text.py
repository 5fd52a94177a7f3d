"""Completions, names and errors are hostile: a report shows them and obeys none."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import change, samples, write

from rlaif.reporting import write_report
from rlaif.reporting.text import Safe, markdown
from rlaif.text import visible

ATTACK = (
    "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)> "
    "\u202etxt\u202c\x1b[31m\x00\ud800\n"
    "# Heading\n![x](http://evil.example/p.png) [y](javascript:alert(1)) | cell | `code` {{ 7*7 }} "
    "</svg></style> www.evil.example <!-- --> $x_1^2$ :smile: _em_ **strong** a@evil.example"
)


class Page(HTMLParser):
    """Collects every element and every address that a browser would follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


@pytest.fixture
def attacked(run: Path) -> tuple[str, str]:
    """A report on a run where every text that others write is an attack."""
    for seed in (1, 2):
        folder = run / f"seed={seed}" / "arms" / "dpo" / "evaluation"
        change(folder / "metrics.json", name=ATTACK, feedback=ATTACK, gold=ATTACK)
        lines = [{**line, "completion": ATTACK, "finish_reason": ATTACK} for line in samples("dpo")]
        write(folder / "samples.jsonl", lines)
    lines = [{**line, "prompt": [{"role": ATTACK, "content": ATTACK}]} for line in samples("base")]
    write(run / "seed=1" / "arms" / "base" / "evaluation" / "samples.jsonl", lines)
    change(
        run / "seed=1" / "labels" / "quality.json",
        labeler=ATTACK,
        agreement_low=0.4,
        dropped={ATTACK: ATTACK},
    )
    write(run / "seed=3" / "failed.json", {"error": ATTACK, "overrides": [ATTACK]})
    write(run / "seed=3" / "provenance.json", {"stage": ATTACK, "wall_s": 1, "versions": {ATTACK: ATTACK}})
    write(run / "seed=3" / "pm" / "training.jsonl", [{"method": ATTACK, "step": 1, "loss": 0.1}])
    html, text = write_report([run], run.parent / "report", ATTACK, "base", 10, 0)
    return html.read_text(encoding="utf-8"), text.read_text(encoding="utf-8")


def test_html_runs_and_loads_nothing(attacked: tuple[str, str]) -> None:
    html, _ = attacked
    page = Page(html)
    assert not page.tags & {"script", "img", "a", "iframe", "link", "object", "form", "image"}
    assert not page.handlers
    assert all(link.startswith("#") for link in page.links)
    assert "http://evil.example/x onerror" in html
    assert "{{ 7*7 }}" in html


def test_html_has_a_strict_content_security_policy(attacked: tuple[str, str]) -> None:
    head = attacked[0].split("<title>")[0]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', head)
    assert policy is not None
    assert policy[1] == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def test_invisible_characters_are_written_out(attacked: tuple[str, str]) -> None:
    for text in attacked:
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x00\x1b]", text)
    assert "\\u202etxt\\u202c\\u001b[31m\\u0000\\ud800" in attacked[0]


def test_markdown_has_no_link_image_heading_or_html(attacked: tuple[str, str]) -> None:
    _, text = attacked
    assert not re.search(r"(?<!\\)\]\(", text)
    assert not re.search(r"(?<!\\)!\[", text.replace("[!WARNING]", ""))
    assert set(re.findall(r"<[^>]*>", text)) == {"<br>"}
    assert not re.search(r"(?i)(https?|javascript):|www\.", text)
    heads = re.findall(r"(?m)^\s*#+ (.*)$", text)
    assert not any(head.startswith("Heading") for head in heads)


def test_markdown_tables_keep_their_columns(attacked: tuple[str, str]) -> None:
    width = None
    for line in attacked[1].splitlines():
        if not line.startswith("|"):
            width = None
            continue
        width = width or line.count("|")
        assert line.count("|") == width


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb", "a\\u202eb"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\r\x7f\u200b\u2028\ufeff", "\\u000d\\u007f\\u200b\\u2028\\ufeff"),
        ("\U000e0041", "\\U000e0041"),
        ("né 日本 🙂", "né 日本 🙂"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", "a&#124;b"),
        ("# x\n# y", "\\# x<br>\\# y"),
        ("rlaif_ppo _x_", "rlaif_ppo \\_x\\_"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("`c` \\", "\\`c\\` \\\\"),
        ("![x](https://y)", "\\!\\[x\\]\\(https\\://y\\)"),
        (Safe("0.41 [0.36, 0.46] (n=128)"), "0.41 [0.36, 0.46] (n=128)"),
    ],
)
def test_markdown(text: str, escaped: str) -> None:
    assert markdown(text) == escaped
