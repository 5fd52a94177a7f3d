"""Critique and revision: what is asked, in which order, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlaif.config import CritiqueRevisionConfig
from rlaif.constitution import Constitution, Principle, load_constitution
from rlaif.engines.base import Engine, Failure, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.labeling.store import VerdictStore
from rlaif.methods.critique_revision import Revised, revise, revising_principles
from rlaif.records import Prompt, UserError

PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"question {i}"},)) for i in range(40)]
CONSTITUTION = Constitution(
    "test",
    "1",
    "Two principles.",
    (
        Principle("rare", 1.0, "Which?", critique="Critique rarely.", revision="Revise rarely."),
        Principle("often", 9.0, "Which?", critique="Critique often.", revision="Revise often."),
        Principle("silent", 9.0, "Which?"),
    ),
)


class Scribe(Engine):
    """Says how many turns it was shown, and keeps the requests; ``broken`` ones fail or are empty."""

    def __init__(self, name: str, broken: dict[str, str] | None = None) -> None:
        self.identity = {"engine": "scribe", "model": name}
        self.broken = broken or {}
        self.asked: list[SampleRequest] = []

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[int, Sampled | Failure]]:
        for index, request in enumerate(requests):
            self.asked.append(request)
            first, last = request.messages[0]["content"], request.messages[-1]["content"]
            problem = self.broken.get(first) or self.broken.get(f"{first} {last}")
            if problem == "empty":
                yield index, Sampled(" ", "stop", 1)
            elif problem:
                yield index, Failure(problem)
            else:
                text = f"{self.identity['model']} on {first} after {len(request.messages)} turns"
                yield index, Sampled(text, "length" if first == "question 3" else "stop", 9)

    def score_options(self, requests: Iterable[OptionRequest]) -> Iterator[tuple[int, OptionMass | Failure]]:
        raise AssertionError("nothing is scored here")


def run(folder: Path, writer: Engine, critic: Engine, **changes: int) -> list[Revised]:
    config = replace(CritiqueRevisionConfig(revisions=2, critique_tokens=7, max_new_tokens=9), **changes)
    with VerdictStore(folder / "store.sqlite") as store:
        return revise(PROMPTS, writer, critic, CONSTITUTION, config, store, seed=0)


def test_critique_and_revision_are_turns_of_the_conversation(tmp_path: Path) -> None:
    writer, critic = Scribe("writer"), Scribe("critic")
    items = run(tmp_path, writer, critic, revisions=1)
    assert len(writer.asked) == 40
    assert len(critic.asked) == 80
    critique, revision = critic.asked[0], critic.asked[40]
    assert [message["role"] for message in revision.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert revision.messages[:3] == critique.messages
    assert revision.messages[1]["content"] == "writer on question 0 after 1 turns"
    assert revision.messages[3]["content"] == "critic on question 0 after 3 turns"
    kind = items[0].rounds[0]["principle"]
    assert critique.messages[-1]["content"] == {"rare": "Critique rarely.", "often": "Critique often."}[kind]
    assert revision.messages[-1]["content"].startswith({"rare": "Revise rarely.", "often": "Revise often."}[kind])
    assert (critique.max_new_tokens, revision.max_new_tokens) == (7, 9)
    found = items[0].demonstration()
    assert (found.prompt, found.completion, found.ended) == (
        PROMPTS[0].messages,
        "critic on question 0 after 5 turns",
        True,
    )
    # A revision that was cut gets no end token.
    assert not items[3].demonstration().ended


def test_a_later_round_starts_from_the_revision_under_a_new_principle(tmp_path: Path) -> None:
    critic = Scribe("critic")
    items = run(tmp_path, Scribe("writer"), critic)
    second = critic.asked[80]
    assert second.messages[1]["content"] == items[0].rounds[0]["revision"]
    drawn = [[row["principle"] for row in item.rounds] for item in items]
    assert {name for names in drawn for name in names} == {"rare", "often"}
    assert any(first != other for first, other in drawn)
    # Drawn by weight: 9 to 1, of 80; and the same every time.
    assert 60 <= sum(names.count("often") for names in drawn) < 80
    again = run(tmp_path / "..", Scribe("writer"), Scribe("critic"))
    assert [[row["principle"] for row in item.rounds] for item in again] == drawn


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    first = run(tmp_path, Scribe("writer"), Scribe("critic"))
    writer, critic = Scribe("writer"), Scribe("critic")
    assert run(tmp_path, writer, critic) == first
    assert not writer.asked
    assert not critic.asked


def test_a_row_that_is_no_text_is_asked_again(tmp_path: Path) -> None:
    first = run(tmp_path, Scribe("writer"), Scribe("critic"))
    with VerdictStore(tmp_path / "store.sqlite") as store:
        [(key,)] = store.connection.execute("SELECT key FROM verdicts LIMIT 1").fetchall()
        store.put(key, {"text": "x", "finish_reason": "stop", "tokens": 1})
    writer, critic = Scribe("writer"), Scribe("critic")
    assert run(tmp_path, writer, critic) == first
    assert len(writer.asked) + len(critic.asked) == 1


def test_what_fails_is_dropped_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = run(tmp_path, Scribe("writer", {"question 1": "timeout"}), Scribe("critic", {"question 2": "empty"}))
    assert [item.dropped for item in items[:4]] == [None, "timeout", "empty", None]
    assert all(len(item.rounds) == 2 for item in items if item.dropped is None)
    assert "2 of 40 completions are dropped (first: timeout)" in caplog.text
    everything = {f"question {i}": "http_500" for i in range(40)}
    with pytest.raises(UserError, match="none of 40 completions was revised; first reason: http_500"):
        run(tmp_path, Scribe("another", everything), Scribe("critic"))


def test_principles_without_requests_are_not_drawn() -> None:
    assert [principle.id for principle in revising_principles(CONSTITUTION)] == ["rare", "often"]
    mute = replace(CONSTITUTION, principles=CONSTITUTION.principles[2:])
    with pytest.raises(UserError, match="no principle has both critique and revision"):
        revising_principles(mute)


@pytest.mark.parametrize("name", ["harmless", "helpful", "honest", "concise", "summarize", "instruction_following"])
def test_shipped_constitutions_can_revise(name: str) -> None:
    constitution = load_constitution(name)
    assert revising_principles(constitution) == list(constitution.principles)
