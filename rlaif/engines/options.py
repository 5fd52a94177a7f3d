"""Which option an answer gives: from log-probabilities of its spellings, or from the text of a reply. Pure."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Container, Mapping, Sequence
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
"""Mass that may belong to one option or to another, above which both are unknown."""


_SPACES = re.compile(r"^[\s▁Ġ]+")


@functools.lru_cache(maxsize=2**16)
def token_text(token: str) -> str:
    """A listed token as text: one space for whatever marks the beginning of a word."""
    return _SPACES.sub(" ", token)


@functools.lru_cache(maxsize=1024)
def continued(options: tuple[tuple[str, ...], ...]) -> list[tuple[int, int]]:
    """Pairs of options of which the second has a spelling that goes on from one of the first's ("1", "10")."""
    words = [{spelling.strip() for spelling in spellings} - {""} for spellings in options]
    return [
        (short, long)
        for short in range(len(words))
        for long in range(len(words))
        if short != long and any(b != a and b.startswith(a) for a in words[short] for b in words[long])
    ]


def option_masses(
    listed: Sequence[tuple[str, float]],
    sampled: str,
    options: Sequence[Sequence[str]],
    whole: Container[int] = (),
    absent: Container[int] = (),
) -> tuple[float | None, ...]:
    """Probability mass of each option among the listed (token, log-probability) pairs of one position.

    All listed tokens that spell an option (:func:`accepted_tokens`) are summed. An option that is not listed
    is unknown, not zero: each of its tokens has at most the smallest listed probability, and all of them
    together at most what the list leaves over. If the unlisted options may have as much as the likeliest listed
    one, nobody can say which is ahead: every mass is ``None``, as where no option is listed. Else each gets its
    upper bound, so of two options the label is never more extreme than the truth; of more, an unlisted one is
    never put ahead of a listed one. A verdict word of several tokens is seen only if it is listed whole.

    Where "1" is listed and "10" is not, "10" may be two tokens, and the mass of "1" that of either: above
    ``UNDECIDED`` both are ``None``. ``whole`` has the options that are known to be single tokens, ``absent`` those
    that are known to be none.
    """
    accepted = accepted_tokens(options)
    tokens, found = _found(listed, accepted)
    if not any(found):
        return (None,) * len(accepted)
    # vLLM lists the sampled token whatever its rank; as the least likely of the list it bounds nothing.
    ranked = sorted((p, token) for (token, _), (_, p) in zip(listed, tokens, strict=True))
    smallest = ranked[1 if len(ranked) > 1 and ranked[0][1] == sampled else 0][0]
    left = max(0.0, 1.0 - sum(p for _, p in tokens))
    seen = [sum(group) for group in found if group]
    bounds = [
        0.0 if group or option in absent else smallest * len(accepted[option]) for option, group in enumerate(found)
    ]
    if any(bounds) and min(sum(bounds), left) >= max(seen):
        return (None,) * len(accepted)
    masses: list[float | None] = [
        sum(group) if group else min(bound, left, *seen) for group, bound in zip(found, bounds, strict=True)
    ]
    for short, long in continued(tuple(map(tuple, options))):
        if not found[long] and long not in whole and long not in absent and sum(found[short]) > UNDECIDED:
            masses[short] = masses[long] = None
    return tuple(masses)


def observed_mass(listed: Sequence[tuple[str, float]], options: Sequence[Sequence[str]]) -> float:
    """Probability of the listed tokens that spell an option: what the options have for certain."""
    accepted = frozenset().union(*accepted_tokens(options))
    return sum(math.exp(min(logprob, 0.0)) for token, logprob in listed if token_text(token) in accepted)


def _found(
    listed: Sequence[tuple[str, float]], accepted: Sequence[frozenset[str]]
) -> tuple[list[tuple[str, float]], list[list[float]]]:
    """The listed tokens as texts with their probabilities, and the probabilities of those that spell each option."""
    tokens = [(token_text(token), math.exp(min(logprob, 0.0))) for token, logprob in listed]
    return tokens, [[p for token, p in tokens if token in group] for group in accepted]


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
