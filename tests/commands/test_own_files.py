"""Users' own files: prompts, candidates and preference data in the forms that are documented; every method on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # each test runs several commands

METHODS = {"pm": "pm/preference_model", "dpo": "dpo/policy", "sft": "sft/policy", "ppo": "ppo/policy"}
TINY_SETTINGS = [
    "model@policy=tiny",
    "eval.enabled=false",
    # A random model after two steps knows nothing.
    "pm.gate=warn",
    *(f"{method}.{setting}" for method in ("pm", "dpo", "sft") for setting in ("max_steps=2", "batch_size=4")),
    "ppo.iterations=1",
    "ppo.rollouts=4",
    "ppo.minibatch_size=4",
    "ppo.max_new_tokens=8",
]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def questions(inputs: Path) -> list[str]:
    lines = (inputs / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_own_prompts_as_texts_and_messages(inputs, run_command, tmp_path):
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(questions(inputs)):
        if number % 3 == 0:
            lines.append({"prompt": text})
        elif number % 3 == 1:
            lines.append({"prompt": [{"role": "system", "content": "Be brief."}, user(text)], "id": number})
        else:
            lines.append({"prompt": [user("Hello"), assistant("Hi."), user(text)], "prompt_id": f"mine-{number}"})
    write_lines(tmp_path / "mine.jsonl", lines)
    run_command(
        "sample",
        "prompts=mine.jsonl",
        "output_dir=out",
        "model@policy=tiny",
        "+sampling.styles.short={system: 'Answer in one word.', n: 1}",
        "sampling.styles.plain.n=2",
        "sampling.max_new_tokens=6",
        cwd=tmp_path,
    )
    sampled = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").open(encoding="utf-8")]
    given = {str(line.get("id", line.get("prompt_id"))): line["prompt"] for line in lines}
    named = {line["prompt_id"]: line for line in sampled if line["prompt_id"] in given}
    # The prompts of the test split are left out: nothing is trained on them.
    assert len(sampled) >= 20
    assert len(named) >= 10
    assert all(line["prompt"] == given[name] for name, line in named.items())
    assert {c["style"] for line in sampled for c in line["candidates"]} == {"plain", "short"}
    systems = {(c["style"], c.get("system")) for line in named.values() for c in line["candidates"]}
    assert ("short", "Answer in one word.") in systems
    assert ("plain", "Be brief.") in systems
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "out"]


def test_own_candidates(inputs, run_command, tmp_path):
    lines: list[dict[str, Any]] = [
        {"prompt": text, "completions": ["aaa eee", "rhythm", "oboe idea"]} for text in questions(inputs)
    ]
    lines[0]["prompt"] = [user(lines[0]["prompt"])]
    write_lines(tmp_path / "mine.jsonl", lines)
    run_command(
        "label",
        f"candidates={tmp_path}/mine.jsonl",
        "constitution=helpful",
        "labeler=scripted",
        "gold=letters",
        f"output_dir={tmp_path}/out",
    )
    quality = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    assert quality["n_pairs"] == 3 * len(lines)
    assert quality["agreement"] == 1
    assert (tmp_path / "out" / "preferences" / "train.parquet").is_file()
    assert (tmp_path / "out" / "preferences" / "test.parquet").is_file()


def own_preferences(kind: str, texts: list[str]) -> list[dict[str, Any]]:
    """The same pairs in one of the forms of TRL's preference format."""
    pairs = [(text, f"area {number}", f"rhythm {number}") for number, text in enumerate(texts)]
    if kind == "text":
        return [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    if kind == "conversational":
        return [{"prompt": [user(p)], "chosen": [assistant(c)], "rejected": [assistant(r)]} for p, c, r in pairs]
    return [{"chosen": [user(p), assistant(c)], "rejected": [user(p), assistant(r)]} for p, c, r in pairs]


@pytest.fixture(scope="module")
def trained(inputs, run_command, tmp_path_factory):
    """Every method on every form of the same pairs, one job each."""
    here = tmp_path_factory.mktemp("own")
    for kind in ("text", "conversational", "implicit"):
        write_lines(here / kind / "train.jsonl", own_preferences(kind, questions(inputs)[:12]))
    run_command(
        "train",
        f"method={','.join(METHODS)}",
        "feedback=human",
        "preferences=text,conversational,implicit",
        *TINY_SETTINGS,
        "output_dir=out",
        "-m",
        cwd=here,
    )
    return here / "out"


@pytest.mark.parametrize("method", METHODS)
def test_own_preferences_in_every_form_train_the_same(trained, method):
    weights = {
        (trained / f"method={method},preferences={kind}" / METHODS[method] / "adapter_model.safetensors").read_bytes()
        for kind in ("text", "conversational", "implicit")
    }
    assert len(weights) == 1


def test_full_fine_tuning(inputs, run_command, tmp_path):
    """Every method without adapters; PPO takes the PM that was trained before."""
    from safetensors.torch import load_file

    run_command(
        "train",
        f"method={','.join(METHODS)}",
        "feedback=human",
        f"preferences={inputs}/preferences",
        *TINY_SETTINGS,
        *(f"{method}.tuning=full" for method in METHODS),
        f"output_dir={tmp_path}",
        "-m",
    )
    weights = {}
    for method, folder in METHODS.items():
        model = tmp_path / f"method={method}" / folder
        assert (model / "config.json").is_file()
        assert not (model / "adapter_config.json").exists()
        weights[method] = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    assert not any(weights["dpo"].equal(weights[other]) for other in ("sft", "ppo", "pm"))
    assert (tmp_path / "method=ppo" / "pm" / "preference_model" / "model.safetensors").is_file()


def test_a_trained_policy_is_evaluated_and_trained_on(trained, inputs, run_command, tmp_path):
    """The folders that training writes are models like any other: to evaluate, and to start from."""
    sft = trained / "method=sft,preferences=text" / "sft" / "policy"
    run_command(
        "evaluate",
        f"policy.name={sft}",
        "model@reference=tiny",
        f"prompts={inputs}/prompts.jsonl",
        f"preference_model={trained}/method=pm,preferences=text/pm/preference_model",
        "eval.gold=letters",
        "eval.max_new_tokens=6",
        "name=mine",
        f"output_dir={tmp_path}/evaluation",
    )
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["name"] == "mine"
    assert metrics["gold"] == "letters"
    assert {"kl", "kl_low", "kl_high", "kl_n"} <= set(metrics)

    run_command(
        "train",
        "method=dpo",
        "feedback=human",
        f"preferences={inputs}/preferences",
        *TINY_SETTINGS,
        f"policy.name={sft}",
        f"output_dir={tmp_path}/dpo",
    )
    # What was merged before training must be in the result.
    assert (tmp_path / "dpo" / "dpo" / "policy" / "model.safetensors").is_file()
