"""Which option an answer gives: from log-probabilities of its spellings, or from the text of a reply. Pure."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlaif.chat import encode_text

LOG_NEGLIGIBLE = math.log(1e-3)
"""Spellings of several tokens whose first token is less likely than this are left out of an option's mass."""


def option_tokens(tokenizer: Any, options: Sequence[Sequence[str]]) -> list[list[tuple[int, ...]]]:
    """Distinct token sequences of each option; one that another of them is a prefix of adds no mass."""
    result = []
    for spellings in options:
        sequences = {tuple(encode_text(tokenizer, spelling)) for spelling in spellings}
        sequences.discard(())
        result.append(
            sorted(
                tokens for tokens in sequences if not any(tokens[:size] in sequences for size in range(1, len(tokens)))
            )
        )
    return result


class Spelling(NamedTuple):
    """A token sequence that spells an option."""

    option: int
    tokens: tuple[int, ...]
    inside: int | None
    """The option whose spelling this one goes on from ("1" for "10" in two tokens): its mass is not that one's."""


def spellings(tokenizer: Any, options: Sequence[Sequence[str]]) -> list[Spelling]:
    """Every token sequence that spells one of the options (see :func:`option_tokens`)."""
    owners = {tokens: option for option, group in enumerate(option_tokens(tokenizer, options)) for tokens in group}
    result = []
    for tokens, option in owners.items():
        inside = next((owners[tokens[:n]] for n in range(len(tokens) - 1, 0, -1) if tokens[:n] in owners), None)
        result.append(Spelling(option, tokens, inside))
    return result


def beginnings(spelled: Sequence[Spelling], logps: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], set[int]]:
    """Which tokens matter after which beginning: those of spellings of several tokens that may have mass.

    A longer spelling has at most the mass of its first token.

    Args:
        spelled: every spelling of every option.
        logps: at least the log-probability of each spelling's first token, as a sequence of one.
    """
    result: dict[tuple[int, ...], set[int]] = {}
    for _, tokens, _ in spelled:
        if logps[tokens[:1]] > LOG_NEGLIGIBLE:
            for place in range(1, len(tokens)):
                result.setdefault(tokens[:place], set()).add(tokens[place])
    return result


def sequence_masses(
    spelled: Sequence[Spelling], logps: Mapping[tuple[int, ...], float], options: int
) -> tuple[float, ...]:
    """Probability of each option: the sum over its spellings, less what goes on to be another option.

    ``logps`` has the log-probability of each sequence from its first token on; one that is missing has no mass.

    >>> one, ten, two = Spelling(0, (1,), None), Spelling(1, (1, 0), 0), Spelling(2, (2,), None)
    >>> logps = {(1,): math.log(0.5), (1, 0): math.log(0.4), (2,): math.log(0.25)}
    >>> [round(mass, 6) for mass in sequence_masses([one, ten, two], logps, 3)]
    [0.1, 0.4, 0.25]
    """
    masses = [0.0] * options
    for option, tokens, inside in spelled:
        if tokens in logps:
            mass = math.exp(logps[tokens])
            masses[option] += mass
            if inside is not None:
                masses[inside] -= mass
    return tuple(min(max(mass, 0.0), 1.0) for mass in masses)


def accepted_tokens(options: Sequence[Sequence[str]]) -> tuple[frozenset[str], ...]:
    """The token texts that count as each option.

    Every spelling with and without a leading space, in its own case, lower, upper and capitalised, except for
    those case variants that another option could claim as well.

    >>> sorted(accepted_tokens([("A",), ("B",)])[0])
    [' A', ' a', 'A', 'a']
    """
    return _accepted(tuple(map(tuple, options)))


@functools.lru_cache(maxsize=1024)
def _accepted(options: tuple[tuple[str, ...], ...]) -> tuple[frozenset[str], ...]:
    words = [{spelling.strip() for spelling in spellings} - {""} for spellings in options]
    cases = [{form for w in group for form in (w.lower(), w.upper(), w.capitalize())} for group in words]
    accepted = []
    for index, group in enumerate(words):
        others = [words[i] | cases[i] for i in range(len(words)) if i != index]
        forms = group | cases[index].difference(*others)
        accepted.append(frozenset(space + form for form in forms for space in ("", " ")))
    return tuple(accepted)


UNDECIDED = 0.05
"""Mass that may or may not be an option's, in parts of what the likeliest one has, above which it is not left open."""


_SPACES = re.compile(r"^[\s▁Ġ]+")


@functools.lru_cache(maxsize=2**16)
def token_text(token: str) -> str:
    """A listed token as text: one space for whatever marks the beginning of a word."""
    return _SPACES.sub(" ", token)


@functools.lru_cache(maxsize=4096)
def _spelt(accepted: tuple[frozenset[str], ...]) -> tuple[dict[str, int], dict[str, list[tuple[int, str]]]]:
    """The option of each spelling; and for each text that longer spellings begin with these, with their options."""
    owners = {word: option for option, group in enumerate(accepted) for word in sorted(group)}
    begun: dict[str, list[tuple[int, str]]] = {}
    for word, option in owners.items():
        for size in range(1, len(word)):
            begun.setdefault(word[:size], []).append((option, word))
    return owners, begun


def rests(accepted: Sequence[frozenset[str]], begun: str) -> tuple[frozenset[str], ...]:
    """What is left of each option's spellings that go on from a text.

    >>> [sorted(group) for group in rests([{"harmless", "safe"}, {"harmful", "harm"}], "harm")]
    [['less'], ['ful']]
    """
    return tuple(
        frozenset(word[len(begun) :] for word in group if word != begun and word.startswith(begun))
        for group in accepted
    )


@dataclass(frozen=True)
class Bounds:
    """Between what masses each option is, as far as the likeliest tokens of a position tell."""

    least: tuple[float, ...]
    most: tuple[float, ...]
    seen: float
    """What the options have together for certain."""
    open: Mapping[str, float]
    """Tokens that may go on to spell one option or another, or none, with their probabilities."""


def option_bounds(
    listed: Sequence[tuple[str, float]],
    sampled: str,
    accepted: Sequence[frozenset[str]],
    after: Mapping[str, Bounds] | None = None,
) -> Bounds:
    """What the listed (token, log-probability) pairs of one position say of options with these spellings.

    A listed token that spells an option (:func:`accepted_tokens`) is its mass. One that spellings of another option go
    on from ("Harm", of "Harmful" and "Harmless") may be anybody's, whether it spells an option itself or not: it counts
    in the ``most`` of each. (A spelling that is listed whole is not spelt in pieces as well.) An option of which
    nothing is listed has besides that at most the smallest listed probability for each of its spellings, and no more
    than what the list leaves over. Of an option that is listed, spellings that are not are left out.

    Args:
        listed: the likeliest tokens.
        sampled: the token that the server chose. vLLM lists it whatever its rank, so that it may bound nothing.
        accepted: the spellings of each option.
        after: for some of the tokens that spellings go on from: what follows them, under :func:`rests`.
    """
    groups = tuple(map(frozenset, accepted))
    tokens = [(token_text(token), math.exp(min(logprob, 0.0))) for token, logprob in listed]
    texts = {text for text, _ in tokens}
    owners, begun = _spelt(groups)
    least, extra = [0.0] * len(groups), [0.0] * len(groups)
    whole, seen, undecided = set[int](), 0.0, dict[str, float]()
    for text, p in tokens:
        if text not in owners and text not in begun:
            continue
        owner = owners.get(text)
        if owner is not None:
            whole.add(owner)
            seen += p
        longer = {option for option, word in begun.get(text, ()) if word not in texts}
        if not longer or longer == {owner}:
            if owner is not None:
                least[owner] += p
        elif after and text in after:
            follows = after[text]
            for option in longer:
                least[option] += p * follows.least[option]
                extra[option] += p * (follows.most[option] - follows.least[option])
            if owner is None:
                seen += p * follows.seen
            else:
                certain, possible = (max(0.0, 1 - sum(masses)) for masses in (follows.most, follows.least))
                least[owner] += p * certain
                extra[owner] += p * (possible - certain)
        else:
            undecided[text] = undecided.get(text, 0.0) + p
            for option in longer if owner is None else longer | {owner}:
                extra[option] += p
    if unlisted := [option for option in range(len(groups)) if option not in whole and not least[option]]:
        ranked = sorted((p, token) for (token, _), (_, p) in zip(listed, tokens, strict=True))
        smallest = ranked[1 if len(ranked) > 1 and ranked[0][1] == sampled else 0][0]
        left = max(0.0, 1.0 - sum(p for _, p in tokens))
        for option in unlisted:
            extra[option] += min(smallest * len(groups[option]), left)
    most = tuple(min(one + more, 1.0) for one, more in zip(least, extra, strict=True))
    return Bounds(tuple(least), most, seen, undecided)


def option_masses(bounds: Bounds) -> tuple[float | None, ...]:
    """One mass for each option, or ``None`` for all of them where nobody can say which is ahead.

    That is where another option may have as much as the likeliest one, or none is listed. Else the likeliest gets its
    least and each other its most: so of two options the label is never more extreme than the truth. Of more, one of
    which nothing is listed gets no more than any that is. What is open by no more than ``UNDECIDED`` of the likeliest
    one's mass leaves a tie, not a doubt.
    """
    lead = max(bounds.least)
    ahead = bounds.least.index(lead)
    others = [option for option in range(len(bounds.least)) if option != ahead]
    if lead == 0 or any(
        bounds.most[option] >= lead and bounds.most[option] - bounds.least[option] > UNDECIDED * lead
        for option in others
    ):
        return (None,) * len(bounds.least)
    fewest = min(mass for mass in bounds.least if mass)
    masses = [min(most, lead if least else fewest) for least, most in zip(bounds.least, bounds.most, strict=True)]
    masses[ahead] = lead
    return tuple(masses)


_OPENERS = r"[\s*_`#>\"'“”’(\[{]*"
_CLOSERS = r"[*_`\"'“”’)\]}]*"
_ANNOUNCED = re.compile(r"\b(?:answer|verdict|choice)\b[\s*_`]*(?::|=|\bis\b(?!\s+not\b))[\s*_`]*:?", re.IGNORECASE)
_SCORE_ANNOUNCED = re.compile(_ANNOUNCED.pattern.replace("answer", "score|rating|answer"), re.IGNORECASE)
_MORE = r"[\s,/&|+]*(?:\b(?:and|or|nor|vs)\b[\s.]*)?"


def parse_reply(reply: str, options: Sequence[Sequence[str]], stem: str = "") -> int | None:
    """Index of the option that a reply gives as its verdict, or ``None``.

    A verdict begins the reply, follows "Answer:" (or "The verdict is"), or stands on a line of its own; the
    last one counts. A single letter, or "Reply" and a letter, must be all there is or be followed by punctuation,
    "because" or "is better": "A good reply ..." is prose. A reply that names two options side by side ("A or B"), or
    takes them up one by one ("A: ... B: ..."), has no verdict by that. Where the options are numbers,
    "Score:" announces one too, and the end of the scale after it is left out ("8/10").

    >>> [parse_reply(text, [("A",), ("B",)]) for text in ("(A)", "Answer: b", "A fine day", "A or B")]
    [0, 1, None, None]
    >>> [parse_reply(text, [("A",), ("B",)]) for text in ("Reply B is better.", "B) because ...", "Reply A is long.")]
    [1, 1, None]
    >>> [parse_reply(text, [("7",), ("10",)]) for text in ("Score: 7", "7/10", "7 out of 10.", "7.5", "7 or 10")]
    [0, 0, 0, None, None]
    """
    numbers = [int(word) for group in options for word in group if word.strip().isdecimal()]
    announcing = _ANNOUNCED
    if numbers:
        announcing = _SCORE_ANNOUNCED
        reply = re.sub(rf"(?<=\d)\s*(?:/|out of)\s*{max(numbers)}\b", "", reply)
    reply = reply.rpartition("</think>")[2]
    if "<think>" in reply:
        return None
    if stem and reply.strip().casefold().startswith(stem.strip().casefold()):
        reply = reply.strip()[len(stem.strip()) :].lstrip(" :")
    verdicts: dict[int, int | None] = {}
    listing = _goes_through(reply.strip(), options)
    for line in re.finditer(r"[^\n]+", reply):
        first = not reply[: line.start()].strip()
        if first and listing:
            continue
        verdict = _verdict_at(line.group(), options, whole_line=not first)
        if verdict is not None:
            verdicts[line.start()] = verdict
    for announced in announcing.finditer(reply):
        # An announced verdict counts even if it names no option: it overrules what came before.
        verdicts[announced.end()] = _verdict_at(reply[announced.end() :], options)
    return verdicts[max(verdicts)] if verdicts else None


@functools.lru_cache(maxsize=1024)
def _words(options: tuple[tuple[str, ...], ...]) -> tuple[list[tuple[str, int]], str]:
    """The words of each option, longest first; and a pattern of what may stand before one that is a letter."""
    bare = [(word.strip(" (["), index) for index, group in enumerate(accepted_tokens(options)) for word in group]
    words = sorted(dict.fromkeys(bare), key=lambda owner: -len(owner[0]))
    letters = all(len(word) == 1 and word.isalpha() for word, _ in words)
    # Prompts that ask for letters call the candidates so.
    return words, rf"(?:(?i:reply)\s+{_OPENERS})?" if letters else ""


def _verdict_at(text: str, options: Sequence[Sequence[str]], whole_line: bool = False) -> int | None:
    """The option that a text begins with."""
    words, name = _words(tuple(map(tuple, options)))
    any_word = "|".join(re.escape(word) for word, _ in words)
    for word, index in words:
        match = re.match(rf"{_OPENERS}({name}){re.escape(word)}(?![\w])(?!-\w)(?![.,]\d){_CLOSERS}", text)
        if match is None:
            continue
        rest = text[match.end() :]
        if re.match(rf"{_MORE}{_OPENERS}{name}(?:{any_word})(?!\w)(?:{_CLOSERS}\s*)(?:$|[\W\n]|is\b|are\b)", rest):
            return None
        if whole_line:
            return index if re.fullmatch(r"[\s.!]*", rest) else None
        if len(word) > 1:
            return index
        ends = r"$|\n|[.!]" if match[1] else r"$|\n|[.,:;!–—-]"
        if name:
            better = rf"is\s+(?:the\s+)?(?:better|best)(?:\s+(?:one|reply|than\s+{name}(?:{any_word})))?"
            ends += rf"|(?:because|since)\b|{better}\s*(?:$|\n|[.!]|because\b|since\b)"
        return index if re.match(rf"\s*(?:{ends})", rest) else None
    return None


def _goes_through(reply: str, options: Sequence[Sequence[str]]) -> bool:
    """Whether a reply begins by taking up the options one by one ("A: ... B: ...")."""
    words, name = _words(tuple(map(tuple, options)))
    owners = dict(words)
    any_word = "|".join(map(re.escape, owners))
    item = rf"(?:^|[\n.;,])\s*{_OPENERS}{name}({any_word}){_CLOSERS}\s*[:.)][ \t]*(?=\w)"
    found = list(re.finditer(item, reply))
    return bool(name and found) and found[0].start() == 0 and len({owners[one[1]] for one in found}) > 1
