"""What SFT imitates: replies to conversations, or plain text for continued pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.records import ROLES, Message, Preference, UserError, parse_messages, read_jsonl


@dataclass(frozen=True)
class Demonstration:
    """A completion to imitate. Without a prompt it is plain text, which no chat template touches."""

    prompt: tuple[Message, ...]
    completion: str
    ended: bool = True
    """False for a completion that was cut: training then adds no end token."""


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Read a JSONL file; each line has ``messages``, ``prompt`` and ``completion``, or ``text``.

    ``messages`` is a conversation; every reply of the assistant in it becomes a demonstration.

    Raises:
        UserError: naming file and line; also if there is nothing to train on.
    """
    found = [one for several in read_jsonl(path, parse_demonstrations) for one in several]
    if not found:
        raise UserError(f"{path}: has no demonstrations")
    return found


def parse_demonstrations(line: Mapping[str, Any]) -> list[Demonstration]:
    """The demonstrations in one line.

    Raises:
        ValueError: naming the key that is wrong.
    """
    if "messages" in line:
        return _replies(line["messages"])
    if "prompt" in line and "completion" in line:
        completion = line["completion"]
        if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
            completion = completion[0].get("content")
        return [Demonstration(parse_messages(line["prompt"]), _text(completion, "completion"))]
    if "text" in line:
        return [Demonstration((), _text(line["text"], "text"))]
    found = ", ".join(sorted(line)) or "nothing"
    raise ValueError(f'needs "messages", "prompt" and "completion", or "text" (found: {found})')


def _replies(messages: Any) -> list[Demonstration]:
    if not isinstance(messages, list):
        raise ValueError('"messages" must be a list of messages')
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    unknown = next((role for role in roles if role not in ROLES), None)
    if not set(roles) <= set(ROLES):
        raise ValueError(f"messages: role {unknown!r}, expected one of {', '.join(ROLES)}")
    places = [place for place, role in enumerate(roles) if role == "assistant"]
    if not places:
        raise ValueError('"messages" has no reply of the assistant')
    return [
        Demonstration(
            parse_messages(messages[:place], "messages"), _text(messages[place].get("content"), f"messages[{place}]")
        )
        for place in places
    ]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be a non-empty text")
    return value


def chosen_completions(preferences: Sequence[Preference]) -> list[Demonstration]:
    """The chosen completion of each pair; one that is chosen in several pairs counts once."""
    seen = {(p.prompt_id, p.chosen): Demonstration(p.prompt, p.chosen, p.chosen_ended) for p in preferences}
    return list(seen.values())
