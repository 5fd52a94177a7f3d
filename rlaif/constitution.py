"""Constitution files: written principles that a labeler applies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlaif.config import LabelMode
from rlaif.records import UserError, shipped


@dataclass(frozen=True)
class Principle:
    """One written principle.

    ``question`` asks which of two replies, (A) or (B), is better. ``statement`` is a sentence stem about one
    reply; ``yes`` and ``no`` are the words that may follow it. ``ask`` is the question put before the text that
    the stem answers; with it the labeler sees the completion alone, without the conversation.
    """

    id: str
    weight: float
    question: str
    statement: str | None = None
    ask: str | None = None
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()
    critique: str | None = None
    revision: str | None = None
    encourage: str | None = None
    """System prompt under which a model would follow the principle; ``discourage``: would go against it."""
    discourage: str | None = None
    parts: tuple[str, ...] = ()
    """The questions that this principle stands for (:func:`together`)."""


@dataclass(frozen=True)
class Exemplar:
    """A worked comparison shown to the labeler."""

    prompt: str
    first: str
    second: str
    preferred: str
    principle: str


@dataclass(frozen=True)
class Constitution:
    """A validated constitution."""

    name: str
    version: str
    description: str
    principles: tuple[Principle, ...]
    exemplars: tuple[Exemplar, ...] = ()


class _Mapping(dict[str, Any]):
    """A YAML mapping that remembers the line of each key."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}
        self.start = 1


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps line numbers and refuses repeated keys."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> _Mapping:
    mapping = _Mapping()
    mapping.start = node.start_mark.line + 1
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            # An unquoted yes or no is a boolean in YAML.
            raise _ProblemError(line, f'key {key!r} is not a text; quote it ("yes":, "no":)')
        if key in mapping:
            raise _ProblemError(line, f"key {key!r} is given twice")
        mapping[key] = loader.construct_object(value_node, deep=True)
        mapping.lines[key] = line
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


class _ProblemError(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def find_constitution(name_or_file: str | None) -> Path:
    """The file of a shipped constitution's name, or the user's own file.

    Raises:
        UserError: if there is neither; lists the shipped names.
    """
    if not name_or_file:
        raise UserError("constitution is not set: give constitution=NAME or constitution=FILE.yaml")
    own = Path(name_or_file)
    if own.is_dir():
        inside = ", ".join(sorted(path.name for path in own.iterdir() if path.suffix in (".yaml", ".yml")))
        raise UserError(
            f"constitution={own}: is a folder, expected a .yaml file{f'; it has {inside}' if inside else ''}"
        )
    if own.suffix in (".yaml", ".yml") or own.is_file():
        if not own.is_file():
            raise UserError(f"constitution={own}: no such file")
        return own
    files = {file.stem: file for file in shipped("constitutions").glob("*.yaml")}
    if name_or_file not in files:
        names = ", ".join(sorted(files))
        raise UserError(f"constitution={name_or_file}: no such constitution. Shipped: {names}; or give a .yaml file")
    return files[name_or_file]


def load_constitution(name_or_file: str | None) -> Constitution:
    """Read and check a constitution.

    Raises:
        UserError: naming the file, the line and the key.
    """
    path = find_constitution(name_or_file)
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.load(text, Loader=_Loader)
        if not isinstance(document, _Mapping):
            raise _ProblemError(1, "expected a mapping with name, version, description, principles")
        return _constitution(document)
    except _ProblemError as problem:
        raise UserError(f"{path}, line {problem.line}: {problem}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(f"{path}, line {mark.line + 1 if mark else '?'}: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        # Not UTF-8, a control character, a date that does not exist.
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def check_mode(constitution: Constitution, mode: LabelMode, exemplars: bool = False) -> None:
    """Check that a constitution has what a labeling mode needs, and ``exemplars`` where they shall be shown.

    Raises:
        UserError: naming the principles that lack it.
    """
    if exemplars:
        shown = {exemplar.principle for exemplar in constitution.exemplars}
        bare = [principle.id for principle in constitution.principles if principle.id not in shown]
        if bare:
            raise UserError(
                f"constitution {constitution.name}: labeling.exemplars=true, and these principles have no exemplars: "
                f"{', '.join(bare)}"
            )
    needed = {LabelMode.pointwise: ("statement", "verdicts"), LabelMode.contrastive: ("encourage", "discourage")}
    if mode not in needed:
        return
    first, second = needed[mode]
    missing = [principle.id for principle in constitution.principles if getattr(principle, first) is None]
    if missing:
        raise UserError(
            f"constitution {constitution.name}: labeling.mode={mode.value} needs {first} and {second}, and "
            f"{', '.join(missing)} has none"
        )


def together(constitution: Constitution) -> Principle:
    """All principles as one, called ``all``, for one verdict on all of them; weights that differ are shown."""
    principles = constitution.principles
    weighted = len({principle.weight for principle in principles}) > 1
    return Principle(
        id="all",
        weight=1.0,
        question=f"Which reply is better by these principles taken together{', by their weights' if weighted else ''}?",
        encourage="\n".join(principle.encourage for principle in principles if principle.encourage) or None,
        discourage="\n".join(principle.discourage for principle in principles if principle.discourage) or None,
        parts=tuple(
            f"{principle.question} (weight {principle.weight:g})" if weighted else principle.question
            for principle in principles
        ),
    )


def _fields(mapping: Any, where: str, required: set[str], optional: set[str], line: int) -> _Mapping:
    if not isinstance(mapping, _Mapping):
        raise _ProblemError(line, f"{where} must be a mapping")
    for key in mapping:
        if key not in required | optional:
            allowed = ", ".join(sorted(required | optional))
            raise _ProblemError(mapping.lines[key], f"{where} has an unknown key {key!r} (allowed: {allowed})")
    for key in sorted(required):
        if key not in mapping:
            raise _ProblemError(mapping.start, f"{where} has no {key!r}")
    return mapping


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _string(mapping: _Mapping, key: str, where: str) -> str:
    value = mapping[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and key == "version":
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise _ProblemError(mapping.lines[key], f"{where}.{key} must be a non-empty text")
    return value.strip()


def _constitution(document: _Mapping) -> Constitution:
    _fields(document, "the file", {"name", "version", "description", "principles"}, {"exemplars"}, 1)
    entries = document["principles"]
    line = document.lines["principles"]
    if not isinstance(entries, list) or not entries:
        raise _ProblemError(line, "principles must be a non-empty list")
    principles: list[Principle] = []
    for index, entry in enumerate(entries):
        principle = _principle(entry, f"principles[{index}]", line)
        if principle.id in {other.id for other in principles}:
            raise _ProblemError(entry.lines["id"], f"principle id {principle.id!r} is used twice")
        principles.append(principle)
    exemplars = document.get("exemplars") or []
    if not isinstance(exemplars, list):
        raise _ProblemError(document.lines["exemplars"], "exemplars must be a list")
    ids = {principle.id for principle in principles}
    return Constitution(
        name=_string(document, "name", "the file"),
        version=_string(document, "version", "the file"),
        description=_string(document, "description", "the file"),
        principles=tuple(principles),
        exemplars=tuple(
            _exemplar(entry, f"exemplars[{index}]", ids, document.lines["exemplars"])
            for index, entry in enumerate(exemplars)
        ),
    )


def _principle(entry: Any, where: str, line: int) -> Principle:
    optional = {"weight", "statement", "ask", "verdicts", "critique", "revision", "encourage", "discourage"}
    entry = _fields(entry, where, {"id", "question"}, optional, line)
    weight = entry.get("weight", 1.0)
    if isinstance(weight, str) and re.fullmatch(r"[\d.]+[eE][+-]?\d+", weight):
        weight = float(weight)  # YAML wants a dot and a sign in 1e-2
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1e100:
        raise _ProblemError(
            entry.lines["weight"], f"{where}.weight must be a number above 0, found {_shortened(repr(weight))}"
        )
    if ("statement" in entry) != ("verdicts" in entry):
        raise _ProblemError(entry.start, f"{where} needs both statement and verdicts, or neither")
    if ("encourage" in entry) != ("discourage" in entry):
        raise _ProblemError(entry.start, f"{where} needs both encourage and discourage, or neither")
    words: dict[str, tuple[str, ...]] = {"yes": (), "no": ()}
    if "verdicts" in entry:
        verdicts = _fields(entry["verdicts"], f"{where}.verdicts", {"yes", "no"}, set(), entry.lines["verdicts"])
        for side in words:
            values = verdicts[side]
            at = verdicts.lines[side]
            if not isinstance(values, list) or not values:
                raise _ProblemError(at, f"{where}.verdicts.{side} must be a non-empty list of words")
            for value in values:
                if not isinstance(value, str) or not value.strip() or len(value.split()) > 1:
                    raise _ProblemError(
                        at,
                        f"{where}.verdicts.{side}: {value!r} is not a single word (quote true, false, yes, no)",
                    )
            words[side] = tuple(value.strip() for value in values)
        both = set(words["yes"]) & set(words["no"])
        if both:
            at = verdicts.lines["no"]
            raise _ProblemError(at, f"{where}.verdicts: {', '.join(sorted(both))} stands under yes and no")
    return Principle(
        id=_string(entry, "id", where),
        weight=float(weight),
        question=_string(entry, "question", where),
        statement=_string(entry, "statement", where) if "statement" in entry else None,
        ask=_string(entry, "ask", where) if "ask" in entry else None,
        yes=words["yes"],
        no=words["no"],
        critique=_string(entry, "critique", where) if "critique" in entry else None,
        revision=_string(entry, "revision", where) if "revision" in entry else None,
        encourage=_string(entry, "encourage", where) if "encourage" in entry else None,
        discourage=_string(entry, "discourage", where) if "discourage" in entry else None,
    )


def _exemplar(entry: Any, where: str, ids: set[str], line: int) -> Exemplar:
    entry = _fields(entry, where, {"prompt", "first", "second", "preferred", "principle"}, set(), line)
    values = {key: _string(entry, key, where) for key in entry}
    if values["preferred"] not in ("first", "second"):
        raise _ProblemError(entry.lines["preferred"], f"{where}.preferred must be first or second")
    if values["principle"] not in ids:
        raise _ProblemError(
            entry.lines["principle"], f"{where}.principle {values['principle']!r} is not a principle id"
        )
    return Exemplar(**values)
