"""``python -m rlaif.train``: preferences -> preference_model/ or policy/, and its metrics."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.cli import launch
from rlaif.config import (
    ByTuning,
    Critic,
    Keep,
    LabelerType,
    Method,
    ModelConfig,
    PPOConfig,
    Reward,
    Sampler,
    TrainConfig,
    TrainerSettings,
    Tuning,
    ValueInit,
)
from rlaif.processes import asked, is_main, spreads_weights, world_size, zero_settings
from rlaif.records import UserError, existing_dir, find_prompts
from rlaif.splits import read_split

if TYPE_CHECKING:
    from rlaif.evaluation.pm_gate import PMGate
    from rlaif.methods.stages import Arm
    from rlaif.rewards import RewardSource

log = logging.getLogger("rlaif")

USAGE = """
Train on preferences or principles: a preference model (pm), or a policy by one of seven methods.

  python -m rlaif.train method=ppo policy.name=MODEL preferences=DIR prompts=FILE output_dir=DIR [key=value ...] [-m]

  method=ppo                      sft, critique_revision, pm, ppo, dpo, rloo, grpo, best_of_n;
                                  method=ppo,dpo seed=1,2,3 -m sweeps (-m anywhere)
  policy.name=MODEL               hub name, folder, or `embedded`; also the reference
  preferences=DIR                 train.parquet (and validation.parquet), or train.jsonl in TRL's or Anthropic HH's
                                  format; or a folder with one such folder per feedback: ai/, human/, simulated_human/
  'columns={chosen: good, rejected: bad}'
                                  what another dataset calls the columns
  'splits={train: train_prefs, validation: test_prefs}'
                                  and the splits
  feedback=ai                     which of the folders; or whose labels they are, where the file does not say
  demonstrations=FILE             sft: JSONL of messages, prompt and completion, or text; default: chosen completions
  sft_first=true                  fine-tune first; everything else starts from the result
  prompts=FILE                    prompts for rollouts and evaluation; default: those of the preferences
  drop_leaked=true                train on no preference or demonstration that resembles an evaluation prompt
  preference_model=DIR            PM for ppo, rloo, grpo, best_of_n; default: one is trained on the preferences first
  pm.gate=warn                    go on with a PM that is not shown to be above chance
  reward=labeler constitution=harmless labeler=...
                                  score completions by the labeler itself, without a PM
  eval.gold=vader                 judge the policy on held-out prompts; eval.enabled=false skips evaluation
  pm.ensemble=4  ppo.iterations=100  ppo.kl_coef=0.05  dpo.loss_type=ipo  sft.tuning=qlora  best_of_n.n=16 ...

output_dir gets pm/preference_model/, METHOD/policy/ with training.jsonl, and evaluation/metrics.json.
An interrupted run goes on when the same command is given again.
"""


@dataclass(frozen=True)
class Trained:
    """What came out of an arm: a policy (None for pm), a PM to score with, and for best_of_n what chooses.

    ``guide`` is what is known of the PM that guided the policy, where one did.
    """

    policy: ModelConfig | None
    pm: Path | None
    best_of: tuple[int, RewardSource] | None = None
    data: Mapping[str, str | bool | int | None] = field(default_factory=dict)
    """What its metrics say of the data behind it."""
    guide: PMGate | None = None
    """The PM's gate, where a PM guided it."""


def main(config: TrainConfig, output: Path) -> None:
    """Entry of the command."""
    check(config)
    # With FSDP, accelerate would by default load weights in one process, and hand them to the policy's alone: the
    # others would spread a reference that they never loaded.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not is_main():
        log.setLevel(logging.ERROR)
    trained = fit(config, output)
    if trained.policy is not None and config.eval.enabled:
        assert config.method is not None
        words = (config.method.value, trained.data["feedback"])
        measure(config, output, "_".join(str(word) for word in words if word), trained, trained.pm)
    if trained.guide is not None:
        trained.guide.tell()


def check(config: TrainConfig) -> None:
    """Everything that can be wrong and is cheap to see, before any work.

    Raises:
        UserError: naming the setting.
    """
    from rlaif.constitution import load_constitution
    from rlaif.methods.critique_revision import revising_principles
    from rlaif.methods.ppo_sampler import check_sampler
    from rlaif.methods.stages import REWARDED, labeler_reward
    from rlaif.rewards import check_unaudited

    method = config.method
    if method is None:
        raise UserError(f"method is not set: give method={'|'.join(method.value for method in Method)}")
    if not config.policy.name:
        raise UserError("policy.name is not set: name a hub model, a folder, or `embedded`")
    if config.eval.gold is not None:
        from rlaif.gold import check_gold

        check_gold(config.eval.gold)
    _check_launcher(config)
    if world_size() > 1:
        _check_processes(config, method)
    if config.sft_first and method is Method.sft:
        raise UserError("sft_first=true with method=sft: that is the same training twice; leave sft_first out")
    if config.reward is Reward.labeler and method not in REWARDED:
        raise UserError(f"reward=labeler: method={method.value} scores nothing; it is for ppo, rloo, grpo, best_of_n")
    if method is Method.ppo and config.ppo.value_init is ValueInit.pm:
        several = config.preference_model is None and config.pm.ensemble > 1
        if config.preference_model is not None:
            several = (Path(config.preference_model) / "ensemble.json").is_file()
        if several or config.reward is Reward.labeler:
            raise UserError("ppo.value_init=pm needs the head of one PM; with an ensemble or reward=labeler give zero")
        if config.preference_model is None and config.pm.model not in (None, config.policy.name):
            raise UserError(
                f"ppo.value_init=pm with pm.model={config.pm.model}: the PM's head reads the states of another model "
                "than the policy; give ppo.value_init=zero"
            )
    if method is Method.best_of_n and not config.eval.enabled:
        raise UserError("method=best_of_n trains nothing, so with eval.enabled=false there is nothing to do")
    asks_labeler = config.reward is Reward.labeler
    if asks_labeler:
        labeler_reward(config).check()
    if method is Method.critique_revision:
        revising_principles(load_constitution(config.constitution))
        if config.critique_revision.critic is Critic.labeler:
            asks_labeler = True
            if config.labeler.type is None:
                raise UserError("critique_revision.critic=labeler needs a labeler: labeler=hf, vllm, openai, scripted")
            check_unaudited("critique_revision.critic=labeler", config.labeler, config.labeling)
    if asks_labeler and config.labeler.type is LabelerType.openai:
        from rlaif.engines import build_labeler

        # Asks the server whether it is there, takes the key and serves the model.
        build_labeler(config.labeler, config.seed).close()
    _check_tunings(config)
    if method is Method.ppo:
        check_sampler(config.ppo, config.policy, config.sft_first)
    for name, settings in _trained(config).items():
        if settings.report_to:
            from rlaif.methods.trackers import check_trackers

            check_trackers(settings.report_to, name)


def _check_processes(config: TrainConfig, method: Method) -> None:
    """What several processes cannot do together.

    Raises:
        UserError: naming the setting or the device.
    """
    import torch

    from rlaif.models import pick_device

    count = world_size()
    if method is Method.ppo and config.ppo.minibatch_size % count:
        raise UserError(
            f"ppo.minibatch_size={config.ppo.minibatch_size} is shared by {count} processes: make it a multiple of "
            f"{count}, and ppo.rollouts one of it"
        )
    if method is Method.ppo and config.ppo.sampler is Sampler.vllm:
        raise UserError(f"ppo.sampler=vllm works with one process, and {count} were launched; give ppo.sampler=hf")
    if "pm" in _trained(config) and config.pm.keep is Keep.best:
        raise UserError(f"pm.keep=best works with one process, and {count} were launched; give pm.keep=last")
    if not torch.cuda.is_available():
        return
    device, local = pick_device(config.policy.device), int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"each process takes a GPU of its own, but this machine has {torch.cuda.device_count()}; launch fewer"
        )
    if device != torch.device("cuda", local):
        raise UserError(
            f"policy.device={config.policy.device}: of several processes each takes a GPU of its own; leave it out, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPUs"
        )


def _check_launcher(config: TrainConfig) -> None:
    """Refuse what a launcher asks for and would not get.

    Raises:
        UserError: naming it.
    """
    on_cpu, several = os.environ.get("ACCELERATE_USE_CPU") == "True", "MASTER_ADDR" in os.environ
    if on_cpu and several and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --cpu starts a single process, whatever --num_processes says (it leaves the others to "
            "MPI); launch with --multi_gpu --num_processes N, which without GPUs starts N processes on CPUs"
        )
    whole = "launch with --multi_gpu, where each process holds the whole model"
    if asked("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(f"accelerate is configured for Megatron-LM, which rlaif does not support; use FSDP, or {whole}")
    deepspeed = asked("ACCELERATE_USE_DEEPSPEED")
    if not deepspeed and not spreads_weights():
        return
    import torch

    name = "DeepSpeed" if deepspeed else "FSDP"
    if config.method is Method.ppo and asked("FSDP_OFFLOAD_PARAMS"):
        raise UserError("accelerate is configured for fsdp_offload_params, which method=ppo does not use; leave it out")
    if config.method is Method.ppo and asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("method=ppo does not use fsdp_activation_checkpointing; give ppo.gradient_checkpointing=true")
    for group, settings in _trained(config).items():
        if settings.tuning is Tuning.qlora:
            raise UserError(f"accelerate is configured for {name}, which {group}.tuning=qlora does not use; {whole}")
    if deepspeed:
        _check_deepspeed(config.method)
    elif os.environ.get("FSDP_VERSION") != "2":
        raise UserError("accelerate is configured for version 1 of FSDP; give it fsdp_version: 2 (--fsdp_version 2)")
    if not torch.cuda.is_available():
        raise UserError(f"accelerate uses {name} on GPUs alone, and there is none here; {whole}")


def _check_deepspeed(method: Method | None) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("accelerate is configured for DeepSpeed, which is not installed: pip install deepspeed")
    settings = zero_settings()
    stage = str(settings["stage"])
    if stage not in ("0", "1", "2"):
        raise UserError(
            f"DeepSpeed's ZeRO stage is {stage}, but rlaif trains with 1 or 2; to share the weights use FSDP"
        )
    for name in ("offload_optimizer", "offload_param"):
        if method is Method.ppo and (settings.get(name) or {}).get("device", "none") != "none":
            raise UserError(f"accelerate is configured for ZeRO's {name}, which method=ppo does not use; leave it out")


def _trained(config: TrainConfig) -> dict[str, TrainerSettings | PPOConfig]:
    """The settings of everything that will be trained, by their group."""
    from rlaif.methods.stages import REWARDED

    used: dict[str, TrainerSettings | PPOConfig] = {}
    if config.sft_first:
        used["sft"] = config.sft
    if config.method in REWARDED and config.reward is Reward.pm and config.preference_model is None:
        used["pm"] = config.pm
    if config.method is not None and config.method is not Method.best_of_n:
        used[config.method.value] = getattr(config, config.method.value)
    return used


def _check_tunings(config: TrainConfig) -> None:
    used = _trained(config)
    for name, settings in used.items():
        if (
            settings.tuning is Tuning.qlora
            and name != "sft"
            and config.sft_first
            and config.sft.tuning is not Tuning.full
        ):
            raise UserError(
                f"sft_first=true with {name}.tuning=qlora needs sft.tuning=full: QLoRA starts from a whole model, "
                "not from an adapter"
            )
    if any(settings.tuning is not Tuning.lora for settings in used.values()):
        from rlaif.models import check_tuning

        for name, settings in used.items():
            check_tuning(settings.tuning, config.policy, name)


def with_rates(config: TrainConfig) -> TrainConfig:
    """The configuration with every learning rate as it is in force: what is recorded, and what decides the content."""
    groups: dict[str, Any] = {
        name: value.resolved() for name, value in vars(config).items() if isinstance(value, ByTuning)
    }
    for name, settings in _trained(config).items():
        log.info("%s: learning rate %g (%s.tuning=%s)", name, settings.rate, name, settings.tuning.value)
    return replace(config, **groups)


def fit(config: TrainConfig, output: Path) -> Trained:
    """Train one arm into ``output``.

    Raises:
        PMGateError: if a PM that knows nothing would guide it.
    """
    from rlaif.evaluation.pm_gate import examine_pm, hold_to_gate
    from rlaif.methods.stages import ONLINE, REWARDED, SUPERVISED, Arm, reward_source, started_from, train_pm_stage

    config = with_rates(config)
    method = config.method
    assert method is not None
    arm = Arm(config, output, config.policy)
    _check_evaluation(arm)
    if method is Method.ppo:
        from rlaif.methods.ppo_checks import check_lengths

        validation = arm.validation_prompts() if config.ppo.eval_every else []
        check_lengths(config.ppo, config.policy, validation)
    given = existing_dir(config.preference_model, "preference_model") if config.preference_model else None
    data = _data_facts(arm)
    guide = None
    if given is not None and method in REWARDED and config.reward is Reward.pm:
        guide = hold_to_gate(given, config.pm, method.value)
    arm = started_from(arm)
    if method is Method.pm:
        folder = train_pm_stage(arm)
        examine_pm(folder, config.pm).tell()
        return Trained(None, folder)
    if method in SUPERVISED:
        return Trained(_folder(config, SUPERVISED[method](arm)), given, data=data)
    reward, pm = reward_source(arm)
    if pm is not None and guide is None:
        guide = hold_to_gate(pm, config.pm, method.value)
    if method is Method.best_of_n:
        return Trained(arm.start, pm or given, (config.best_of_n.n, reward), data, guide)
    return Trained(_folder(config, ONLINE[method](arm, reward)), pm or given, data=data, guide=guide)


def _folder(config: TrainConfig, policy: Path) -> ModelConfig:
    return replace(config.policy, name=str(policy), adapter=None, revision=None)


def _check_evaluation(arm: Arm) -> None:
    """Held-out prompts must be there before hours of training, and should be held out."""
    config = arm.config
    if config.prompts is None and config.drop_leaked:
        raise UserError("drop_leaked=true needs the prompts that evaluation holds out: give prompts=FILE")
    if config.method is Method.pm or not config.eval.enabled:
        if config.drop_leaked:
            _warn_of_leaks(arm)
        return
    if config.prompts is None:
        raise UserError(
            "prompts is not set: evaluation needs held-out prompts; give prompts=FILE, or eval.enabled=false"
        )
    _warn_of_leaks(arm)


def _warn_of_leaks(arm: Arm) -> None:
    """Preferences and demonstrations that people bring may hold the very prompts that evaluation holds out."""
    leaks = arm.leaks
    if not leaks.rows:
        return
    told = f"{leaks.rows} rows of the training data resemble {leaks.prompts} of {leaks.held_out} evaluation prompts"
    if arm.config.drop_leaked:
        log.info("%s: they are left out of the training", told)
    else:
        log.warning("WARNING: %s; the evaluation will flatter; drop_leaked=true leaves these rows out", told)


def _data_facts(arm: Arm) -> dict[str, str | bool | int | None]:
    """What the evaluation must say of the data behind the policy."""
    dropped = arm.config.drop_leaked
    feedback, declared = arm.origin
    return {
        "feedback": feedback,
        "feedback_declared": declared,
        "leaked_prompts": 0 if dropped else arm.leaks.prompts,
        "leaked_rows": 0 if dropped else arm.leaks.rows,
        "dropped_leaked": arm.leaks.rows if dropped else 0,
    }


def measure(
    config: TrainConfig,
    output: Path,
    name: str,
    trained: Trained,
    preference_model: Path | None = None,
    baseline_samples: Path | None = None,
) -> None:
    """Evaluate a trained policy into ``output/evaluation``."""
    from rlaif.evaluate import run_evaluation

    assert config.method is not None
    assert trained.policy is not None
    prompts_file = find_prompts(config.prompts)
    run_evaluation(
        output / "evaluation",
        policy=trained.policy,
        reference=config.policy,
        prompts=read_split(prompts_file, config.data, config.eval.split)[: config.eval.max_prompts],
        prompts_file=prompts_file,
        config=config.eval,
        row={
            "name": name,
            "method": config.method.value,
            "seed": config.seed,
            **trained.data,
            **(trained.guide.flat() if trained.guide else {}),
        },
        seed=config.seed,
        baseline_samples=baseline_samples,
        preference_model=preference_model,
        best_of=trained.best_of,
    )


if __name__ == "__main__":
    launch("train", main, USAGE)
