"""PPO's rollouts by vLLM: the weights that train are handed over before every batch of completions.

An adapter goes over as a PEFT folder under a number and a name that were never used, so that neither vLLM's adapters
nor its cached prefixes can be those of an earlier step; all weights go over as a folder of safetensors. Token ids go in
and come out. The log-probabilities that come with them are only compared with the policy's: training takes its own.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlaif.config import VLLM_RANKS, ModelConfig, PPOConfig, Sampler, Tuning
from rlaif.engines.vllm_process import VLLMProcess, check_installed
from rlaif.generation import Generation
from rlaif.models import arithmetic, eos_ids, is_adapter, load_causal_lm, pick_device, resolve_model
from rlaif.policy import Policy
from rlaif.processes import world_size
from rlaif.records import UserError

if TYPE_CHECKING:
    from rlaif.engines.vllm_server import VLLMServer

SHAKE = 0.1
"""How far weights are moved to see whether a sampler follows, as a share of each matrix's norm."""
_KEPT = "the same command goes on from the newest checkpoint"


def check_sampler(config: PPOConfig, start: ModelConfig, sft_first: bool = False) -> None:
    """Everything about ``ppo.sampler`` that can be wrong and is cheap to see; a server is asked.

    Raises:
        UserError: naming the setting.
    """
    if config.sampler is not Sampler.vllm:
        return
    if world_size() > 1:
        raise UserError("ppo.sampler=vllm runs in one process; several need ppo.sampler=hf")
    if config.vllm.url is not None:
        if sft_first or start.adapter or is_adapter(start.name):
            raise UserError(
                "ppo.vllm.url: PPO would start from other weights than the server's, from a fine-tuned policy or an "
                "adapter; leave the url out, or start from a merged model that the server serves"
            )
        _open_server(config).close()
        return
    check_installed(config.vllm.python, "ppo.sampler=vllm", "ppo.vllm.python")
    if config.tuning is Tuning.lora and pick_device(start.device).type == "cuda" and arithmetic(start) == torch.float32:
        raise UserError(
            "ppo.sampler=vllm: on a GPU vLLM computes adapters in 16 bits alone; set policy.dtype=bfloat16, or "
            "ppo.tuning=full"
        )


class VLLMSampler:
    """Samples from a policy with vLLM.

    Args:
        policy: what is sampled from, as its weights are at each call.
        config: of PPO.
        folder: where weights lie on their way to vLLM; gone when the sampler is closed.

    Raises:
        UserError: if vLLM cannot start, ends early, or refuses the weights or a prompt.
    """

    def __init__(self, policy: Policy, config: PPOConfig, folder: Path) -> None:
        self.policy, self.config = policy, config
        self.folder = folder.absolute()
        self.number = 0
        self.eos = eos_ids(policy.model, policy.tokenizer)
        shutil.rmtree(self.folder, ignore_errors=True)  # what a run that was killed has left
        self.engine: VLLMServer | VLLMProcess
        if config.vllm.url is not None:
            self.engine = _open_server(config)
        else:
            self.engine = VLLMProcess(self._arguments(), config.vllm.python, "ppo.sampler=vllm", _KEPT)

    def __enter__(self) -> VLLMSampler:
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], reference: bool = False
    ) -> list[Generation]:
        """A completion of each prompt (token ids) by the policy, or by the reference.

        Args:
            prompts: token ids of each prompt.
            seeds: integers that seed each completion.
            reference: leave the adapter off; only for ``tuning=lora``.
        """
        target = {} if reference else self.hand_over()
        parameters = {
            "max_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "logprobs": 0,
            # Completions end where training says that they end, whatever the model's own settings are.
            "ignore_eos": True,
            "stop_token_ids": self.eos,
        }
        answers = self._ask(
            [
                {"ids": list(ids), **target, "sample": {**parameters, "seed": one_seed(seed)}}
                for ids, seed in zip(prompts, seeds, strict=True)
            ]
        )
        found = [Generation(answer["tokens"], answer["finish"] == "stop", answer["logps"]) for answer in answers]
        for generation in found:
            if generation.ended and generation.tokens[-1] not in self.eos:
                raise UserError(
                    f"ppo.sampler=vllm: a completion ended at token {generation.tokens[-1]}; the policy's end at "
                    f"{', '.join(map(str, self.eos))}"
                )
        return found

    def hand_over(self) -> dict[str, Any]:
        """Give vLLM the policy's present weights; returns what a job must carry to be done with them."""
        self.number += 1
        model, folder = self.policy.model, self.folder / str(self.number)
        if self.policy.tuning is Tuning.full:
            model.save_pretrained(folder)
            self._ask([{"weights": str(folder)}])
            shutil.rmtree(folder)
            return {}
        # A preference model may be another adapter on the same base. The embeddings are never adapted.
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        self._ask([{"load": str(folder), "adapter": self.number}])
        # The newest stays: a server that serves others too may set it aside and read it again.
        shutil.rmtree(self.folder / str(self.number - 1), ignore_errors=True)
        return {"adapter": self.number}

    def _ask(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = self.engine.ask(jobs)
        for answer in answers:
            if "error" in answer:
                raise UserError(f"ppo.sampler=vllm: {' '.join(answer['error'].split())[:400]} ({_KEPT})")
        return answers

    def _arguments(self) -> dict[str, Any]:
        """Of vLLM's engine."""
        start, settings = self.policy.start, self.config.vllm
        model = resolve_model(start.name)
        arguments: dict[str, Any] = {"model": model, "revision": start.revision}
        if start.adapter or is_adapter(model):
            arguments = {"model": self._merged_start(), "revision": None}
        context = getattr(self.policy.model.config.get_text_config(), "max_position_embeddings", None)
        needed = self.config.max_prompt_length + self.config.max_new_tokens
        arguments |= {
            "dtype": str(arithmetic(start)).removeprefix("torch."),
            "trust_remote_code": start.trust_remote_code,
            "max_model_len": min(needed, context or needed),
            # At the sampling temperature, as the policy's are.
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "enable_log_requests": False,
            "disable_log_stats": True,
        }
        if self.policy.tuning is not Tuning.full:
            rank = next(rank for rank in VLLM_RANKS if rank >= self.config.lora.r)
            # One place: the adapter of a step takes that of the step before.
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
        return {**arguments, **settings.engine_args}

    def _merged_start(self) -> str:
        """A folder with the starting policy, whose adapters are merged, as the policy's base is."""
        folder = self.folder / "start"
        load_causal_lm(replace(self.policy.start, device="cpu"), merged=True).save_pretrained(folder)
        self.policy.tokenizer.save_pretrained(folder)
        return str(folder)


def _open_server(config: PPOConfig) -> VLLMServer:
    from rlaif.engines.vllm_server import VLLMServer

    assert config.vllm.url is not None
    return VLLMServer(config.vllm.url, "ppo.vllm.url", config.max_prompt_length + config.max_new_tokens, _KEPT)


@contextlib.contextmanager
def open_sampler(policy: Policy, config: PPOConfig, folder: Path) -> Iterator[VLLMSampler | None]:
    """The sampler that ``ppo.sampler`` asks for; none: the policy's own model samples."""
    if config.sampler is Sampler.hf:
        yield None
        return
    with VLLMSampler(policy, config, folder / "sampler") as sampler:
        yield sampler


@contextlib.contextmanager
def shaken(policy: Policy, seed: int, by: float = SHAKE) -> Iterator[None]:
    """The policy with other weights, for the length of the block: each matrix is off by ``by`` of its norm."""
    from peft.tuners.lora import LoraLayer

    kept = {name: value.detach().to("cpu", copy=True) for name, value in policy.trainable()}
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        if policy.tuning is Tuning.full:
            for _, value in policy.trainable():
                if value.dim() > 1:
                    change = noise(value)
                    value += change * (by * value.norm() / change.norm())
        else:
            for layer in policy.model.modules():
                if isinstance(layer, LoraLayer) and "default" in layer.lora_B:
                    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
                    change = noise(up)
                    effect = layer.scaling["default"] * (change @ down).norm()
                    up += change * (by * layer.get_base_layer().weight.norm() / effect)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in policy.trainable():
                value.copy_(kept[name])


def one_seed(words: Sequence[int]) -> int:
    """A completion's seed as one number of 63 bits."""
    return int(np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0] >> np.uint64(1))
