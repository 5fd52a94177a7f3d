"""Every method through ``python -m rlaif.train`` on the tiny model, and arms of a run that use them."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import (
    Critic,
    CritiqueRevisionConfig,
    DataConfig,
    DPOConfig,
    EnsembleScore,
    EvalConfig,
    Feedback,
    Keep,
    LabelerConfig,
    LabelerType,
    Method,
    ModelConfig,
    PMConfig,
    PPOConfig,
    Reward,
    Sampler,
    Split,
    TrainConfig,
    Tuning,
    ValueInit,
)
from rlaif.methods.pm import train_pm
from rlaif.methods.stages import Arm
from rlaif.records import Preference, UserError
from rlaif.rewards import PMReward
from rlaif.train import _check_evaluation, _data_facts, check, fit

Command = Callable[..., Any]

QUICK = [
    "policy.name=tiny",
    "eval.gold=letters",
    "eval.max_new_tokens=6",
    "eval.max_prompts=4",
    "data.test_fraction=0.3",
    "pm.max_steps=2",
    "pm.batch_size=4",
    # A random model after two steps knows nothing.
    "pm.gate=warn",
    "sft.max_steps=2",
    "critique_revision.max_steps=1",
    "critique_revision.max_new_tokens=6",
    "critique_revision.critique_tokens=6",
    "dpo.max_steps=2",
    "rloo.max_steps=1",
    "rloo.batch_size=8",
    "rloo.max_new_tokens=6",
    "grpo.max_steps=1",
    "grpo.batch_size=8",
    "grpo.max_new_tokens=6",
    "best_of_n.n=3",
    "ppo.iterations=1",
    "ppo.rollouts=4",
    "ppo.minibatch_size=4",
    "ppo.max_new_tokens=6",
]
LABELER = ["reward=labeler", "constitution=warm", "labeler=scripted", "labeler.scripted.utility=letters"]


@pytest.fixture
def train(run_command: Command, inputs: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(*overrides: str, preferences: bool = True, expect: int = 0) -> Any:
        data = [f"prompts={inputs}/prompts.jsonl"]
        if preferences:
            data += [f"preferences={inputs}/preferences", "feedback=human"]
        return run_command("train", *QUICK, *data, f"output_dir={tmp_path / 'out'}", *overrides, expect=expect)

    return run


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation" / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "best_of_n"])
def test_methods_that_need_a_pm_train_one(train: Command, tmp_path: Path, method: str) -> None:
    train(f"method={method}", "pm.ensemble=2", "pm.ensemble_score=min")
    out = tmp_path / "out"
    assert (out / "pm" / "preference_model" / "member-1" / "calibration.json").is_file()
    found = metrics(out)
    assert found["method"] == method
    assert found["preference_model"].startswith("human (declared by the user) labels by unknown, 2 members (")
    assert "pm_gain" in found
    if method == "best_of_n":
        assert not (out / "best_of_n").exists()
        assert found["kl_bound"] == pytest.approx(math.log(3) - 2 / 3, abs=1e-5)
        assert "kl" not in found
        # The PM chose by its score.
        assert found["pm_gain"] > 0
    else:
        assert (out / method / "policy" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "method", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("ppo", "grpo")), "best_of_n"]
)
def test_the_labeler_is_a_reward_of_its_own(train: Command, tmp_path: Path, method: str) -> None:
    result = train(f"method={method}", *LABELER, preferences=False)
    out = tmp_path / "out"
    assert not (out / "pm").exists()
    place = out / ("evaluation" if method == "best_of_n" else method)
    assert (place / "store.sqlite").is_file()
    assert metrics(out)["preference_model"] is None
    assert "Traceback" not in result.stderr
    again = train(f"method={method}", *LABELER, preferences=False)
    assert again.stderr.count("up to date, skipped") == (1 if method == "best_of_n" else 2)


@pytest.mark.parametrize(
    ("mode", "lowest", "highest"),
    [("score", -1, 1), pytest.param("pointwise", -14, 14, marks=pytest.mark.slow)],
)
def test_the_labeler_is_asked_as_told(train: Command, tmp_path: Path, mode: str, lowest: int, highest: int) -> None:
    """The expected score is between -1 and 1; a logit of this labeler is far outside."""
    sharp = "labeler.scripted.sharpness=20"
    train("method=ppo", *LABELER, f"labeling.mode={mode}", sharp, "eval.enabled=false", preferences=False)
    lines = (tmp_path / "out" / "ppo" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["score"] for line in lines]
    assert all(lowest <= score <= highest for score in found)
    assert (max(map(abs, found)) > 1) == (mode == "pointwise")


def test_a_mode_for_pairs_is_no_reward(train: Command) -> None:
    result = train("method=ppo", *LABELER, "labeling.mode=pairwise", preferences=False, expect=2)
    assert "labeling.mode=pairwise: reward=labeler judges one completion at a time" in result.stderr


def test_critique_and_revision(train: Command, tmp_path: Path) -> None:
    train("method=critique_revision", "constitution=harmless", preferences=False)
    folder = tmp_path / "out" / "critique_revision"
    lines = [json.loads(line) for line in (folder / "revisions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 5
    kept = [line for line in lines if line["dropped"] is None]
    assert all(len(line["rounds"]) == 2 for line in kept)
    assert (folder / "policy" / "adapter_config.json").is_file()
    assert metrics(tmp_path / "out")["method"] == "critique_revision"


@pytest.mark.slow
def test_a_labeler_may_be_the_critic(train: Command, tmp_path: Path) -> None:
    train(
        "method=critique_revision",
        "constitution=harmless",
        "critique_revision.critic=labeler",
        "labeler=scripted",
        "eval.enabled=false",
        preferences=False,
    )
    line = json.loads((tmp_path / "out/critique_revision/revisions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    # The scripted labeler writes pseudo-text of known words; the tiny policy cannot.
    assert line["rounds"][0]["revision"].split()[0] in ("The", "This", "Your", "That")


@pytest.mark.slow
def test_three_stages_in_one_command(train: Command, inputs: Path, tmp_path: Path) -> None:
    """SFT, PM and PPO: PPO's reference is the fine-tuned policy, or its start checks would fail."""
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text('{"prompt": "Hi", "completion": "area"}\n{"text": "once upon a time"}\n' * 8)
    train("method=ppo", "sft_first=true", f"demonstrations={demonstrations}", "sft.learning_rate=1e-2")
    out = tmp_path / "out"
    for stage in ("sft", "pm", "ppo"):
        provenance = json.loads((out / stage / "provenance.json").read_text(encoding="utf-8"))
        start = provenance["inputs"]["start"]
        assert start == ("tiny@None" if stage == "sft" else str(out / "sft" / "policy")), stage
    assert metrics(out)["method"] == "ppo"


def test_hh_transcripts_from_other_columns(train: Command, tmp_path: Path) -> None:
    folder = tmp_path / "hh"
    folder.mkdir()
    rows = [
        {"better": f"\n\nHuman: question {i}\n\nAssistant: area", "worse": f"\n\nHuman: question {i}\n\nAssistant: zzz"}
        for i in range(8)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "columns={chosen: better, rejected: worse}"
    overrides = ["method=dpo", "dpo.loss_type=ipo", f"preferences={folder}", "feedback=human", "eval.enabled=false"]
    result = train(*overrides, "columns={chosen: nothing}", preferences=False, expect=2)
    assert "has no column nothing" in result.stderr.splitlines()[-1]
    train(*overrides, columns, preferences=False)
    assert (tmp_path / "out" / "dpo" / "policy" / "adapter_config.json").is_file()


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(policy=ModelConfig(name="tiny", device="cpu"), **changes)


REVISE = Method.critique_revision


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": Method.dpo, "dpo": DPOConfig(tuning=Tuning.qlora)}, "dpo.tuning=qlora needs a CUDA GPU"),
        ({"method": Method.ppo, "pm": PMConfig(tuning=Tuning.qlora)}, "pm.tuning=qlora needs a CUDA GPU"),
        (
            {"method": Method.dpo, "dpo": DPOConfig(tuning=Tuning.qlora), "sft_first": True},
            "sft_first=true with dpo.tuning=qlora needs sft.tuning=full",
        ),
        (
            {"method": Method.ppo, "pm": PMConfig(tuning=Tuning.qlora), "sft_first": True},
            "sft_first=true with pm.tuning=qlora needs sft.tuning=full",
        ),
        (
            {
                "method": REVISE,
                "constitution": "helpful",
                "critique_revision": CritiqueRevisionConfig(critic=Critic.labeler),
                "labeler": LabelerConfig(type=LabelerType.scripted, audit="pairs.jsonl"),
            },
            "labeler.audit=pairs.jsonl: critique_revision.critic=labeler does not measure its labeler; run rlaif.audit",
        ),
        (
            {"method": Method.dpo, "dpo": DPOConfig(report_to=["abacus"])},
            "dpo.report_to: transformers knows no tracker 'abacus'; it knows",
        ),
        ({"method": Method.pm, "pm": PMConfig(report_to=["dagshub"])}, "pm.report_to: dagshub is not installed"),
        (
            {"method": Method.ppo, "ppo": PPOConfig(report_to=["tensorboard", "dagshub"])},
            "ppo.report_to: accelerate knows no tracker 'dagshub'; it knows aim, clearml",
        ),
        ({"method": Method.ppo, "ppo": PPOConfig(report_to=["aim"])}, "ppo.report_to: aim is not installed"),
        ({"method": Method.dpo, "reward": Reward.labeler}, "method=dpo scores nothing"),
        ({"method": Method.ppo, "reward": Reward.labeler}, "reward=labeler needs a labeler"),
        (
            {"method": Method.ppo, "ppo": PPOConfig(value_init=ValueInit.pm), "pm": PMConfig(model="other")},
            "ppo.value_init=pm with pm.model=other: the PM's head reads the states of another model",
        ),
        ({"method": Method.best_of_n, "eval": EvalConfig(enabled=False)}, "best_of_n trains nothing"),
        ({"method": Method.sft, "sft_first": True}, "same training twice"),
        ({"method": REVISE}, "constitution is not set"),
        ({"method": REVISE, "constitution": "none"}, "no such constitution"),
        (
            {
                "method": REVISE,
                "constitution": "helpful",
                "critique_revision": CritiqueRevisionConfig(critic=Critic.labeler),
            },
            "critic=labeler needs a labeler",
        ),
    ],
)
def test_what_cannot_work_is_said_before_any_work(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check(config(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("variables", "changes", "said"),
    [
        (
            {"WORLD_SIZE": "3"},
            {"method": Method.ppo},
            "ppo.minibatch_size=16 is shared by 3 processes: make it a multiple",
        ),
        ({"WORLD_SIZE": "2"}, {"method": Method.ppo, "ppo": PPOConfig(sampler=Sampler.vllm)}, "works with one process"),
        ({"WORLD_SIZE": "2"}, {"method": Method.ppo, "pm": PMConfig(keep=Keep.best)}, "give pm.keep=last"),
        (
            {"ACCELERATE_USE_MEGATRON_LM": "true"},
            {"method": Method.dpo},
            "configured for Megatron-LM, which rlaif does not",
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {"method": Method.ppo},
            "ZeRO's offload_optimizer, which method=ppo does not use",
        ),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {"method": Method.dpo}, "ZeRO stage is 3"),
        ({**FSDP, "FSDP_VERSION": "1"}, {"method": Method.dpo}, "fsdp_version: 2"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {"method": Method.ppo}, "fsdp_offload_params, which method=ppo does"),
        (
            {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"method": Method.ppo},
            "give ppo.gradient_checkpointing=true",
        ),
        (
            FSDP,
            {"method": Method.dpo, "dpo": DPOConfig(tuning=Tuning.qlora)},
            "FSDP, which dpo.tuning=qlora does not use",
        ),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
            {"method": Method.dpo},
            "accelerate launch --cpu starts a single process",
        ),
    ],
)
def test_what_a_launcher_cannot_have_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], changes: dict[str, Any], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError) as caught:
        check(config(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        check(config(method=Method.dpo))


def test_only_training_runs_in_several_processes(run_command: Command, tmp_path: Path) -> None:
    result = run_command("report", f"output_dir={tmp_path}", env={"WORLD_SIZE": "2"}, expect=2)
    assert result.stderr == "error: rlaif.report runs in one process, and 2 were launched\n"


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """Preferences without a validation split."""
    (tmp_path / "preferences").mkdir()
    row = {"prompt": "what is seen in training", "chosen": "a", "rejected": "b"}
    (tmp_path / "preferences" / "train.jsonl").write_text(json.dumps(row) + "\n")
    return {"preferences": str(tmp_path / "preferences"), "feedback": Feedback.human}


def test_validation_prompts_are_missed_before_anything_is_trained(tmp_path: Path, own: dict[str, Any]) -> None:
    settings = config(method=Method.ppo, ppo=PPOConfig(eval_every=1), eval=EvalConfig(enabled=False), **own)
    with pytest.raises(UserError, match=r"ppo.eval_every=1: .* has no validation split"):
        fit(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def arm_that_leaks(tmp_path: Path, method: Method = Method.dpo, **changes: Any) -> Arm:
    """Two evaluation prompts of four are trained on, but for a full stop and a capital letter."""
    prompts = ["what is a whale, and where does it live", "how do ducks swim", "why is the sky blue", "who wrote this"]
    lines = [{"prompt": text} for text in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "preferences").mkdir(exist_ok=True)
    texts = [f"{prompts[0].capitalize()}.", prompts[0], "something else entirely", "and another one"]
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in texts]
    (tmp_path / "preferences" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [{"prompt": text, "completion": "a"} for text in (f"{prompts[1]}?", "what nobody asked")]
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*shown, {"text": "a b c"}]))
    settings = config(
        method=method,
        feedback=Feedback.human,
        preferences=str(tmp_path / "preferences"),
        sft_first=method is Method.dpo,
        demonstrations=str(tmp_path / "shown.jsonl"),
        prompts=str(tmp_path / "prompts.jsonl"),
        data=DataConfig(validation_fraction=0, test_fraction=0),
        eval=EvalConfig(split=Split.train),
        **changes,
    )
    return Arm(settings, tmp_path, settings.policy)


def test_training_data_that_resembles_evaluation_prompts_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arm = arm_that_leaks(tmp_path)
    with caplog.at_level("WARNING", logger="rlaif"):
        _check_evaluation(arm)
    assert "3 rows of the training data resemble 2 of 4 evaluation prompts; the evaluation will flatter" in caplog.text
    assert "drop_leaked=true" in caplog.text
    facts = {"leaked_rows": 3, "leaked_prompts": 2, "dropped_leaked": 0, "feedback": "human", "feedback_declared": True}
    assert _data_facts(arm) == facts
    assert (len(arm.preferences("train")), len(arm.demonstrations())) == (4, 3)
    # SFT on demonstrations reads no preferences.
    assert (arm_that_leaks(tmp_path, Method.sft).leaks.rows, arm_that_leaks(tmp_path, Method.sft).leaks.prompts) == (
        1,
        1,
    )
    # A PM is not evaluated on prompts.
    assert arm_that_leaks(tmp_path, Method.pm).leaks.rows == 0


def test_training_data_that_resembles_evaluation_prompts_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arm = arm_that_leaks(tmp_path, drop_leaked=True)
    with caplog.at_level("INFO", logger="rlaif"):
        _check_evaluation(arm)
    assert "3 rows of the training data resemble 2 of 4 evaluation prompts: they are left out" in caplog.text
    assert [row.prompt[-1]["content"] for row in arm.preferences("train")] == [
        "something else entirely",
        "and another one",
    ]
    assert [each.prompt[-1]["content"] if each.prompt else "" for each in arm.demonstrations()] == [
        "what nobody asked",
        "",
    ]
    assert (_data_facts(arm)["leaked_rows"], _data_facts(arm)["dropped_leaked"]) == (0, 3)
    # What is left out is part of the fingerprint.
    assert arm.preference_inputs != arm_that_leaks(tmp_path).preference_inputs
    pm = arm_that_leaks(tmp_path, Method.pm, drop_leaked=True)
    assert len(pm.preferences("train")) == 2
    with pytest.raises(UserError, match="drop_leaked=true needs the prompts that evaluation holds out: give prompts="):
        _check_evaluation(Arm(replace(arm.config, prompts=None), tmp_path, arm.start))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "something else entirely"}\n{"prompt": "and another one!"}\n')
    (tmp_path / "preferences" / "train.jsonl").write_text(
        json.dumps({"prompt": "Something else, entirely", "chosen": "a", "rejected": "b"}) + "\n"
    )
    with pytest.raises(UserError, match="drop_leaked=true leaves nothing to train on"):
        Arm(arm.config, tmp_path, arm.start).preferences("train")


def test_a_folder_that_moved_is_up_to_date(tmp_path: Path) -> None:
    """Neither the place of a model nor the device decides what comes out."""
    made: list[Path] = []

    def run(root: Path, device: str = "cpu", **changes: Any) -> None:
        start = ModelConfig(name=str(root / "start"), adapter=str(root / "adapter"), device=device, **changes)
        Arm(config(method=Method.dpo), root / "out", start).run("dpo", {}, {}, made.append)

    for name in ("start", "adapter"):
        (tmp_path / "old" / name).mkdir(parents=True)
        (tmp_path / "old" / name / "config.json").write_text(name)
    run(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    run(tmp_path / "new", device="auto")
    assert len(made) == 1
    run(tmp_path / "new", trust_remote_code=True)
    (tmp_path / "new" / "start" / "config.json").write_text("other")
    run(tmp_path / "new", trust_remote_code=True)
    assert len(made) == 3


def test_how_an_ensemble_is_combined_decides_nothing_for_one_pm(tmp_path: Path) -> None:
    one, other = [PMReward(tmp_path, ModelConfig(), PMConfig(ensemble_score=how)) for how in EnsembleScore][:2]
    assert one.settings == other.settings
    (tmp_path / "ensemble.json").write_text("{}")
    assert one.settings != other.settings


def test_lengths_that_do_not_fit_are_said_before_anything_is_trained(train: Command, tmp_path: Path) -> None:
    said = train("method=ppo", "ppo.max_prompt_length=2048", "ppo.eval_every=0", expect=2).stderr
    assert "ppo.max_prompt_length=2048 and ppo.max_new_tokens=6 make 2054 tokens, and" in said
    said = train("method=ppo", "ppo.max_prompt_length=3", "ppo.eval_every=1", expect=2).stderr
    assert "validation prompts has at most ppo.max_prompt_length=3 tokens" in said
    assert not (tmp_path / "out" / "pm").exists()


def test_a_pm_base_that_cannot_be_loaded_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    row = Preference("p", ({"role": "user", "content": "q"},), "a", "b", "0", "1", 1.0, "people", "human")
    with pytest.raises(UserError, match=r"^pm\.model="):
        train_pm(PMConfig(model=str(tmp_path / "base")), ModelConfig(name="tiny", device="cpu"), [row], [], tmp_path, 0)


def test_a_pm_that_is_not_trained_needs_no_gpu() -> None:
    check(config(method=Method.ppo, preference_model="somewhere", pm=PMConfig(tuning=Tuning.qlora)))


@pytest.mark.slow
def test_arms_of_a_run(run_command: Command, tmp_path: Path) -> None:
    """Arms that need no labels get none made; all rows are in the report."""
    result = run_command(
        "run",
        "experiment=smoke",
        f"output_dir={tmp_path / 'run'}",
        "~arms.rlhf_ppo",
        "~arms.rlaif_ppo",
        "~arms.dpo",
        "constitution=warm",
        "labeler=scripted",
        "+arms.bon={method: best_of_n, reward: labeler}",
        "+arms.revised={method: critique_revision}",
        "+arms.direct={method: rloo, reward: labeler}",
        *[override for override in QUICK if override.startswith(("rloo", "critique", "best"))],
        "constitution=harmless",
        expect=0,
    )
    out = tmp_path / "run"
    assert not (out / "labels").exists()
    report = (out / "report.md").read_text(encoding="utf-8")
    assert all(name in report for name in ("bon", "revised", "direct", "base"))
    assert "Traceback" not in result.stderr


def test_the_learning_rate_in_force_is_recorded_and_said(train: Callable[..., Any], tmp_path: Path) -> None:
    result = train("method=dpo", "dpo.tuning=full", "eval.enabled=false")
    assert "dpo: learning rate 5e-07 (dpo.tuning=full)" in result.stderr
    provenance = json.loads((tmp_path / "out" / "dpo" / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["config"]["settings"]["learning_rate"] == 5e-7
    lines = (tmp_path / "out" / "dpo" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    assert max(json.loads(line)["learning_rate"] for line in lines) <= 5e-7
    # The rate that is written out is no other setting.
    again = train("method=dpo", "dpo.tuning=full", "dpo.learning_rate=5e-7", "eval.enabled=false")
    assert "dpo: up to date, skipped" in again.stderr
