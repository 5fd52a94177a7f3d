"""Soft pair labels -> the preference dataset, and reading it (or a user's own) back."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlaif.config import AnnotatorConfig, Feedback, Selection
from rlaif.gold import gold_score
from rlaif.labeling.aggregate import PairLabel, logit, sigmoid
from rlaif.labeling.ranking import ranks, scores_of
from rlaif.labeling.verdicts import smoothed
from rlaif.records import (
    Candidates,
    Message,
    Preference,
    Prompt,
    UserError,
    content_hash,
    parse_messages,
    read_jsonl,
)

log = logging.getLogger("rlaif")

SPLITS = ("train", "validation", "test")
_ROW_GROUP = 1000
ENDINGS = ("jsonl", "jsonl.gz", "parquet")
"""Of the file of a split."""


def select_preferences(
    line: Candidates,
    pairs: Sequence[PairLabel],
    selection: Selection,
    min_margin: float,
    labeler: str,
    feedback: str,
) -> tuple[list[Preference], Counter[str]]:
    """Choose among one prompt's pairs and orient them: chosen is the one with p >= 0.5.

    Candidates are ranked by the Bradley-Terry scores that the pairs fit. ``best_worst`` keeps the pair whose scores
    differ most, of those without an empty completion, which are dropped first. Exact ties (p = 0.5) and pairs below
    ``min_margin`` are dropped. ``length_balanced`` is the business of :class:`LengthBalance`, which must see all
    prompts; here it is ``all_pairs``.

    Returns:
        Preferences, and counts of dropped pairs by reason.
    """
    texts = {candidate.candidate_id: candidate.completion for candidate in line.candidates}
    cut = {candidate.candidate_id for candidate in line.candidates if candidate.finish_reason == "length"}
    scores = scores_of(pairs)
    places = ranks(scores)
    usable = [pair for pair in pairs if texts[pair.one].strip() and texts[pair.other].strip()]
    selected = usable
    if selection is Selection.best_worst and usable:
        selected = [max(usable, key=lambda pair: abs(scores[pair.one] - scores[pair.other]))]
    # Without counts of 0.
    dropped = +Counter(empty_completion=len(pairs) - len(usable), not_selected=len(usable) - len(selected))
    result = []
    for pair in selected:
        sign = 1 if pair.logit >= 0 else -1
        p_chosen = sigmoid(abs(pair.logit))
        if pair.logit == 0:
            dropped["tie"] += 1
            continue
        if p_chosen - 0.5 < min_margin:
            dropped["margin"] += 1
            continue
        winner, loser = (pair.one, pair.other) if sign > 0 else (pair.other, pair.one)
        result.append(
            Preference(
                prompt_id=line.prompt.prompt_id,
                prompt=line.prompt.messages,
                chosen=texts[winner],
                rejected=texts[loser],
                chosen_id=winner,
                rejected_id=loser,
                p_chosen=p_chosen,
                labeler=labeler,
                feedback=feedback,
                principles={name: round(sign * value, 6) for name, value in pair.principles.items()},
                chosen_ended=winner not in cut,
                rejected_ended=loser not in cut,
                chosen_rank=places[winner],
                rejected_rank=places[loser],
                inferred=pair.inferred,
                missing_weight=round(pair.missing_weight, 6),
            )
        )
    return result, dropped


class LengthBalance:
    """Which preferences to drop so that, in each split, the longer completion is chosen as often as the shorter one.

    See every preference first (:meth:`add`), then ask of each whether it goes (:meth:`drops`). Preferences of the more
    frequent kind are dropped at random, by a hash of the seed and the pair, so the choice depends on nothing else;
    those with completions of equal length (in characters) all stay. Memory: 8 bytes a preference,
    and as much again while the limit is found.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._draws: dict[tuple[str, bool], array[int]] = defaultdict(lambda: array("Q"))
        self._limits: dict[tuple[str, bool], int] = {}

    def add(self, split: str, preference: Preference) -> None:
        """Count one preference."""
        kind = self._kind(split, preference)
        if kind is not None:
            self._draws[kind].append(self._draw(preference))

    def drops(self, split: str, preference: Preference) -> bool:
        """Whether a preference goes; after every one has been added."""
        kind = self._kind(split, preference)
        if kind is None:
            return False
        if kind not in self._limits:
            more = len(self._draws[kind]) - len(self._draws[split, not kind[1]])
            # Not sorted(): a list of Python's integers takes five times the memory.
            self._limits[kind] = int(np.partition(self._draws[kind], more - 1)[more - 1]) if more > 0 else -1
        return self._draw(preference) <= self._limits[kind]

    def _kind(self, split: str, preference: Preference) -> tuple[str, bool] | None:
        difference = len(preference.chosen) - len(preference.rejected)
        return (split, difference > 0) if difference else None

    def _draw(self, preference: Preference) -> int:
        ids = preference.prompt_id, preference.chosen_id, preference.rejected_id
        return int(content_hash("length_balance", self._seed, *ids)[:16], 16)


def balanced(
    preferences: Iterable[tuple[str, Preference]], seed: int, dropped: Counter[str], folder: Path
) -> Iterator[tuple[str, Preference]]:
    """Preferences with their splits, without those that :class:`LengthBalance` drops; these are counted.

    All are taken before the first comes out; meanwhile they lie in a nameless file in ``folder``.
    """
    balance = LengthBalance(seed)
    with tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8") as file:
        for split, preference in preferences:
            balance.add(split, preference)
            file.write(json.dumps([split, vars(preference)]) + "\n")
        file.seek(0)
        for line in file:
            split, values = json.loads(line)
            preference = Preference(**{**values, "prompt": tuple(values["prompt"])})
            if balance.drops(split, preference):
                dropped["length_balance"] += 1
            else:
                yield split, preference


def simulated_human_pairs(line: Candidates, gold: str, annotator: AnnotatorConfig, seed: int) -> list[PairLabel]:
    """Draw labels for every pair of a prompt from a Bradley-Terry model of the gold judge, with label noise.

    P(one beats other) = sigmoid(scale * (gold(one) - gold(other))); a share ``flip`` of the draws is inverted.
    Each annotator's draw is a function of the seed, the pair and the annotator's number alone. Ties in gold are drawn
    like any other pair.

    A single draw is a hard label, as in a file of people's choices. The votes of several are smoothed as a labeler's
    are: their reliability is known to nobody downstream.
    """
    result = []
    scores = {candidate.candidate_id: gold_score(gold, candidate.completion) for candidate in line.candidates}
    for one, other in itertools.combinations(sorted(scores), 2):
        p = sigmoid(annotator.scale * (scores[one] - scores[other]))
        key = content_hash("simulated_human", seed, line.prompt.prompt_id, one, other)
        n = annotator.annotators
        choice, flip = np.random.default_rng(int(key[:15], 16)).random((n, 2)).T
        votes = int(((choice < p) != (flip < annotator.flip)).sum())
        label = logit(float(votes)) if n == 1 else logit(smoothed(votes / n, n, 2))
        result.append(PairLabel(line.prompt.prompt_id, one, other, label, {gold: label}))
    return result


class PreferenceWriter:
    """Writes a preference dataset: one parquet file per split and a card that ``datasets.load_dataset`` understands.

    Use as a context manager; rows go to the disk in groups, whatever their number.
    """

    def __init__(self, folder: Path, card: Mapping[str, Any]) -> None:
        self.folder, self.card = folder, dict(card)
        self.counts: Counter[str] = Counter()
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._files: dict[str, Any] = {}
        self._content = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, split: str, preferences: Iterable[Preference]) -> None:
        """Write preferences of one split."""
        waiting = self._rows.setdefault(split, [])
        for preference in preferences:
            row = preference.to_row()
            self._content.update(content_hash(split, row).encode())
            waiting.append(row)
            self.counts[split] += 1
        if len(waiting) >= _ROW_GROUP:
            self._flush(split)

    def _flush(self, split: str) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = self._rows[split]
        if not rows:
            return
        table = pyarrow.Table.from_pylist(rows, schema=_schema())
        if split not in self._files:
            self._files[split] = pyarrow.parquet.ParquetWriter(self.folder / f"{split}.parquet", table.schema)
        self._files[split].write_table(table)
        rows.clear()

    def __enter__(self) -> PreferenceWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            for split in self._rows:
                self._flush(split)
        for file in self._files.values():
            file.close()
        if kind is None:
            self._write_card()

    def _write_card(self) -> None:
        names = [split for split in SPLITS if self.counts[split]]
        # datasets caches by folder and configuration name, not by place: equal names would load each other's labels.
        name = f"{self.card.get('feedback', 'preferences')}-{self._content.hexdigest()[:12]}"
        files = "\n".join(f"  - split: {split}\n    path: {split}.parquet" for split in names)
        counts = "\n".join(f"| {split} | {self.counts[split]} |" for split in names)
        facts = "\n".join(f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.card.items())
        (self.folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}\n"
            "tags: [preference, rlaif]\n---\n\n# Preference dataset\n\n"
            "Conversational preference format (`prompt`, `chosen`, `rejected`) with a soft label: `p_chosen` is the "
            "labeler's probability that `chosen` is better. Splits are by prompt, near-duplicates together.\n\n"
            f"| split | preferences |\n| --- | --- |\n{counts}\n\n{facts}\n",
            encoding="utf-8",
        )


def _schema() -> Any:
    """The columns of :meth:`Preference.to_row`."""
    import pyarrow

    text, flag = pyarrow.string(), pyarrow.bool_()
    messages = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    return pyarrow.schema(
        [
            *((name, messages) for name in ("prompt", "chosen", "rejected")),
            ("p_chosen", pyarrow.float64()),
            *((name, text) for name in ("prompt_id", "chosen_id", "rejected_id", "labeler", "feedback", "principles")),
            *((name, flag) for name in ("chosen_ended", "rejected_ended")),
            *((name, pyarrow.int64()) for name in ("chosen_rank", "rejected_rank")),
            ("inferred", flag),
            ("missing_weight", pyarrow.float64()),
        ]
    )


def read_preferences(folder: Path, split: str, columns: Mapping[str, str] | None = None) -> list[Preference]:
    """Read one split: ``SPLIT.parquet``, ``SPLIT.jsonl`` or ``SPLIT.jsonl.gz``; no file means no rows.

    Takes this project's own datasets and any in TRL's preference format (texts or messages, with ``prompt`` apart or
    as the part that ``chosen`` and ``rejected`` share), transcripts as in Anthropic's HH data, and, with ``columns``
    (our name -> theirs), datasets that call their columns otherwise. ``feedback`` is empty where a row does not say it.

    Raises:
        UserError: naming file and row.
    """
    skipped: Counter[str] = Counter()

    def parse(row: Mapping[str, Any]) -> Preference | None:
        try:
            return parse_preference(_renamed(row, columns or {}))
        except UnusableTranscriptError as problem:
            skipped[str(problem)] += 1
            return None

    found: list[Preference | None] = []
    file = next((folder / f"{split}.{end}" for end in ENDINGS if (folder / f"{split}.{end}").is_file()), None)
    if file is None:
        return []
    if file.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not a readable parquet file ({error})") from None
        for number, row in enumerate(rows, 1):
            try:
                found.append(parse(row))
            except ValueError as error:
                raise UserError(f"{file}, row {number}: {error}") from None
    else:
        found = list(read_jsonl(file, parse))
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        log.warning("%s: %d of %d transcripts are left out: %s", file, sum(skipped.values()), len(found), reasons)
    return [preference for preference in found if preference is not None]


def hub_preferences(name: str) -> Path | None:
    """A folder with the splits of a preference dataset on the hub, or None if ``name`` is none (``owner/name``).

    Raises:
        UserError: if the hub does not give it.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    from datasets import load_dataset

    from rlaif.bundled import cache_dir

    try:
        splits = load_dataset(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"preferences={name}: no such folder, and the hub did not give it ({reason})") from None
    folder = cache_dir() / "datasets" / name.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows.to_parquet(str(folder / f"{split}.parquet"))
    return folder


class UnusableTranscriptError(ValueError):
    """A transcript that holds no pair: known to occur in HH data, left out and counted."""


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        found = ", ".join(sorted(map(str, row)))
        raise ValueError(f"has no column {', '.join(missing)} that columns names (found: {found})")
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def parse_preference(row: Mapping[str, Any]) -> Preference:
    """One row in TRL's preference format, or with transcripts as in HH data, as a :class:`Preference`.

    Raises:
        UnusableTranscriptError: if the row's transcripts differ by more than their last reply.
        ValueError: naming the column that is wrong.
    """
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise ValueError(f'has no "{column}" (found: {", ".join(sorted(map(str, row))) or "nothing"})')
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    transcripts = prompt is None and _is_transcript(chosen) and _is_transcript(rejected)
    if transcripts:
        chosen, rejected = parse_transcript(chosen), parse_transcript(rejected)
    if prompt is None:
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise ValueError('has no "prompt", and "chosen" and "rejected" are not message lists that share one')
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if transcripts:
            _check_transcripts(prompt, chosen, rejected)
    elif _is_transcript(prompt):
        prompt = parse_transcript(prompt)
        if prompt[-1] == {"role": "assistant", "content": ""}:
            prompt = prompt[:-1]
    messages = parse_messages(prompt)
    chosen, rejected = (_after(value, messages) for value in (chosen, rejected))
    texts = {"chosen": _reply(chosen, "chosen"), "rejected": _reply(rejected, "rejected")}
    p_chosen = row.get("p_chosen")
    p_chosen = 1.0 if p_chosen is None else p_chosen
    if isinstance(p_chosen, bool) or not isinstance(p_chosen, (int, float)) or not 0 <= p_chosen <= 1:
        raise ValueError(f'"p_chosen" must be between 0 and 1, found {p_chosen!r}')
    name = next((row[key] for key in ("prompt_id", "id") if row.get(key) not in (None, "")), None)
    return Preference(
        prompt_id=content_hash(messages) if name is None else str(name),
        prompt=messages,
        chosen=texts["chosen"],
        rejected=texts["rejected"],
        chosen_id=str(row.get("chosen_id") or "chosen"),
        rejected_id=str(row.get("rejected_id") or "rejected"),
        p_chosen=float(p_chosen),
        labeler=str(row.get("labeler") or "unknown"),
        feedback=_origin(row.get("feedback")),
        chosen_ended=row.get("chosen_ended") is not False,
        rejected_ended=row.get("rejected_ended") is not False,
        source=str(row.get("subset") or row.get("source") or ""),
    )


def _origin(value: Any) -> str:
    """Whose feedback a row says it is; empty where it does not say, or has a column of that name for something else."""
    word = value.strip().lower() if isinstance(value, str) else ""
    return word if word in list(Feedback) else ""


def of_feedback(rows: Sequence[Preference], feedback: Feedback | None, folder: Path) -> list[Preference]:
    """Rows as labels of one kind: the file's word counts, and where it says nothing the user's declaration.

    Args:
        rows: as they were read.
        feedback: what the user says that they are; None takes the file's word, which must then be on all rows.
        folder: for messages.

    Raises:
        UserError: if rows say that they are of another kind, or of several, or if nobody says.
    """
    said = Counter(row.feedback for row in rows if row.feedback)
    if feedback is None and rows:
        if silent := len(rows) - said.total():
            raise UserError(
                f"preferences={folder}: {silent} of its {len(rows)} rows do not say who labelled them "
                "(column feedback): give feedback=ai or feedback=human"
            )
        feedback = Feedback(said.most_common(1)[0][0])
    others = {word: count for word, count in said.items() if word != feedback}
    if others:
        found = max(others, key=lambda word: others[word])
        raise UserError(
            f"preferences={folder}: {others[found]} of its {len(rows)} rows say that they are {found} labels, but "
            f"feedback={feedback}: give feedback={found}, or rows of one kind"
        )
    return [row if row.feedback else replace(row, feedback=str(feedback), declared=True) for row in rows]


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and _TURN.match(value) is not None


def parse_transcript(text: str) -> list[Message]:
    """The turns of ``\\n\\nHuman: ...\\n\\nAssistant: ...`` (Anthropic's HH data) as messages.

    >>> parse_transcript("\\n\\nHuman: Hi\\n\\nAssistant: Yes?")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes?'}]
    """
    parts = _TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": turn.strip()} for name, turn in zip(parts[1::2], parts[2::2], strict=True)]


def _check_transcripts(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    turns = [*prompt, *chosen, *rejected]
    if not prompt or len(chosen) != 1 or len(rejected) != 1:
        raise UnusableTranscriptError("that differ by more than the last reply")
    if any(not turn["content"] for turn in turns):
        raise UnusableTranscriptError("with an empty turn")
    if {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        raise UnusableTranscriptError("that do not end with the assistant")
    roles = [turn["role"] for turn in prompt]
    if any(one == two for one, two in itertools.pairwise([*roles, "assistant"])) or roles[0] != "user":
        raise UnusableTranscriptError("whose turns do not alternate")
    if chosen == rejected:
        raise UnusableTranscriptError("with two equal replies")


def _after(value: Any, prompt: Sequence[Message]) -> Any:
    """The reply alone where a message list begins with the prompt that stands beside it, as in UltraFeedback."""
    if not isinstance(value, list) or len(value) != len(prompt) + 1:
        return value
    turns = [turn if isinstance(turn, dict) else {} for turn in value]
    begins = all(turn.get(key) == said[key] for turn, said in zip(turns, prompt, strict=False) for key in said)
    return value[-1:] if begins else value


def _reply(value: Any, what: str) -> str:
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise ValueError(f'"{what}" must be one assistant message after the prompt')
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{what}" must be a non-empty text or one assistant message')
    return value


def prompts_of(preferences: Sequence[Preference]) -> list[Prompt]:
    """The distinct prompts of preferences, in order."""
    seen = {preference.prompt_id: Prompt(preference.prompt_id, preference.prompt) for preference in preferences}
    return list(seen.values())
