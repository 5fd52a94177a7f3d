"""RLOO (Ahmadian et al. 2024) and GRPO (Shao et al. 2024) on TRL's trainers, with a reward of ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from rlaif.chat import encode_chat
from rlaif.config import GRPOConfig, Method, ModelConfig, OnlineConfig
from rlaif.generation import STREAM_ROLLOUT, generate
from rlaif.methods.supervised import (
    load_start,
    on_one_device,
    peft_arguments,
    run_trainer,
    save_result,
    trainer_arguments,
)
from rlaif.models import eos_ids, load_causal_lm, load_tokenizer, seed_everything
from rlaif.policy import Policy
from rlaif.processes import rank, world_size
from rlaif.records import Example, Prompt, UserError
from rlaif.rewards import RewardModel
from rlaif.sharding import gathered

with warnings.catch_warnings():
    # TRL looks for vLLM, which is not used here, and comments on its version.
    warnings.simplefilter("ignore")
    from trl import GRPOConfig as TRLGRPOConfig
    from trl import GRPOTrainer, RLOOTrainer
    from trl import RLOOConfig as TRLRLOOConfig
    from trl.models import unwrap_model_for_generation

log = logging.getLogger("rlaif")


class _OwnSampling:
    """Prompts and completions are made as everywhere in this project.

    Control tokens inside prompts stay text. A completion's random numbers are a function of seed, step and place in
    the step, however many processes share it.
    """

    processing_class: Any
    model_wrapped: Any
    accelerator: Any
    state: Any
    args: Any
    eos_token_ids: list[int]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [encode_chat(self.processing_class, prompt) for prompt in prompts], None, {}

    def _sample(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        # Each process has as many rows of a step, in the order of the processes.
        first = rank() * len(prompts)
        seeds = [
            (self.args.seed, STREAM_ROLLOUT, self.state.global_step, first + row, 1) for row in range(len(prompts))
        ]
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model, gathered(model):
            found = generate(
                model,
                prompts,
                seeds,
                max_new_tokens=self.args.max_completion_length,
                temperature=self.args.temperature,
                eos=self.eos_token_ids,
                pad=self.processing_class.pad_token_id,
                training=True,
            )
        return [generation.tokens for generation in found]


class OwnRLOOTrainer(_OwnSampling, RLOOTrainer):
    """RLOOTrainer on prompts from outside."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any) -> list[list[int]]:
        return self._sample(prompt_ids)


class OwnGRPOTrainer(_OwnSampling, GRPOTrainer):
    """GRPOTrainer on prompts from outside."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any) -> tuple[list[list[int]], None]:
        return self._sample(prompt_ids), None


TRAINERS: dict[Method, tuple[Any, Any]] = {
    Method.rloo: (OwnRLOOTrainer, TRLRLOOConfig),
    Method.grpo: (OwnGRPOTrainer, TRLGRPOConfig),
}


def train_online(
    method: Method,
    config: OnlineConfig,
    start: ModelConfig,
    prompts: Sequence[Prompt],
    reward: RewardModel,
    folder: Path,
    seed: int,
) -> Path:
    """Train a policy by RLOO or GRPO; writes ``policy/`` and ``training.jsonl``.

    A completion without a score takes no part in its group.

    Raises:
        UserError: if there are too few prompts for one step.
    """
    seed_everything(seed)
    tokenizer = load_tokenizer(start)
    kept = _fitting(tokenizer, prompts, config, method.value)
    model = load_start(start, config.tuning)
    # TRL stops where the generation config says.
    model.generation_config.eos_token_id = eos_ids(model, tokenizer)
    trainer_class, arguments_class = TRAINERS[method]
    arguments = arguments_class(
        **trainer_arguments(config, start, folder, seed, len(kept) * config.generations),
        num_generations=config.generations,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=config.kl_coef,
        disable_dropout=True,
        trust_remote_code=start.trust_remote_code,
        **({"loss_type": config.loss_type.value} if isinstance(config, GRPOConfig) else {}),
    )
    trainer = trainer_class(
        model=model,
        reward_funcs=reward_function(reward, eos_ids(model, tokenizer), config.missing_eos_penalty),
        args=on_one_device(arguments, start),
        train_dataset=Dataset.from_list([{"prompt": list(prompt.messages)} for prompt in kept]),
        processing_class=tokenizer,
        **peft_arguments(config, start, model, "CAUSAL_LM"),
    )
    if trainer.ref_model is not None:
        # TRL loads it anew by the model's name, which knows of no revision and no merged adapter. By now FSDP has
        # spread it, or DeepSpeed has wrapped it.
        reference = getattr(trainer.ref_model, "module", trainer.ref_model)
        weights = load_causal_lm(start, merged=True).state_dict()
        set_model_state_dict(reference, weights, options=StateDictOptions(full_state_dict=True))
    run_trainer(trainer, folder, method.value)
    policy = Policy(trainer.model, tokenizer, config.tuning, start)
    save_result(trainer, folder, method.value, lambda: policy.save(folder / "policy"))
    return folder / "policy"


def reward_function(reward: RewardModel, eos: Sequence[int], missing_eos_penalty: float) -> Any:
    """A reward in the form that TRL calls; completions that were cut pay the penalty."""

    def score(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        texts = [completion[0]["content"].strip() for completion in completions]
        ended = [tokens[-1] in eos for tokens in completion_ids]
        scores = reward.score([Example(*row) for row in zip(prompts, texts, ended, strict=True)])
        return [
            None if score is None else score - missing_eos_penalty * (not end)
            for score, end in zip(scores, ended, strict=True)
        ]

    return score


def _fitting(tokenizer: Any, prompts: Sequence[Prompt], config: OnlineConfig, name: str) -> list[Prompt]:
    room = config.max_length - config.max_new_tokens
    kept = [prompt for prompt in prompts if len(encode_chat(tokenizer, prompt.messages)) <= room]
    if len(kept) < len(prompts):
        log.warning(
            "%s: %d of %d prompts leave no room for %s.max_new_tokens=%d within %s.max_length=%d and are left out",
            name,
            len(prompts) - len(kept),
            len(prompts),
            name,
            config.max_new_tokens,
            name,
            config.max_length,
        )
    needed = config.batch_size * config.gradient_accumulation_steps * world_size() // config.generations
    if len(kept) < needed:
        raise UserError(
            f"{name}: a step takes {needed} prompts ({name}.batch_size={config.batch_size} completions, "
            f"{name}.generations={config.generations} a prompt, {world_size()} process(es)), but there are "
            f"{len(kept)}; lower {name}.batch_size"
        )
    return kept
