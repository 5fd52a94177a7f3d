"""Write docs/benchmarks.md, and the tables of docs/defaults.md, from the last results in benchmarks/results.

make bench
python scripts/publish_benchmarks.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif.config import PPOConfig
from rlaif.records import read_json

ROOT = Path(__file__).parent.parent
PAGE, DEFAULTS = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "defaults.md"
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """<!-- made by scripts/publish_benchmarks.py -->

# Benchmarks

`make bench` runs them all, `python -m benchmarks.NAME` one of them, `--quick` a short form that writes no result;
`ppo`, `preference_model` and `dpo` compute in float32 unless `--dtype bfloat16` is given, which writes a result of
its own. The command of each result stands under its table. Each compares side by side in one run, in turns, and
writes its ratios, every single measurement, the machine and the versions to `benchmarks/results/NAME.json`. Timings
depend on the machine; ratios less so. Where a command says `--repeats 1` they come from one run of each side, without
an interval, and want care: such runs of `preference_model` differed by a fifth within two hours, while TRL's own
speed moved by half.
"""

# Benchmark: what it is about, and what each of its figures says.
MEANING: dict[str, tuple[str, dict[str, str]]] = {
    "labeling_engine": (
        "Labeling by vLLM in process, against the bare engine that is fed the same token ids.",
        {
            "vs_bare_engine": "labels a second of `rlaif.label` over those of the bare engine",
            "cpu_vs_bare_engine": "processor seconds a label over those of the bare engine",
        },
    ),
    "labeling_server": (
        "Labeling over HTTP.",
        {
            "labels_per_s_instant_server": "labels a second by chat, server answers at once, one client core",
            "labels_per_s_instant_batched": "the same by batches of token ids",
            "vs_bare_client": "labels a second over those of a bare asyncio client, against a real vLLM server",
            "vs_distilabel": "wall time of distilabel over that of `rlaif.label` on the same comparisons",
        },
    ),
    "labeling_scale": (
        "A million comparisons against ten thousand, scripted labeler, killed and resumed.",
        {
            "rss_ratio_1m_to_10k": "resident memory at its peak",
            "cost_per_label_ratio_1m_to_10k": "seconds a label",
            "seconds_to_go_on_at_nine_tenths": "seconds until the resumed run asks its next question",
        },
    ),
    "labeling_budget": (
        "What asking less saves ([label.md](label.md)).",
        {
            "calls_saved_at_equal_agreement": "share of calls saved, one principle",
            "policy": "by this setting",
            "confirmed_saved": "share saved on new prompts",
            "confirmed_difference": "change of agreement there, with its 95 % interval",
            "principles_calls_saved_at_equal_agreement": "share of calls saved, three principles",
            "principles_policy": "by this setting",
            "principles_confirmed_saved": "share saved on new prompts",
            "principles_confirmed_difference": "change of agreement there, with its 95 % interval",
        },
    ),
    "ppo": (
        "PPO against TRL 1.12.0's (the last release that has one) at equal settings; `lean` is TRL's with a frozen "
        "value model.",
        {
            "episodes_per_s": "episodes a second",
            "episodes_per_s_vs_trl": "over TRL's",
            "episodes_per_s_vs_trl_lean": "over TRL's, lean",
            "peak_memory_mb": "peak resident memory, MB",
            "peak_memory_vs_trl": "over TRL's",
            "peak_memory_vs_trl_lean": "over TRL's, lean",
            "time_sampling": "share of the time in sampling",
            "time_scoring": "in scoring by the PM",
            "time_reference": "in the reference",
            "time_update": "in updates",
            "time_other": "in everything else",
            "maths_difference_to_trl": "largest differences of losses, advantages, rewards to what TRL's loop computes",
            "cost_ratio_100k_to_1k": "cost of an episode with 100,000 prompts over that with 1,000",
            "fraction_of_peak": "our operations a second over those of a large product on this machine",
            "start_up_s_100k": "seconds to load the tiny model and to make a trainer of 100,000 prompts in memory",
            "command_start_s": "seconds of `rlaif.train method=ppo` beside its round, 1,000 prompts, the second time",
            "command_start_s_100k": "with 100,000 prompts",
        },
    ),
    "preference_model": (
        "PM training against TRL's stock trainer.",
        {
            "pairs_per_s_vs_trl": "pairs a second over TRL's, one pair a prompt",
            "pairs_loss_difference": "largest difference of a step's loss",
            "groups_of_4_per_s_vs_trl": "pairs a second over TRL's, all pairs of four completions",
            "groups_of_4_loss_difference": "largest difference of a step's loss",
        },
    ),
    "dpo": (
        "DPO against TRL's stock trainer.",
        {
            "pairs_per_s_vs_trl": "pairs a second over TRL's, one pair a prompt",
            "pairs_loss_difference": "largest difference of a step's loss",
            "groups_of_4_per_s_vs_trl": "pairs a second over TRL's, all pairs of four completions",
            "groups_of_4_loss_difference": "largest difference of a step's loss",
        },
    ),
    "optimum": (
        "How far training ends from the KL-regularised optimum that is known ([optimum.md](optimum.md)).",
        {
            "reference_total_variation": "total variation before training",
            "dpo_total_variation": "after DPO",
            "ppo_total_variation": "after PPO",
            "ppo_full_total_variation": "of all weights",
            "ppo_raw_total_variation": "by its defaults on raw scores",
            "ppo_raw_to_dpo_total_variation": "between that and DPO",
            "ppo_raw_adapter_total_variation": "with a critic of its own adapter",
            "ppo_raw_backprop_total_variation": "with a critic that trains the policy's features",
            "ppo_raw_full_total_variation": "all weights",
            "ppo_raw_full_backprop_total_variation": "all weights, with such a critic",
            "ppo_raw_k3_total_variation": "with k3 in the reward, which is biased",
        },
    ),
    "ppo_defaults": (
        "What PPO's defaults gain over the former ones in its objective, on fresh seeds ([defaults.md](defaults.md)).",
        {},
    ),
    "labeling_attacks": (
        "How often the loser of a pair wins when its text is attacked, and when harmless sentences of the same length "
        "are put there instead ([safety.md](safety.md)).",
        {},
    ),
}


def shown(value: Any) -> str:
    """A figure as the page shows it."""
    if value is None:
        return "not measured"
    if isinstance(value, dict):
        if "flip_rate" in value:
            rates = [
                f"{value[name]:.0%} [{value[name + '_low']:.0%}, {value[name + '_high']:.0%}]"
                for name in ("flip_rate", "flip_rate_harmless")
            ]
            return f"{rates[0]} attacked, {rates[1]} harmless, n = {value['flip_rate_n']}"
        return ", ".join(f"{name} {shown(one)}" for name, one in value.items())
    if isinstance(value, list):
        middle, low, high = value
        return f"{shown(middle)} [{shown(low)}, {shown(high)}]"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}"
    return str(value)


def section(name: str, title: str, result: dict[str, Any]) -> str:
    """One benchmark, in one precision."""
    about, meaning = MEANING[name]
    machine = result["machine"]
    processor = f"{machine['cores']} cores of {machine['processor']}"
    where = f"{machine['gpu']}, {processor}" if machine.get("gpu") else f"{processor}, no GPU"
    versions = ", ".join(
        f"{package} {version}" for package, version in result["versions"].items() if package != "rlaif"
    )
    lines = [
        f"## {title}",
        "",
        about,
        "",
        "| figure | value | what it says |",
        "|---|---|---|",
        *(f"| `{key}` | {shown(value)} | {meaning.get(key, '')} |" for key, value in result["ratios"].items()),
        "",
        f"`{result['command']}`, {result['date']}, {where}" + (f"; {versions}" if versions else "") + ".",
    ]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    found = [(name, RESULTS / f"{name}{suffix}.json") for name in MEANING for suffix in ("", "_bfloat16")]
    sections = [section(name, file.stem, read_json(file)) for name, file in found if file.is_file()]
    return "\n\n".join([HEAD.rstrip("\n"), *sections]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def estimate(row: Sequence[float], digits: int = 2) -> str:
    """A mean and its interval."""
    middle, low, high = (f"{value:.{digits}f}" for value in row)
    return f"{middle} [{low}, {high}]"


PUBLISHED: dict[str, tuple[str, str]] = {
    "gae_lambda": ("0.95", "1"),
    "gamma": ("1.0", "1"),
    "kl_coef": ("0.05", "0.01"),
    "clip_range": ("0.2", "0.2"),
    "value_clip_range": ("0.2", "0.5"),
    "value_coef": ("0.1", "a model of its own"),
    "epochs": ("4", "1"),
    "learning_rate": ("3e-6", "1e-6; in its scripts 5e-7"),
    "value_learning_rate": ("3e-6", "9e-6"),
    "adam_epsilon": ("1e-8", "1e-8"),
    "missing_eos_penalty": ("none; in its commands 1.0", "none"),
}
"""Setting: TRL's and OpenRLHF's value."""


def default_tables(details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The tables of docs/defaults.md by name."""
    ours = PPOConfig()
    rates = f"{ours.RATES.lora:g} (LoRA), {ours.RATES.full:g} (full)"
    yield (
        "published",
        table(
            ["setting", "here", "TRL", "OpenRLHF"],
            [
                [f"`ppo.{name}`", rates if name == "learning_rate" else f"{getattr(ours, name):g}", *values]
                for name, values in PUBLISHED.items()
            ],
        ),
    )
    tiny = details["tiny"]
    columns = sorted({(row["task"], row["tokens"]) for row in tiny["table"]})
    rows: dict[tuple[str, str, float], dict[tuple[str, int], str]] = {}
    for row in tiny["table"]:
        cells = rows.setdefault((row["tuning"], row["critic"], row["gae_lambda"]), {})
        cells[row["task"], row["tokens"]] = estimate(row["objective"])
    yield (
        "critics",
        table(
            ["tuning", "critic", "lambda", *(f"{task}, {tokens} tokens" for task, tokens in columns)],
            [[*map(str, key), *(cells.get(column, "") for column in columns)] for key, cells in rows.items()],
        ),
    )
    yield (
        "decisions",
        table(
            ["setting", "default until then", "gain of others over it", "chosen"],
            [
                [
                    name,
                    f"{row['default']}",
                    "; ".join(f"{value}: {estimate(gain)}" for value, gain in row["gains"].items()),
                    f"{row['chosen']}",
                ]
                for name, row in tiny["decisions"].items()
            ],
        ),
    )
    yield (
        "confirmed",
        table(
            ["tuning", "reward", "tokens", "score", "KL", "objective", "gain"],
            [
                [
                    tuning,
                    row["task"],
                    str(row["tokens"]),
                    f"{row['former_score'][0]:.2f} -> {row['chosen_score'][0]:.2f}",
                    f"{row['former_kl'][0]:.1f} -> {row['chosen_kl'][0]:.1f}",
                    f"{row['former'][0]:.2f} -> {row['chosen'][0]:.2f}",
                    estimate(row["gain"]),
                ]
                for tuning, found in tiny["confirmed"].items()
                for row in found
            ],
        ),
    )
    yield (
        "rates",
        table(
            ["model", "tuning", "learning rate", "objective", "score", "KL"],
            [
                [model, tuning, rate, *(estimate(row[name]) for name in ("objective", "score", "kl"))]
                for model in ("tiny", "embedded")
                if model in details
                for tuning, found in details[model]["rates"]["table"].items()
                for rate, row in found.items()
            ],
        ),
    )
    yield (
        "penalties",
        table(
            ["tuning", "tokens", "penalty", "share that ended", "score", "KL"],
            [
                [
                    row["tuning"],
                    str(row["tokens"]),
                    str(row["missing_eos_penalty"]),
                    *(estimate(row[name]) for name in ("eos_rate", "score", "kl")),
                ]
                for row in tiny["penalties"]
            ],
        ),
    )


def with_tables(text: str) -> str:
    """docs/defaults.md with its tables made anew."""
    if not (RESULTS / "ppo_defaults.json").is_file():
        return text
    result = read_json(RESULTS / "ppo_defaults.json")
    for name, rows in default_tables(result["details"]):
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        assert found.search(text), name
        text = found.sub(lambda match: f"{begin}\n{rows}\n\n{end}", text)  # noqa: B023
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    DEFAULTS.write_text(with_tables(DEFAULTS.read_text(encoding="utf-8")), encoding="utf-8")
