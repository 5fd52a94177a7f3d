"""Hostile input to every command: settings, files of every kind, experiments and paths.

Whatever it is, a command ends with exit status 0, or with 2 and one line; there is no traceback, and no file is lost.
"""

from __future__ import annotations

import json
import os
import random
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from conftest import PROMPTS, write_lines
from drive import Ended, composed_once, drive, snapshot
from hypothesis import HealthCheck, settings
from hypothesis import given as given_lines
from hypothesis import strategies as st

from rlaif.config import COMMANDS

pytestmark = pytest.mark.slow  # two thousand inputs

OUT = "output_dir={here}-out"
LABELER = ["constitution=warm", "labeler=scripted"]
BASE = {
    "sample": ["prompts={here}/prompts.jsonl", "model@policy=tiny", OUT],
    "label": ["candidates={here}/candidates.jsonl", *LABELER, OUT],
    "audit": ["comparisons={here}/comparisons.jsonl", *LABELER, OUT],
    "train": [
        "preferences={here}/preferences",
        "feedback=human",
        "model@policy=tiny",
        "method=dpo",
        "eval.enabled=false",
        OUT,
    ],
    "evaluate": ["prompts={here}/prompts.jsonl", "model@policy=tiny", OUT],
    "report": ["runs=[{here}/run]", OUT],
    "run": ["experiment=smoke", "prompts={here}/prompts.jsonl", "data.max_prompts=null", OUT],
}
"""What each command needs to get to work."""
CHEAPEST = ["report", "sample", "audit", "label", "evaluate", "train", "run"]
"""Where a group of settings stands in several commands, it is attacked where composing takes least."""

LONG = "x" * 5000
NUMBERS = ["nan", "-1", "9" * 23, "many", "[1]"]
HOSTILE: dict[type, list[str]] = {
    float: [*NUMBERS, "-inf", "1e308", "1e-320"],
    int: [*NUMBERS, "0", "1.5"],
    bool: ["perhaps", "null", "[true]"],
    Enum: ["nonsense", "[a]", "''"],
    str: ["''", LONG, "'a\0b'", "'\ud800\u202e\x1b[2J'", "[a]", "../.."],
    list: ["x", "[nan]", "[null]", "[[a]]", "{a: 1}", "['']"],
    dict: ["x", "[1]", "{a: nan}", "{a: {b: [inf]}}", "{'': 1}", "{a: null}"],
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good inputs of a user's, which must outlive everything."""
    folder = tmp_path_factory.mktemp("hostile")
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:30]
    prompts = [json.loads(line)["prompt"][-1]["content"] for line in lines]
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_lines(folder / "candidates.jsonl", [candidate(prompt, n) for n, prompt in enumerate(prompts)])
    write_lines(folder / "comparisons.jsonl", [comparison(prompt, n) for n, prompt in enumerate(prompts)])
    (folder / "preferences").mkdir()
    write_lines(folder / "preferences" / "train.jsonl", [preference(prompt, n) for n, prompt in enumerate(prompts)])
    (folder / "run" / "base").mkdir(parents=True)
    row = {"name": "base", "method": "base", "seed": 0, "gold_score": 0.1, "length": 3.0}
    (folder / "run" / "base" / "metrics.json").write_text(json.dumps(row), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an odd ``output_dir`` makes belongs into no checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def candidate(prompt: str, n: int) -> dict[str, Any]:
    return {"prompt": prompt, "completions": [f"area {n}", f"rhythm {n}"]}


def comparison(prompt: str, n: int) -> dict[str, Any]:
    return {"prompt": prompt, "response_a": f"area {n}", "response_b": f"rhythm {n}", "label": "ab"[n % 2]}


def preference(prompt: str, n: int) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": f"area {n}", "rejected": f"rhythm {n}"}


def arguments(command: str, here: Path, *own: str) -> list[str]:
    """What the command needs, with ``own`` instead where they set the same."""
    keys = {argument.split("=")[0] for argument in own}
    base = [argument.format(here=here) for argument in BASE[command]]
    return [*(argument for argument in base if argument.split("=")[0] not in keys), *own]


class Tally:
    """Ends of many inputs; at the end there must be no faulty one."""

    def __init__(self) -> None:
        self.tried = 0
        self.faults: list[str] = []

    def add(self, what: str, end: Ended) -> None:
        self.tried += 1
        if end.fault:
            self.faults.append(f"{what[:120]!r}: {end.fault}: {end.errors.strip().splitlines()[-1][:200]}")

    def check(self, at_least: int) -> None:
        print(f"{self.tried} inputs, {len(self.faults)} faults")  # noqa: T201
        assert not self.faults, "\n".join(self.faults)
        assert self.tried >= at_least


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, type, str, Any]]:
    """(override, class that has the field, field, type) of every setting."""
    hints = typing.get_type_hints(schema)
    for field in fields(schema):
        kind = hints[field.name]
        if is_dataclass(kind):
            yield from keys(kind, f"{prefix}{field.name}.")
        else:
            owner = next(base for base in schema.__mro__ if field.name in vars(base).get("__annotations__", {}))
            yield prefix + field.name, owner, field.name, kind


def hostile_values(kind: Any) -> list[str]:
    whole = typing.get_origin(kind) or next((x for x in typing.get_args(kind) if x is not type(None)), kind)
    whole = kind if typing.get_origin(kind) in (list, dict) else whole
    whole = typing.get_origin(whole) or whole
    for known, values in HOSTILE.items():
        if isinstance(whole, type) and issubclass(whole, known) and not (whole is bool and known is int):
            return values
    return HOSTILE[dict]


def attacks() -> list[tuple[str, str]]:
    """(command, override): every setting with every hostile value once, and every key of every command once."""
    rng = random.Random(0)
    seen: set[tuple[type, str]] = set()
    found = []
    for command in CHEAPEST:
        for key, owner, name, kind in keys(COMMANDS[command]):
            if key == "experiment":
                continue
            values = hostile_values(kind)
            if (owner, name) in seen:
                values = [rng.choice(values)]
            seen.add((owner, name))
            found += [(command, f"{key}={value}") for value in values]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_attacks_start_from_is_fine(command, here):
    end = drive(command, arguments(command, here))
    assert (end.status, end.reached is None) == (0, command == "report"), end.errors


def test_settings(here):
    """Composed and validated by the whole of the command's entry, as far as its first stage."""
    tally, before = Tally(), snapshot(here)
    with composed_once() as tried:
        for command, override in attacks():
            tried.clear()
            tried.add(override)
            tally.add(f"{command} {override}", drive(command, arguments(command, here, override)))
    assert snapshot(here) == before
    tally.check(at_least=1000)


def test_shortcut_is_the_real_thing(here):
    """What stands in for composing ends like it."""
    tried = random.Random(1).sample([attack for attack in attacks() if attack[0] in ("sample", "audit")], 12)
    for command, override in tried:
        given = arguments(command, here, override)
        with composed_once() as own:
            own.add(override)
            short = drive(command, given)
        real = drive(command, given)
        assert (real.status, real.errors) == (short.status, short.errors), override
        assert not real.fault


VALUES = [
    *(None, True, 0, -1, 1e308, "", " ", [], {}, [[]], [None], {"a": 1}, "\x00", "\ud800", "\u202e\x1b[2J<|im_end|>"),
    *("x" * 100_000, "\n\n", "7", 10**30, ["a", "a"], [{"role": "user"}], [{"role": "root", "content": "x"}]),
    *([{"role": "user", "content": None}], [{"role": "user", "content": "x"}] * 2),
]
"""What any key of a line may hold."""
RAW = [
    *(
        b"",
        b"\n\n",
        b"{",
        b"[]\n",
        b"null\n",
        b"1\n",
        b'"a"\n',
        b"{}\n",
        b"\xff\xfe{\x00}\x00",
        b"\x00" * 100,
        b"\x1f\x8b\x08\x00",
    ),
    *(b"\xef\xbb\xbf", b"{'a': 1}\n", b'{"a": 1,}\n', b"[" * 100_000, b'{"prompt": ' * 5_000, b'{"prompt": 1e999}\n'),
    *(
        b'{"prompt": ' + b"9" * 5_000 + b"}\n",
        b'{"prompt": "a", "prompt": "b"}\n',
        b"\xed\xa0\x80\n",
        b"PAR1" + b"\0" * 50,
    ),
]
"""What a whole file may be."""
KINDS: dict[str, tuple[str, str, Callable[[str, int], dict[str, Any]], list[str]]] = {
    "prompts": ("sample", "prompts={file}", lambda prompt, n: {"prompt": prompt, "prompt_id": f"p{n}"}, []),
    "candidates": ("label", "candidates={file}", candidate, []),
    "sampled": (
        "label",
        "candidates={file}",
        lambda prompt, n: {
            "prompt_id": f"p{n}",
            "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}],
            "split": "train",
            "candidates": [
                {"candidate_id": x, "completion": x * n, "tokens": 1, "finish_reason": "length"} for x in "ab"
            ],
        },
        [],
    ),
    "comparisons": ("audit", "comparisons={file}", comparison, []),
    "preferences": ("train", "preferences={folder}", preference, []),
    "demonstrations": (
        "train",
        "demonstrations={file}",
        lambda prompt, n: {"prompt": prompt, "completion": f"text {n}"},
        ["method=sft"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_lines(kind, here, tmp_path):
    """A bad value under every key of a line in the middle of a good file, and files that are none."""
    command, setting, line, more = KINDS[kind]
    file = tmp_path / "train.jsonl"
    given = arguments(command, here, setting.format(file=file, folder=tmp_path), *more)
    good = [json.dumps(line(f"Prompt {n}: {os.urandom(8).hex()}", n)) for n in range(20)]
    tally = Tally()
    with composed_once():
        for raw in RAW:
            file.write_bytes(raw)
            tally.add(f"{kind} {raw[:40]!r}", drive(command, given))
        for bad in bad_lines(line("Prompt", 99)):
            write_lines(file, [*good[:10], bad, *good[10:]])
            tally.add(f"{kind} {bad}", drive(command, given))
            assert len(file.read_text(encoding="utf-8").splitlines()) >= 20, "the user's file is touched"
    tally.check(at_least=70)


def bad_lines(good: dict[str, Any]) -> Iterator[str]:
    for key in good:
        for value in VALUES:
            yield json.dumps({**good, key: value})
        yield json.dumps({name: value for name, value in good.items() if name != key})
    for key, value in good.items():
        for place, item in enumerate(value) if isinstance(value, list) else ():
            for wrong in VALUES[:12]:
                yield json.dumps({**good, key: [*value[:place], wrong, *value[place + 1 :]]})
            for name in item if isinstance(item, dict) else ():
                changed = {**item, name: random.Random(name).choice(VALUES)}
                yield json.dumps({**good, key: [*value[:place], changed, *value[place + 1 :]]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
FUZZ = settings(
    max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("kind", ["candidates", "comparisons"])
def test_lines_of_any_json(kind, here, tmp_path):
    command, setting, line, more = KINDS[kind]
    file = tmp_path / "train.jsonl"
    given = arguments(command, here, setting.format(file=file, folder=tmp_path), *more)
    names = st.sampled_from([*line("Prompt", 0), "id", "split", "annotators", "subset"])

    @FUZZ
    @given_lines(st.dictionaries(names, JSON, max_size=4))
    def check(changed: dict[str, Any]) -> None:
        good = [line(f"Prompt {n} of {n * n + 17}", n) for n in range(12)]
        write_lines(file, [*good, {**line("Prompt", 99), **changed}])
        end = drive(command, given)
        assert not end.fault, end.errors

    with composed_once():
        check()


CONSTITUTION: dict[str, Any] = {
    "name": "mine",
    "version": 1,
    "description": "A test.",
    "principles": [
        {
            "id": "kind",
            "question": "Which is kinder?",
            "weight": 2,
            "statement": "This is",
            "ask": "Is it?",
            "verdicts": {"yes": ["kind"], "no": ["rude"]},
            "critique": "Say what is rude.",
            "revision": "Make it kind.",
            "encourage": "Be kind.",
            "discourage": "Be rude.",
        }
    ],
    "exemplars": [{"prompt": "a", "first": "b", "second": "c", "preferred": "first", "principle": "kind"}],
}
SNIPPETS = [
    *("null", "[]", "''", "-1", ".nan", "1" * 400, "true", "{a: 1}", "2026-02-30", "'\\0'", "x" * 5_000),
    *("!!python/object/apply:os.system [true]", "&a [*a]", "*nothing", "[" * 500),
]


def test_constitutions(here, tmp_path):
    file = tmp_path / "mine.yaml"
    given = arguments("label", here, f"constitution={file}")
    place = "PLACE"
    texts = [
        json.dumps(changed).replace(f'"{place}"', snippet)
        for changed in changes(CONSTITUTION, place)
        for snippet in SNIPPETS
    ]
    tally = Tally()
    with composed_once():
        for raw in [*(text.encode() for text in texts), *RAW, *(text.encode("utf-16") for text in texts[:1])]:
            file.write_bytes(raw)
            tally.add(f"constitution {raw[:300]!r}", drive("label", given))
            assert file.read_bytes() == raw
    tally.check(at_least=300)


def changes(value: Any, place: str) -> Iterator[Any]:
    """The value with each of its parts replaced in turn."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        for changed in [place, *changes(item, place)]:
            copied = dict(value) if isinstance(value, dict) else list(value)
            copied[key] = changed
            yield copied


EXPERIMENTS = [
    *(
        "seed: [1",
        "seed:\t1",
        "seed: 1\nseed: 2",
        "- seed: 1",
        "seed",
        "7",
        "null",
        "seed: many",
        "sed: 1",
        "1: 2",
        "seed: ${x}",
    ),
    *("seed: ${oc.env:NOPE}", "? [a]", "a: &a [*a]", "*x", "seed: !!python/name:os.system", "policy: 3", "policy: [a]"),
    *(
        "defaults: 7",
        "defaults: [nothing]",
        "defaults: [{override /model@policy: nothing}]",
        "defaults: [experiment: x]",
    ),
    *(
        "sampling: {styles: {a: {n: 0}}}",
        "sampling: {styles: 3}",
        "sampling: {splits: [a]}",
        "seed: " + "9" * 5000,
        "seed: .nan",
    ),
    *(
        "sampling: " + "{a: " * 500 + "1" + "}" * 500,
        "seed: " + "[" * 3000,
        'output_dir: "a\\0b"',
        "prompts: [a]",
        "\x01",
        "@",
        "%a",
    ),
]


def test_experiments(here, tmp_path):
    """A user's own settings, composed as they are."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    head = b"# @package _global_\n"
    raw = {f"own{n}": head + text.encode() for n, text in enumerate(EXPERIMENTS)}
    raw |= {"latin": head + b"title: caf\xe9", "wide": head.decode().encode("utf-16"), "marked": b"\xef\xbb\xbf" + head}
    raw |= {"bare": b"seed: 1", "odd": b"# @package a: b\nseed: 1", "nul": head + b"\0", "empty": b""}
    tally = Tally()
    for name, content in raw.items():
        (folder / f"{name}.yaml").write_bytes(content)
        end = drive("sample", arguments("sample", here, f"experiment={name}", f"--config-dir={tmp_path}"))
        tally.add(f"experiment {content[:60]!r}", end)
        assert (folder / f"{name}.yaml").read_bytes() == content
    tally.check(at_least=40)


PATHS = [
    *("/", "..", "/dev/null", "{odd}/nothing", "{here}/prompts.jsonl/x", "{here}", "{odd}/loop", "{odd}/dangling"),
    *("{odd}/fifo", "{odd}/" + "n" * 300, "/n" * 3_000, "a\0b", "\udcff\n\u202e", "{odd}/e mpty.jsonl"),
]
FILES = {
    "sample": ["prompts", "policy.name", "policy.adapter"],
    "label": ["candidates", "constitution", "labeler.audit", "labeling.calibrate", "gold", "combine"],
    "audit": ["comparisons", "compare"],
    "train": ["preferences", "demonstrations", "prompts", "preference_model", "pm.model"],
    "evaluate": ["baseline_samples", "preference_model", "prompts"],
    "run": ["human_preferences", "constitution"],
    "report": ["runs", "output_dir"],
}


def test_paths(here, tmp_path):
    """Something else, or nothing, where a file or a folder is named."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "e mpty.jsonl").touch()
    tally, before = Tally(), snapshot(here)
    with composed_once() as tried:
        for command, key in ((command, key) for command, names in FILES.items() for key in names):
            # Below / and .. a report finds all that this machine has.
            for path in PATHS[2:] if key == "runs" else PATHS:
                value = "'" + path.format(here=here, odd=tmp_path).replace("'", "\\'") + "'"
                value = {"runs": f"[{value}]", "compare": f"[{value}]", "combine": f"[{value},{value}]"}.get(key, value)
                tried.clear()
                tried.add(f"{key}={value}")
                tally.add(f"{command} {key}={path!r}", drive(command, arguments(command, here, f"{key}={value}")))
    assert before.items() <= snapshot(here).items()
    tally.check(at_least=300)


def test_command_lines_of_any_text(here):
    keys_of_sample = [key for key, *_ in keys(COMMANDS["sample"])]
    words = st.text("abc019.,=:@+~-_ ()[]{}'\"\\$!*/?\n\t\u00e9", max_size=15)
    text = words | st.builds(lambda key, value: f"{key}={value}", st.sampled_from(keys_of_sample), words)

    @FUZZ
    @given_lines(text)
    def check(override: str) -> None:
        tried.clear()
        tried.add(override)
        end = drive("sample", [*arguments("sample", here), override])
        assert not end.fault, end.errors

    with composed_once() as tried:
        check()


@pytest.mark.parametrize("name", ["metrics.json", "training.jsonl", "failed.json", "provenance.json", "quality.json"])
def test_reports_of_any_figures(name, here, tmp_path):
    """A report is made of what there is, whatever a run left."""
    run = tmp_path / "run" / "ppo"
    run.mkdir(parents=True)
    row = {"name": "ppo", "method": "ppo", "seed": 0, "length": 3.0, "kl": 1.0}
    huge = [
        {"iteration": 0, "score": 1e308, "kl": -1e308, "seconds": 1e308},
        {"iteration": 1e308, "score": -1e308, "kl": 5e-324},
    ]
    figures = dict.fromkeys(("gold_score", "gold_score_low", "win_rate", "kl", "kl_high", "length", "wall_s"), 1e308)
    contents = [*RAW[:16], json.dumps({**row, **figures}).encode(), "\n".join(map(json.dumps, huge)).encode()]
    tally = Tally()
    with composed_once():
        for raw in contents:
            (run / "metrics.json").write_text(json.dumps({**row, "gold_score": 0.2}), encoding="utf-8")
            (run / name).write_bytes(raw)
            given = arguments("report", here, f"runs=[{here}/run,{tmp_path}/run]", f"output_dir={tmp_path}/out")
            end = drive("report", given)
            tally.add(f"{name} {raw[:60]!r}", end)
            assert (run / name).read_bytes() == raw
            assert end.status == 0
    tally.check(at_least=15)
