"""Preference model training: the loss, the export, the metrics."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif.config import EnsembleScore, Keep, LoraSettings, ModelConfig, PMConfig, SFTConfig, Tuning
from rlaif.generation import left_pad
from rlaif.methods import supervised
from rlaif.methods.pm import train_pm
from rlaif.preference_model import (
    PreferenceModel,
    encode_example,
    head_scores,
    last_hidden,
    load_scorer,
    pm_config,
    pm_identity,
    separate_pad_token,
    training_scores,
)
from rlaif.prefix import positions_after
from rlaif.records import Example, Preference, UserError
from tests.methods.families import family

TINY = ModelConfig(name="tiny", device="cpu")


def preferences(count: int, p_chosen: float = 0.95) -> list[Preference]:
    """Chosen completions are made of a, rejected ones of z."""
    return [
        Preference(
            prompt_id=f"p{i}",
            prompt=({"role": "user", "content": f"question {i}"},),
            chosen="a" * (3 + i % 4),
            rejected="z" * (3 + (i + 1) % 4),
            chosen_id="0",
            rejected_id="1",
            p_chosen=p_chosen,
            labeler="test",
            feedback="ai",
        )
        for i in range(count)
    ]


def settings(**changes: object) -> PMConfig:
    values = {"learning_rate": 1e-2, "batch_size": 8, "lora": LoraSettings(r=4, alpha=8)} | changes
    return PMConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_a_pm_learns_and_its_folder_gives_the_same_scores(tmp_path: Path, tuning: Tuning) -> None:
    data = preferences(64)
    target = train_pm(settings(tuning=tuning), TINY, data, preferences(20), tmp_path, seed=0)
    metrics = json.loads((tmp_path / "pm_metrics.json").read_text())
    assert metrics["accuracy"] > 0.9
    assert metrics["nll"] < 0.6
    assert metrics["train_pairs"] == 64
    model = PreferenceModel(ModelConfig(name=str(target), device="cpu"))
    example = Example(data[0].prompt, "aaaa")
    alone = model.score([example])[0]
    together = model.score([example, Example(data[0].prompt, "z" * 60), Example(data[3].prompt, "a")])[0]
    assert alone == pytest.approx(together, abs=1e-4)


def test_soft_labels_of_one_half_teach_nothing(tmp_path: Path) -> None:
    train_pm(settings(center_coefficient=0.0), TINY, preferences(32, 0.5), preferences(10), tmp_path, seed=0)
    metrics = json.loads((tmp_path / "pm_metrics.json").read_text())
    assert metrics["nll"] == pytest.approx(0.6931, abs=2e-2)


def test_soft_labels_are_learnt_as_probabilities(tmp_path: Path) -> None:
    train_pm(settings(epochs=4.0), TINY, preferences(64, 0.7), preferences(20, 0.7), tmp_path, seed=0)
    metrics = json.loads((tmp_path / "pm_metrics.json").read_text())
    # The least possible loss is the entropy of a 0.7 coin: 0.6109.
    assert metrics["nll"] == pytest.approx(0.6109, abs=0.02)


def test_ties_have_no_hard_label(tmp_path: Path) -> None:
    data = [*preferences(16, 0.7), *preferences(4, 0.5)]
    train_pm(settings(soft_labels=False, epochs=1), TINY, data, [], tmp_path, seed=0)
    metrics = json.loads((tmp_path / "pm_metrics.json").read_text())
    assert (metrics["train_pairs"], metrics["dropped_ties"]) == (16, 4)
    with pytest.raises(UserError, match=r"pm.soft_labels=false: 4 of 4 preferences are ties"):
        train_pm(settings(soft_labels=False), TINY, preferences(4, 0.5), [], tmp_path / "none", seed=0)


def test_long_pairs_are_dropped_and_counted(tmp_path: Path) -> None:
    data = preferences(16)
    long = [Preference(**{**vars(data[0]), "prompt_id": "long", "chosen": "a" * 400})]
    train_pm(settings(max_length=128), TINY, data + long, data, tmp_path, seed=0)
    assert json.loads((tmp_path / "pm_metrics.json").read_text())["dropped_long"] == 1
    with pytest.raises(UserError, match="max_length=8"):
        train_pm(settings(max_length=8), TINY, data, data, tmp_path / "none", seed=0)


def test_the_pad_token_is_never_the_last_token() -> None:
    from rlaif.models import load_tokenizer

    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    tokenizer.pad_token = "<|im_end|>"
    separate_pad_token(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_new_head_scores_everything_zero() -> None:
    from rlaif.models import load_sequence_scorer

    model = load_sequence_scorer(TINY, new_head=True)
    assert torch.count_nonzero(model.score.weight) == 0


def test_an_ensemble_has_members_that_differ_and_one_score(tmp_path: Path) -> None:
    data = preferences(32)
    target = train_pm(settings(ensemble=3, epochs=1), TINY, data, preferences(10), tmp_path, seed=0)
    config = ModelConfig(name=str(target), device="cpu")
    examples = [Example(data[0].prompt, text) for text in ("aaaa", "zzzz", "azaz")]
    members = [PreferenceModel(ModelConfig(name=str(target / f"member-{i}"), device="cpu")) for i in range(3)]
    scales = [json.loads((target / f"member-{i}" / "calibration.json").read_text()) for i in range(3)]
    table = [
        [(score - scale["score_mean"]) / scale["score_std"] for score in member.score(examples)]
        for member, scale in zip(members, scales, strict=True)
    ]
    assert table[0] != pytest.approx(table[1], abs=1e-6)
    columns = list(zip(*table, strict=True))
    for combine, penalty, reduce in (
        (EnsembleScore.mean, 1.0, statistics.fmean),
        (EnsembleScore.min, 1.0, min),
        (EnsembleScore.uncertainty, 2.0, lambda row: statistics.fmean(row) - 2 * statistics.pstdev(row)),
    ):
        scorer = load_scorer(config, combine, penalty)
        assert len({id(member.model) for member in scorer.members}) == 1  # one base model for all
        found = scorer.score(examples)
        assert found == pytest.approx([reduce(column) for column in columns], abs=1e-5)
    metrics = json.loads((tmp_path / "pm_metrics.json").read_text())
    assert metrics["ensemble"] == 3
    assert metrics["accuracy"] > 0.9


def test_an_interrupted_ensemble_keeps_its_finished_members(tmp_path: Path) -> None:
    train_pm(settings(ensemble=2), TINY, preferences(16), preferences(8), tmp_path, seed=0)
    weights = tmp_path / "preference_model" / "member-0" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    (tmp_path / "preference_model" / "member-1" / "calibration.json").unlink()
    train_pm(settings(ensemble=2), TINY, preferences(16), preferences(8), tmp_path, seed=0)
    assert weights.stat().st_mtime_ns == before
    assert (tmp_path / "preference_model" / "member-1" / "calibration.json").is_file()


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_a_margin_asks_for_more(tmp_path: Path, margin: float) -> None:
    config = settings(margin=margin, center_coefficient=0.0, max_steps=1, warmup_ratio=0.0)
    train_pm(config, TINY, preferences(8, 0.9), preferences(4), tmp_path, seed=0)
    first = json.loads((tmp_path / "training.jsonl").read_text().splitlines()[0])
    # Scores start at 0, so the loss is that of a margin of -margin * |2 * 0.9 - 1|.
    m = margin * 0.8
    expected = 0.9 * math.log(1 + math.exp(m)) + 0.1 * math.log(1 + math.exp(-m))
    assert first["loss"] == pytest.approx(expected, abs=1e-3)


def test_centring_holds_the_scores_of_a_pair_around_zero(tmp_path: Path) -> None:
    data = preferences(48)
    off = {}
    for coefficient in (0.0, 1.0):
        folder = tmp_path / str(coefficient)
        target = train_pm(settings(center_coefficient=coefficient), TINY, data, data[:8], folder, seed=0)
        model = PreferenceModel(ModelConfig(name=str(target), device="cpu"))
        chosen, rejected = (model.score([row.examples[side] for row in data]) for side in (0, 1))
        assert sum(one > other for one, other in zip(chosen, rejected, strict=True)) > 40
        off[coefficient] = statistics.fmean((one + other) ** 2 for one, other in zip(chosen, rejected, strict=True))
    assert off[1.0] < 0.3 * off[0.0]


def test_accumulated_steps_are_those_of_a_whole_batch(tmp_path: Path) -> None:
    losses = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        config = settings(batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=4)
        train_pm(config, TINY, preferences(32), preferences(4), tmp_path / str(batch_size), seed=0)
        lines = (tmp_path / str(batch_size) / "training.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_a_pm_may_have_another_tokenizer_than_the_policy(tmp_path: Path) -> None:
    """pm.model: another base with another vocabulary, given the same texts."""
    other = tmp_path / "other"
    family("gpt_neox", other)
    target = train_pm(settings(model=str(other)), TINY, preferences(32), preferences(10), tmp_path / "pm", seed=0)
    metrics = json.loads((tmp_path / "pm" / "pm_metrics.json").read_text())
    assert (metrics["base"], metrics["accuracy"] > 0.9) == (str(other), True)
    scorer = load_scorer(pm_config(TINY, target))
    high, low = scorer.score([Example(preferences(1)[0].prompt, text) for text in ("aaaa", "zzzz")])
    assert high > low


def test_training_reads_the_scores_that_are_used_later() -> None:
    """Through the model's forward pass, and from its parts: the same scores, whatever the padding."""
    from rlaif.models import load_sequence_scorer, load_tokenizer

    model = load_sequence_scorer(TINY, new_head=True)
    torch.nn.init.normal_(model.score.weight)
    tokenizer = load_tokenizer(TINY)
    rows = [encode_example(tokenizer, Example(preferences(1)[0].prompt, text)) for text in ("a", "zz" * 9, "aaaa")]
    ids, mask = left_pad(rows, tokenizer.pad_token_id, torch.device("cpu"))
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        alone = [
            head_scores(model, last_hidden(model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)))
            for row in rows
        ]
        together = training_scores(model, ids, mask, positions_after(None, mask))[:, -1]
    assert together.tolist() == pytest.approx(torch.cat(alone).tolist(), abs=1e-5)


def test_a_pm_is_named_by_its_labels_and_its_files(tmp_path: Path) -> None:
    names = []
    for seed in (0, 1):
        target = train_pm(settings(max_steps=1), TINY, preferences(16), preferences(4), tmp_path / str(seed), seed)
        names.append(pm_identity(target))
    assert names[0]["preference_model"].startswith("ai labels by test, seed 0 (")
    assert names[0]["preference_model_id"] != names[1]["preference_model_id"]
    assert pm_identity(tmp_path / "0" / "preference_model") == names[0]


def test_a_pm_that_starts_from_an_adapter_is_saved_whole(tmp_path: Path) -> None:
    """Its own adapter alone would miss what the first one had learnt."""
    from rlaif.demonstrations import Demonstration
    from rlaif.methods.sft import train_sft

    demonstrations = [Demonstration(row.prompt, row.chosen) for row in preferences(8)]
    tuned = SFTConfig(learning_rate=1e-2, max_steps=2, lora=LoraSettings(r=4, alpha=8))
    sft = train_sft(tuned, TINY, demonstrations, tmp_path / "sft", seed=0)
    start = ModelConfig(name=str(sft), device="cpu")
    target = train_pm(settings(), start, preferences(32), preferences(10), tmp_path / "pm", seed=0)
    assert not (target / "adapter_config.json").exists()
    metrics = json.loads((tmp_path / "pm" / "pm_metrics.json").read_text())
    assert metrics["accuracy"] > 0.9


def contrary(rows: list[Preference]) -> list[Preference]:
    return [replace(row, chosen=row.rejected, rejected=row.chosen) for row in rows]


def test_the_weights_that_held_out_preferences_like_best_are_kept(tmp_path: Path) -> None:
    """What training teaches is wrong of the validation prompts, so the least of it is the best."""
    validation = contrary(preferences(24))
    kept = {}
    for keep in Keep:
        folder = tmp_path / keep.value
        # Ten steps, looked at after every second one.
        config = settings(keep=keep, epochs=5, batch_size=16, warmup_ratio=0.0)
        train_pm(config, TINY, preferences(32), validation, folder, seed=0)
        kept[keep] = json.loads((folder / "pm_metrics.json").read_text())
    assert kept[Keep.best]["kept_step"] == 2
    assert "kept_step" not in kept[Keep.last]
    assert kept[Keep.best]["nll"] < kept[Keep.last]["nll"] - 0.5
    # A third of the prompts chose, the others measure.
    assert (kept[Keep.last]["validation_pairs"], kept[Keep.best]["validation_pairs"]) == (24, 16)


def test_the_last_weights_are_kept_where_they_are_the_best(tmp_path: Path) -> None:
    scores = {}
    for keep in Keep:
        config = settings(keep=keep, max_steps=11, learning_rate=2e-3)
        target = train_pm(config, TINY, preferences(32), preferences(9), tmp_path / keep.value, seed=0)
        scores[keep] = PreferenceModel(pm_config(TINY, target)).score([Example(preferences(1)[0].prompt, "aza")])
    assert json.loads((tmp_path / "best" / "pm_metrics.json").read_text())["kept_step"] == 11
    assert scores[Keep.best] == scores[Keep.last]


def test_weights_are_chosen_on_validation_prompts_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^pm\.keep=best .* there are only 1; raise data\.validation_fraction"):
        train_pm(settings(keep=Keep.best), TINY, preferences(8), preferences(1), tmp_path, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_an_interrupted_run_still_knows_the_best_weights(
    tmp_path: Path, tuning: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(keep=Keep.best, tuning=tuning, epochs=5, batch_size=16, warmup_ratio=0.0, learning_rate=1e-3)
    step_end = supervised.Curve.on_step_end

    def run(folder: Path) -> tuple[int, list[float]]:
        target = train_pm(config, TINY, preferences(32), contrary(preferences(12)), folder, seed=0)
        scores = PreferenceModel(pm_config(TINY, target)).score([Example(preferences(1)[0].prompt, "aza")])
        return json.loads((folder / "pm_metrics.json").read_text())["kept_step"], scores

    def stops(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt
        step_end(self, args, state, control, **kwargs)

    whole = run(tmp_path / "whole")
    assert whole[0] == 2
    with monkeypatch.context() as patch:
        patch.setattr(supervised.Curve, "on_step_end", stops)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    assert run(tmp_path / "cut") == whole


def test_the_score_of_a_cut_completion_is_read_at_its_last_token(tmp_path: Path) -> None:
    target = train_pm(settings(max_steps=1), TINY, preferences(8), preferences(4), tmp_path, seed=0)
    model = PreferenceModel(ModelConfig(name=str(target), device="cpu"))
    prompt = ({"role": "user", "content": "ab"},)
    text = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd"
    for ended, tail in ((True, "<|im_end|>\n"), (False, "")):
        ids = torch.tensor([model.tokenizer(text + tail, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            state = model.model.model(ids)[0][:, -1]
            expected = float(model.model.score(state))
        # Whatever stands beside it in the batch.
        found = model.score([Example(prompt, "z" * 9), Example(prompt, "cd", ended)])[1]
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_pm_can_tell_completions_that_ended_from_those_that_were_cut(tmp_path: Path) -> None:
    """The same text twice, of which one was cut."""
    rows = [replace(row, rejected=row.chosen, rejected_ended=False) for row in preferences(48)]
    train_pm(settings(), TINY, rows, rows[:16], tmp_path, seed=0)
    assert json.loads((tmp_path / "pm_metrics.json").read_text())["accuracy"] == 1.0
