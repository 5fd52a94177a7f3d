"""What PPO's defaults are worth: lambda, critic, rates, clips and epsilon, on rewards that are known.

    python -m benchmarks.ppo_defaults [--quick] [--jobs 2] [--journal FILE] [--part tiny|embedded]

Two rewards on the tiny model: ``first``, whether the first character is one of a to m, so that the whole score belongs
to one token at the far end from where it is given; ``shared``, the number of vowels, to which every token adds. LoRA
and full tuning, completions of 16 and 64 tokens, 20 rounds of 64 completions, everything else as it comes but
``missing_eos_penalty=0``, which would add to the reward. What counts is PPO's own objective, the standardised score
minus ``kl_coef`` times the KL, over the rollouts of the last five rounds.

The rule, written before the first run: for each tuning the learning rate with the highest objective, over both lambdas
and both rewards at 64 tokens, goes on into the comparisons. There, a default stays unless another value's gain has a
95 % interval above 0 (a t interval over seeds, each seed's runs averaged); of several such values the highest is taken.
``adam_epsilon`` starts from what TRL and OpenRLHF use, the critic from the cheapest. What was chosen is then compared
with the former defaults on seeds that took no part, up to 128 tokens.

The tiny model's rates say nothing of real models, so the learning rates are also tried on the embedded one
(``--part embedded``): the VADER sentiment of 16 tokens, 10 rounds of 32 completions.
With ``--journal`` an interrupted run goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, finish, parser, say

Cell = dict[str, Any]
"""A run: model, task, tokens, tuning, critic, seed, and settings of PPO."""

TUNINGS = ("lora", "full")
TASKS = ("first", "shared")
CRITICS = {"lora": ("head", "adapter", "backprop"), "full": ("head", "backprop")}
"""A linear head on the policy's states; one on states of an adapter of its own; one that also trains the policy's."""
CRITIC_SETTINGS: dict[str, dict[str, bool]] = {
    "head": {"value_adapter": False, "value_backprop": False},
    "adapter": {"value_adapter": True, "value_backprop": False},
    "backprop": {"value_adapter": False, "value_backprop": True},
}
RATES = {
    "tiny": {"lora": (1e-3, 3e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3)},
    "embedded": {"lora": (1e-5, 1e-4, 1e-3), "full": (1e-6, 1e-5, 1e-4)},
}
FORMER: dict[str, Any] = {
    "critic": "head",
    "gae_lambda": 0.95,
    "value_learning_rate": 1e-3,
    "value_clip_range": 0.2,
    "adam_epsilon": 1e-5,
}
PINNED = FORMER | {"missing_eos_penalty": 0.0}
"""What a run has where it does not say otherwise: the table stays what it is when a default changes."""
OTHERS: dict[str, tuple[float, ...]] = {
    "value_learning_rate": (1e-2,),
    "value_clip_range": (0.5,),
    "adam_epsilon": (1e-5,),
}
"""What is tried of each setting beside the default, one at a time."""
LENGTHS = (16, 64)
CASES = [("first", 16), ("first", 64), ("first", 128), ("shared", 64)]
"""Rewards and lengths for the comparison with the former defaults."""
SEEDS, FRESH = range(4), range(100, 104)
ROUNDS = {"tiny": 20, "embedded": 10}
LAST = 5
# Student's t for 95 % by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def score_first(text: str, tokens: int) -> float:
    """Whether the first character is one of a to m."""
    return float("a" <= text[:1] <= "m")


def score_shared(text: str, tokens: int) -> float:
    """The number of vowels, of as many as there could be: an early end makes it no higher."""
    return sum(letter in "aeiou" for letter in text) / tokens


def score_vader(text: str, tokens: int) -> float:
    """The sentiment by VADER."""
    from rlaif.gold import gold_score

    return gold_score("vader", text)


SCORES: dict[str, Callable[[str, int], float]] = {
    "first": score_first,
    "shared": score_shared,
    "vader": score_vader,
}


def measure(cell: Cell, rounds: int) -> dict[str, float]:
    """Run PPO once; means over the last rounds."""
    warnings.simplefilter("ignore")
    import torch

    from rlaif.config import Dtype, ModelConfig, PPOConfig, Tuning
    from rlaif.methods.ppo import train_ppo
    from rlaif.records import Example, Prompt, UserError, find_prompts, read_prompts

    torch.set_num_threads(1)
    logging.getLogger("rlaif").setLevel(logging.ERROR)
    about = {name: cell[name] for name in ("model", "task", "tokens", "tuning", "critic", "seed")}
    settings = {name: value for name, value in (PINNED | cell).items() if name not in about}
    model, score = str(about["model"]), SCORES[str(about["task"])]
    if model == "tiny":
        prompts = [Prompt(f"p{i}", ({"role": "user", "content": "ab" * (i + 1)},)) for i in range(16)]
    else:
        prompts = read_prompts(find_prompts("everyday"))[:256]
        settings |= {"rollouts": 32}
    config = PPOConfig(
        tuning=Tuning(about["tuning"]),
        max_new_tokens=int(about["tokens"]),
        report_to=[],
        log_samples=0,
        **{"iterations": rounds} | settings,
        **CRITIC_SETTINGS[str(about["critic"])],
    )
    start = ModelConfig(name=model, device="cpu", dtype=Dtype.float32)

    def judge(examples: Sequence[Example]) -> list[float]:
        return [score(example.completion, int(about["tokens"])) for example in examples]

    with tempfile.TemporaryDirectory() as folder:
        try:
            train_ppo(config, start, prompts, judge, Path(folder), int(about["seed"]))
        except UserError:
            return {"objective": 0.0, "diverged": 1.0}  # What the policy was worth before.
        lines = [json.loads(line) for line in (Path(folder) / "training.jsonl").read_text().splitlines()]
    last = lines[-LAST:]
    names = {"objective": "reward"} | {name: name for name in ("score", "kl", "explained_variance", "eos_rate")}
    found = {name: statistics.fmean(line[key] for line in last) for name, key in names.items()}
    return found | {"score_at_start": lines[0]["score"], "seconds": sum(line["seconds"] for line in lines)}


class Runner:
    """Runs cells in some processes; each once, and not those that the journal has."""

    def __init__(self, jobs: int, journal: Path | None) -> None:
        self.pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        self.journal = journal
        self.known: dict[str, dict[str, float]] = {}
        if journal is not None and journal.is_file():
            for line in journal.read_text(encoding="utf-8").splitlines():
                cell, found = json.loads(line)
                self.known[key(cell)] = found

    def __call__(self, cells: Iterable[Cell]) -> None:
        """Have the figures of these cells."""
        left = {key(cell): cell for cell in cells if key(cell) not in self.known}
        if not left:
            return
        running = {self.pool.submit(measure, cell, ROUNDS[cell["model"]]): name for name, cell in left.items()}
        for number, future in enumerate(as_completed(running), 1):
            name = running[future]
            self.known[name] = found = future.result()
            if self.journal is not None:
                with self.journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([left[name], found]) + "\n")
            if number % 20 == 0 or number == len(left):
                say(f"{number} of {len(left)} runs")

    def by_seed(self, cells: Iterable[Cell], figure: str = "objective") -> list[float]:
        """The mean of a figure over the cells of each seed."""
        rows: dict[int, list[float]] = {}
        for cell in cells:
            rows.setdefault(int(cell["seed"]), []).append(self.known[key(cell)].get(figure, math.nan))
        return [statistics.fmean(rows[seed]) for seed in sorted(rows)]


def key(cell: Cell) -> str:
    """A name for a cell."""
    return json.dumps(PINNED | cell, sort_keys=True)


def grid(**axes: Any) -> list[Cell]:
    """Every combination of the axes that are lists; other values are the same in all."""
    many = {name: value if isinstance(value, (list, tuple, range)) else (value,) for name, value in axes.items()}
    return [dict(zip(many, values, strict=True)) for values in itertools.product(*many.values())]


def interval(values: Sequence[float]) -> list[float]:
    """Mean and its 95 % t interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return [round(mean, 4)] * 3
    half = _T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return [round(each, 4) for each in (mean, mean - half, mean + half)]


def gain(values: Sequence[float], against: Sequence[float]) -> list[float]:
    """The mean difference, paired by seed, and its interval."""
    return interval([one - other for one, other in zip(values, against, strict=True)])


def choose(found: dict[Any, Sequence[float]], default: Any) -> tuple[Any, dict[str, list[float]]]:
    """By the rule: the default, unless another value gains for sure; and every value's gain over the default."""
    gains = {value: gain(values, found[default]) for value, values in found.items() if value != default}
    sure = {value: row[0] for value, row in gains.items() if row[1] > 0}
    best = max(sure, key=lambda value: sure[value]) if sure else default
    return best, {str(value): row for value, row in gains.items()}


def rates(run: Runner, model: str, seeds: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """Objective by learning rate, over both lambdas on the tiny model; and the best rate of each tuning."""
    best, table = {}, {}
    for tuning in TUNINGS:
        common: dict[str, Any] = {"model": model, "tuning": tuning, "critic": "head", "seed": tuple(seeds)}
        if model == "tiny":
            common |= {"task": TASKS, "tokens": tuple(lengths), "gae_lambda": (0.95, 1.0)}
        else:
            common |= {"task": "vader", "tokens": 16, "gae_lambda": 1.0}
        cells = {rate: grid(**common, adam_epsilon=1e-8, learning_rate=rate) for rate in RATES[model][tuning]}
        run(cell for some in cells.values() for cell in some)
        values = {rate: run.by_seed(some) for rate, some in cells.items()}
        best[tuning] = max(values, key=lambda rate: statistics.fmean(values[rate]))
        table[tuning] = {
            f"{rate:g}": {
                "objective": interval(found),
                "score": interval(run.by_seed(cells[rate], "score")),
                "kl": interval(run.by_seed(cells[rate], "kl")),
            }
            for rate, found in values.items()
        }
    return {"best": best, "table": table}


def compare(run: Runner, rate: dict[str, float], seeds: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """Lambda and critic together, then the other settings one at a time from what was chosen.

    All at the longest of the lengths; lambda with the cheapest critic at the others too.
    """

    def cells(tuning: str, critic: str, lam: float, tokens: int = lengths[-1], **changes: Any) -> list[Cell]:
        axes: dict[str, Any] = {"model": "tiny", "task": TASKS, "tokens": tokens, "seed": tuple(seeds)}
        axes |= {"tuning": tuning, "critic": critic, "gae_lambda": lam, "learning_rate": rate[tuning]}
        return grid(**axes | {"adam_epsilon": 1e-8} | changes)

    lambdas = (0.95, 1.0)
    combinations = [
        (tuning, critic, lam, tokens)
        for tuning in TUNINGS
        for critic in CRITICS[tuning]
        for lam in lambdas
        for tokens in (lengths if critic == "head" else lengths[-1:])
    ]
    run(cell for each in combinations for cell in cells(*each))
    table = [
        {
            "tuning": tuning,
            "critic": critic,
            "gae_lambda": lam,
            "task": task,
            "tokens": tokens,
            **{
                figure: interval(run.by_seed(cells(tuning, critic, lam, tokens, task=task), figure))
                for figure in ("objective", "score", "kl", "explained_variance")
            },
        }
        for tuning, critic, lam, tokens in combinations
        for task in TASKS
    ]
    decisions: dict[str, Any] = {}

    def by_lambda(lam: float) -> list[float]:
        return run.by_seed(cell for each in combinations if each[2] == lam for cell in cells(*each))

    lam, gains = choose({each: by_lambda(each) for each in lambdas}, FORMER["gae_lambda"])
    decisions["gae_lambda"] = {"default": FORMER["gae_lambda"], "chosen": lam, "gains": gains}
    critics = {}
    for tuning in TUNINGS:
        found = {critic: run.by_seed(cells(tuning, critic, lam)) for critic in CRITICS[tuning]}
        critics[tuning], gains = choose(found, FORMER["critic"])
        decisions[f"critic, {tuning}"] = {"default": "head", "chosen": critics[tuning], "gains": gains}
    base = {tuning: cells(tuning, critics[tuning], lam) for tuning in TUNINGS}
    for name, values in OTHERS.items():
        changed = {value: [cell | {name: value} for tuning in TUNINGS for cell in base[tuning]] for value in values}
        run(cell for some in changed.values() for cell in some)
        default = 1e-8 if name == "adam_epsilon" else FORMER[name]
        found = {default: run.by_seed(cell for tuning in TUNINGS for cell in base[tuning])}
        found |= {value: run.by_seed(some) for value, some in changed.items()}
        best, gains = choose(found, default)
        decisions[name] = {"default": default, "chosen": best, "gains": gains}
    return {"table": table, "decisions": decisions, "gae_lambda": lam, "critics": critics}


def chosen_settings(found: dict[str, Any], tuning: str) -> dict[str, Any]:
    """The settings of a tuning that the comparisons came to."""
    decided = {name: found["decisions"][name]["chosen"] for name in OTHERS}
    return {"critic": found["critics"][tuning], "gae_lambda": found["gae_lambda"], **decided}


def confirm(
    run: Runner, rate: dict[str, float], found: dict[str, Any], seeds: Sequence[int], cases: Sequence[tuple[str, int]]
) -> dict[str, Any]:
    """What was chosen against the defaults until now, on seeds that took no part in the choice."""
    result: dict[str, Any] = {}
    for tuning in TUNINGS:
        rows = {}
        for name, settings in (("former", FORMER), ("chosen", chosen_settings(found, tuning))):
            axes: dict[str, Any] = {"model": "tiny", "tuning": tuning, "seed": tuple(seeds), **settings}
            rows[name] = [
                (task, tokens, grid(**axes, task=task, tokens=tokens, learning_rate=rate[tuning]))
                for task, tokens in cases
            ]
            run(cell for *_, some in rows[name] for cell in some)
        result[tuning] = [
            {
                "task": task,
                "tokens": tokens,
                "former": interval(run.by_seed(before)),
                "chosen": interval(run.by_seed(after)),
                "gain": gain(run.by_seed(after), run.by_seed(before)),
                **{
                    f"{name}_{figure}": interval(run.by_seed(some, figure))
                    for name, some in (("former", before), ("chosen", after))
                    for figure in ("score", "kl")
                },
            }
            for (task, tokens, before), (*_, after) in zip(rows["former"], rows["chosen"], strict=True)
        ]
    return result


def penalties(
    run: Runner, rate: dict[str, float], found: dict[str, Any], seeds: Sequence[int], tokens: int
) -> list[dict[str, Any]]:
    """What a penalty on completions that were cut does to their share and to the score."""
    rows = []
    for tuning, penalty in itertools.product(TUNINGS, (0.0, 1.0)):
        axes: dict[str, Any] = {"model": "tiny", "tuning": tuning, "seed": tuple(seeds), "task": TASKS}
        axes |= chosen_settings(found, tuning) | {"tokens": tokens, "learning_rate": rate[tuning]}
        some = grid(**axes, missing_eos_penalty=penalty)
        run(some)
        figures = {name: interval(run.by_seed(some, name)) for name in ("eos_rate", "score", "kl")}
        rows.append({"tuning": tuning, "tokens": tokens, "missing_eos_penalty": penalty, **figures})
    return rows


def main() -> None:
    """Entry of the command."""
    arguments = parser(__doc__)
    arguments.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each")
    arguments.add_argument("--journal", type=Path, help="file to keep finished runs in, and to take them from")
    arguments.add_argument("--part", choices=["tiny", "embedded"], help="only this model; the other's result is kept")
    options = arguments.parse_args()
    seeds, fresh, lengths, cases = SEEDS, FRESH, LENGTHS, CASES
    if options.quick:
        seeds, fresh, lengths, cases = range(1), range(100, 101), (8,), [("first", 8)]
        ROUNDS.update(tiny=1)
        RATES["tiny"] = {tuning: values[1:2] for tuning, values in RATES["tiny"].items()}
    run = Runner(options.jobs, options.journal)
    file = RESULTS / "ppo_defaults.json"
    details: dict[str, Any] = json.loads(file.read_text())["details"] if options.part and file.is_file() else {}
    if options.part != "embedded":
        rate = rates(run, "tiny", seeds[:2], lengths[-1:])
        found = compare(run, rate["best"], seeds, lengths)
        details["tiny"] = {
            "rates": rate,
            **found,
            "confirmed": confirm(run, rate["best"], found, fresh, cases),
            "penalties": penalties(run, rate["best"], found, seeds, lengths[0]),
        }
    if options.part == "embedded" or not (options.part or options.quick):
        details["embedded"] = {"rates": rates(run, "embedded", range(2), ())}
    run.pool.shutdown()
    ratios: dict[str, Any] = {}
    for tuning, rows in details.get("tiny", {}).get("confirmed", {}).items():
        for row in rows:
            ratios[f"{tuning}_{row['task']}_{row['tokens']}_gain"] = row["gain"]
    finish("ppo_defaults", ratios, details, ("torch", "transformers", "peft"), options.quick)


if __name__ == "__main__":
    main()
