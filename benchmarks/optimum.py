"""PPO and DPO on a problem so small that the best policy can be written down: docs/optimum.md.

    python -m benchmarks.optimum [--quick]

Nine tokens, completions of at most two: 73 possible completions, each with a reward of its own. The policy that
maximises E[r] - beta KL(pi || ref) is then a table, and so is every policy that was trained.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import finish, parser
from rlaif.chat import encode_chat
from rlaif.config import DPOConfig, Dtype, KLEstimator, ModelConfig, PPOConfig, Tuning
from rlaif.methods.dpo import train_dpo
from rlaif.methods.ppo import train_ppo
from rlaif.models import load_causal_lm, load_tokenizer
from rlaif.policy import completion_logps
from rlaif.records import Preference, Prompt

LETTERS = "abcdefgh"
TOKENS = 2
PROMPT = Prompt("p", ({"role": "user", "content": "a"},))
BETA = 0.5


@dataclass
class Problem:
    """Every completion with its reward and its probability under the reference and at the optimum: (73,) each."""

    model: ModelConfig
    texts: list[str]
    ended: list[bool]
    rewards: Tensor
    reference: Tensor
    optimum: Tensor

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """The reward of completions."""
        return [float(self.rewards[self.texts.index(text)]) for text in texts]

    def distribution(self, model: ModelConfig) -> Tensor:
        """Probability of every completion under a policy."""
        tokenizer, policy = load_tokenizer(model), load_causal_lm(model)
        rows = [
            [*tokenizer.convert_tokens_to_ids(list(text)), *[tokenizer.eos_token_id] * ended]
            for text, ended in zip(self.texts, self.ended, strict=True)
        ]
        prompt = encode_chat(tokenizer, PROMPT.messages)
        logps = completion_logps(policy, [prompt] * len(rows), rows, tokenizer.pad_token_id, batch_size=len(rows))
        return torch.tensor([sum(row) for row in logps], dtype=torch.float64).exp()

    def distances(self, probabilities: Tensor) -> dict[str, float]:
        """How far a policy is from the optimum, and how good it is."""
        kl = (probabilities * (probabilities / self.reference).log()).sum()
        return {
            "total_variation": float((probabilities - self.optimum).abs().sum() / 2),
            "kl_to_optimum": float((probabilities * (probabilities / self.optimum).log()).sum()),
            "objective": float((probabilities * self.rewards).sum() - BETA * kl),
        }


def make_problem(folder: Path, seed: int = 0) -> Problem:
    """A random reference and random rewards (standard normal)."""
    _save_model(folder, seed)
    texts = ["".join(letters) for n in range(TOKENS + 1) for letters in itertools.product(LETTERS, repeat=n)]
    rewards = torch.randn(len(texts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ended = [len(text) < TOKENS for text in texts]
    none = torch.empty(0)
    problem = Problem(
        ModelConfig(name=str(folder), device="cpu", dtype=Dtype.float32), texts, ended, rewards, none, none
    )
    problem.reference = problem.distribution(problem.model)
    weights = problem.reference * (rewards / BETA).exp()
    problem.optimum = weights / weights.sum()
    return problem


def _save_model(folder: Path, seed: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(LETTERS)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    # The one prompt is a token that no completion goes on from, so that no two states look alike to the model.
    tokenizer.chat_template = "<end>"
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
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


def by_ppo(problem: Problem, folder: Path, seed: int = 0, **changes: Any) -> Tensor:
    """The distribution that PPO arrives at: raw scores, so that beta is ``kl_coef``."""
    settings: dict[str, Any] = {
        "tuning": Tuning.full,
        "iterations": 80,
        "rollouts": 512,
        "rollout_batch_size": 512,
        "minibatch_size": 256,
        "micro_batch_size": 256,
        "epochs": 4,
        "max_new_tokens": TOKENS,
        "learning_rate": 5e-3,
        "value_learning_rate": 1e-2,
        "value_clip_range": 10.0,
        "value_coef": 1.0,
        "gae_lambda": 1.0,
        "kl_coef": BETA,
        "normalize_scores": False,
        "score_clip": 100.0,
        "save_every": 1000,
        "log_samples": 0,
    }
    folder.mkdir(parents=True)
    config = PPOConfig(**(settings | changes))
    policy = train_ppo(config, problem.model, [PROMPT], problem.score, folder, seed)
    return problem.distribution(ModelConfig(name=str(policy), device="cpu", dtype=Dtype.float32))


def by_dpo(problem: Problem, folder: Path, seed: int = 0, **changes: Any) -> Tensor:
    """The distribution that DPO arrives at, on every pair of completions with its Bradley-Terry probability."""
    pairs = []
    for one, other in itertools.combinations(range(len(problem.texts)), 2):
        first, second = (one, other) if problem.rewards[one] >= problem.rewards[other] else (other, one)
        margin = problem.rewards[first] - problem.rewards[second]
        pairs.append(
            Preference(
                PROMPT.prompt_id,
                PROMPT.messages,
                problem.texts[first],
                problem.texts[second],
                str(first),
                str(second),
                float(torch.sigmoid(margin)),
                "reward",
                "simulated_human",
                chosen_ended=problem.ended[first],
                rejected_ended=problem.ended[second],
            )
        )
    shuffled = [pairs[index] for index in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
    settings = {"tuning": Tuning.full, "epochs": 15.0, "learning_rate": 5e-3, "batch_size": 16, "beta": BETA}
    folder.mkdir(parents=True)
    policy = train_dpo(DPOConfig(**(settings | changes)), problem.model, shuffled, folder, seed)
    return problem.distribution(ModelConfig(name=str(policy), device="cpu", dtype=Dtype.float32))


def run(folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Distances to the optimum of the reference and of what PPO and DPO make of it, for several problems."""
    rows = []
    for seed in seeds:
        problem = make_problem(folder / f"model-{seed}", seed)
        reached = {
            "reference": problem.reference,
            "ppo": by_ppo(problem, folder / f"ppo-{seed}", seed),
            "ppo_k3": by_ppo(problem, folder / f"ppo-k3-{seed}", seed, kl_estimator=KLEstimator.k3),
            "dpo": by_dpo(problem, folder / f"dpo-{seed}", seed),
            "optimum": problem.optimum,
        }
        row: dict[str, Any] = {name: problem.distances(table) for name, table in reached.items()}
        row["ppo_to_dpo"] = float((reached["ppo"] - reached["dpo"]).abs().sum() / 2)
        rows.append({"seed": seed, **row})
    return rows


def main() -> None:
    """Entry of the command."""
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems = run(Path(folder), range(1 if arguments.quick else 3))
    ratios = {
        f"{name}_total_variation": round(max(row[name]["total_variation"] for row in problems), 4)
        for name in ("reference", "ppo", "ppo_k3", "dpo")
    }
    ratios["ppo_to_dpo_total_variation"] = round(max(row["ppo_to_dpo"] for row in problems), 4)
    details = {"beta": BETA, "problems": problems}
    finish("optimum", ratios, details, ("torch", "transformers", "trl"), arguments.quick)


if __name__ == "__main__":
    main()
