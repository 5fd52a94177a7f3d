"""Reading what SFT imitates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlaif.demonstrations import Demonstration, parse_demonstrations, read_demonstrations
from rlaif.records import UserError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Yes?"}


def test_every_reply_of_a_conversation_is_a_demonstration() -> None:
    system = {"role": "system", "content": "Be brief."}
    more = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long."}]
    found = parse_demonstrations({"messages": [system, USER, REPLY, *more]})
    assert found == [
        Demonstration((system, USER), "Yes?"),
        Demonstration((system, USER, REPLY, more[0]), "So long."),
    ]


def test_prompt_and_completion_and_text() -> None:
    assert parse_demonstrations({"prompt": "Hi", "completion": "Yes?"}) == [Demonstration((USER,), "Yes?")]
    assert parse_demonstrations({"prompt": [USER], "completion": [REPLY]}) == [Demonstration((USER,), "Yes?")]
    assert parse_demonstrations({"text": "Once upon a time"}) == [Demonstration((), "Once upon a time")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "Hi"}, 'needs "messages"'),
        ({"messages": "Hi"}, "list of messages"),
        ({"messages": [USER]}, "no reply"),
        ({"messages": [REPLY]}, "empty list"),
        ({"messages": [USER, {"role": "bot", "content": "Yes?"}]}, "'bot'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "non-empty"),
        ({"prompt": "Hi", "completion": 3}, "completion must be"),
        ({"text": ""}, "text must be"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    file = tmp_path / "demonstrations.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match="line 2") as caught:
        read_demonstrations(file)
    assert said in str(caught.value)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "demonstrations.jsonl"
    file.write_text("\n")
    with pytest.raises(UserError, match="no demonstrations"):
        read_demonstrations(file)
