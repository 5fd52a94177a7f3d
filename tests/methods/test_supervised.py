"""What methods on TRL's trainers share: comparisons as training examples, and arguments that fit the device."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rlaif.config import DPOConfig, Dtype, LoraSettings, ModelConfig, PMConfig, SFTConfig, Tuning
from rlaif.demonstrations import Demonstration
from rlaif.methods import supervised
from rlaif.methods.dpo import train_dpo
from rlaif.methods.pm import train_pm
from rlaif.methods.sft import train_sft
from rlaif.methods.supervised import (
    collate_comparisons,
    group_comparisons,
    on_one_device,
    parts_by_length,
    shares_prefix,
    trainer_arguments,
    with_targets,
)
from rlaif.models import load_causal_lm
from rlaif.records import Preference, UserError
from tests.methods.problem import TINY


def row(prompt: str, chosen: list[int], rejected: list[int], p_chosen: float = 1.0) -> dict[str, object]:
    return {
        "prompt_id": prompt,
        "prompt_ids": [ord(c) for c in prompt],
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "p_chosen": p_chosen,
    }


def test_a_hard_label_is_a_side_and_a_tie_has_none(caplog: pytest.LogCaptureFixture) -> None:
    prompt = ({"role": "user", "content": "q"},)
    pairs = [Preference("p", prompt, "a", "b", "0", "1", p, "people", "human") for p in (0.9, 0.5, 0.2, 0.5)]
    assert [target for _, target in with_targets(pairs, True, "dpo")] == [0.9, 0.5, 0.2, 0.5]
    assert not caplog.records
    assert with_targets(pairs, False, "dpo") == [(pairs[0], 1.0), (pairs[2], 0.0)]
    assert "dpo: 2 of 4 preferences are ties (p_chosen is 0.5)" in caplog.text
    with pytest.raises(UserError, match=r"dpo.soft_labels=false: 1 of 1 preferences are ties .* nothing to train on"):
        with_targets(pairs[1:2], False, "dpo")


def test_three_completions_are_three_sequences_in_three_pairs() -> None:
    groups = group_comparisons(
        [row("a", [1], [2], 0.9), row("b", [7], [8]), row("a", [2], [3], 0.8), row("a", [1], [3], 0.7)]
    )
    assert [group["sequences"] for group in groups] == [[[1], [2], [3]], [[7], [8]]]
    assert (groups[0]["chosen"], groups[0]["rejected"]) == ([0, 1, 0], [1, 2, 2])
    batch = collate_comparisons(groups)
    assert batch["chosen"].tolist() == [0, 1, 0, 3]
    assert batch["rejected"].tolist() == [1, 2, 2, 4]
    assert batch["p_chosen"].tolist() == pytest.approx([0.9, 0.8, 0.7, 1.0])
    # Two prompts, half the weight each, whatever their number of pairs.
    assert batch["weight"].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert batch["prompts"] == [[97]] * 3 + [[98]] * 2


@pytest.mark.parametrize(("completions", "examples"), [(15, 1), (16, 1), (17, 3)])
def test_all_pairs_of_up_to_16_completions_are_one_example(completions: int, examples: int) -> None:
    pairs = itertools.combinations(range(completions), 2)
    groups = group_comparisons([row("a", [one], [other]) for one, other in pairs])
    assert len(groups) == examples
    assert max(len(group["sequences"]) for group in groups) <= 16


def test_one_id_for_two_prompts_keeps_them_apart() -> None:
    other = row("a", [1], [2]) | {"prompt_ids": [5]}
    assert len(group_comparisons([row("a", [1], [2]), other])) == 2


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.lists(st.integers(0, 30), min_size=1, max_size=2),
            st.lists(st.integers(31, 60), min_size=1, max_size=2),
            st.floats(0, 1),
        ),
        min_size=1,
        max_size=80,
    )
)
def test_grouping_keeps_every_pair(pairs: list[tuple[str, list[int], list[int], float]]) -> None:
    groups = group_comparisons([row(*pair) for pair in pairs])
    batch = collate_comparisons(groups)
    found = [
        (
            "".join(map(chr, batch["prompts"][chosen])),
            batch["sequences"][chosen],
            batch["sequences"][rejected],
            p,
        )
        for chosen, rejected, p in zip(
            batch["chosen"].tolist(), batch["rejected"].tolist(), batch["p_chosen"].double().tolist(), strict=True
        )
    ]
    rounded = [(*pair[:3], float(torch.tensor(pair[3]))) for pair in pairs]
    assert sorted(found) == sorted(rounded)
    assert batch["weight"].sum().item() == pytest.approx(1, abs=1e-5)
    for group in groups:
        assert len(group["sequences"]) <= 16
        assert len({tuple(sequence) for sequence in group["sequences"]}) == len(group["sequences"])


def test_one_process_uses_one_device(tmp_path, monkeypatch):
    """Where several GPUs are visible, transformers would wrap the model in nn.DataParallel."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 4
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert on_one_device(arguments, ModelConfig(device="cpu")).n_gpu == 1
    assert arguments.device.type == "cpu"
    assert arguments.train_batch_size == arguments.per_device_train_batch_size
    # A launcher gives each process a device of its own.
    arguments._n_gpu = 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert on_one_device(arguments, ModelConfig(device="cpu")).n_gpu == 4


def test_the_device_is_the_configured_one(tmp_path):
    found = trainer_arguments(SFTConfig(), ModelConfig(device="cpu"), tmp_path, 0, 32)
    assert (found["use_cpu"], found["bf16"]) == (True, False)


def test_steps_count_all_processes(tmp_path, monkeypatch):
    settings = SFTConfig(batch_size=4, warmup_ratio=0.5)
    assert trainer_arguments(settings, ModelConfig(device="cpu"), tmp_path, 0, 32)["warmup_steps"] == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trainer_arguments(settings, ModelConfig(device="cpu"), tmp_path, 0, 32)["warmup_steps"] == 2


def padded(lengths: list[int], parts: list[list[int]], overhead: int) -> int:
    return sum(len(part) * max(lengths[row] for row in part) + overhead for part in parts)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=7))
def test_parts_of_similar_lengths_cost_least(lengths: list[int]) -> None:
    found = [part.tolist() for part in parts_by_length(torch.tensor(lengths))]
    assert sorted(row for part in found for row in part) == list(range(len(lengths)))
    # All ways to cut the rows, sorted by length, into parts.
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ways = []
    for cuts in range(2 ** (len(order) - 1)):
        parts: list[list[int]] = [[]]
        for place, row in enumerate(order):
            if place and cuts >> (place - 1) & 1:
                parts.append([])
            parts[-1].append(row)
        ways.append(padded(lengths, parts, supervised._PASS_CPU))
    assert padded(lengths, found, supervised._PASS_CPU) == min(ways)


def test_parts_by_hand() -> None:
    # Ten rows of 10 and two of 100 tokens: 12 x 100 in one part; 100 + 200 and two passes (32) in two.
    lengths = torch.tensor([10, 100] + [10] * 9 + [100])
    assert [part.tolist() for part in parts_by_length(lengths)] == [[1, 11], [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    # Two of 10 beside one of 15: 45 and one pass, or 35 and two.
    assert [part.tolist() for part in parts_by_length(torch.tensor([10, 15, 10]))] == [[0, 2, 1]]
    # A prefix of 900 tokens is read once more for each part: 1200 + 900 + 32, or 300 + 1800 + 64.
    assert len(parts_by_length(lengths, torch.arange(900))) == 1
    assert len(parts_by_length(lengths, torch.arange(20))) == 2


def test_several_processes_pass_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(ModelConfig(name="tiny", device="cpu"))
    alike = [[[*range(40, 52), number], [*range(40, 52), 7]] for number in range(3)]
    other, single = [[1, 2, 3], [1, 2, 4]], [[*range(40, 53)]]
    lengths = torch.tensor([1, 1000, 1])
    assert shares_prefix(model, SFTConfig(), [*alike, other, single])
    assert len(parts_by_length(lengths)) == 2
    monkeypatch.setattr(supervised, "world_size", lambda: 2)
    assert shares_prefix(model, SFTConfig(), alike)
    assert not shares_prefix(model, SFTConfig(), [*alike, other])
    # Two texts that are the same tokens: a batch of one row begins like no other.
    assert not shares_prefix(model, SFTConfig(), [*alike, single])
    assert [part.tolist() for part in parts_by_length(lengths)] == [[0, 1, 2]]
    assert not shares_prefix(model, SFTConfig(gradient_checkpointing=True), alike)


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
@pytest.mark.parametrize("method", ["sft", "pm", "dpo"])
def test_bfloat16_trains_like_float32(method: str, tuning: Tuning, tmp_path: Path) -> None:
    """On GPUs it is the default. Adapters and heads are float32 all the same."""
    system = {"role": "system", "content": "Answer in one short sentence."}
    data = [
        Preference(f"p{i}", (system, {"role": "user", "content": "ab" * i}), "a" * (1 + 9 * i), "z" * 5, "0", "1", 0.9,
                   "people", "human")
        for i in range(8)
    ]  # fmt: skip
    shared = {"batch_size": 4, "max_steps": 3, "tuning": tuning, "lora": LoraSettings(r=4, top_layers=0.5)}
    losses = []
    for dtype in (Dtype.float32, Dtype.bfloat16):
        folder, start = tmp_path / dtype, dataclasses.replace(TINY, dtype=dtype)
        if method == "pm":
            target = train_pm(PMConfig(**shared), start, data, data, folder, seed=0)
        elif method == "dpo":
            target = train_dpo(DPOConfig(**shared), start, data, folder, seed=0)
        else:
            shown = [Demonstration(row.prompt, row.chosen) for row in data]
            target = train_sft(SFTConfig(**shared), start, shown, folder, seed=0)
        losses.append([json.loads(line)["loss"] for line in (folder / "training.jsonl").read_text().splitlines()])
        (file,) = target.glob("*.safetensors")
        assert all(value.isfinite().all() for value in load_file(file).values())
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
@pytest.mark.parametrize("method", ["sft", "pm", "dpo"])
def test_gradient_checkpointing_runs_layers_again_and_changes_no_loss(
    method: str, tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    data = [
        Preference(f"p{i}", ({"role": "user", "content": "ab" * i},), "a" * (1 + i), "z" * 5, "0", "1", 0.9, "people",
                   "human")
        for i in range(8)
    ]  # fmt: skip
    runs: dict[bool, int] = dict.fromkeys((False, True), 0)
    forward = LlamaMLP.forward
    losses = {}
    for again in runs:

        def counted(layer: Any, x: torch.Tensor, again: bool = again) -> torch.Tensor:
            runs[again] += layer.training
            return forward(layer, x)

        monkeypatch.setattr(LlamaMLP, "forward", counted)
        shared = {
            "batch_size": 4,
            "max_steps": 3,
            "tuning": tuning,
            "learning_rate": 1e-3,
            "gradient_checkpointing": again,
        }
        folder = tmp_path / str(again)
        if method == "pm":
            train_pm(PMConfig(**shared), TINY, data, data, folder, seed=0)
        elif method == "dpo":
            train_dpo(DPOConfig(**shared), TINY, data, folder, seed=0)
        else:
            train_sft(
                SFTConfig(**shared), TINY, [Demonstration(row.prompt, row.chosen) for row in data], folder, seed=0
            )
        losses[again] = [json.loads(line)["loss"] for line in (folder / "training.jsonl").read_text().splitlines()]
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
    assert losses[True][-1] != losses[True][0]
    assert runs[True] > runs[False] > 0


@pytest.mark.parametrize("method", ["pm", "dpo"])
def test_training_in_parts_is_training_in_one(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below adapted layers that start in the middle, and after a system message that all prompts share."""
    system = {"role": "system", "content": "Answer in one short sentence."}
    data = [
        Preference(f"p{i}", (system, {"role": "user", "content": "ab" * i}), "a" * (1 + 60 * i), "z" * 5, "0", "1", 0.9,
                   "people", "human")
        for i in range(8)
    ]  # fmt: skip
    counts: list[int] = []
    found = parts_by_length

    def counted(*arguments: Any) -> list[torch.Tensor]:
        parts = found(*arguments)
        counts.append(len(parts))
        return parts

    monkeypatch.setattr(f"rlaif.methods.{method}.parts_by_length", counted)
    shared = {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "lora": LoraSettings(r=4, top_layers=0.5)}
    weights = []
    for overhead in (0, 10**9):
        monkeypatch.setattr(supervised, "_PASS_CPU", overhead)
        folder = tmp_path / str(overhead)
        if method == "pm":
            target = train_pm(PMConfig(**shared), TINY, data, [], folder, seed=0)
        else:
            target = train_dpo(DPOConfig(**shared), TINY, data, folder, seed=0)
        weights.append(load_file(target / "adapter_model.safetensors"))
    assert min(counts[:3]) > 1
    assert counts[3:] == [1, 1, 1]
    one, other = weights
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4, msg=key)
