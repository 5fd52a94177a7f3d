"""Every file in conf/ composes into its dataclass, and every setting is documented."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from rlaif import config as schema
from rlaif.cli import _normalise
from rlaif.config import COMMANDS, register
from rlaif.records import find_prompts

REPO = Path(__file__).parents[2]
CONF = REPO / "conf"
GROUPS = sorted(path for path in CONF.rglob("*.yaml") if path.parent != CONF)


@pytest.fixture(scope="module")
def registered() -> None:
    for command in COMMANDS:
        register(command)


@pytest.fixture(autouse=True)
def composing(registered: None) -> Iterator[None]:
    """Hydra set up on ``conf/`` as the commands do it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def converted(command: str, *overrides: str) -> object:
    value = OmegaConf.to_object(compose(command, list(overrides)))
    assert isinstance(value, COMMANDS[command])
    return value


def groups_of(command: str) -> dict[str, str]:
    """Config group -> how the command's overrides select from it."""
    hints = typing.get_type_hints(COMMANDS[command])
    found = {}
    for name, kind in hints.items():
        if kind is schema.ModelConfig:
            found.setdefault("model", f"model@{name}")
        if kind is schema.LabelerConfig:
            found["labeler"] = "labeler"
    return found


def test_every_primary_file_has_a_command():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_primary_configs_compose(command):
    assert converted(command, "output_dir=out", "seed=3").seed == 3


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", GROUPS, ids=[f"{path.parent.name}-{path.stem}" for path in GROUPS])
def test_every_choice_composes(command, file):
    group, choice = file.parent.name, file.stem
    if group == "experiment":
        # An experiment is written for one command, which has every key that it sets.
        if command == "run":
            config = converted(command, f"experiment={choice}")
            assert config.output_dir
            assert config.arms
            assert find_prompts(config.prompts).is_file()
        return
    key = groups_of(command).get(group)
    if key is None:
        return
    assert converted(command, f"{key}={choice}", "output_dir=out")


@pytest.mark.parametrize(
    ("command", "overrides", "key", "expected"),
    [
        ("label", ["labeler.extra_body={a: 1, b: {c: [x]}}"], "labeler.extra_body", {"a": 1, "b": {"c": ["x"]}}),
        ("label", ["labeler.vllm.engine_args={max_num_seqs: 7}"], "labeler.vllm.engine_args", {"max_num_seqs": 7}),
        ("train", ["policy.chat_template_kwargs.thinking=false"], "policy.chat_template_kwargs", {"thinking": False}),
        (
            "run",
            ["labeler.chat_template_kwargs={a: 1}", "labeler.chat_template_kwargs.a=2"],
            "labeler.chat_template_kwargs",
            {"a": 2},
        ),
    ],
)
def test_mappings_take_names_of_the_users(command, overrides, key, expected):
    """As they are written in the documentation, without Hydra's own signs for what is new."""
    arguments, _ = _normalise(overrides)
    found = converted(command, *arguments)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == expected


def test_every_group_is_used():
    used = {"experiment"} | {group for command in COMMANDS for group in groups_of(command)}
    assert {path.parent.name for path in GROUPS} == used


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_of_the_files_are_those_of_the_dataclasses(command):
    """The primary files add nothing to the dataclasses: one place to look up a default."""
    assert dataclasses.asdict(converted(command)) == dataclasses.asdict(COMMANDS[command]())


@pytest.mark.parametrize("command", COMMANDS)
def test_cfg_job_shows_every_setting(command, run_command):
    shown = OmegaConf.create(run_command(command, "--cfg", "job").stdout)
    assert set(shown) == {field.name for field in dataclasses.fields(COMMANDS[command])}


def config_classes() -> Iterator[ast.ClassDef]:
    """Every dataclass of the configuration."""
    files = sorted(Path(str(schema.__file__)).parent.glob("*.py"))
    for node in (node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ClassDef) and dataclasses.is_dataclass(getattr(schema, node.name, None)):
            yield node


def test_every_setting_is_documented():
    """Each field has a docstring under it, unless it nests a dataclass or changes an inherited default."""
    missing = []
    for node in config_classes():
        cls = getattr(schema, node.name)
        inherited = {field.name for base in cls.__bases__ if dataclasses.is_dataclass(base)
                     for field in dataclasses.fields(base)}  # fmt: skip
        hints = typing.get_type_hints(cls)
        for place, statement in enumerate(node.body):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            name = statement.target.id
            if dataclasses.is_dataclass(hints[name]) or name in inherited:
                continue
            after = node.body[place + 1] if place + 1 < len(node.body) else None
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                missing.append(f"{node.name}.{name}")
    assert not missing
