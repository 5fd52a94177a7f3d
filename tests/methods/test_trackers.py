"""Curves in trackers: TensorBoard beside the run without being asked, each step once, others by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from rlaif.config import DPOConfig, LoraSettings, PPOConfig, SFTConfig
from rlaif.demonstrations import Demonstration
from rlaif.methods import trackers
from rlaif.methods.ppo import train_ppo
from rlaif.methods.sft import train_sft
from rlaif.methods.trackers import TensorBoardBeside, Trackers, chosen, flat
from rlaif.records import Example
from tests.methods.problem import PROMPTS, TINY

pytest.importorskip("tensorboard")


def scalars(folder: Path, key: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a curve: (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(key)]


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]


class KilledError(Exception):
    """Stands for a kill."""


def ppo(folder: Path, kill_in_round: int = 0, **changes: Any) -> None:
    rounds = 0

    def score(examples: Sequence[Example]) -> list[float]:
        nonlocal rounds
        rounds += 1
        if rounds == kill_in_round:
            raise KilledError
        return [float(len(example.completion)) for example in examples]

    settings = {"iterations": 5, "rollouts": 4, "minibatch_size": 4, "max_new_tokens": 4, "save_every": 2} | changes
    config = PPOConfig(lora=LoraSettings(r=2), **settings)
    train_ppo(config, TINY, PROMPTS, score, folder, 0)


def test_ppo_goes_on_with_the_same_curve(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        ppo(tmp_path, kill_in_round=4)
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "train/score")] == [0, 1, 2]
    # Round 2 came after the last checkpoint, and is worked again.
    ppo(tmp_path)
    lines = curve(tmp_path)
    for key in ("score", "kl", "value_loss", "seconds"):
        shown = scalars(tmp_path / "tensorboard", f"train/{key}")
        assert shown == [(line["iteration"], pytest.approx(line[key], rel=1e-6)) for line in lines], key
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4]


def test_ppo_without_a_checkpoint_begins_its_curve_again(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        ppo(tmp_path, kill_in_round=2)
    ppo(tmp_path)
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "train/score")] == [0, 1, 2, 3, 4]


def test_trainers_leave_their_curve_beside_training_jsonl(tmp_path: Path) -> None:
    """transformers would put it into the folder of the checkpoints, which goes when training is done."""
    data = [Demonstration(prompt.messages, "yes", True) for prompt in PROMPTS]
    train_sft(SFTConfig(max_steps=3, batch_size=2, lora=LoraSettings(r=2)), TINY, data, tmp_path, 0)
    assert not (tmp_path / "checkpoints").exists()
    shown = scalars(tmp_path / "tensorboard", "train/loss")
    assert shown == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in curve(tmp_path)]
    assert [step for step, _ in shown] == [1, 2, 3]


def test_trainers_go_on_with_the_same_curve(tmp_path: Path) -> None:
    arguments = SimpleNamespace(to_json_string=lambda: "{}")
    for first, last in ((0, 5), (3, 6)):
        state = SimpleNamespace(
            global_step=first, is_world_process_zero=True, is_hyper_param_search=False, trial_name=None
        )
        callback = TensorBoardBeside(tmp_path)
        callback.on_train_begin(arguments, state, None)
        for step in range(first + 1, last + 1):
            state.global_step = step
            callback.on_log(arguments, state, None, logs={"loss": 10 * first + step})
        callback.on_train_end(arguments, state, None)
    shown = scalars(tmp_path / "tensorboard", "train/loss")
    assert shown == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36)]


def test_without_tensorboard_nothing_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(None) == ["tensorboard"]
    monkeypatch.setattr(trackers, "is_tensorboard_available", lambda: False)
    assert chosen(None) == []
    ppo(tmp_path, iterations=1)
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("names", [[], ["none"]])
def test_no_tracker_where_none_is_wanted(tmp_path: Path, names: list[str]) -> None:
    ppo(tmp_path, iterations=1, report_to=names)
    assert not (tmp_path / "tensorboard").exists()


def test_only_the_main_process_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Trackers(None, tmp_path, 0, {}) as shown:
        shown.add(0, {"score": 1.0})
    assert not list(tmp_path.iterdir())


class Recorder(GeneralTracker):
    """A tracker that keeps what it gets."""

    name, requires_logging_directory = "recorder", False
    kept: list[Any]

    def __init__(self, project: str) -> None:
        super().__init__()
        Recorder.kept = [project]

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.kept.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.kept.append((step, values))

    def finish(self) -> None:
        self.kept.append("finished")


def test_a_tracker_asked_for_by_name_gets_settings_and_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    ppo(tmp_path, iterations=2, report_to=["recorder"])
    project, settings, *rounds, end = Recorder.kept
    assert (project, end) == ("rlaif", "finished")
    assert settings["lora.r"] == 2
    assert settings["kl_control"] == "fixed"
    for (step, values), line in zip(rounds, curve(tmp_path), strict=True):
        assert step == line["iteration"]
        assert values["train/score"] == line["score"]
        assert all(isinstance(value, (int, float)) for value in values.values())
    assert not (tmp_path / "tensorboard").exists()


def test_settings_by_dotted_keys() -> None:
    assert flat({"a": 1, "lora": {"r": 2, "deep": {"x": None}}, "names": ["q", "v"]}) == {
        "a": 1, "lora.r": 2, "lora.deep.x": None, "names": "['q', 'v']"
    }  # fmt: skip


def test_watching_is_no_reason_to_train_again(tmp_path: Path) -> None:
    from rlaif.config import Method, TrainConfig
    from rlaif.methods.stages import Arm

    made: list[Path] = []
    for names in (None, [], ["tensorboard"]):
        arm = Arm(TrainConfig(method=Method.dpo), tmp_path, TINY)
        arm.run("dpo", {"settings": DPOConfig(report_to=names)}, {}, made.append)
    assert len(made) == 1
