"""Every setting takes what it is meant for, from the command line and from Python, and refuses the rest by its name."""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from rlaif import config
from rlaif.config import (
    ArmConfig,
    DPOConfig,
    EvalConfig,
    LabelConfig,
    LabelerConfig,
    LabelerType,
    LabelingConfig,
    LabelMode,
    Method,
    PPOConfig,
    ReportConfig,
    RunConfig,
    SamplingConfig,
    ScriptedConfig,
    SFTConfig,
    Split,
)
from rlaif.config.checks import Settings

CLASSES = [kind for name in config.__all__ if dataclasses.is_dataclass(kind := getattr(config, name))]


def fields(of: type) -> list[tuple[type, str]]:
    """(class, field) of every setting of this type, whether it may be null or not."""
    found = []
    for kind in CLASSES:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            types = typing.get_args(hints[field.name]) or (hints[field.name],)
            if any(isinstance(each, type) and issubclass(each, of) for each in types) and bool not in types:
                found.append((kind, field.name))
    return found


def refused(kind: type, name: str, value: Any) -> str:
    with pytest.raises(ValueError) as error:
        kind(**{name: [value] if typing.get_origin(typing.get_type_hints(kind)[name]) is list else value})
    assert name in str(error.value)
    return str(error.value)


def named(case: Any) -> str:
    return f"{case[0].__name__}.{case[1]}"


def test_all_settings_are_checked():
    assert len(CLASSES) > 20
    assert not [kind for kind in CLASSES if not issubclass(kind, Settings)]


@pytest.mark.parametrize("case", fields(float), ids=named)
def test_every_float_is_finite_also_in_single_precision(case):
    for value in (float("nan"), float("inf"), float("-inf"), 1e308, 10**400, "1", True):
        refused(*case, value)


@pytest.mark.parametrize("case", fields(int), ids=named)
def test_every_count_is_a_whole_number_that_can_be_meant(case):
    for value in (-2, 10**23, 1.5, "1", True):
        refused(*case, value)


@pytest.mark.parametrize("case", fields(Enum), ids=named)
def test_every_choice_is_taken_by_its_name(case):
    kind, name = case
    hint = typing.get_type_hints(kind)[name]
    choices = next(each for each in (typing.get_args(hint) or (hint,)) if each is not type(None))
    listed = typing.get_origin(hint) is list
    default = getattr(kind(), name)
    first = (default[0] if listed else default) or next(iter(choices))
    made = getattr(kind(**{name: [first.value] if listed else first.value}), name)
    assert (made[0] if listed else made) is first
    assert ", ".join(choice.value for choice in choices) in refused(kind, name, "nonsense")
    refused(kind, name, 0)


@pytest.mark.parametrize(
    ("kind", "name", "good", "bad", "message"),
    [
        (EvalConfig, "max_prompts", 1, 0, "eval.max_prompts=0: must be above 0 or null"),
        (EvalConfig, "max_prompts", None, -1, "eval.max_prompts=-1: must be above 0 or null"),
        (ReportConfig, "examples", 0, -1, "examples=-1: must be 0 or more"),
        (ScriptedConfig, "position_bias", -3.0, float("nan"), "labeler.scripted.position_bias=nan: must be a finite"),
        (ScriptedConfig, "noise", 0.0, -1.0, "labeler.scripted.noise=-1.0: must be 0 or more"),
        (SFTConfig, "max_steps", -1, -2, "sft.max_steps=-2: must be -1 or more"),
        (SFTConfig, "weight_decay", 0.0, -0.1, "sft.weight_decay=-0.1: must be 0 or more"),
        (DPOConfig, "label_smoothing", 0.49, 0.5, "dpo.label_smoothing=0.5: must be 0 or more and below 0.5"),
        (DPOConfig, "beta", 0.01, 0, "dpo.beta=0: must be above 0"),
        (SamplingConfig, "top_p", 1.0, 1.1, "sampling.top_p=1.1: must be above 0 and at most 1"),
        (PPOConfig, "gamma", 1, 1.01, "ppo.gamma=1.01: must be between 0 and 1"),
        (PPOConfig, "iterations", 2**31 - 1, 2**31, "ppo.iterations=2147483648: must be at most 2147483647"),
        (LabelerConfig, "top_logprobs", 20, 21, "labeler.top_logprobs=21: servers accept between 1 and 20"),
        (LabelConfig, "candidates", Path("x.jsonl"), 3, "candidates=3: must be a text"),
        (LabelConfig, "gold", None, "a\0b", "gold: holds a NUL character"),
        (LabelConfig, "seed", 2**32 - 1, 2**32, "seed=4294967296: must be between 0 and 4294967295"),
        (
            LabelerConfig,
            "extra_body",
            {"a": [1e308]},
            {"a": [float("inf")]},
            "labeler.extra_body.a=inf: must be a finite",
        ),
    ],
)
def test_bounds(kind, name, good, bad, message):
    kind(**{name: good})
    assert message in refused(kind, name, bad)


def test_groups_are_made_of_mappings_with_their_choices():
    made = RunConfig(
        labeler={"type": "openai", "vllm": {"max_model_len": 7}},
        arms={"a": {"method": "ppo"}, "b": ArmConfig(method="dpo")},
        labeling=LabelingConfig(mode="score"),
        sampling={"splits": ("test",)},
    )
    assert made.labeler.type is LabelerType.openai
    assert made.labeler.vllm.max_model_len == 7
    assert [arm.method for arm in made.arms.values()] == [Method.ppo, Method.dpo]
    assert made.labeling.mode is LabelMode.score
    assert made.sampling.splits == [Split.test]
    assert "has no setting tpye" in refused(RunConfig, "labeler", {"tpye": "hf"})


def test_a_name_given_as_text_builds_the_engine_of_that_name():
    from rlaif.engines import build_labeler
    from rlaif.records import UserError

    with pytest.raises(UserError, match=r"labeler\.base_url=x: not a valid address"):
        build_labeler(LabelerConfig(type="openai", model="m", base_url="x"), 0)
    # Assigned, a text is not checked by the settings.
    config = LabelerConfig(type="scripted", model="m", base_url="x")
    config.type = "openai"
    with pytest.raises(UserError, match="base_url"):
        build_labeler(config, 0)


@pytest.mark.parametrize("name", ["../x", "a/b", "/abs", "..", ".hidden", "", " a", "a\nb", "a\\b", "x" * 101])
def test_an_arm_is_a_folder_of_its_run(name):
    with pytest.raises(ValueError, match=r"arms: .* names a folder"):
        RunConfig(arms={name: {"method": "ppo"}})
    assert RunConfig(arms={"my arm_2.b": {"method": "ppo"}}).arms
