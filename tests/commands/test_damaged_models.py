"""Damaged models and adapters: one clear line each, whichever command meets them.

The commands run in this process: in one of its own each would take a second longer.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damages import Damage, adapter_damages, model_damages, pm_damages
from peft import get_peft_model

import rlaif.evaluate
import rlaif.label
import rlaif.sample
import rlaif.train
from rlaif.config import (
    DataConfig,
    DPOConfig,
    EvalConfig,
    EvaluateConfig,
    Feedback,
    LabelConfig,
    LabelerConfig,
    LabelerType,
    LabelingConfig,
    LoraSettings,
    Method,
    ModelConfig,
    PPOConfig,
    SampleConfig,
    SamplingConfig,
    Split,
    StyleConfig,
    TrainConfig,
    Tuning,
)
from rlaif.models import load_sequence_scorer, load_tokenizer, lora_config, resolve_model, save_model
from rlaif.policy import load_policy
from rlaif.records import UserError, write_json, write_jsonl

TINY = ModelConfig(name="tiny", device="cpu")
LORA = LoraSettings(r=2, alpha=4)

KINDS: dict[str, tuple[Callable[[], Iterator[tuple[str, Damage]]], list[str]]] = {
    "model": (model_damages, ["sample", "label", "train", "evaluate"]),
    "adapter": (adapter_damages, ["train", "evaluate", "sample", "label"]),
    "pm": (lambda: itertools.chain(adapter_damages(), pm_damages()), ["evaluate_pm", "train_ppo"]),
    "whole_pm": (lambda: itertools.islice(model_damages(), 0, None, 3), ["evaluate_pm"]),
}
HARMLESS = {
    *(f"chat_template: {kind}" for kind in ("gone", "empty", "folder", "nul", "words")),
    *("generation_config: gone", "generation_config: temperature_text"),
    *("config: dtype_number", "config: quantized_unknown"),
    *(f"tokenizer_config: {kind}" for kind in ("class_unknown", "template_number", "templates_without_default")),
}
"""What is not used here, or has a meaning all the same (no chat template: the default one, with a warning)."""
EITHER = {"adapter_config: targets_null", "adapter_config: targets_other", "calibration: gone"}
"""What has a meaning to some commands."""
UNREAD = {("whole_pm", "evaluate_pm"): "generation_config", ("pm", "train_ppo"): "calibration"}
"""Files that commands do not read."""
ALWAYS = ("half", "weights: some", "weights: none", "type_error")
"""Damages that every command is shown; the others take turns."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder of each kind, and inputs."""
    root = tmp_path_factory.mktemp("good")
    shutil.copytree(resolve_model("tiny"), root / "model")
    load_policy(TINY, Tuning.lora, LORA).save(root / "adapter")
    scorer = load_sequence_scorer(TINY, new_head=True)
    save_model(scorer, root / "whole_pm")
    shutil.copy(root / "model" / "generation_config.json", root / "whole_pm")
    save_model(get_peft_model(scorer, lora_config(LORA, scorer, "SEQ_CLS", ["score"])), root / "pm")
    about = {"feedback": "human", "labeler": "people", "base": "tiny", "seed": 0, "score_mean": 0.0, "score_std": 1.0}
    for kind in ("pm", "whole_pm"):
        load_tokenizer(TINY).save_pretrained(root / kind)
        write_json(root / kind / "calibration.json", about)
    write_jsonl(root / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(2)])
    write_jsonl(root / "candidates.jsonl", [{"prompt": f"say {i}", "completions": ["a", "b"]} for i in range(2)])
    pairs = [{"prompt": f"say {i}", "chosen": "aa", "rejected": "bb"} for i in range(2)]
    write_jsonl(root / "preferences" / "train.jsonl", pairs)
    return root


def run(command: str, inputs: Path, output: Path, model: str, **settings: Any) -> None:
    """A command with a model, as short as it gets."""
    policy = ModelConfig(**{"name": model, "device": "cpu", **settings})
    prompts, data = str(inputs / "prompts.jsonl"), DataConfig(test_fraction=0, validation_fraction=0)
    measured = EvalConfig(max_new_tokens=4, split=Split.train)
    if command == "sample":
        sampling = SamplingConfig(styles={"plain": StyleConfig(n=2)}, max_new_tokens=4)
        rlaif.sample.main(SampleConfig(prompts=prompts, policy=policy, data=data, sampling=sampling), output)
    elif command == "label":
        labeler = LabelerConfig(type=LabelerType.hf, model=model, device="cpu")
        labeling = LabelingConfig(min_option_mass=0)
        candidates = str(inputs / "candidates.jsonl")
        shared = {"constitution": "warm", "data": data, "candidates": candidates}
        rlaif.label.main(LabelConfig(**shared, labeler=labeler, labeling=labeling), output)
    elif command == "train":
        dpo = DPOConfig(max_steps=1, report_to=[], lora=LORA)
        shared = {"preferences": str(inputs / "preferences"), "feedback": Feedback.human, "data": data, "dpo": dpo}
        rlaif.train.main(
            TrainConfig(method=Method.dpo, policy=policy, eval=EvalConfig(enabled=False), **shared), output
        )
    elif command == "train_ppo":
        ppo = PPOConfig(
            iterations=1, rollouts=2, minibatch_size=2, micro_batch_size=2, max_new_tokens=4, report_to=[], lora=LORA
        )
        shared = {"preference_model": model, "prompts": prompts, "data": data, "ppo": ppo}
        rlaif.train.main(TrainConfig(method=Method.ppo, policy=TINY, eval=EvalConfig(enabled=False), **shared), output)
    elif command == "evaluate":
        rlaif.evaluate.main(EvaluateConfig(policy=policy, prompts=prompts, data=data, eval=measured), output)
    else:
        shared = {"preference_model": model, "prompts": prompts, "data": data, "eval": measured}
        rlaif.evaluate.main(EvaluateConfig(policy=TINY, **shared), output)


@pytest.mark.parametrize("kind", KINDS)
def test_one_clear_line(
    kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.CRITICAL)
    damages, commands = KINDS[kind]
    unclear: dict[str, str] = {}
    tried = 0
    for place, (name, damage) in enumerate(damages()):
        for command in commands if name.endswith(ALWAYS) else [commands[place % len(commands)]]:
            folder, output = tmp_path / f"damaged-{tried}", tmp_path / f"out-{tried}"
            shutil.copytree(good / kind, folder)
            damage(folder)
            tried += 1
            unused = name.startswith(UNREAD.get((kind, command), "nothing"))
            try:
                run(command, good, output, str(folder))
            except UserError as error:
                line = str(error)
                if name in HARMLESS or "\n" in line or str(folder) not in line or len(line) > 500:
                    unclear[f"{name}, {command}"] = line
            except Exception as error:
                unclear[f"{name}, {command}"] = repr(error)
            else:
                if not (unused or name in HARMLESS | EITHER):
                    unclear[f"{name}, {command}"] = "was taken"
            assert not (tmp_path / "code-was-run").exists(), name
    assert unclear == {}
    assert tried >= {"model": 130, "adapter": 40, "pm": 55, "whole_pm": 35}[kind]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "meta"}, "device=meta: not available here"),
        ({"device": "hpu"}, "device=hpu: not available here"),
        ({"device": "the big one"}, "device=the big one: not available here"),
        ({"device": ""}, "device=: not available here"),
        ({"attn_implementation": "wobble"}, "policy.name=tiny: .*wobble"),
        ({"adapter": "/no/such/adapter"}, "policy.adapter=/no/such/adapter: not a PEFT adapter folder"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "train", "evaluate"])
def test_settings_that_no_model_can_have(
    settings: dict[str, str], message: str, command: str, good: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(command, good, tmp_path / "out", "tiny", **settings)


@pytest.mark.parametrize("names", [["nothing"], ["q_proj", "nothing"], ["layers"], ["input_layernorm"], [""]])
def test_layers_that_lora_cannot_adapt(names: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"lora\.target_modules: .* no linear layer named .*; it has down_proj, .*q_proj"
    ):
        load_policy(TINY, Tuning.lora, LoraSettings(target_modules=names))


def test_a_rank_above_that_of_the_layers() -> None:
    """It would fill the memory and add nothing."""
    with pytest.raises(UserError, match=r"lora\.r=99999999: the model's layers have at most rank 48"):
        load_policy(TINY, Tuning.lora, LoraSettings(r=99999999))


def test_a_broken_adapter_is_named_and_not_its_base(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    message = r"policy\.adapter=.*adapter: adapter_model\.safetensors is cut, or no safetensors file; copy it anew"
    with pytest.raises(UserError, match=message):
        run("sample", good, tmp_path / "out", "tiny", adapter=str(tmp_path / "adapter"))


def test_a_broken_base_is_named_where_an_adapter_stands_on_it(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "model", tmp_path / "base")
    load_policy(ModelConfig(name=str(tmp_path / "base"), device="cpu"), Tuning.lora, LORA).save(tmp_path / "adapter")
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"policy\.name=.*/adapter: .*/base: model\.safetensors is cut"):
        run("sample", good, tmp_path / "out", str(tmp_path / "adapter"))


def test_a_language_model_is_no_preference_model(good: Path, tmp_path: Path) -> None:
    """transformers would give it a head of random numbers."""
    with pytest.raises(UserError, match=r"preference_model=.*its files lack 1 of its weights: score\.weight"):
        run("evaluate_pm", good, tmp_path / "out", str(good / "model"))
