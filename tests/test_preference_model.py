"""A PM on the policy's own base: the same scores as on a base of its own, and the policy does not notice."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import get_peft_model

from rlaif.config import Dtype, LoraSettings, ModelConfig, Tuning
from rlaif.models import load_sequence_scorer, load_tokenizer, lora_config
from rlaif.policy import completion_logits, load_policy, merged, pack
from rlaif.preference_model import (
    AdapterPreferenceModel,
    PreferenceModel,
    check_same_base,
    load_preference_model,
    read_head,
    separate_pad_token,
)
from rlaif.records import Example, UserError
from rlaif.trunk import frozen_layers

TINY = ModelConfig(name="tiny", device="cpu")
EXAMPLES = [Example([{"role": "user", "content": "ab" * n}], "cd" * (5 - n)) for n in range(1, 5)]


def make_pm(folder, lora):
    model = load_sequence_scorer(TINY, new_head=True)
    if lora is not None:
        model = get_peft_model(model, lora_config(lora, model, "SEQ_CLS", ["score"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "score" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(TINY)
    separate_pad_token(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pm(tmp_path_factory):
    return make_pm(tmp_path_factory.mktemp("pm"), LoraSettings(r=3, alpha=5))


def of(folder):
    return dataclasses.replace(TINY, name=str(folder))


def policy_of(top_layers=1.0):
    policy = load_policy(TINY, Tuning.lora, LoraSettings(r=4, alpha=8, top_layers=top_layers))
    with torch.no_grad():
        for name, value in policy.trainable():
            if "lora_B" in name:
                value.fill_(0.05)
    return policy


def logits_of(policy, how=lambda model: model):
    batch = pack([[5, 6, 7], [8]], [[20], [21, 22]], 256, torch.device("cpu"))
    with torch.no_grad():
        return completion_logits(how(policy.model), batch)


@pytest.mark.parametrize("top_layers", [1.0, 0.5])
def test_scores_are_those_of_a_model_of_its_own(pm, top_layers):
    policy = policy_of(top_layers)
    shared = load_preference_model(of(pm), policy)
    assert isinstance(shared, AdapterPreferenceModel)
    assert shared.model is policy.model
    alone = PreferenceModel(of(pm)).score(EXAMPLES)
    assert len(set(alone)) == len(alone)
    assert shared.score(EXAMPLES) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("top_layers", [1.0, 0.5])
def test_the_policy_is_as_it_was(pm, tmp_path, top_layers):
    policy = policy_of(top_layers)
    plain, names = logits_of(policy), [name for name, _ in policy.trainable()]
    frozen = len(frozen_layers(policy.model))
    with policy.reference():
        base = logits_of(policy)
    policy.save(tmp_path / "before")
    shared = load_preference_model(of(pm), policy)
    shared.score(EXAMPLES)
    assert torch.equal(logits_of(policy), plain)
    assert [name for name, _ in policy.trainable()] == names
    assert len(frozen_layers(policy.model)) == frozen
    with policy.reference():
        assert torch.equal(logits_of(policy), base)
    with merged(policy.model) as sampler:
        torch.testing.assert_close(logits_of(policy, lambda _: sampler), plain, atol=1e-4, rtol=0)
    policy.save(tmp_path / "after")
    files = ["adapter_model.safetensors", "adapter_config.json"]
    assert sorted(path.name for path in (tmp_path / "after").iterdir() if path.name in files) == sorted(files)
    for name in files:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_a_failing_score_gives_the_policys_adapter_back(pm, monkeypatch):
    policy = policy_of()
    plain = logits_of(policy)
    shared = load_preference_model(of(pm), policy)
    monkeypatch.setattr("rlaif.preference_model.last_hidden", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared.score(EXAMPLES)
    assert torch.equal(logits_of(policy), plain)


def test_another_base_full_weights_or_a_merged_start_get_a_model_of_their_own(pm, tmp_path):
    whole = make_pm(tmp_path / "whole", None)
    assert type(load_preference_model(of(whole), policy_of())) is PreferenceModel
    full = load_policy(TINY, Tuning.full, LoraSettings())
    assert type(load_preference_model(of(pm), full)) is PreferenceModel
    policy_of().save(tmp_path / "sft")
    started = load_policy(
        dataclasses.replace(TINY, adapter=str(tmp_path / "sft")), Tuning.lora, LoraSettings(r=4, alpha=8)
    )
    assert type(load_preference_model(of(pm), started)) is PreferenceModel


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["score", "norm"]}, {"revision": "v2"}]
)
def test_an_adapter_that_is_more_than_lora_gets_a_model_of_its_own(pm, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(PreferenceModel, "_load", lambda self, config: None)
    shutil.copytree(pm, tmp_path, dirs_exist_ok=True)
    settings = json.loads((pm / "adapter_config.json").read_text())
    assert isinstance(load_preference_model(of(pm), policy_of()), AdapterPreferenceModel)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changes))
    assert type(load_preference_model(of(tmp_path), policy_of())) is PreferenceModel


def test_a_pm_in_a_short_float_keeps_its_adapter_beside_the_weights(pm):
    short = PreferenceModel(dataclasses.replace(of(pm), dtype=Dtype.bfloat16))
    assert hasattr(short.model, "peft_config")
    assert short.score(EXAMPLES) == pytest.approx(PreferenceModel(of(pm)).score(EXAMPLES), abs=0.1)


def test_an_adapter_that_does_not_fit_is_an_error(pm, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((pm / name).read_bytes())
    weights = load_file(pm / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_A" in name))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit the policy's model"):
        load_preference_model(of(tmp_path), policy_of())


@pytest.mark.parametrize("lora", [None, LoraSettings(r=3, alpha=5)])
def test_the_head_is_read_from_the_folder(tmp_path, lora):
    folder = make_pm(tmp_path, lora)
    model = load_sequence_scorer(of(folder))
    ends = ("score.weight", "score.modules_to_save.default.weight")
    expected = next(value for name, value in model.named_parameters() if name.endswith(ends))
    weight, bias = read_head(folder)
    torch.testing.assert_close(weight, expected.detach())
    assert weight.shape == (1, 48)
    assert float(weight.abs().sum()) > 0
    assert bias.tolist() == [0.0]


def test_a_value_starts_only_from_a_pm_on_the_policys_base(pm, tmp_path):
    check_same_base(pm, TINY)
    policy_of().save(tmp_path / "sft")
    check_same_base(pm, of(tmp_path / "sft"))
    other = tmp_path / "other"
    load_policy(TINY, Tuning.full, LoraSettings()).save(other)
    with pytest.raises(
        UserError, match=r"value_init=pm: .* trained on .*, the policy is .*other.* give .*value_init=zero"
    ):
        check_same_base(pm, of(other))
    whole = make_pm(tmp_path / "whole", None)
    check_same_base(whole, of(other))
    (whole / "calibration.json").write_text(json.dumps({"base": "tiny"}))
    check_same_base(whole, TINY)
    with pytest.raises(UserError, match="trained on"):
        check_same_base(whole, of(other))


def test_a_folder_without_a_head_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="no head named score"):
        read_head(tmp_path)
