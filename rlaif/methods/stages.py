"""What each method needs and makes: the stages behind ``rlaif.train``, each in an output folder of its own."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlaif.artifacts import labeler_inputs, model_inputs, run_stage
from rlaif.config import Critic, Feedback, Method, ModelConfig, Reward, Split, TrainConfig
from rlaif.config.training import ByTuning
from rlaif.constitution import find_constitution, load_constitution
from rlaif.demonstrations import Demonstration, chosen_completions, read_demonstrations
from rlaif.engines.base import Engine
from rlaif.preference_model import pm_feedback
from rlaif.preferences import ENDINGS, hub_preferences, of_feedback, prompts_of, read_preferences
from rlaif.processes import is_main, spread, world_size
from rlaif.records import (
    Example,
    Message,
    Preference,
    Prompt,
    UserError,
    content_hash,
    existing_dir,
    existing_file,
    find_prompts,
    write_jsonl,
)
from rlaif.rewards import LabelerReward, PMReward, RewardSource, known_scores
from rlaif.splits import read_split, shared, validation_ids

log = logging.getLogger("rlaif")

Inputs = dict[str, Path | str | None]

REWARDED = (Method.ppo, Method.rloo, Method.grpo, Method.best_of_n)
"""Methods that score completions."""


def preference_folder(
    preferences: str | None,
    feedback: Feedback | None,
    columns: Mapping[str, str] | None = None,
    splits: Mapping[str, str] | None = None,
) -> Path:
    """The dataset for a feedback (None: ``ai``): a subfolder of that name, else the folder itself, else the hub's.

    Raises:
        UserError: if it holds no training split, or not one that ``splits`` names; says what was looked for.
    """
    splits = splits or {}
    train = splits.get("train", "train")
    root = hub_preferences(preferences) if preferences else None
    root = root or existing_dir(preferences, "preferences")
    name = (feedback or Feedback.ai).value
    for folder in (root / name / "preferences", root / name, root):
        if _has_split(folder, train):
            missing = [f"{ours}: {theirs}" for ours, theirs in splits.items() if not _has_split(folder, theirs)]
            if missing:
                raise UserError(f"splits={{{', '.join(missing)}}}: {folder} has no such file")
            if folder == root:
                # Labels of one kind must not be trained on, and reported, as another.
                of_feedback(read_preferences(folder, train, columns), feedback, folder)
            return folder
    raise UserError(
        f"preferences={root}: no {train}.parquet, {train}.jsonl or {train}.jsonl.gz in it or in its subfolder "
        f"{name} (feedback={name}); splits={{train: NAME}} says what else it is called"
    )


def _has_split(folder: Path, name: str) -> bool:
    return any((folder / f"{name}.{ending}").is_file() for ending in ENDINGS)


def needs_preferences(config: TrainConfig) -> bool:
    """Whether a method has to have preferences."""
    if config.sft_first and config.demonstrations is None:
        return True
    if config.method is Method.sft:
        return config.demonstrations is None
    if config.method in REWARDED:
        return config.reward is Reward.pm and config.preference_model is None
    return config.method in (Method.pm, Method.dpo)


@dataclass(frozen=True)
class Leaks:
    """Training data that resembles evaluation prompts."""

    texts: frozenset[str] = frozenset()
    """The prompts concerned, as :attr:`Prompt.text`."""
    rows: int = 0
    """Preferences and demonstrations with such a prompt."""
    prompts: int = 0
    """Evaluation prompts that they resemble, ..."""
    held_out: int = 0
    """... of so many."""


@dataclass(frozen=True)
class Arm:
    """One line of training: what it reads, and the policy it starts from."""

    config: TrainConfig
    output: Path
    start: ModelConfig

    @cached_property
    def source(self) -> Path | None:
        """The folder of the preferences; None where there is none and none is needed."""
        config = self.config
        if config.preferences is None and not needs_preferences(config):
            return None
        return preference_folder(config.preferences, config.feedback, config.columns, config.splits)

    def preferences(self, split: str) -> list[Preference]:
        """One split of the preferences; no rows without a dataset.

        Where a PM is trained or a policy on prompts, a dataset without a validation split holds out
        ``data.validation_fraction`` of its prompts for one; SFT and DPO measure nothing on it.

        Raises:
            UserError: if the training split is empty.
        """
        if self.source is None:
            return []
        rows = self._parts[split]
        if split != "train":
            return rows
        if not rows:
            raise UserError(f"{self.source}: the training split is empty")
        kept = [row for row in rows if not self.drops(row.prompt)]
        if not kept:
            raise UserError(f"{self.source}: drop_leaked=true leaves nothing to train on")
        return kept

    @property
    def _holds_out(self) -> bool:
        measures = self.config.method in (Method.pm, *REWARDED)
        if self.source is None or not measures or not self.config.data.validation_fraction:
            return False
        return not _has_split(self.source, self.config.splits.get("validation", "validation"))

    @cached_property
    def _parts(self) -> dict[str, list[Preference]]:
        """Training and validation preferences, before any is left out for resembling what is evaluated."""
        assert self.source is not None
        # A folder is called after the feedback by whoever made it.
        named = Feedback.ai.value in (self.source.name, self.source.parent.name)
        feedback = self.config.feedback or (Feedback.ai if named else None)
        train = of_feedback(self._read("train"), feedback, self.source)
        if self._holds_out:
            return self._held_out(train)
        if train:
            feedback = Feedback(train[0].feedback)
        return {"train": train, "validation": of_feedback(self._read("validation"), feedback, self.source)}

    def _read(self, split: str) -> list[Preference]:
        assert self.source is not None
        return read_preferences(self.source, self.config.splits.get(split, split), self.config.columns)

    def _held_out(self, rows: Sequence[Preference]) -> dict[str, list[Preference]]:
        data = self.config.data
        held_out = validation_ids(prompts_of(rows), data)
        parts: dict[str, list[Preference]] = {"train": [], "validation": []}
        for row in rows:
            parts["validation" if row.prompt_id in held_out else "train"].append(row)
        if held_out:
            log.info(
                "%s has no validation split: %d of its %d preferences are held out for one "
                "(data.validation_fraction=%g; splits={validation: NAME} takes another split, 0 holds nothing out)",
                self.source,
                len(parts["validation"]),
                len(rows),
                data.validation_fraction,
            )
        return parts

    @property
    def feedback(self) -> str:
        """Whose labels: the setting, or what the preferences say."""
        if self.config.feedback is not None or self.source is None:
            return (self.config.feedback or Feedback.ai).value
        rows = self._parts["train"]
        return rows[0].feedback if rows else Feedback.ai.value

    @property
    def declared(self) -> bool:
        """Whether it is the user who says whose feedback the preferences are, for some at least."""
        return self.source is not None and any(row.declared for row in self._parts["train"])

    @property
    def origin(self) -> tuple[str | None, bool]:
        """Whose feedback trains the policy, None where nobody says, and whether that is the user's word alone."""
        config, rewarded = self.config, self.config.method in REWARDED
        if config.method is Method.critique_revision or (rewarded and config.reward is Reward.labeler):
            return Feedback.ai.value, False
        said: tuple[str | None, bool] = (None, False)
        if rewarded and config.preference_model:
            said = pm_feedback(existing_dir(config.preference_model, "preference_model"))
        elif needs_preferences(config):
            return self.feedback, self.declared
        if said[0] is None and config.feedback is not None:
            return config.feedback.value, True
        return said

    @cached_property
    def leaks(self) -> Leaks:
        """What the training data shares with the prompts that evaluation holds out."""
        config = self.config
        if config.prompts is None or not (self._evaluates or config.drop_leaked):
            return Leaks()
        shown: list[Sequence[Message]] = []
        if needs_preferences(config) and self.source is not None:
            shown += [row.prompt for row in self._parts["train"]]
        shown += [each.prompt for each in self._demonstrations if each.prompt]
        held_out = read_split(find_prompts(config.prompts), config.data, config.eval.split)
        trained = [Prompt("", tuple(messages)) for messages in shown]
        ours, theirs = shared(held_out, trained, config.data.near_duplicate_threshold)
        return Leaks(frozenset(trained[place].text for place in theirs), len(theirs), len(ours), len(held_out))

    @property
    def _evaluates(self) -> bool:
        return self.config.eval.enabled and self.config.method is not Method.pm

    @cached_property
    def _demonstrations(self) -> list[Demonstration]:
        """The demonstrations that are trained on; none where that is chosen completions."""
        config = self.config
        if config.demonstrations is None or not (config.sft_first or config.method is Method.sft):
            return []
        return read_demonstrations(existing_file(config.demonstrations, "demonstrations"))

    def demonstrations(self) -> list[Demonstration]:
        """What SFT imitates: a file of demonstrations, or the chosen completions.

        Raises:
            UserError: if nothing is left.
        """
        if self.config.demonstrations is None:
            return chosen_completions(self.preferences("train"))
        kept = [each for each in self._demonstrations if not self.drops(each.prompt)]
        if not kept:
            raise UserError(f"{self.config.demonstrations}: drop_leaked=true leaves nothing to train on")
        return kept

    def drops(self, prompt: Sequence[Message]) -> bool:
        """Whether a row with this prompt is left out of the training data (``drop_leaked``)."""
        return self.config.drop_leaked and Prompt("", tuple(prompt)).text in self.leaks.texts

    def dropped(self) -> Inputs:
        """For the fingerprint: what is left out depends on the evaluation's prompts, which are no input otherwise."""
        if not self.config.drop_leaked or not self.leaks.texts:
            return {}
        return {"leaked": f"{self.leaks.rows} rows dropped ({content_hash(sorted(self.leaks.texts))})"}

    @property
    def preference_inputs(self) -> Inputs:
        """The files of the preference dataset that training reads."""
        folder = self.source
        if folder is None:
            return {}
        files = {
            f"preferences/{split}.{ending}": folder / f"{self.config.splits.get(split, split)}.{ending}"
            for split in ("train", "validation")
            for ending in ENDINGS
        }
        inputs: Inputs = {role: file for role, file in files.items() if file.is_file()}
        inputs |= self.dropped()
        if self.declared:
            inputs["preferences/feedback"] = f"{self.feedback}, declared by the user"
        if self._holds_out:
            data = self.config.data
            inputs["preferences/held_out"] = (
                f"{data.validation_fraction} after {data.test_fraction}, alike from {data.near_duplicate_threshold}"
            )
        return inputs

    def prompts(self) -> tuple[list[Prompt], Inputs]:
        """Training prompts: those of ``prompts``, else those of the preferences; and where they come from.

        Raises:
            UserError: if there are neither.
        """
        if self.config.prompts:
            file = find_prompts(self.config.prompts)
            return read_split(file, self.config.data, Split.train), {"prompts": file}
        if self.source is None:
            raise UserError("prompts is not set: give prompts=FILE (or preferences=DIR, whose prompts are then used)")
        return prompts_of(self.preferences("train")), self.preference_inputs

    def validation_prompts(self) -> list[Prompt]:
        """Prompts to choose a checkpoint on: never those of the test split.

        Raises:
            UserError: if there are none.
        """
        if self.config.prompts:
            return read_split(find_prompts(self.config.prompts), self.config.data, Split.validation)
        found = prompts_of(self.preferences("validation"))
        if not found:
            raise UserError(
                f"ppo.eval_every={self.config.ppo.eval_every}: {self.source} has no validation split, nor enough "
                "prompts to hold some out for one; give prompts=FILE, or 0"
            )
        return found

    def run(
        self,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Inputs,
        make: Callable[[Path], None],
        carry_over: Sequence[str] = (),
    ) -> Path:
        """Run a stage into its folder, unless it is up to date."""
        # Where things lie and on which device they are computed decides nothing; the model is an input.
        own = {"columns": self.config.columns, "trust_remote_code": self.start.trust_remote_code}
        rates = {name: each.resolved() for name, each in settings.items() if isinstance(each, ByTuning)}
        settings = {**settings, **rates, **own}
        if world_size() > 1 and stage != Method.ppo.value:
            # A batch is per process: more of them take larger steps. Those of PPO are shared.
            settings["processes"] = world_size()
        inputs = {**inputs, **model_inputs("start", self.start)}
        made = run_stage(
            stage, self.output / stage, settings, inputs, make, self.config.seed, carry_over, together=True
        )
        # Trainers and their models refer to each other; the next stage, or the evaluation, loads more beside them.
        gc.collect()
        return made


def train_sft_stage(arm: Arm) -> Path:
    """Fine-tune on demonstrations, or on chosen completions; returns the policy."""
    config = arm.config
    file = existing_file(config.demonstrations, "demonstrations") if config.demonstrations else None
    data = arm.demonstrations()

    def make(folder: Path) -> None:
        from rlaif.methods.sft import train_sft

        train_sft(config.sft, arm.start, data, folder, config.seed)

    inputs: Inputs = {"demonstrations": file, **arm.dropped()} if file else arm.preference_inputs
    return arm.run("sft", {"settings": config.sft}, inputs, make) / "policy"


def train_critique_revision_stage(arm: Arm) -> Path:
    """Sample, critique, revise, fine-tune on the revisions; returns the policy."""
    config = arm.config
    settings = config.critique_revision
    constitution = load_constitution(config.constitution)
    prompts, inputs = arm.prompts()
    by_labeler = settings.critic is Critic.labeler

    def make(folder: Path) -> None:
        from rlaif.engines import build_labeler
        from rlaif.engines.hf import HFEngine
        from rlaif.labeling.store import STORE, VerdictStore
        from rlaif.methods.critique_revision import revise
        from rlaif.methods.sft import train_sft

        # Every process writes, and critiques unless a labeler does: one asks that for all, in one store and budget.
        with contextlib.ExitStack() as opened:
            store = opened.enter_context(VerdictStore(folder / STORE)) if is_main() else None
            writer = opened.enter_context(HFEngine(arm.start))
            critic: Engine | None = writer
            if by_labeler:
                critic = opened.enter_context(build_labeler(config.labeler, config.seed)) if is_main() else None
            items = revise(prompts, writer, critic, constitution, settings, store, config.seed, alone=by_labeler)
        if is_main():
            write_jsonl(folder / "revisions.jsonl", (vars(item) for item in items))
        data = [item.demonstration() for item in items if item.dropped is None]
        train_sft(settings, arm.start, data, folder, config.seed, "critique_revision")

    from rlaif.labeling.store import STORE_FILES

    described: dict[str, Any] = {"settings": settings, "data": config.data}
    inputs |= {"constitution": find_constitution(config.constitution)}
    if by_labeler:
        described |= {"labeler": config.labeler}
        inputs |= labeler_inputs(config.labeler)
    return arm.run("critique_revision", described, inputs, make, STORE_FILES) / "policy"


def train_pm_stage(arm: Arm) -> Path:
    """Train a preference model; returns its folder."""
    config = arm.config
    train, validation = arm.preferences("train"), arm.preferences("validation")

    def make(folder: Path) -> None:
        from rlaif.methods.pm import train_pm

        train_pm(config.pm, arm.start, train, validation, folder, config.seed, config.eval.gold)

    settings = {"pm": config.pm, "gold": config.eval.gold}
    inputs = arm.preference_inputs
    if config.pm.model:
        inputs |= model_inputs("pm_model", ModelConfig(name=config.pm.model))
    return arm.run("pm", settings, inputs, make) / "preference_model"


def train_dpo_stage(arm: Arm) -> Path:
    """Train by DPO; returns the policy."""
    config = arm.config
    train = arm.preferences("train")

    def make(folder: Path) -> None:
        from rlaif.methods.dpo import train_dpo

        train_dpo(config.dpo, arm.start, train, folder, config.seed)

    return arm.run("dpo", {"settings": config.dpo}, arm.preference_inputs, make) / "policy"


def train_ppo_stage(arm: Arm, reward: RewardSource) -> Path:
    """Train by PPO; returns the policy."""
    config = arm.config
    prompts, inputs = arm.prompts()
    validation = arm.validation_prompts() if config.ppo.eval_every else []
    pm = reward.folder if isinstance(reward, PMReward) and not reward.is_ensemble else None

    def make(folder: Path) -> None:
        from rlaif.methods.ppo import train_ppo

        if pm is not None:
            # PPO loads a single PM by itself: it may share the policy's base model.
            train_ppo(config.ppo, arm.start, prompts, None, folder, config.seed, validation, pm)
            return
        with reward.open(folder) as model:

            def score(examples: Sequence[Example]) -> list[float]:
                return known_scores(spread(model.score, examples))

            train_ppo(config.ppo, arm.start, prompts, score, folder, config.seed, validation)

    settings = {"ppo": config.ppo, "data": config.data, **reward.settings}
    return arm.run("ppo", settings, {**reward.inputs, **inputs}, make, reward.carry_over) / "policy"


def train_online_stage(arm: Arm, reward: RewardSource) -> Path:
    """Train by RLOO or GRPO; returns the policy."""
    config = arm.config
    method = config.method
    assert method is not None
    options = config.rloo if method is Method.rloo else config.grpo
    prompts, inputs = arm.prompts()

    def make(folder: Path) -> None:
        from rlaif.methods.online import train_online

        with reward.open(folder) as model:
            train_online(method, options, arm.start, prompts, model, folder, config.seed)

    settings = {"settings": options, "data": config.data, **reward.settings}
    return arm.run(method.value, settings, {**reward.inputs, **inputs}, make, reward.carry_over) / "policy"


def reward_source(arm: Arm) -> tuple[RewardSource, Path | None]:
    """What scores completions, and the PM behind it; a PM is trained first where none is given."""
    config = arm.config
    if config.reward is Reward.labeler:
        return labeler_reward(config), None
    if config.preference_model:
        folder = existing_dir(config.preference_model, "preference_model")
    else:
        folder = train_pm_stage(arm)
    return PMReward(folder, arm.start, config.pm), folder


def labeler_reward(config: TrainConfig) -> LabelerReward:
    """The labeler as the reward."""
    return LabelerReward(config.labeler, config.labeling, config.constitution, config.seed)


SUPERVISED: dict[Method, Callable[[Arm], Path]] = {
    Method.sft: train_sft_stage,
    Method.critique_revision: train_critique_revision_stage,
    Method.dpo: train_dpo_stage,
}
ONLINE: dict[Method, Callable[[Arm, RewardSource], Path]] = {
    Method.ppo: train_ppo_stage,
    Method.rloo: train_online_stage,
    Method.grpo: train_online_stage,
}


def started_from(arm: Arm) -> Arm:
    """The arm after ``sft_first``: it starts from the fine-tuned policy."""
    if not arm.config.sft_first:
        return arm
    policy = train_sft_stage(arm)
    return replace(arm, start=replace(arm.start, name=str(policy), adapter=None, revision=None))
