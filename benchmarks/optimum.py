"""PPO and DPO on a problem so small that the best policy can be written down: docs/optimum.md.

    python -m benchmarks.optimum [--quick]

Four prompts, nine tokens, completions of at most two: 73 possible completions of each prompt, each with a score of its
own, to which every prompt adds an offset. The policy that maximises E[r] - beta KL(pi || ref) is then a table, and so
is every policy that was trained. PPO runs with its defaults, but for the size of things and the price of KL.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import finish, parser, say
from rlaif.chat import encode_chat
from rlaif.config import DPOConfig, Dtype, KLEstimator, ModelConfig, PPOConfig, Tuning
from rlaif.methods.dpo import train_dpo
from rlaif.methods.ppo import train_ppo
from rlaif.models import load_causal_lm, load_tokenizer
from rlaif.policy import completion_logps
from rlaif.records import Example, Preference, Prompt

LETTERS = "abcdefgh"
TOKENS = 2
PROMPTS = [Prompt(letter, ({"role": "user", "content": letter},)) for letter in "abcd"]
OFFSETS = (0.0, 2.0, 4.0, 6.0)
"""Added to every score of a prompt. The best policy is the same with and without."""
BETA = 0.5
PENALTY = PPOConfig().missing_eos_penalty


@dataclass
class Target:
    """Rewards, the price of KL, the reference, and the best policy for them (eq. 4 of docs/optimum.md): (4, 73)."""

    rewards: Tensor
    beta: float
    reference: Tensor
    optimum: Tensor

    def distances(self, policy: Tensor) -> dict[str, list[float]]:
        """How far a policy is from the best one, and how good it is, prompt by prompt."""
        kl = (policy * (policy / self.reference).log()).sum(dim=1)
        return {
            "total_variation": total_variation(policy, self.optimum).tolist(),
            "kl_to_optimum": (policy * (policy / self.optimum).log()).sum(dim=1).tolist(),
            "objective": ((policy * self.rewards).sum(dim=1) - self.beta * kl).tolist(),
        }


@dataclass
class Problem:
    """Every completion of every prompt with its score and its probability under the reference: (4, 73) each."""

    model: ModelConfig
    texts: list[str]
    ended: list[bool]
    scores: Tensor
    reference: Tensor

    def score(self, examples: Sequence[Example]) -> list[float]:
        """The scores of completions."""
        rows = [prompt.prompt_id for prompt in PROMPTS]
        return [
            float(self.scores[rows.index(each.prompt[0]["content"]), self.texts.index(each.completion)])
            for each in examples
        ]

    def target(self, scores: Tensor, beta: float = BETA) -> Target:
        """What PPO by its defaults maximises, given scores as they enter the reward: (4, 73)."""
        rewards = scores - PENALTY * (~torch.tensor(self.ended)).double()
        # Minus the largest of each prompt: exp must not overflow, and nothing changes.
        weights = self.reference * ((rewards - rewards.max(dim=1, keepdim=True).values) / beta).exp()
        return Target(rewards, beta, self.reference, weights / weights.sum(dim=1, keepdim=True))

    def distribution(self, model: ModelConfig) -> Tensor:
        """Probability of every completion under a policy: (4, 73)."""
        tokenizer, policy = load_tokenizer(model), load_causal_lm(model)
        rows = [
            [*tokenizer.convert_tokens_to_ids(list(text)), *[tokenizer.eos_token_id] * ended]
            for text, ended in zip(self.texts, self.ended, strict=True)
        ]
        prompts = [encode_chat(tokenizer, prompt.messages) for prompt in PROMPTS for _ in rows]
        logps = completion_logps(policy, prompts, rows * len(PROMPTS), tokenizer.pad_token_id, batch_size=len(prompts))
        table = torch.tensor([sum(row) for row in logps], dtype=torch.float64).exp()
        return table.view(len(PROMPTS), len(rows))


def total_variation(one: Tensor, other: Tensor) -> Tensor:
    """Half the sum of absolute differences, of each prompt: (4, 73), (4, 73) -> (4,)."""
    return (one - other).abs().sum(dim=1) / 2


def make_problem(folder: Path, seed: int = 0) -> Problem:
    """A random reference and random scores (standard normal, plus the offsets)."""
    _save_model(folder, seed)
    texts = ["".join(letters) for n in range(TOKENS + 1) for letters in itertools.product(LETTERS, repeat=n)]
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(PROMPTS), len(texts), generator=generator, dtype=torch.float64)
    scores += torch.tensor(OFFSETS, dtype=torch.float64).unsqueeze(1)
    ended = [len(text) < TOKENS for text in texts]
    model = ModelConfig(name=str(folder), device="cpu", dtype=Dtype.float32)
    problem = Problem(model, texts, ended, scores, torch.empty(0))
    problem.reference = problem.distribution(model)
    return problem


def _save_model(folder: Path, seed: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(LETTERS)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    # A prompt ends with a token that no completion goes on from, so that no two states look alike to the model.
    tokenizer.chat_template = "{{ messages[0]['content'] }}<end>"
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # A reference that is not uniform.
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


SIZE: dict[str, Any] = {
    "iterations": 80,
    "rollouts": 512,
    "rollout_batch_size": 512,
    "minibatch_size": 128,
    "micro_batch_size": 128,
    "max_new_tokens": TOKENS,
    "save_every": 1000,
    "log_samples": 0,
    "report_to": [],
    "learning_rate": 3e-3,
    "value_learning_rate": 1e-2,
}
"""What depends on the size of the problem: so small a model takes large learning rates."""
RAW: dict[str, Any] = {"normalize_scores": False, "score_clip": 100.0, "kl_coef": BETA}
"""Scores as they are, so that beta is ``kl_coef``."""
NORMALISED: dict[str, Any] = {"kl_coef": 0.2}
"""The price of KL in standard deviations of the score, higher than by default: else one completion takes all."""


def by_ppo(problem: Problem, folder: Path, seed: int = 0, **changes: Any) -> tuple[Tensor, Target]:
    """The distribution that PPO arrives at, (4, 73), and what it was after."""
    folder.mkdir(parents=True)
    config = PPOConfig(**(SIZE | changes))
    first: list[float] = []

    def score(examples: Sequence[Example]) -> list[float]:
        found = problem.score(examples)
        first.extend([] if first else found)
        return found

    policy = train_ppo(config, problem.model, PROMPTS, score, folder, seed)
    scores = problem.scores
    if config.normalize_scores:
        noted = torch.tensor(first, dtype=torch.float64)
        scores = (scores - noted.mean()) / noted.std(unbiased=False)
    target = problem.target(scores.clamp(-config.score_clip, config.score_clip), config.kl_coef)
    return problem.distribution(ModelConfig(name=str(policy), device="cpu", dtype=Dtype.float32)), target


def by_dpo(problem: Problem, folder: Path, seed: int = 0, **changes: Any) -> Tensor:
    """The distribution that DPO arrives at, on every pair of completions with its Bradley-Terry probability."""
    rewards = problem.target(problem.scores).rewards
    pairs = []
    for row, prompt in enumerate(PROMPTS):
        for one, other in itertools.combinations(range(len(problem.texts)), 2):
            first, second = (one, other) if rewards[row, one] >= rewards[row, other] else (other, one)
            pairs.append(
                Preference(
                    prompt.prompt_id,
                    prompt.messages,
                    problem.texts[first],
                    problem.texts[second],
                    str(first),
                    str(second),
                    float(torch.sigmoid(rewards[row, first] - rewards[row, second])),
                    "reward",
                    "simulated_human",
                    chosen_ended=problem.ended[first],
                    rejected_ended=problem.ended[second],
                )
            )
    shuffled = [pairs[index] for index in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
    settings = {"tuning": Tuning.full, "epochs": 5.0, "learning_rate": 5e-3, "batch_size": 16, "beta": BETA}
    folder.mkdir(parents=True)
    policy = train_dpo(DPOConfig(**(settings | changes)), problem.model, shuffled, folder, seed)
    return problem.distribution(ModelConfig(name=str(policy), device="cpu", dtype=Dtype.float32))


FULL: dict[str, Any] = {"tuning": Tuning.full, "learning_rate": 1e-3}
"""Each tuning has the rate that was best for it on the tiny model of docs/defaults.md."""
VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": NORMALISED,
    "ppo_full": NORMALISED | FULL,
    "ppo_raw": RAW,
    "ppo_raw_adapter": RAW | {"value_adapter": True},
    "ppo_raw_backprop": RAW | {"value_backprop": True},
    "ppo_raw_full": RAW | FULL,
    "ppo_raw_full_backprop": RAW | FULL | {"value_backprop": True},
    "ppo_raw_k3": RAW | {"kl_estimator": KLEstimator.k3},
}
"""What is changed of the defaults; ``raw``: scores are not normalised, so that the critic has to learn the offsets."""


def run(folder: Path, seeds: Sequence[int], variants: Sequence[str]) -> list[dict[str, Any]]:
    """Distances to the optimum of the reference and of what PPO and DPO make of it, for several problems."""
    rows = []
    for seed in seeds:
        problem = make_problem(folder / f"model-{seed}", seed)
        raw = problem.target(problem.scores)
        dpo = by_dpo(problem, folder / f"dpo-{seed}", seed)
        row: dict[str, Any] = {"reference": raw.distances(problem.reference), "dpo": raw.distances(dpo)}
        for name in variants:
            reached, target = by_ppo(problem, folder / f"{name}-{seed}", seed, **VARIANTS[name])
            row[name] = target.distances(reached)
            if name == "ppo_raw":
                row["ppo_raw_to_dpo"] = {"total_variation": total_variation(reached, dpo).tolist()}
            say(f"problem {seed}, {name}: {[round(each, 4) for each in row[name]['total_variation']]}")
        row["optimum"] = raw.distances(raw.optimum)
        rows.append({"seed": seed, **row})
    return rows


def main() -> None:
    """Entry of the command."""
    arguments = parser(__doc__).parse_args()
    variants = ["ppo"] if arguments.quick else list(VARIANTS)
    if arguments.quick:
        SIZE["iterations"] = 10
    with tempfile.TemporaryDirectory() as folder:
        problems = run(Path(folder), range(1 if arguments.quick else 3), variants)
    names = [name for name in problems[0] if name not in ("seed", "optimum")]
    ratios = {
        # The median, the smallest and the largest over prompts and problems.
        f"{name}_total_variation": [
            round(pick([each for row in problems for each in row[name]["total_variation"]]), 4)
            for pick in (statistics.median, min, max)
        ]
        for name in names
    }
    details = {"beta": BETA, "offsets": OFFSETS, "problems": problems}
    finish("optimum", ratios, details, ("torch", "transformers", "trl"), arguments.quick)


if __name__ == "__main__":
    main()
