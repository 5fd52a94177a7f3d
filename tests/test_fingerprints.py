"""Which settings decide what a stage makes: a new one must be put on one side or the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlaif import config
from rlaif.artifacts import deciding, plain
from rlaif.config import DPOConfig, Keep, ModelConfig, PMConfig, PPOConfig, SamplerVLLMConfig, TrainConfig
from rlaif.config.checks import Settings
from rlaif.methods import stages

TRAINER = (
    "tuning lora learning_rate epochs max_steps batch_size gradient_accumulation_steps warmup_ratio max_length "
    "weight_decay max_grad_norm"
)
ONLINE = f"{TRAINER} generations max_new_tokens temperature kl_coef missing_eos_penalty"
DECIDES = {
    "SFTConfig": TRAINER,
    "CritiqueRevisionConfig": (
        f"{TRAINER} critic revisions samples_per_prompt max_new_tokens critique_tokens temperature"
    ),
    "PMConfig": f"{TRAINER} soft_labels center_coefficient margin ensemble model keep",
    "DPOConfig": f"{TRAINER} beta soft_labels loss_type label_smoothing",
    "RLOOConfig": ONLINE,
    "GRPOConfig": f"{ONLINE} loss_type",
    "PPOConfig": (
        "tuning lora iterations rollouts epochs minibatch_size max_new_tokens sampler temperature learning_rate "
        "value_learning_rate adam_epsilon linear_decay warmup_iterations gamma gae_lambda clip_range value_clip_range "
        "value_coef value_init value_adapter value_backprop entropy_coef max_grad_norm stop_kl kl_coef kl_estimator "
        "kl_control kl_target kl_horizon normalize_scores score_clip missing_eos_penalty length_penalty "
        "relative_reward whiten_rewards whiten_advantages max_prompt_length eval_every eval_prompts keep"
    ),
    "LoraSettings": "r alpha target_modules top_layers",
    "EvalConfig": "samples_per_prompt max_new_tokens temperature gold",
    "SamplingConfig": "styles max_new_tokens temperature top_p splits",
    "StyleConfig": "system n",
    "DataConfig": "validation_fraction test_fraction near_duplicate_threshold max_prompts",
    "LabelerConfig": (
        "type trust_remote_code base_url endpoint top_logprobs min_agreement extra_body chat_template_kwargs prefill "
        "votes vllm scripted"
    ),
    "VLLMConfig": "max_model_len engine_args",
    "ScriptedConfig": "utility sharpness position_bias noise option_mass fault_rate",
}
"""The settings that a stage's fingerprint counts; the others say beside themselves why they change no number."""


def uncounted(kind: type) -> set[str]:
    """What a class of settings leaves out, always."""
    return {name for base in kind.__mro__ for side in ("_idle", "_inputs") for name in vars(base).get(side, ())}


@pytest.mark.parametrize("name", DECIDES)
def test_every_setting_is_on_one_side(name: str) -> None:
    kind = getattr(config, name)
    counted, left_out = set(DECIDES[name].split()), uncounted(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    assert not counted & left_out
    assert counted | left_out == fields, (
        f"{name}: a setting that changes no number of what is made belongs into _idle beside it, any other into DECIDES"
    )


def test_no_group_that_leaves_something_out_is_forgotten() -> None:
    kinds = [kind for each in config.__all__ if isinstance(kind := getattr(config, each), type)]
    found = {kind.__name__ for kind in kinds if issubclass(kind, Settings) and uncounted(kind)}
    assert found - DECIDES.keys() <= {"TrainerSettings", "OnlineConfig"}


def counts(settings: Any, **changes: Any) -> bool:
    """Whether a change is seen in what a fingerprint is made of."""
    other = dataclasses.replace(settings, **changes)
    assert other != settings
    return bool(plain(x=deciding(settings)) != plain(x=deciding(other)))


def test_measurements_count_where_they_choose_the_policy() -> None:
    last, best = PPOConfig(eval_every=5), PPOConfig(eval_every=5, keep=Keep.best)
    for change in ({"eval_every": 10}, {"eval_prompts": 3}):
        assert not counts(last, **change)
        assert counts(best, **change)


def test_a_rate_that_is_left_out_counts_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(stages, "run_stage", lambda stage, output, settings, *rest, **more: seen.append(settings))
    for settings in (DPOConfig(), DPOConfig(learning_rate=DPOConfig().rate), DPOConfig(learning_rate=1.0)):
        arm = stages.Arm(TrainConfig(dpo=settings), tmp_path, ModelConfig(name="tiny"))
        arm.run("dpo", {"settings": settings}, {}, lambda folder: None)
    same, given, other = (plain(**deciding(each)) for each in seen)
    assert same == given != other


def test_groups_within_groups_and_lists_are_searched() -> None:
    changed = [PMConfig(report_to=["wandb"])]
    assert deciding({"a": [PMConfig()]}) == deciding({"a": changed})
    assert not counts(PPOConfig(), vllm=SamplerVLLMConfig(url="http://127.0.0.1:1/v1"))


def test_more_rounds_go_on_where_they_change_no_earlier_one() -> None:
    for decay, expected in ((True, []), (False, [40])):
        extents: list[Any] = []
        rest = deciding(PPOConfig(iterations=40, linear_decay=decay), extents)
        assert extents == expected
        other = deciding(PPOConfig(iterations=60, linear_decay=decay), [])
        assert (rest == other) == (not decay)
        assert counts(PPOConfig(iterations=40, linear_decay=decay), iterations=60)
