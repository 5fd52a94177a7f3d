"""Asking: candidates -> verdicts, each stored the moment it exists.

The candidates are gone through once for each kind of request, again as long as a talk asks anything new where it
decides by its answers, and once more to read the labels off the store. Nothing that grows with their number is held in
memory, except a float for each answer's latency.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlaif.config import LabelingConfig, LabelMode
from rlaif.constitution import Constitution
from rlaif.engines.base import (
    CompletionRequest,
    Engine,
    Failure,
    Likelihood,
    OptionMass,
    OptionRequest,
    Sampled,
    SampleRequest,
)
from rlaif.labeling.live import LiveView, Truth
from rlaif.labeling.modes import Request, Setup
from rlaif.labeling.store import Failures, VerdictStore
from rlaif.labeling.verdicts import Answer
from rlaif.records import Candidates, Completion, Label, Prompt, UserError, content_hash

log = logging.getLogger("rlaif")

_ACCOUNT_S = 0.01

_EXAMPLE = Candidates(
    Prompt("example", ({"role": "user", "content": "Question?"},)), (Completion("a", "One."), Completion("b", "Two."))
)

Lines = Callable[[], Iterable[Candidates]]
"""Opens the candidates anew."""


def label_candidates(
    lines: Sequence[Candidates],
    constitution: Constitution,
    engine: Engine,
    config: LabelingConfig,
    store: VerdictStore,
    seed: int = 0,
) -> list[Label]:
    """All labels of candidates that fit into memory, in a fixed order."""
    setup = Setup(constitution, engine.name, config, seed)
    labeling = Labeling(lambda: lines, setup, engine, store)
    labeling.ask(sum(setup.expected(len(line.candidates)) for line in lines), len(lines))
    return [label for _, labels in labeling.labels() for label in labels]


class Labeling:
    """One run over the candidates.

    Args:
        lines: opens the candidates.
        setup: how they are labeled.
        engine: whom to ask.
        store: what is known already, and where new answers go.
        truth: what verdicts are compared with while they come in.
    """

    def __init__(
        self, lines: Lines, setup: Setup, engine: Engine, store: VerdictStore, truth: Truth | None = None
    ) -> None:
        self.lines, self.setup, self.engine, self.store, self.truth = lines, setup, engine, store, truth
        self.failed = Failures()
        """Requests without an answer in this run; they are not stored, so a later run asks them again."""
        self.latencies = array("f")
        """Seconds of each answered request of this run, retries included, where the engine knows them."""
        self.answered = 0
        """Answers that this run got to requests of the last kind, those that labels are made of."""
        self._identity = content_hash(engine.identity)
        self._accounted = 0.0
        before = store.spent()
        if before is not None and engine.spent is not None and not engine.spent.requests:
            engine.spent = type(engine.spent)(*before[: len(engine.spent)])  # type: ignore[misc]
        self._set_aside = engine.set_aside(store.set_aside)
        self._fingerprint = content_hash(
            self._identity,
            asdict(setup.constitution),
            asdict(setup.config),
            asdict(setup.calibration),
            setup.seed,
            "finished",
            _code(),
            # And what other modules contribute to the wording, as an example shows it.
            [self.key(request, self._near(_EXAMPLE)) for request in next(setup.talk(_EXAMPLE))],
        )

    def ask(self, expected: int, prompts: int = 0) -> None:
        """Ask everything that is not in the store yet.

        Args:
            expected: about how many verdicts there will be, for the progress shown.
            prompts: how many prompts there are, for the same.
        """
        for number in itertools.count(1):
            asked = 0
            for kind in self.setup.kinds:
                last = kind is self.setup.kinds[-1]
                what, unit = ("labeling", "verdict") if last else ("rationales", "rationale")
                if self.setup.adaptive:
                    what = f"{what}, round {number}"
                # How many answers a round takes is known only afterwards.
                total = None if self.setup.adaptive else expected
                with LiveView(total, (what, unit), self.engine, self.setup.minimum, self.truth, prompts) as view:
                    asked += self._ask(kind, last, view)
            if not self.setup.adaptive or not asked:
                break
        if reasons := self.failed.reasons:
            log.warning("%d requests failed: %s", reasons.total(), dict(reasons))

    def labels(self) -> Iterator[tuple[Candidates, list[Label]]]:
        """The labels of each line, in the order of the candidates, from the store; after :meth:`ask`."""
        for line in self.lines():
            yield line, self._hold(line, missing=Failure("not_asked")).labels

    def _ask(self, kind: type, last: bool, view: LiveView) -> int:
        """One time through the candidates: ask what is missing and of this kind; returns how much that was."""
        adaptive = self.setup.adaptive
        waiting: dict[int, tuple[str, Any, _Open]] = {}
        in_flight: set[str] = set()

        def feed() -> Iterator[Any]:
            place = 0
            for line in self.lines():
                marker = content_hash(self._fingerprint, line.prompt.prompt_id, line.prompt.messages, _shown(line))
                expected = self.setup.expected(len(line.candidates))
                if self.store.is_finished(marker):
                    view.prompt(0)
                    view.known(0 if adaptive else expected)
                    continue
                held = self._hold(line)
                asked = [(key, request) for key, request in held.unknown if isinstance(request, kind)]
                view.known(0 if adaptive else max(expected - len(asked), 0))
                # Two lines may ask the same; a line whose answers somebody else waits for is not marked.
                own = {key: request for key, request in asked if key not in in_flight}
                view.prompt(len(own))
                # Nor is one that may ask more once it has its answers.
                answered = not held.unknown if adaptive else len(own) == len({key for key, _ in held.unknown})
                opened = _Open(marker, len(own), sound=last and held.sound and answered)
                self._close_if_done(opened)
                for key, request in own.items():
                    in_flight.add(key)
                    waiting[place] = key, request, opened
                    place += 1
                    self._account_if_due()
                    yield request

        count = 0
        self.engine.after_burst = self.store.commit
        try:
            for place, answer in _server(self.engine, kind)(feed()):
                count += 1
                key, request, opened = waiting.pop(place)
                in_flight.discard(key)
                opened.missing -= 1
                if isinstance(answer, Failure) and not answer.permanent:
                    self.failed.add(key, answer)
                    opened.sound = False
                else:
                    self.store.put(key, _to_json(answer), together=self.engine.in_bursts)
                    self.answered += last
                    # A later run shall look at it again.
                    opened.sound = opened.sound and not _is_passing(answer)
                    if isinstance(answer, OptionMass) and answer.latency_s is not None:
                        self.latencies.append(answer.latency_s)
                self._close_if_done(opened)
                view.add(request, answer)
                self._account_if_due()
        except BaseException:
            # Why it ended must not be hidden by what follows from it (a full disk).
            with contextlib.suppress(UserError):
                self.store.commit()
                if not self._set_aside:  # else requests may still be sent, and what they can cost is noted
                    self._account()
            raise
        finally:
            del self.engine.after_burst
        self.store.commit()
        self._account()
        if last and view.skipped:
            log.info("%d verdicts were known already, %d were asked", view.skipped, count)
        return count

    def _account(self) -> None:
        """Remember what has been spent, for the budget of a later run."""
        self._accounted = time.monotonic()
        if self.engine.spent is not None:
            self.store.spend(self.engine.settle())

    def _account_if_due(self) -> None:
        if not self._set_aside and time.monotonic() - self._accounted > _ACCOUNT_S:
            self._account()

    def _close_if_done(self, opened: _Open) -> None:
        if opened.sound and not opened.missing:
            self.store.finish(opened.marker)

    def _hold(self, line: Candidates, missing: Failure | None = None) -> _Held:
        """Hold the talk about a line with what is known.

        Args:
            line: a prompt's candidates.
            missing: the answer to whatever is not known; without it the talk stops there.
        """
        talk = self.setup.talk(line)
        near = self._near(line)
        sound = True
        try:
            requests = next(talk)
            while True:
                keys = [self.key(request, near) for request in requests]
                known = self._known(dict(zip(keys, requests, strict=True)))
                unknown = [(key, request) for key, request in zip(keys, requests, strict=True) if key not in known]
                if unknown and missing is None:
                    return _Held([], unknown, sound)
                answers = [known.get(key, missing) for key in keys]
                sound = sound and not any(map(_is_passing, answers))
                requests = talk.send([answer for answer in answers if answer is not None])
        except StopIteration as end:
            return _Held(end.value, [], sound)

    def _known(self, asked: Mapping[str, Request]) -> dict[str, Answer]:
        keys = list(asked)
        stored: dict[str, Answer] = {}
        for key, value in self.store.get(keys).items():
            if (answer := _answer(value, asked[key])) is None:
                self.store.drop(key)
            else:
                stored[key] = answer
        known = {key: answer for key, answer in stored.items() if not (_is_fallback(answer) and self._outdated(answer))}
        failed = self.failed.get(key for key in keys if key not in known)
        return known | {key: Failure(reason) for key, reason in failed.items()}

    def _outdated(self, answer: Answer) -> bool:
        """Whether a verdict from replies is asked again: votes of earlier versions do not say how many they are."""
        uncounted = isinstance(answer, OptionMass) and answer.replies is None
        return uncounted or self._superseded

    @functools.cached_property
    def _superseded(self) -> bool:
        """Whether verdicts from replies are asked again, because the labeler now gives log-probabilities.

        Asked once, at the first stored one: one run must not mix the two where it need not.
        """
        superseded = self.engine.gives_logprobs()
        if superseded:
            log.warning(
                "%s now gives log-probabilities: verdicts that an earlier run read from replies are asked again",
                self.engine.name,
            )
        return superseded

    def _near(self, line: Candidates) -> str:
        """What keys of this line's requests start with, so that the store holds them next to each other.

        Else each of a million verdicts would be written to, and read from, another page of the file. Empty where
        requests may leave the conversation out: those of two prompts can be the same.
        """
        pointwise = self.setup.config.mode is LabelMode.pointwise
        if pointwise and any(principle.ask is not None for principle in self.setup.constitution.principles):
            return ""
        return content_hash(line.prompt.messages)[:8]

    def key(self, request: Request, near: str = "") -> str:
        """Hash of everything that can change the answer, after ``near``."""
        scripted = self.engine.identity["engine"] == "scripted"
        content: tuple[Any, ...]
        if isinstance(request, OptionRequest):
            content = (request.messages, request.options, request.stem, request.meta if scripted else None)
        elif isinstance(request, CompletionRequest):
            content = ("likelihood", request.messages, request.completion, request.meta if scripted else None)
        else:
            content = ("sample", *asdict(request).values())
        return near + content_hash(self._identity, self.setup.seed, *content)


@dataclass(frozen=True)
class _Held:
    """A talk that was held: its labels, or the requests at which it stopped.

    ``sound``: nothing in it had failed or was read from replies.
    """

    labels: list[Label]
    unknown: list[tuple[str, Request]]
    sound: bool


@dataclass
class _Open:
    """A line with requests in flight. ``sound``: once they are answered, nothing of it is missing."""

    marker: str
    missing: int
    sound: bool


def _server(engine: Engine, kind: type) -> Callable[[Iterable[Any]], Iterator[tuple[int, Any]]]:
    if kind is CompletionRequest:
        return engine.score_completions
    return engine.sample if kind is SampleRequest else engine.score_options


@functools.cache
def _code() -> str:
    """Hash of the modules that decide what is asked: after a change of theirs no line counts as finished."""
    return content_hash(*(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))))


def _is_fallback(answer: Answer | None) -> bool:
    """Whether a verdict was read from replies, for want of log-probabilities."""
    return isinstance(answer, OptionMass) and answer.method != "logprob"


def _is_passing(answer: Answer | None) -> bool:
    """Whether a later run may have a better answer."""
    return _is_fallback(answer) or (isinstance(answer, Failure) and not answer.permanent)


def _shown(line: Candidates) -> list[tuple[str, str]]:
    return [(candidate.candidate_id, candidate.completion) for candidate in line.candidates]


def _to_json(answer: Answer) -> dict[str, Any]:
    return {name: value for name, value in vars(answer).items() if value is not None}


def _answer(value: Any, request: Request) -> Answer | None:
    """What is stored as the answer to a request, if it can be one: a row that was changed may be that of another."""
    answer = _from_json(value) if isinstance(value, Mapping) else None
    if isinstance(answer, OptionMass):
        fits = isinstance(request, OptionRequest) and len(answer.masses) == len(request.options)
    else:
        kinds: dict[type, type] = {Sampled: SampleRequest, Likelihood: CompletionRequest, Failure: object}
        fits = answer is not None and isinstance(request, kinds[type(answer)])
    return answer if fits else None


def _from_json(value: Mapping[str, Any]) -> Answer:
    kinds: dict[str, Any] = {"text": Sampled, "logp": Likelihood, "reason": Failure}
    kind = next((made for name, made in kinds.items() if name in value), OptionMass)
    known = {name: field for name, field in value.items() if name in kind.__dataclass_fields__}
    if kind is OptionMass:
        known["masses"] = tuple(known["masses"])
        if known.get("method") == "text":
            # As earlier versions stored it: one reply, by its method alone.
            known.setdefault("replies", 1)
    return kind(**known)
