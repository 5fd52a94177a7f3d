"""README and docs say what is so: commands compose, links resolve, the tree is complete, defaults are right."""

from __future__ import annotations

import dataclasses
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from rlaif.cli import _normalise
from rlaif.config import (
    COMMANDS,
    ByTuning,
    CommandConfig,
    DataConfig,
    LoraSettings,
    ModelConfig,
    TrainerSettings,
    register,
)
from rlaif.constitution import load_constitution
from rlaif.preferences import PreferenceWriter
from rlaif.records import Preference, find_prompts, read_prompts, shipped
from rlaif.splits import assign_splits

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# results.md is generated, and holds sample completions.
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "results.md")
DOCUMENTS = [README, *PAGES]
DEMO = ROOT / "docs" / "demo.md"
WITH_LINKS = [*DOCUMENTS, ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"\b(?:FILE|DIR|NAME|MODEL|URL|FOLDER)\b")
GROUPS = (
    "policy|reference|data|sampling|labeler|labeling|annotator|sft|critique_revision|pm|ppo|dpo|rloo|grpo|best_of_n|"
    "eval|arms"
)
MENTION = re.compile(rf"(?<![\w./-])((?:{GROUPS})(?:\.\w+)+)(?!\.?\w|/)")
NOT_KEYS = {".py", ".md", ".yaml", ".json", ".jsonl"}


def blocks(path: Path, *languages: str) -> list[str]:
    """Contents of the fenced blocks in these languages."""
    return [text for language, text in BLOCK.findall(path.read_text(encoding="utf-8")) if language in languages]


def commands() -> list[tuple[str, str]]:
    """(document, command line) of every ``python -m rlaif.X`` in a shell block."""
    found = []
    for path in DOCUMENTS:
        for block in blocks(path, "bash"):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if "python -m rlaif." in line:
                    found.append((path.name, line.strip()))
    return found


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(override, dataclass that defines it, field) of every setting; NAME stands for a name of the user's."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        arguments = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{field.name}.")
        elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(arguments[1]):
            yield from keys(arguments[1], f"{prefix}{field.name}.NAME.")
        else:
            # The class that sets the default: pm.epochs and dpo.epochs are one setting, their learning rates are not.
            owner = next(base for base in schema.__mro__ if field.name in vars(base).get("__annotations__", {}))
            yield prefix + field.name, schema if owner is CommandConfig else owner, field.name


SETTINGS = {command: list(keys(schema)) for command, schema in COMMANDS.items()}
KNOWN = {key: (owner, name) for settings in SETTINGS.values() for key, owner, name in settings}
PAGE_COMMANDS = [page for page in PAGES if page.stem in COMMANDS]


def as_known(mention: str) -> str:
    """``sampling.styles.warm.n`` as ``sampling.styles.NAME.n``."""
    return re.sub(r"^(sampling\.styles|arms)\.\w+", r"\1.NAME", mention)


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """``conf/`` with the experiment that docs/hydra.md teaches."""
    from hydra import initialize_config_dir

    folder = tmp_path_factory.mktemp("docs") / "conf"
    shutil.copytree(ROOT / "conf", folder)
    page = ROOT / "docs" / "hydra.md"
    (name,) = re.findall(r"`conf/(experiment/\w+\.yaml)`:\n", page.read_text(encoding="utf-8"))
    (block,) = blocks(page, "yaml")
    (folder / name).write_text(block, encoding="utf-8")
    for command in COMMANDS:
        register(command)
    with initialize_config_dir(str(folder), version_base="1.3"):
        yield


def first_choices(overrides: list[str]) -> list[str]:
    """Overrides with the first of each swept list."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    chosen = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            chosen.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}")
        else:
            chosen.append(override.input_line)
    return chosen


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_compose(document: str, line: str, conf: None) -> None:
    from hydra import compose

    words = shlex.split(PLACEHOLDER.sub("x", line))
    module = words[words.index("-m") + 1]
    arguments, sweep = _normalise(words[words.index("-m") + 2 :])
    command = module.removeprefix("rlaif.")
    assert command in COMMANDS
    flags = [word for word in arguments if word.startswith("-")]
    assert set(flags) <= {"-m", "--help", "--cfg=job"}
    overrides = [word for word in arguments if word not in flags]
    chosen = first_choices(overrides)
    assert sweep == (chosen != overrides), "a sweep and only a sweep has -m"
    config = OmegaConf.to_object(compose(config_name=command, overrides=chosen))
    assert isinstance(config, COMMANDS[command])


def test_every_command_is_shown() -> None:
    shown = {re.search(r"rlaif\.(\w+)", line)[1] for _, line in commands()}  # type: ignore[index]
    assert shown == set(COMMANDS)
    in_readme = [line for document, line in commands() if document == "README.md"]
    assert {re.search(r"rlaif\.(\w+)", line)[1] for line in in_readme} >= set(COMMANDS) - {"run"}  # type: ignore[index]
    assert {page.stem for page in PAGE_COMMANDS} == set(COMMANDS)


def tree() -> list[str]:
    """Paths in README's tree of the repository."""
    text = next(block for block in blocks(README, "") if "pyproject.toml" in block)
    found: list[str] = []
    folders: list[str] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        assert indent % 2 == 0
        name = line.split()[0]
        found.append("".join(folders[: indent // 2]) + name)
        folders[indent // 2 :] = [name]
    return found


def tracked() -> list[str]:
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    return run.stdout.splitlines()


def test_tree_exists() -> None:
    paths = tree()
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_tree_is_complete() -> None:
    names = {path.split("/")[0] for path in tracked()}
    top = {name + "/" * (ROOT / name).is_dir() for name in names if not name.startswith(".")}
    modules = {f"rlaif/{path.name}" for path in (ROOT / "rlaif").glob("*.py")}
    packages = {f"rlaif/{path.parent.name}/" for path in (ROOT / "rlaif").glob("*/__init__.py")}
    assert (top | modules | packages) - set(tree()) == set()


def test_make_targets_exist() -> None:
    text = README.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for path in DOCUMENTS for name in re.findall(r"(?:`|^)make ([\w-]+)", path.read_text(), re.MULTILINE)}
    assert {"demo", "test", "setup"} <= named <= targets
    in_tree = re.search(r"^Makefile +(.*)$", text, re.MULTILINE)
    assert in_tree
    assert set(in_tree[1].split(", ")) == targets


def anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", WITH_LINKS, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_mentioned_settings_exist(path: Path) -> None:
    groups = {key.rsplit(".", 1)[0] for key in KNOWN if "." in key}
    for mention in MENTION.findall(path.read_text(encoding="utf-8")):
        if Path(mention).suffix not in NOT_KEYS:
            assert as_known(mention) in KNOWN.keys() | groups | {"arms.NAME", "sampling.styles.NAME"}, mention


def tables(path: Path) -> Iterator[tuple[str, str]]:
    """(key, default) of every row below a head ``| key | default |``."""
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells[:2] == ["key", "default"]:
            inside = True
        elif not cells:
            inside = False
        elif inside and not cells[0].startswith("---"):
            yield cells[0].strip("`"), cells[1]


def test_every_setting_is_documented() -> None:
    """Once: a group that several commands or methods share is documented under one of its names."""
    documented = {KNOWN[key] for page in PAGES for key, _ in tables(page)}
    for command in COMMANDS:
        page = ROOT / "docs" / f"{command}.md"
        here = {key for key, _ in tables(page)}
        shown = here | set(re.findall(r"(\w+)=", page.read_text(encoding="utf-8")))
        for key, owner, name in SETTINGS[command]:
            if "." in key:
                assert (owner, name) in documented, f"{key} ({owner.__name__}.{name})"
            elif key not in ("experiment", "seed", "output_dir"):
                assert key in shown, f"docs/{command}.md: {key}"


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def read(cell: str) -> Any:
    value = yaml.safe_load(cell)
    if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
        return float(value)  # YAML wants a dot in 1e-4
    return value


@pytest.mark.parametrize("page", PAGE_COMMANDS, ids=lambda page: page.name)
def test_defaults_are_right(page: Path) -> None:
    rows = list(tables(page))
    assert len(dict(rows)) == len(rows)
    instances = {"": COMMANDS[page.stem]()}
    for key, default in rows:
        owner, name = KNOWN[key] if "." in key else (COMMANDS[page.stem], key)
        if owner in (ModelConfig, LoraSettings, TrainerSettings) or "NAME" in key:
            value = getattr(owner(), name)
        else:
            value = instances[""]
            for part in key.split("."):
                value = getattr(value, part)
        assert plain(value) == read(default), key


def test_shared_defaults_are_shared() -> None:
    """docs/train.md gives one default for all methods on TRL's trainers."""
    train = COMMANDS["train"]()
    for field in dataclasses.fields(TrainerSettings):
        methods = ["pm", "dpo", "sft", "critique_revision"]
        methods += [] if field.name == "batch_size" else ["rloo", "grpo"]
        values = {method: getattr(getattr(train, method), field.name) for method in methods}
        assert len({repr(value) for value in values.values()}) == 1, (field.name, values)


def test_the_learning_rates_by_tuning_are_right() -> None:
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8").partition("## Learning rates")[2]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\S+) \| (\S+) \|", page, re.MULTILINE)
    found = {name: (float(lora), float(full)) for names, lora, full in rows for name in re.findall(r"\w+", names)}
    settings = vars(COMMANDS["train"]())
    assert found == {name: tuple(value.RATES) for name, value in settings.items() if isinstance(value, ByTuning)}


def test_demo_numbers() -> None:
    """The counts in docs/demo.md and docs/constitutions.md."""
    text = re.sub(r"\s+", " ", DEMO.read_text(encoding="utf-8"))
    demo = yaml.safe_load((ROOT / "conf" / "experiment" / "demo.yaml").read_text(encoding="utf-8"))
    prompts = read_prompts(find_prompts(demo["prompts"]))
    splits = [split.value for split in assign_splits(prompts, DataConfig(**demo["data"])).values()]
    train, validation, test = (splits.count(name) for name in ("train", "validation", "test"))
    assert f"{len(prompts)} everyday prompts, split into {train} train, {validation} validation and {test} test" in text
    assert f"the {test} test prompts" in text
    assert f"{splits[:70].count('test')} of these 70 prompts fall into the test split" in text
    ppo = demo["ppo"]
    assert f"{ppo['iterations']} rounds of {ppo['rollouts']} completions" in text
    assert f"samples {ppo['iterations'] * ppo['rollouts']} completions" in text
    arms = re.findall(r"^\| `(\w+)` \| (?:none|PM, then PPO|DPO)", DEMO.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(arms) == set(demo["arms"])
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \|$", (ROOT / "docs" / "constitutions.md").read_text(), re.MULTILINE)
    names = [path.stem for path in shipped("constitutions").glob("*.yaml")]
    assert {name: int(count) for name, count in rows} == {
        name: len(load_constitution(name).principles) for name in names
    }


def test_example_constitution_loads(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs" / "constitutions.md", "yaml")
    file = tmp_path / "polite.yaml"
    file.write_text(block, encoding="utf-8")
    assert load_constitution(str(file)).name == "polite"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_snippets_compile(path: Path) -> None:
    for block in blocks(path, "python"):
        compile(block, path.name, "exec")


def test_readme_is_short_and_has_the_demo_block() -> None:
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition("<!-- demo:begin -->\n")
    results, end, after = rest.partition("<!-- demo:end -->\n")
    assert begin
    assert end
    assert results.strip()
    assert "demo:" not in before + after
    assert len((before + after).splitlines()) < 200


def test_the_tutorial_brings_a_constitution_and_pairs_that_are_read(tmp_path: Path) -> None:
    """What the page tells the reader to type into files."""
    from rlaif.labeling.audit import read_comparisons

    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^cat > \S+/(\S+) <<'END'\n(.*?)^END$", text, re.MULTILINE | re.DOTALL))
    assert set(files) == {"polite.yaml", "pairs.jsonl"}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert load_constitution(str(tmp_path / "polite.yaml")).name == "polite"
    pairs = read_comparisons(tmp_path / "pairs.jsonl")
    assert len(pairs) == 12
    # Neither the position nor the length gives the answer away.
    assert sum(pair.truth > 0 for pair in pairs) == 6
    assert 4 <= sum((len(pair.a) - len(pair.b)) * pair.truth > 0 for pair in pairs) <= 8


@pytest.mark.slow  # imports datasets in a process of its own
def test_the_tutorial_shows_the_surest_labels_and_the_least_sure(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    [(code, folder)] = re.findall(
        r"^python - <<'END'\n(.*?load_dataset\(\"([^\"]+)\".*?)^END$", text, re.MULTILINE | re.DOTALL
    )
    prompt = ({"role": "user", "content": "?"},)
    rows = [
        Preference("p", prompt, f"yes {p}", "no", "a", "b", p, "me", "ai") for p in (0.7, 0.99, 0.51, 0.8, 0.55, 0.9)
    ]
    with PreferenceWriter(tmp_path / folder, {"feedback": "ai"}) as writer:
        writer.add(
            "train", [*rows, dataclasses.replace(rows[0], p_chosen=0.75), dataclasses.replace(rows[0], p_chosen=0.76)]
        )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line[:4] for line in result.stdout.splitlines()] == ["0.99", "0.90", "0.80", "0.70", "0.55", "0.51"]


def test_the_page_of_benchmarks_is_made_of_the_results():
    made = runpy.run_path(str(ROOT / "scripts" / "publish_benchmarks.py"))
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == made["page"]()
    for file in made["RESULTS"].glob("*.json"):
        about = made["MEANING"][file.stem.removesuffix("_bfloat16")][1]
        if about:
            assert set(yaml.safe_load(file.read_text(encoding="utf-8"))["ratios"]) <= set(about), file.name
    defaults = (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
    assert made["with_tables"](defaults) == defaults
