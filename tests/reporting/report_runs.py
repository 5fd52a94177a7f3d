"""Synthetic run folders: two seeds, four rows, labels, preference models and curves."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif.evaluation.statistics import paired_gain

GAINS = {"base": None, "rlaif_ppo": 0.41, "dpo": 0.02, "rlhf_ppo": -0.2}
METHODS = {"base": "base", "rlaif_ppo": "ppo", "dpo": "dpo", "rlhf_ppo": "ppo"}
FEEDBACK = {"base": None, "rlaif_ppo": "ai", "dpo": "ai", "rlhf_ppo": "simulated_human"}


def estimate(key: str, value: float, half: float, n: int = 128) -> dict[str, float]:
    return {key: value, f"{key}_n": n, f"{key}_low": value - half, f"{key}_high": value + half}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = value if isinstance(value, list) else [value]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


PROMPTS = 128
# Every other prompt gains so much more or less: Student's interval over 128 prompts is then 0.05 each way.
SPREAD = 0.28475


def metrics(name: str, seed: int) -> dict[str, Any]:
    """An evaluation; seed 2 gains 0.1 more than seed 1."""
    gain, shift = GAINS[name], 0.1 * (seed - 1)
    result: dict[str, Any] = {
        "name": name,
        "method": METHODS[name],
        "feedback": FEEDBACK[name],
        "seed": seed,
        "gold": "sentiment",
        "preference_model": None,
        "n_prompts": PROMPTS,
        "n_samples": PROMPTS,
        **estimate("gold_score", 0.1 + (0 if gain is None else gain + shift), 0.05),
        **estimate("kl", 0.0 if gain is None else 4 + 10 * gain, 0.4),
        **estimate("length", 31.5, 1.5),
        **estimate("eos_rate", 0.9, 0.04),
    }
    if gain is not None:
        scores = [[line["gold_score"] for line in samples(one, seed=seed)] for one in (name, "base")]
        paired = paired_gain(*scores, range(PROMPTS))
        assert paired is not None
        result |= paired.gain.flat("gold_gain") | paired.win_rate.flat("win_rate")
    return result


def samples(name: str, count: int = PROMPTS, seed: int = 1) -> list[dict[str, Any]]:
    """Completions whose gold scores have the gains of :data:`GAINS` over ``base``."""
    gain = GAINS[name]
    rises = [0.0 if gain is None else gain + 0.1 * (seed - 1) + SPREAD * (-1) ** index for index in range(count)]
    return [
        {
            "prompt_id": f"p{index}",
            "prompt": [{"role": "user", "content": f"Say something kind about day {index}."}],
            "completion": f"{name} says: day {index} was lovely, " + "and warm " * (index % 7),
            "gold_score": round(0.1 + rise, 6),
            "tokens": 9,
            "finish_reason": "stop",
            "sample": 0,
        }
        for index, rise in enumerate(rises)
    ]


def ppo_curve() -> list[dict[str, Any]]:
    noise = random.Random(0)
    return [
        {
            "method": "ppo",
            "iteration": index,
            "score": 1 - math.exp(-index / 20) + noise.gauss(0, 0.05),
            "kl": index / 15,
            "reward": 0.8 - math.exp(-index / 20),
            "entropy": 2.5 - index / 50,
            "clip_fraction": 0.1 + noise.random() / 20,
            "value_loss": 0.5 - index / 200,
            "explained_variance": index / 100,
            "length": 30 + index / 10,
            "eos_rate": 0.9,
            "seconds": 1.5,
        }
        | (validation(index) if index % 10 == 9 else {})
        for index in range(60)
    ]


def validation(index: int) -> dict[str, float]:
    return {"validation_score": index / 50, "validation_kl": index / 15, "validation_objective": index / 60}


def loss_curve(method: str) -> list[dict[str, Any]]:
    return [{"method": method, "step": 5 * i, "loss": 0.69 * math.exp(-i / 40)} for i in range(40)]


def build(root: Path, seeds: tuple[int, ...] = (1, 2), agreement: float = 0.71) -> Path:
    """A sweep over ``seeds`` as the commands leave it."""
    for seed in seeds:
        job = root / f"seed={seed}"
        for name, method in METHODS.items():
            arm = job / "arms" / name
            write(arm / "evaluation" / "metrics.json", metrics(name, seed))
            write(arm / "evaluation" / "samples.jsonl", samples(name, seed=seed))
            write(arm / "evaluation" / "provenance.json", provenance("evaluate", 12.5, seed))
            if method != "base":
                write(arm / "training.jsonl", ppo_curve() if method == "ppo" else loss_curve("dpo"))
        write(job / "labels" / "quality.json", quality(agreement))
        write(job / "labels" / "provenance.json", provenance("label", 70.0, seed))
        model = {"feedback": "ai", "seed": seed, "train_pairs": 800, **estimate("accuracy", 0.7, 0.05, 200)}
        write(job / "preference_model" / "pm_metrics.json", model)
        write(job / "preference_model" / "training.jsonl", loss_curve("pm"))
    return root


def quality(agreement: float) -> dict[str, Any]:
    return {
        "feedback": "ai",
        "labeler": "scripted",
        "mode": "pairwise",
        "n_verdicts": 2000,
        "n_pairs": 1000,
        "n_preferences": 900,
        "failed": 3,
        "uncovered": 7,
        "option_mass_mean": 0.98,
        "dropped": {"tie": 60, "duplicate": 30},
        **estimate("agreement", agreement, 0.03, 950),
        **estimate("longer_wins", 0.55, 0.03, 950),
        **estimate("same_position_rate", 0.12, 0.02, 1000),
    }


def provenance(stage: str, wall: float, seed: int) -> dict[str, Any]:
    versions = {"python": "3.12.1", "torch": "2.13.0"}
    common = {"commit": "abc123def456", "device": "cpu (x86_64)", "versions": versions}
    return {"stage": stage, "wall_s": wall, "seed": seed, **common}


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; ``None`` removes."""
    old: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    write(path, {k: v for k, v in {**old, **values}.items() if v is not None})
