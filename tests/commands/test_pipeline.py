"""``rlaif.run`` from prompts to report: what it leaves, what it redoes, and that an interruption changes nothing."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import DataConfig
from rlaif.near_duplicates import near_duplicate_clusters

pytestmark = pytest.mark.slow  # each test runs several commands

ARMS = {"rlaif_ppo": "ppo", "rlhf_ppo": "ppo", "dpo": "dpo"}
LONGER = ["ppo.iterations=12", "ppo.save_every=2", "~arms.dpo", "~arms.rlhf_ppo"]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def copied(smoke: Path, target: Path) -> Path:
    """A run to change: everything but the timing is that of the shared one."""
    return shutil.copytree(smoke, target)


def snapshot(folder: Path) -> dict[str, int]:
    """Time of the last change of every file but the report, which is always written anew."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    # TensorBoard's file names have the time in them.
    names = [path.with_name("events") if path.parent.name == "tensorboard" else path for path in files]
    changed = (path.stat().st_mtime_ns for path in files)
    return {str(name.relative_to(folder)): at for name, at in zip(names, changed, strict=True)}


def test_every_artefact_is_there(smoke):
    expected = [
        "candidates/candidates.jsonl",
        "labels/ai/labels.jsonl",
        "labels/ai/preferences/train.parquet",
        "labels/ai/preferences/validation.parquet",
        "labels/ai/preferences/README.md",
        "labels/ai/quality.json",
        "labels/ai/store.sqlite",
        "labels/simulated_human/preferences/train.parquet",
        "labels/simulated_human/quality.json",
        "arms/base/evaluation/metrics.json",
        "report.html",
        "report.md",
    ]
    for arm, method in ARMS.items():
        expected += [
            f"arms/{arm}/{method}/policy/adapter_model.safetensors",
            f"arms/{arm}/{method}/training.jsonl",
            f"arms/{arm}/evaluation/metrics.json",
            f"arms/{arm}/evaluation/samples.jsonl",
        ]
        if method == "ppo":
            expected += [
                f"arms/{arm}/pm/preference_model/adapter_model.safetensors",
                f"arms/{arm}/pm/pm_metrics.json",
            ]
    missing = [name for name in expected if not (smoke / name).is_file() or not (smoke / name).stat().st_size]
    assert not missing


def test_nothing_unfinished_is_left(smoke):
    hidden = [path.name for path in smoke.rglob("*") if path.name.startswith(".")]
    assert not hidden
    assert not list(smoke.rglob("checkpoints"))


def test_provenance(smoke):
    files = sorted(smoke.rglob("provenance.json"))
    assert len(files) == 1 + 2 + 4 + 2 + 3
    for file in files:
        value = json.loads(file.read_text(encoding="utf-8"))
        assert {"stage", "config", "inputs", "seed", "commit", "device", "platform", "cpus"} <= set(value), file
        assert value["seed"] == 0
        assert value["wall_s"] > 0
        assert value["config"]
        assert {"python", "rlaif", "torch", "transformers", "trl", "peft"} <= set(value["versions"])
        assert value["device"].startswith("cpu")


def test_no_key_is_written_anywhere(smoke):
    """The environment of the run had a key."""
    for path in smoke.rglob("*"):
        if path.is_file():
            assert b"sk-this-must-never" not in path.read_bytes(), path


def test_candidates(smoke):
    lines = lines_of(smoke / "candidates" / "candidates.jsonl")
    assert len({line["prompt_id"] for line in lines}) == len(lines) > 30
    for line in lines:
        texts = [candidate["completion"] for candidate in line["candidates"]]
        assert 2 <= len(texts) == len(set(texts))
        assert line["split"] in ("train", "validation", "test")
        assert {"model", "temperature", "seed", "finish_reason"} <= set(line["candidates"][0])


def test_labels_ask_both_orders(smoke):
    labels = lines_of(smoke / "labels" / "ai" / "labels.jsonl")
    asked = {(label["prompt_id"], label["principle"], label["first"], label["second"]) for label in labels}
    assert len(asked) == len(labels)
    assert all((prompt, principle, second, first) in asked for prompt, principle, first, second in asked)
    assert all(0 <= label["p_first"] <= 1 for label in labels)


def test_preferences_load_with_datasets(smoke, tmp_path):
    from datasets import load_dataset

    held_out = {line["prompt_id"]: line["split"] for line in lines_of(smoke / "candidates" / "candidates.jsonl")}
    for feedback in ("ai", "simulated_human"):
        folder = smoke / "labels" / feedback / "preferences"
        data = load_dataset(str(folder), cache_dir=str(tmp_path))
        assert {"train", "validation"} <= set(data)
        for split, rows in data.items():
            for row in rows:
                assert held_out[row["prompt_id"]] == split
                assert row["prompt"][-1]["role"] == "user"
                assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant"] * 2
                assert row["chosen"] != row["rejected"]
                assert 0.5 < row["p_chosen"] <= 1
                assert row["feedback"] == feedback


def test_no_stage_trains_on_what_another_evaluates(smoke):
    """Sampling, labels, rollouts and evaluation of one run, near-duplicates included."""
    splits = {}
    for line in lines_of(smoke / "candidates" / "candidates.jsonl"):
        splits[line["prompt"][-1]["content"]] = line["split"]
    assert set(splits.values()) == {"train", "validation"}
    evaluated = [
        {line["prompt"][-1]["content"] for line in lines_of(file)}
        for file in smoke.glob("arms/*/evaluation/samples.jsonl")
    ]
    rolled_out = [
        line["prompt"][-1]["content"] for file in smoke.glob("arms/*/ppo/samples.jsonl") for line in lines_of(file)
    ]
    assert len(evaluated) > 1
    assert rolled_out
    assert all(one == evaluated[0] for one in evaluated)
    assert {splits[text] for text in rolled_out if text in splits} == {"train"}
    trained = sorted({*splits, *rolled_out})
    held_out = sorted(evaluated[0])
    clusters = near_duplicate_clusters([*trained, *held_out], DataConfig().near_duplicate_threshold)
    assert not set(clusters[: len(trained)]) & set(clusters[len(trained) :])


def test_preference_model_is_a_plain_transformers_model(smoke, command_env, monkeypatch):
    """Loaded and batched as the transformers and PEFT documentation do it, right padding included."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rlaif.config import ModelConfig
    from rlaif.preference_model import PreferenceModel
    from rlaif.records import Example

    monkeypatch.setenv("RLAIF_CACHE", command_env["RLAIF_CACHE"])
    folder = smoke / "arms" / "rlaif_ppo" / "pm" / "preference_model"
    samples = lines_of(smoke / "arms" / "base" / "evaluation" / "samples.jsonl")
    user = [{"role": "user", "content": "Say something."}]
    texts = ["a", "area idea", samples[0]["completion"] or "oboe", "rhythm " * 30]
    ours = PreferenceModel(ModelConfig(name=str(folder), device="cpu")).score([Example(user, text) for text in texts])

    base = AutoModelForSequenceClassification.from_pretrained(
        PeftConfig.from_pretrained(folder).base_model_name_or_path, num_labels=1
    )
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    conversations = [[*user, {"role": "assistant", "content": text}] for text in texts]
    rendered = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in conversations]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer(rendered, padding=True, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            theirs = model(**arguments).logits[:, 0].tolist()
        assert theirs == pytest.approx(ours, abs=1e-4), side
    assert max(ours) - min(ours) > 1e-3


def test_policies_load_with_peft(smoke):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    for arm, method in ARMS.items():
        folder = smoke / "arms" / arm / method / "policy"
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor([tokenizer.encode("hello", add_special_tokens=False)])
        with torch.inference_mode():
            trained = model(input_ids=ids).logits
            with model.disable_adapter():
                assert not torch.equal(trained, model(input_ids=ids).logits), f"{arm} was not trained"


def test_metrics_have_n_and_interval(smoke):
    for arm in ["base", *ARMS]:
        metrics = json.loads((smoke / "arms" / arm / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["name"] == arm
        names = ["gold", "pm"] + ([] if arm == "base" else ["win_rate", "kl"])
        for key in [key.removesuffix("_low") for key in metrics if key.endswith("_low")]:
            assert metrics[f"{key}_low"] <= metrics[key] <= metrics[f"{key}_high"]
            assert metrics[f"{key}_n"] > 0
        for name in names:
            assert any(key.startswith(name) and key.endswith("_low") for key in metrics), (arm, name)


def test_every_stage_runs_in_bfloat16(run_command, tmp_path):
    """As it does by itself on a GPU, and on a CPU with AMX."""
    import torch
    from safetensors.torch import load_file

    run_command("run", "experiment=smoke", f"output_dir={tmp_path}", env={"RLAIF_AUTO_DTYPE": "bfloat16"})
    for arm, method in ARMS.items():
        metrics = json.loads((tmp_path / "arms" / arm / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["kl_low"] <= metrics["kl"] <= metrics["kl_high"]
        weights = load_file(tmp_path / "arms" / arm / method / "policy/adapter_model.safetensors")
        # What trains is kept in float32, and did train.
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)


def test_second_run_skips_and_a_change_redoes_only_what_depends_on_it(smoke, run_command, tmp_path):
    folder = copied(smoke, tmp_path / "again")
    before = snapshot(folder)
    result = run_command("run", "experiment=smoke", f"output_dir={folder}")
    assert snapshot(folder) == before
    assert ": done in" not in result.stderr
    assert result.stderr.count("up to date, skipped") >= 12

    result = run_command("run", "experiment=smoke", f"output_dir={folder}", "ppo.kl_coef=0.5")
    after = snapshot(folder)
    assert set(after) == set(before)
    changed = {str(Path(*Path(name).parts[:3])) for name in after if after[name] != before[name]}
    assert changed == {f"arms/{arm}/{stage}" for arm in ("rlaif_ppo", "rlhf_ppo") for stage in ("ppo", "evaluation")}
    assert "making it again" in result.stderr
    assert not list(folder.rglob(".*"))


def test_a_damaged_stage_is_not_taken_for_complete(smoke, run_command, tmp_path):
    """A stage without its provenance was never finished; one whose input lost a file is made again."""
    folder = copied(smoke, tmp_path / "damaged")
    (folder / "arms" / "dpo" / "dpo" / "provenance.json").unlink()
    result = run_command("run", "experiment=smoke", f"output_dir={folder}", expect=2)
    assert "was not made by rlaif.dpo" in result.stderr
    shutil.rmtree(folder / "arms" / "dpo" / "dpo")
    before = snapshot(folder)
    run_command("run", "experiment=smoke", f"output_dir={folder}")
    after = snapshot(folder)
    changed = {str(Path(*Path(name).parts[:3])) for name in after if after[name] != before.get(name)}
    assert "arms/dpo/dpo" in changed
    assert changed <= {"arms/dpo/dpo", "arms/dpo/evaluation"}
    name = "policy/adapter_model.safetensors"
    assert (folder / "arms/dpo/dpo" / name).read_bytes() == (smoke / "arms/dpo/dpo" / name).read_bytes()


def wait_for(process: Any, ready: Callable[[], bool], what: str) -> None:
    """Wait for something that a running command does; a busy machine may take minutes to start one."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if ready():
            return
        assert process.poll() is None, f"ended before {what}:\n{process.log.read_text()[-3000:]}"
        time.sleep(0.01)
    raise AssertionError(f"no {what} within four minutes:\n{process.log.read_text()[-3000:]}")


def test_interrupted_training_goes_on_to_the_same_weights(smoke, run_command, start_command, tmp_path):
    """Killed at one checkpoint, interrupted at a later one, and gone on with: bit for bit the undisturbed run."""
    whole, cut = copied(smoke, tmp_path / "whole"), copied(smoke, tmp_path / "cut")
    arguments = ["experiment=smoke", *LONGER]
    arm = Path("arms") / "rlaif_ppo"
    run_command("run", *arguments, f"output_dir={whole}")

    checkpoints = cut / arm / ".ppo.partial" / "checkpoints"

    def newest() -> int:
        return max((int(path.name.rsplit("-", 1)[-1]) for path in checkpoints.glob("iteration-*")), default=0)

    process = start_command("run", *arguments, f"output_dir={cut}")
    wait_for(process, lambda: newest() >= 2, "checkpoint")
    process.send_signal(signal.SIGKILL)
    assert process.wait(90) == -signal.SIGKILL
    killed_at = newest()
    assert 2 <= killed_at < 12

    process = start_command("run", *arguments, f"output_dir={cut}")
    wait_for(process, lambda: newest() > killed_at, "later checkpoint")
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130
    text = process.log.read_text()
    assert text.rstrip().endswith("interrupted; the same command goes on from here")
    assert "Traceback" not in text
    assert f"going on from iteration {killed_at}" in text
    # The finished stage of the first run is still in place, whole.
    old = "ppo/policy/adapter_model.safetensors"
    assert (cut / arm / old).read_bytes() == (smoke / arm / old).read_bytes()

    result = run_command("run", *arguments, f"output_dir={cut}")
    assert "going on where an interrupted run stopped" in result.stderr
    assert (cut / arm / old).read_bytes() == (whole / arm / old).read_bytes()
    assert (cut / arm / old).read_bytes() != (smoke / arm / old).read_bytes()
    curves = [lines_of(folder / arm / "ppo" / "training.jsonl") for folder in (whole, cut)]
    assert len(curves[0]) == len(curves[1]) == 12
    for one, other in zip(*curves, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }
    assert not list(cut.rglob(".*partial"))


def test_interrupted_labeling_asks_nothing_twice(inputs, run_command, start_command, tmp_path):
    arguments = [
        f"candidates={inputs}/candidates.jsonl",
        "constitution=warm",
        "labeler=scripted",
        "labeler.scripted.delay_s=0.02",
        "labeler.scripted.noise=1",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_command("label", *arguments, f"output_dir={whole}")
    total = len(lines_of(whole / "labels.jsonl"))

    store = cut.with_name(".cut.partial") / "store.sqlite"

    def stored() -> int:
        try:
            connection = sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=5)
            try:
                return int(connection.execute("SELECT count(*) FROM verdicts").fetchone()[0])
            finally:
                connection.close()
        except sqlite3.OperationalError:
            return 0

    process = start_command("label", *arguments, f"output_dir={cut}")
    wait_for(process, lambda: stored() >= 20, "20 verdicts")
    process.send_signal(signal.SIGKILL)
    process.wait(90)
    assert not cut.exists()
    known = stored()
    assert 20 <= known < total

    result = run_command("label", *arguments, f"output_dir={cut}")
    assert f"{known} verdicts were known already, {total - known} were asked" in result.stderr
    assert (cut / "labels.jsonl").read_bytes() == (whole / "labels.jsonl").read_bytes()
    for file in sorted((whole / "preferences").iterdir()):
        assert (cut / "preferences" / file.name).read_bytes() == file.read_bytes()
    counts = [
        sqlite3.connect(folder / "store.sqlite").execute("SELECT count(*) FROM verdicts").fetchone()[0]
        for folder in (whole, cut)
    ]
    assert counts == [total, total]

    # Other settings of how verdicts are combined: made again without asking.
    result = run_command("label", *arguments, f"output_dir={cut}", "labeling.min_margin=0.1")
    assert f"{total} verdicts were known already, 0 were asked" in result.stderr
