"""Every model family goes through SFT, PM, DPO and PPO, and ends its turns with its own token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlaif.chat import encode_chat, turn_end
from rlaif.config import DPOConfig, LoraSettings, ModelConfig, PMConfig, PPOConfig, SFTConfig, Tuning
from rlaif.demonstrations import Demonstration
from rlaif.generation import generate
from rlaif.methods.dpo import train_dpo
from rlaif.methods.pm import train_pm
from rlaif.methods.ppo import train_ppo
from rlaif.methods.sft import _rows, train_sft
from rlaif.models import eos_ids, load_causal_lm, load_tokenizer
from rlaif.policy import completion_logits, completion_logps, pack
from rlaif.preference_model import load_scorer, pm_config
from rlaif.prefix import shareable
from rlaif.records import Example, Preference, Prompt, UserError
from rlaif.siblings import joinable, lay_out, visible
from tests.methods.families import FAMILIES, family

USER = ({"role": "user", "content": "question"},)
PAIRS = [Preference(f"p{i}", USER, "a" * (3 + i % 3), "z" * (3 + i % 2), "0", "1", 0.9, "test", "ai") for i in range(8)]
LORA = LoraSettings(r=2, alpha=4)


# One of each kind in every run of the tests: its own end of a turn, alibi instead of positions, no end of a turn.
_ALWAYS = ("gemma", "bloom", "glm")


def _marked(name: str) -> object:
    return name if name in _ALWAYS else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[_marked(name) for name in FAMILIES])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModelConfig]:
    folder = family(request.param, tmp_path_factory.mktemp("families") / request.param)
    return request.param, ModelConfig(name=str(folder), device="cpu")


def test_completions_end_with_the_turn(model: tuple[str, ModelConfig]) -> None:
    name, config = model
    tokenizer = load_tokenizer(config)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name][2])
    assert turn_end(tokenizer) == end
    assert end in eos_ids(load_causal_lm(config), tokenizer)
    (row,) = _rows(tokenizer, [Demonstration(USER, "reply")], 100)
    assert row["input_ids"][-1] == end
    # What SFT trains on is how a conversation with that reply starts, up to the end of the turn.
    whole = encode_chat(tokenizer, [*USER, {"role": "assistant", "content": "reply"}], generation_prompt=False)
    if end in whole:
        assert row["input_ids"] == whole[: len(row["input_ids"])]
    else:
        assert row["input_ids"][:-1] == whole[: len(row["input_ids"]) - 1]


@torch.no_grad()
def test_a_shared_prefix_changes_no_logits(model: tuple[str, ModelConfig]) -> None:
    name, config = model
    loaded = load_causal_lm(config)
    # Where attention ends at some distance nothing is shared.
    assert shareable(loaded) == (name not in ("mistral", "gemma2", "gemma3_text"))
    start = list(range(20, 32))
    prompts, completions = [[*start, 5, 6, 7], [*start, 8]], [[20], [21, 22, 23]]
    alone, shared = (pack(prompts, completions, 0, torch.device("cpu"), share) for share in (False, True))
    assert shared.prefix is not None
    real = alone.completion_mask.bool()
    expected, found = (completion_logits(loaded, batch)[real] for batch in (alone, shared))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_completions_in_one_row_change_no_states(model: tuple[str, ModelConfig]) -> None:
    name, config = model
    loaded = load_causal_lm(config)
    # Where attention ends at some distance, or counts by the mask, each completion has a row of its own.
    assert joinable(loaded) == (name not in ("mistral", "gemma2", "gemma3_text", "bloom"))
    if not joinable(loaded):
        return
    rows = [[[5, 6, 7, 20], [5, 6, 7, 21, 22, 23], [5, 6, 7, 24, 25]], [[8, 9, 10, 11, 12]]]
    alone, together = (lay_out(rows, 0, False, hidden) for hidden in (None, 10**6))
    assert (len(alone["input_ids"]), len(together["input_ids"])) == (4, 2)
    expected, found = (
        loaded(
            input_ids=batch["input_ids"], attention_mask=visible(batch["part"]), position_ids=batch["positions"]
        ).logits[batch["row"], batch["column"]]
        for batch in (alone, together)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sampling_says_what_a_forward_pass_says(model: tuple[str, ModelConfig]) -> None:
    """With rows that end early, so that the cache is cut while it grows."""
    _, config = model
    loaded = load_causal_lm(config)
    prompts = [[20 + row, 6, 7, *range(row)] for row in range(9)]
    ends = list(range(0, 200, 5))
    found = generate(
        loaded, prompts, [(row, 1) for row in range(9)], max_new_tokens=9, temperature=1.0, eos=ends, pad=0
    )
    assert len({len(one.tokens) for one in found}) > 2
    expected = completion_logps(loaded, prompts, [one.tokens for one in found], 0)
    for one, logps in zip(found, expected, strict=True):
        assert one.logps == pytest.approx(logps, abs=1e-4)


@pytest.mark.parametrize("tuning", [Tuning.lora, pytest.param(Tuning.full, marks=pytest.mark.slow)])
def test_every_method_trains(model: tuple[str, ModelConfig], tuning: Tuning, tmp_path: Path) -> None:
    _, start = model
    common = {"tuning": tuning, "lora": LORA, "max_steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    demonstrations = [Demonstration(pair.prompt, pair.chosen) for pair in PAIRS]
    policies = [
        train_sft(SFTConfig(**common), start, demonstrations, tmp_path / "sft", seed=0),
        train_dpo(DPOConfig(**common), start, PAIRS, tmp_path / "dpo", seed=0),
    ]
    pm = train_pm(PMConfig(**common), start, PAIRS, PAIRS, tmp_path / "pm", seed=0)
    scorer = load_scorer(pm_config(start, pm))
    examples = [Example(USER, text) for text in ("a", "zzzzzzz")]
    alone = [scorer.score([example])[0] for example in examples]
    assert scorer.score(examples) == pytest.approx(alone, abs=1e-4)

    settings = PPOConfig(
        tuning=tuning,
        lora=LORA,
        iterations=2,
        rollouts=4,
        minibatch_size=4,
        micro_batch_size=4,
        max_new_tokens=6,
        learning_rate=1e-3,
    )
    (tmp_path / "ppo").mkdir()
    # Its start checks fail where padding or positions change what the model says.
    policies.append(train_ppo(settings, start, [Prompt("p", USER)], scorer.score, tmp_path / "ppo", seed=0))
    for policy in policies:
        load_causal_lm(ModelConfig(name=str(policy), device="cpu"))


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path: Path) -> None:
    """Baichuan is not part of transformers: one line says how to allow its own code."""
    folder = family("llama", tmp_path / "baichuan")
    config = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "baichuan"')
    auto = '"auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"},\n  "model_type"'
    (folder / "config.json").write_text(config.replace('"model_type"', auto))
    with pytest.raises(UserError, match="trust_remote_code=true"):
        load_causal_lm(ModelConfig(name=str(folder), device="cpu"))
