"""Sample, critique, revise: completions for the supervised stage of Constitutional AI (Bai et al. 2022, section 3).

Critique and revision are turns of the same conversation, so whatever a completion says stays a turn of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlaif.config import CritiqueRevisionConfig
from rlaif.constitution import Constitution, Principle
from rlaif.demonstrations import Demonstration
from rlaif.engines.base import Engine, Failure, Sampled, SampleRequest
from rlaif.labeling.store import VerdictStore
from rlaif.processes import from_main, spread, world_size
from rlaif.progress import progress
from rlaif.records import Message, Prompt, UserError, content_hash

log = logging.getLogger("rlaif")

# Texts that each of several processes makes before the main one stores those of all.
_TOGETHER = 512
_REPLY_ALONE = "Answer with the rewritten reply alone."


@dataclass
class Revised:
    """A completion on its way through the rounds; a line of ``revisions.jsonl``."""

    prompt_id: str
    prompt: list[Message]
    completion: str
    ended: bool
    rounds: list[dict[str, Any]]
    """Of each round: principle, critique, revision and whether the revision ended by itself."""
    dropped: str | None = None
    """Why it cannot be trained on."""

    @property
    def current(self) -> str:
        """The newest version."""
        return str(self.rounds[-1]["revision"]) if self.rounds else self.completion

    def demonstration(self) -> Demonstration:
        """The last revision, to imitate."""
        return Demonstration(tuple(self.prompt), self.current, bool(self.rounds[-1]["ended"]))


def revising_principles(constitution: Constitution) -> list[Principle]:
    """The principles that have a critique and a revision request.

    Raises:
        UserError: if there is none.
    """
    found = [principle for principle in constitution.principles if principle.critique and principle.revision]
    if not found:
        raise UserError(
            f"constitution {constitution.name}: no principle has both critique and revision, which "
            "method=critique_revision needs"
        )
    return found


def revise(
    prompts: Sequence[Prompt],
    writer: Engine,
    critic: Engine | None,
    constitution: Constitution,
    config: CritiqueRevisionConfig,
    store: VerdictStore | None,
    seed: int,
    alone: bool = False,
) -> list[Revised]:
    """Sample completions, then critique and revise each ``config.revisions`` times.

    Every text is stored as it arrives, so an interrupted run goes on from there. A completion of which a step failed
    or came out empty is dropped, with the reason.

    Several processes share the writing, and the critic's work unless it is ``alone``, in the main process. That one
    has the store. All get all texts.
    """
    principles = revising_principles(constitution)
    weights = np.array([principle.weight for principle in principles])
    jobs = [(prompt, number) for prompt in prompts for number in range(config.samples_per_prompt)]
    requests = [
        SampleRequest(
            prompt.messages, config.max_new_tokens, config.temperature, seed=_seed(seed, prompt.prompt_id, number)
        )
        for prompt, number in jobs
    ]
    sampled = _ask(writer, requests, store, "completions", alone=False)
    items = [
        Revised(prompt.prompt_id, list(prompt.messages), text.text, text.finish_reason == "stop", [])
        if isinstance(text, Sampled)
        else Revised(prompt.prompt_id, list(prompt.messages), "", False, [], dropped=text)
        for (prompt, _), text in zip(jobs, sampled, strict=True)
    ]
    for round_number in range(config.revisions):
        going = [(place, item) for place, item in enumerate(items) if item.dropped is None]
        drawn = []
        for place, item in going:
            key = _seed(seed, item.prompt_id, jobs[place][1], round_number)
            drawn.append(principles[int(np.random.default_rng(key).choice(len(weights), p=weights / weights.sum()))])
        asked = [
            _critique_request(item, principle, config, _seed(seed, item.prompt_id, jobs[place][1], round_number, 1))
            for (place, item), principle in zip(going, drawn, strict=True)
        ]
        critiques = _ask(critic, asked, store, f"critiques {round_number + 1}", alone)
        rewrites = [
            _revision_request(request, critique.text, principle, config) if isinstance(critique, Sampled) else None
            for request, critique, principle in zip(asked, critiques, drawn, strict=True)
        ]
        possible = [rewrite for rewrite in rewrites if rewrite is not None]
        texts = iter(_ask(critic, possible, store, f"revisions {round_number + 1}", alone))
        for (_, item), critique, rewrite, principle in zip(going, critiques, rewrites, drawn, strict=True):
            revision = critique if rewrite is None else next(texts)
            if isinstance(critique, Sampled) and isinstance(revision, Sampled):
                item.rounds.append(
                    {
                        "principle": principle.id,
                        "critique": critique.text,
                        "revision": revision.text,
                        "ended": revision.finish_reason == "stop",
                    }
                )
            else:
                item.dropped = str(revision)
    lost = [item.dropped for item in items if item.dropped is not None]
    if lost:
        log.warning("critique_revision: %d of %d completions are dropped (first: %s)", len(lost), len(items), lost[0])
    if len(lost) == len(items):
        raise UserError(f"critique_revision: none of {len(items)} completions was revised; first reason: {lost[0]}")
    return items


def _seed(*parts: Any) -> int:
    return int(content_hash("critique_revision", *parts)[:12], 16)


def _critique_request(item: Revised, principle: Principle, config: CritiqueRevisionConfig, seed: int) -> SampleRequest:
    messages = (
        *item.prompt,
        {"role": "assistant", "content": item.current},
        {"role": "user", "content": str(principle.critique)},
    )
    return SampleRequest(messages, config.critique_tokens, config.temperature, seed=seed)


def _revision_request(
    asked: SampleRequest, critique: str, principle: Principle, config: CritiqueRevisionConfig
) -> SampleRequest:
    messages = (
        *asked.messages,
        {"role": "assistant", "content": critique},
        {"role": "user", "content": f"{principle.revision} {_REPLY_ALONE}"},
    )
    return SampleRequest(messages, config.max_new_tokens, config.temperature, seed=asked.seed + 1)


def _ask(
    engine: Engine | None, requests: Sequence[SampleRequest], store: VerdictStore | None, what: str, alone: bool
) -> list[Sampled | str]:
    """The text of each request, or the reason why there is none; asks only what is not in the store.

    Of several processes each asks a share, or the main one all (``alone``).
    """

    def ask(some: Sequence[SampleRequest]) -> list[Sampled | str]:
        assert engine is not None
        return _ask_here(engine, some, store, what)

    if alone or world_size() == 1:
        return from_main(lambda: ask(requests))
    assert engine is not None
    keys = _keys(engine, requests)
    known = from_main(lambda: _known(store, keys))
    pending = [request for key, request in zip(keys, requests, strict=True) if key not in known]
    found: dict[str, Sampled | str] = {key: Sampled(*value) for key, value in known.items()}
    size = _TOGETHER * world_size()
    for start in range(0, len(pending), size):
        part = pending[start : start + size]
        texts = dict(zip(_keys(engine, part), spread(ask, part), strict=True))
        found |= texts
        if store is not None:
            for key, text in texts.items():
                if isinstance(text, Sampled):
                    store.put(key, _stored(text))
    return [found[key] for key in keys]


def _ask_here(
    engine: Engine, requests: Sequence[SampleRequest], store: VerdictStore | None, what: str
) -> list[Sampled | str]:
    keys = _keys(engine, requests)
    known = _known(store, keys)
    pending = [place for place, key in enumerate(keys) if key not in known]
    failed: dict[str, str] = {}
    with progress(len(requests), what, "text", initial=len(requests) - len(pending)) as bar:
        for index, result in engine.sample(requests[place] for place in pending):
            key = keys[pending[index]]
            if isinstance(result, Failure):
                failed[key] = result.reason
            elif not result.text.strip():
                failed[key] = "empty"
            else:
                known[key] = _stored(result)
                if store is not None:
                    store.put(key, known[key])
            bar.update()
    return [Sampled(*known[key]) if key in known else failed[key] for key in keys]


def _known(store: VerdictStore | None, keys: Sequence[str]) -> dict[str, Any]:
    """The texts that are stored; of another stage's answers, which are no lists, none."""
    found = {} if store is None else store.get(keys)
    return {key: value for key, value in found.items() if isinstance(value, list)}


def _keys(engine: Engine, requests: Sequence[SampleRequest]) -> list[str]:
    return [
        content_hash(engine.identity, r.messages, r.max_new_tokens, r.temperature, r.top_p, r.seed) for r in requests
    ]


def _stored(text: Sampled) -> list[Any]:
    return [text.text, text.finish_reason, text.tokens]
