"""The shape of every file that stages exchange, and the only code that reads and writes them.

Readers check each line and raise :class:`UserError` naming the file, the line and what would be right.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Message = dict[str, str]
T = TypeVar("T")
ROLES = ("system", "user", "assistant")


class UserError(Exception):
    """Something the user can put right. Commands print its text as one line and exit with status 2."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user turn."""

    prompt_id: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """The conversation as plain text, for near-duplicate search and word counts."""
        return "\n".join(message["content"] for message in self.messages if message["role"] != "system")


@dataclass(frozen=True)
class Completion:
    """One candidate completion and how it was sampled (``None``: not known)."""

    candidate_id: str
    completion: str
    model: str | None = None
    style: str | None = None
    system: str | None = None
    temperature: float | None = None
    seed: int | None = None
    finish_reason: str | None = None
    tokens: int | None = None


class Example(NamedTuple):
    """A prompt and a completion to be scored. ``ended`` is false for one that was cut at the length limit."""

    prompt: Sequence[Message]
    completion: str
    ended: bool = True


@dataclass(frozen=True)
class Candidates:
    """A prompt with its candidate completions: one line of ``candidates.jsonl``."""

    prompt: Prompt
    candidates: tuple[Completion, ...]
    split: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        line: dict[str, Any] = {"prompt_id": self.prompt.prompt_id, "prompt": list(self.prompt.messages)}
        if self.split:
            line["split"] = self.split
        line["candidates"] = [{k: v for k, v in asdict(c).items() if v is not None} for c in self.candidates]
        return line


@dataclass(frozen=True)
class Label:
    """One verdict of one labeler under one principle: one line of ``labels.jsonl``.

    What was shown are candidate ids: ``first`` and ``second`` (pairwise), ``order`` (listwise, in the order shown) or
    ``candidate`` (the other modes). The verdict is ``p``, P(first is better) or P(the completion satisfies the
    principle) (pairwise, pointwise); ``score`` with its distribution ``probs`` over 1 to 9 (score); ``probs``, P(each
    is the best) in the order shown (listwise); or ``score``, a log-likelihood ratio (contrastive). Where there is none
    it is ``None`` with a ``reason``: kept and counted, never guessed. ``replies``: how many (votes, text) name one.
    """

    prompt_id: str
    mode: str
    principle: str
    labeler: str
    method: str
    p: float | None = None
    reason: str | None = None
    option_mass: float | None = None
    first: str | None = None
    second: str | None = None
    candidate: str | None = None
    order: tuple[str, ...] | None = None
    score: float | None = None
    probs: tuple[float, ...] | None = None
    reply: str | None = None
    replies: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    truncated: bool | None = None
    """True if the labeler saw a text without its middle, because it is very long."""

    @property
    def verdict(self) -> float | tuple[float, ...] | None:
        """What the labeler said, whatever the mode."""
        if self.mode in ("pairwise", "pointwise"):
            return self.p
        return self.probs if self.mode == "listwise" else self.score

    def to_json(self) -> dict[str, Any]:
        """The line as a JSON object: ``p`` is called ``p_first`` (pairwise) or ``score`` (pointwise)."""
        line = {k: v for k, v in vars(self).items() if v is not None and k != "p"}
        line[{"pairwise": "p_first", "listwise": "probs"}.get(self.mode, "score")] = self.verdict
        return line

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Label:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: saying what is wrong.
        """
        values = {name: value for name, value in line.items() if name in cls.__dataclass_fields__}
        p_name = {"pairwise": "p_first", "pointwise": "score"}.get(str(line.get("mode")))
        if p_name is not None:
            values.pop("score", None)
            values["p"] = p = line.get(p_name)
            if p is not None and (isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1):
                raise ValueError(f"the verdict must be between 0 and 1, or null, found {p!r}")
        for name in ("order", "probs"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        try:
            return cls(**values)
        except TypeError:
            raise ValueError("not a label as rlaif.label writes it") from None


@dataclass(frozen=True)
class Preference:
    """A soft-labelled pair. ``p_chosen`` is P(chosen is better), at least 0.5 by construction."""

    prompt_id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_id: str
    rejected_id: str
    p_chosen: float
    labeler: str
    feedback: str
    principles: dict[str, float] = field(default_factory=dict)
    chosen_ended: bool = True
    rejected_ended: bool = True
    """False for a completion that was cut at the length limit: training and scoring then add no end token."""
    chosen_rank: int | None = None
    rejected_rank: int | None = None
    """Place among the prompt's candidates by Bradley-Terry score, 1 for the best; None where it is not known."""
    inferred: bool = False
    """The labeler was not asked about this very pair; its label follows from those on others."""
    missing_weight: float = 0.0
    """Share of the principles' weight that has no verdict on this pair: ``principles`` has the others."""
    source: str = ""
    """Which part of its dataset it comes from (a ``subset`` or ``source`` column), for figures by part."""
    declared: bool = False  # whose feedback it is, by the user: its file does not say

    @property
    def examples(self) -> tuple[Example, Example]:
        """The chosen and the rejected completion, to be scored."""
        return (
            Example(self.prompt, self.chosen, self.chosen_ended),
            Example(self.prompt, self.rejected, self.rejected_ended),
        )

    def to_row(self) -> dict[str, Any]:
        """The row in TRL's conversational preference format, with the soft label beside it."""
        return {
            "prompt": list(self.prompt),
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "p_chosen": self.p_chosen,
            "prompt_id": self.prompt_id,
            "chosen_id": self.chosen_id,
            "rejected_id": self.rejected_id,
            "labeler": self.labeler,
            "feedback": self.feedback,
            "principles": json.dumps(self.principles, sort_keys=True),
            "chosen_ended": self.chosen_ended,
            "rejected_ended": self.rejected_ended,
            "chosen_rank": self.chosen_rank,
            "rejected_rank": self.rejected_rank,
            "inferred": self.inferred,
            "missing_weight": self.missing_weight,
        }


def content_hash(*parts: Any) -> str:
    """A short stable hash of JSON-able values."""
    return hashlib.sha256(_CANONICAL.encode(parts).encode("utf-8", "surrogatepass")).hexdigest()[:24]


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
_LINE = json.JSONEncoder(ensure_ascii=False)


def existing_file(path: str | os.PathLike[str] | None, key: str) -> Path:
    """The path of a file that must be there; ``key`` is the configuration key that named it."""
    if path is None:
        raise UserError(f"{key} is not set: give {key}=FILE")
    file = Path(path)
    if file.is_dir():
        inside = file / f"{key}.jsonl"
        raise UserError(f"{key}={file}: is a folder, expected a file{f'; give {inside}' if inside.is_file() else ''}")
    if not file.is_file():
        raise UserError(f"{key}={file}: no such file")
    return file


def shipped(name: str) -> Path:
    """Folder of what comes with the project (``conf``, ``constitutions``, ``data``).

    An installed package has them inside; a checkout beside the package. Inside goes first: beside an installed
    package lie other packages, and one of them may be called ``data``.
    """
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def find_prompts(path: str | os.PathLike[str] | None) -> Path:
    """The user's prompts file, or one that comes with the project (``everyday``).

    Raises:
        UserError: if there is neither; lists the shipped names.
    """
    if path is None:
        raise UserError("prompts is not set: give prompts=FILE.jsonl")
    folder = shipped("data")
    own = folder / f"{path}_prompts.jsonl"
    if not Path(path).exists() and own.is_file():
        return own
    if not Path(path).exists():
        names = ", ".join(sorted(file.name.removesuffix("_prompts.jsonl") for file in folder.glob("*_prompts.jsonl")))
        raise UserError(f"prompts={path}: no such file (shipped sets of prompts: {names})")
    return existing_file(path, "prompts")


def existing_dir(path: str | os.PathLike[str] | None, key: str) -> Path:
    """The path of a folder that must be there; ``key`` is the configuration key that named it."""
    if path is None:
        raise UserError(f"{key} is not set: give {key}=DIR")
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{key}={folder}: no such folder")
    return folder


def read_jsonl(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """Parse a JSONL file (gzip if it ends in ``.gz``) line by line; blank lines are skipped.

    Half of a surrogate pair (text that was cut in the middle of an emoji) becomes U+FFFD: no tokenizer takes it.
    ``parse`` raises ``ValueError`` for a bad line.

    Raises:
        UserError: with file and line number.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})"
                    ) from None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
                if _HALF_PAIR.search(line):
                    value = _whole(value)
                if not isinstance(value, dict):
                    raise UserError(f"{path}, line {number}: expected a JSON object, found {_kind(value)}")
                try:
                    yield parse(value)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after line {number}: not UTF-8 ({error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def _whole(value: Any) -> Any:
    """A JSON value whose texts can all be encoded."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return value


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file so that it appears complete or not at all."""
    with atomic_file(path) as file:
        file.writelines(json_line(line) for line in lines)


def json_line(value: dict[str, Any]) -> str:
    """One line of a JSONL file."""
    return _LINE.encode(value) + "\n"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Any]:
    """Open a text file for writing that replaces ``path``, once on the disk, if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Half of a surrogate pair has no UTF-8 form; in JSON its escape is right.
        with temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON so that it appears complete or not at all."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that this project wrote.

    Raises:
        UserError: if it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{path}: not valid JSON ({where})") from None


def _kind(value: Any) -> str:
    names = {str: "a text", int: "a number", float: "a number", bool: "true/false", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a text, found {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value


def parse_messages(value: Any, what: str = "prompt") -> tuple[Message, ...]:
    """A prompt as messages: from a text, or from a list of ``{"role", "content"}`` ending with a user turn.

    Raises:
        ValueError: naming the part that is wrong.
    """
    if isinstance(value, str):
        return ({"role": "user", "content": _text(value, what)},)
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a text or a list of messages, found {_kind(value)}")
    if not value:
        raise ValueError(f"{what} is an empty list")
    messages = []
    for index, message in enumerate(value):
        where = f"{what}[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f'{where} must be an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise ValueError(f"{where}.role is {message['role']!r}, expected one of {', '.join(ROLES)}")
        if message["role"] == "system" and index > 0:
            raise ValueError(f"{where}: a system message must come first")
        messages.append({"role": message["role"], "content": _text(message["content"], f"{where}.content")})
    if messages[-1]["role"] != "user":
        raise ValueError(f"{what} must end with a user turn, ends with {messages[-1]['role']}")
    return tuple(messages)


def _prompt(line: dict[str, Any]) -> Prompt:
    if "prompt" not in line:
        raise ValueError(f'has no "prompt" (found: {", ".join(sorted(line)) or "nothing"})')
    messages = parse_messages(line["prompt"])
    name = line.get("prompt_id", line.get("id"))
    if name is None:
        name = content_hash(messages)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise ValueError('"prompt_id" must be a non-empty text or a number')
    return Prompt(str(name), messages)


class _Unique:
    """Raises when an id turns up twice."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.seen: set[str] = set()

    def check(self, name: str) -> None:
        if name in self.seen:
            raise ValueError(f"{self.what} {name!r} was used on an earlier line; ids must be unique")
        self.seen.add(name)


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts: ``{"prompt": text or messages}`` a line, with an optional unique ``prompt_id``.

    Raises:
        UserError: naming file and line; also if there is no prompt at all.
    """
    unique = _Unique("prompt_id")

    def parse(line: dict[str, Any]) -> Prompt:
        prompt = _prompt(line)
        unique.check(prompt.prompt_id)
        return prompt

    prompts = list(read_jsonl(path, parse))
    if not prompts:
        raise UserError(f"{path}: has no prompts")
    return prompts


def _completion(value: Any, index: int) -> Completion:
    if isinstance(value, str):
        return Completion(f"c{index}", _text(value, f"completions[{index}]"))
    if not isinstance(value, dict):
        raise ValueError(f"candidates[{index}] must be an object, found {_kind(value)}")
    known = {k: value[k] for k in Completion.__dataclass_fields__ if k in value}
    # An empty completion is a legitimate sample (the model ended at once); a missing one is not.
    if not isinstance(known.get("completion"), str):
        raise ValueError(f'candidates[{index}] has no "completion" text')
    known["candidate_id"] = str(known.get("candidate_id", f"c{index}"))
    return Completion(**known)


def iterate_candidates(path: Path) -> Iterator[Candidates]:
    """Read ``candidates.jsonl``, or a user's lines with ``prompt`` and ``completions`` (a list of texts).

    Raises:
        UserError: naming file and line; also if there is none.
    """
    unique = _Unique("prompt_id")

    def parse(line: dict[str, Any]) -> Candidates:
        prompt = _prompt(line)
        unique.check(prompt.prompt_id)
        values = line.get("candidates", line.get("completions"))
        if not isinstance(values, list):
            raise ValueError('has no "candidates" (objects) or "completions" (texts) list')
        completions = tuple(_completion(value, index) for index, value in enumerate(values))
        ids = [completion.candidate_id for completion in completions]
        if len(set(ids)) < len(ids):
            raise ValueError(f"candidate ids repeat: {', '.join(ids)}")
        if len(completions) < 2:
            raise ValueError(f"has {len(completions)} completion(s); a preference needs at least 2")
        return Candidates(prompt, completions, line.get("split"))

    empty = True
    for line in read_jsonl(path, parse):
        empty = False
        yield line
    if empty:
        raise UserError(f"{path}: has no candidates")


def bounded_examples(items: Sequence[str], limit: int = 5) -> str:
    """``a, b, c and 4 more`` for messages about many items."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
