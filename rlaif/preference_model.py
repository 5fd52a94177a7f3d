"""Scoring completions with a preference model, or with an ensemble of them."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from rlaif.artifacts import input_hash
from rlaif.chat import encode_chat
from rlaif.config import EnsembleScore, LoraSettings, ModelConfig, Tuning
from rlaif.generation import left_pad_after
from rlaif.in_line import Line, in_line, read_in_line
from rlaif.loading import adapter_config, json_object, loading
from rlaif.models import (
    adapter_base,
    check_vocabulary,
    inner,
    is_adapter,
    load_sequence_scorer,
    load_tokenizer,
    resolve_model,
)
from rlaif.policy import Policy, load_policy, merged, under
from rlaif.prefix import positions_after, read_after, shareable
from rlaif.records import Example, UserError

log = logging.getLogger("rlaif")

CALIBRATION = "calibration.json"
"""Beside the weights: who labelled, and mean, deviation and temperature of the scores on reference completions."""
ENSEMBLE = "ensemble.json"
"""In the folder of an ensemble: the folders of its members."""


class Scorer(Protocol):
    """What scores completions; higher is better."""

    def score(self, examples: Sequence[Example]) -> list[float]:
        """The score of each example."""


def pm_config(policy: ModelConfig, folder: Path) -> ModelConfig:
    """How a PM in ``folder`` is loaded: on the policy's device and with its precision."""
    return replace(policy, name=str(folder), adapter=None, revision=None)


def load_scorer(config: ModelConfig, combine: EnsembleScore = EnsembleScore.mean, penalty: float = 1.0) -> Scorer:
    """The PM in a folder, or the ensemble whose members are in it."""
    listed = Path(str(config.name)) / ENSEMBLE
    if not listed.is_file():
        return PreferenceModel(config)
    names = json_object(listed, members=list)["members"]
    if not names or not all(isinstance(name, str) and (listed.parent / name).is_dir() for name in names):
        raise UserError(f"{listed}: names members that are not there; copy the folder anew")
    members = [pm_config(config, listed.parent / name) for name in names]
    return Ensemble(members, combine, penalty)


def pm_identity(folder: Path) -> dict[str, str]:
    """What reports call a PM: whose labels it learnt, under which seed, and a hash of its files."""
    digest = str(input_hash(folder))[:8]
    found = sorted(folder.rglob(CALIBRATION))
    if not found:
        return {"preference_model": f"{folder.name} ({digest})", "preference_model_id": digest}
    about = json_object(found[0], feedback=str, labeler=str, seed=int)
    size = f", {len(found)} members" if len(found) > 1 else f", seed {about['seed']}"
    declared = " (declared by the user)" if about.get("feedback_declared") else ""
    name = f"{about['feedback']}{declared} labels by {about['labeler']}{size} ({digest})"
    return {"preference_model": name, "preference_model_id": digest}


def pm_feedback(folder: Path) -> tuple[str | None, bool]:
    """Whose labels a PM learnt, where it says so, and whether that was the user's word alone."""
    found = sorted(folder.rglob(CALIBRATION))
    if not found:
        return None, False
    about = json_object(found[0], feedback=str)
    return about["feedback"], about.get("feedback_declared") is True


class Ensemble:
    """Several PMs whose standardised scores become one (Coste et al. 2023, section 3).

    Members that are adapters on one base model stand on one copy of it.
    """

    def __init__(self, members: Sequence[ModelConfig], combine: EnsembleScore, penalty: float) -> None:
        base = _common_base(members)
        self.members = [
            PreferenceModel(member) if base is None else AdapterPreferenceModel(member, base, f"member_{number}")
            for number, member in enumerate(members)
        ]
        # Scores have no unit: two PMs are compared in deviations from what they give reference completions.
        number = (int, float)
        figures = [
            json_object(Path(str(member.name)) / CALIBRATION, score_mean=number, score_std=number) for member in members
        ]
        self.scales = [(row["score_mean"], max(row["score_std"], 1e-6)) for row in figures]
        self.combine, self.penalty = combine, penalty

    def score(self, examples: Sequence[Example]) -> list[float]:
        """The combined score of each example, in standard deviations."""
        columns = [
            [(score - mean) / std for score in member.score(examples)]
            for member, (mean, std) in zip(self.members, self.scales, strict=True)
        ]
        return [combined(row, self.combine, self.penalty) for row in zip(*columns, strict=True)]


def combined(scores: Sequence[float], combine: EnsembleScore, penalty: float) -> float:
    """One score of the members' standardised scores.

    ``mean``; ``min``, worst-case optimisation; or ``uncertainty``, mean minus ``penalty`` times the deviation between
    members (Coste et al. 2023, eq. 3-5, with the deviation for their variance, so that the penalty has the unit of a
    score).
    """
    if combine is EnsembleScore.min:
        return min(scores)
    mean = statistics.fmean(scores)
    return mean - penalty * statistics.pstdev(scores) if combine is EnsembleScore.uncertainty else mean


def encode_example(tokenizer: Any, example: Example) -> list[int]:
    """Token ids of the conversation as the chat template renders it; the score is read at the last one.

    A completion that was cut has no end of its turn: it did not end, and a PM must not be told that it did.
    """
    messages = [*example.prompt, {"role": "assistant", "content": example.completion}]
    return encode_chat(tokenizer, messages, generation_prompt=False, ended=example.ended)


def separate_pad_token(tokenizer: Any) -> None:
    """Give the tokenizer a pad token that no conversation ends with.

    transformers' classification models find the last token by looking for padding. Where pad equals eos and a
    template ends with eos, they would read the score one token early.
    """
    last = encode_example(tokenizer, Example([{"role": "user", "content": "a"}], "b"))[-1]
    if tokenizer.pad_token_id != last:
        return
    others = [
        str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special and number != last
    ]
    if others:
        tokenizer.pad_token = others[0]


class PreferenceModel:
    """A sequence-classification model with one output, and its tokenizer."""

    def __init__(self, config: ModelConfig, batch_tokens: int = 8192) -> None:
        path = str(config.name)
        if Path(path).is_dir() and not any(
            (Path(path) / name).is_file() for name in ("config.json", "adapter_config.json")
        ):
            raise UserError(f"preference_model={path}: not a model folder (no config.json or adapter_config.json)")
        self.tokenizer = load_tokenizer(config, "preference_model")
        self.batch_tokens = batch_tokens
        self.model = self._load(config)

    def _load(self, config: ModelConfig) -> Any:
        model = load_sequence_scorer(config, "preference_model")
        check_vocabulary(model, self.tokenizer)
        # Only scored with, never trained further: without the adapter's extra products it is faster. A shorter float
        # would round the update.
        whole = hasattr(model, "merge_and_unload") and model.dtype == torch.float32
        return model.merge_and_unload() if whole else model

    def score(self, examples: Sequence[Example]) -> list[float]:
        """The score of each example."""
        given = [tuple(encode_example(self.tokenizer, example)) for example in examples]
        # Pairs of one prompt share completions.
        places = {row: place for place, row in enumerate(dict.fromkeys(given))}
        encoded = [list(row) for row in places]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        scores = [0.0] * len(encoded)
        batch: list[int] = []
        for index in order:
            if batch and len(encoded[index]) * (len(batch) + 1) > self.batch_tokens:
                self._score_batch(batch, encoded, scores)
                batch = []
            batch.append(index)
        if batch:
            self._score_batch(batch, encoded, scores)
        return [scores[places[row]] for row in given]

    @torch.inference_mode()
    def _score_batch(self, batch: list[int], encoded: list[list[int]], scores: list[float]) -> None:
        device = next(self.model.parameters()).device
        rows = [encoded[index] for index in batch]
        pad, share = self.tokenizer.pad_token_id, shareable(self.model)
        prefix, ids, mask = left_pad_after(rows, pad, device, share)
        for index, score in zip(batch, self._head_scores(ids, mask, prefix).tolist(), strict=True):
            scores[index] = score

    def _head_scores(self, ids: torch.Tensor, mask: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
        return head_scores(self.model, last_hidden(self.model, ids, mask, prefix))


class AdapterPreferenceModel(PreferenceModel):
    """A PM that is an adapter and a head on the base model of a policy: the base is in memory once."""

    ADAPTER = "preference_model"

    def __init__(self, config: ModelConfig, policy: Policy, adapter: str = ADAPTER) -> None:
        self.policy, self.adapter = policy, adapter
        super().__init__(config)

    def _load(self, config: ModelConfig) -> Any:
        folder, model = Path(str(config.name)), self.policy.model
        check_vocabulary(model, self.tokenizer)
        add_beside(self.policy, folder, self.adapter)
        device = next(model.parameters()).device
        self.weight, self.bias = (tensor.to(device) for tensor in read_head(folder))
        return model

    def score(self, examples: Sequence[Example]) -> list[float]:
        """The score of each example."""
        with under(self.model, self.adapter), merged(self.model):
            return super().score(examples)

    def _head_scores(self, ids: torch.Tensor, mask: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
        hidden = last_hidden(self.model, ids, mask, prefix)
        return (hidden.float() @ self.weight.T + self.bias).squeeze(-1)


def add_beside(policy: Policy, folder: Path, name: str) -> None:
    """Put a PM's adapter, without its head, beside that of a policy on the same base.

    Raises:
        UserError: if it does not fit.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    model = policy.model
    trained = [parameter for parameter, _ in policy.trainable()]
    settings = adapter_config(folder)
    # The head is kept beside the model: a language model has no place for it.
    settings.modules_to_save, settings.task_type, settings.inference_mode = None, "CAUSAL_LM", True
    with loading(str(folder), "preference_model"):
        model.add_adapter(name, settings)
        weights = load_file(folder / "adapter_model.safetensors")
        result = set_peft_model_state_dict(
            model, {key: value for key, value in weights.items() if ".score." not in key}, name
        )
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        raise UserError(f"preference_model={folder}: its adapter does not fit the policy's model")
    assert [parameter for parameter, _ in policy.trainable()] == trained
    model.eval()


def fits_beside(folder: Path | str, policy: Policy) -> bool:
    """Whether a PM was trained as an adapter on the policy's base model."""
    if not is_adapter(folder) or policy.tuning is not Tuning.lora or policy.start.adapter:
        return False
    same = adapter_base(folder) == (resolve_model(policy.start.name), policy.start.revision)
    return same and _is_plain_lora(str(folder))


def _common_base(members: Sequence[ModelConfig]) -> Policy | None:
    """The base model of PMs that are all adapters on the same one."""
    folders = [str(member.name) for member in members]
    if not all(is_adapter(folder) and _is_plain_lora(folder) for folder in folders):
        return None
    bases = {adapter_base(folder) for folder in folders}
    if len(bases) > 1:
        return None
    name, revision = bases.pop()
    start = replace(members[0], name=name, adapter=None, revision=revision)
    # A policy's adapter is what those of PMs stand beside.
    return load_policy(start, Tuning.lora, LoraSettings(r=1))


def check_same_base(folder: Path, start: ModelConfig) -> None:
    """A PM's head reads a policy's states only if both were trained on the same base model.

    What a PM of unknown origin was trained on cannot be checked.

    Raises:
        UserError: if it was another one.
    """
    base = str(folder) if is_adapter(folder) else None
    if base is None and (folder / CALIBRATION).is_file():
        base = json_object(folder / CALIBRATION, base=str)["base"]
    policy = _root(str(start.name))
    if base is not None and _root(base) != policy:
        raise UserError(
            f"ppo.value_init=pm: the preference model was trained on {_root(base)}, the policy is {policy}, whose "
            "states mean something else; give ppo.value_init=zero"
        )


def _root(name: str) -> str:
    """The model under the adapters of a model."""
    path = resolve_model(name)
    while is_adapter(path):
        path = adapter_base(path)[0]
    return str(Path(path).resolve()) if Path(path).exists() else path


def load_preference_model(config: ModelConfig, policy: Policy) -> PreferenceModel:
    """A PM; as an adapter on the policy's base model if it was trained as one."""
    if not fits_beside(str(config.name), policy):
        return PreferenceModel(config)
    log.info("the preference model is an adapter on the policy's base model: loaded once for both")
    return AdapterPreferenceModel(config, policy)


def _is_plain_lora(folder: str) -> bool:
    """Whether an adapter is low-rank products and a head alone, which is what can stand beside a policy's adapter."""
    settings = adapter_config(folder)
    if settings.peft_type != "LORA":
        return False
    # PEFT lists both of its names for a classifier's head.
    heads = set(settings.modules_to_save or ()) <= {"score", "classifier"}
    return heads and settings.bias == "none" and not settings.use_dora


def read_head(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (1, H) and bias (1,) of a PM's head, in float32, from its folder.

    Raises:
        UserError: if there is none.
    """
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    with loading(str(folder), "preference_model"):
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if f".{name}".endswith((".score.weight", ".score.bias")):
                        found[name.rsplit(".", 1)[-1]] = tensors.get_tensor(name).float()
    if "weight" not in found:
        raise UserError(f"preference_model={folder}: its files hold no head named score")
    return found["weight"], found.get("bias", torch.zeros(1))


def last_hidden(model: Any, ids: torch.Tensor, mask: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden state of the last token of left-padded rows, that stand after a prefix (L,): (B, T) -> (B, H).

    Read from the backbone by position, not by searching for padding: where pad equals eos, such a search (the one
    in transformers' classification models) would stop one token early.
    """
    backbone, positions = inner(model).base_model, positions_after(prefix, mask)
    if prefix is not None and not torch.is_grad_enabled() and in_line(model, int(mask.sum(dim=1).max()) + len(prefix)):
        return read_in_line(backbone, Line(prefix, mask), ids, positions)[:, -1]
    return backbone(**read_after(model, prefix, ids, mask, positions, backbone))[0][:, -1]


def training_scores(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    prefix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores at every token of rows that stand after a prefix (L,), through the model's own forward pass, (B, T).

    Calling the model itself, and not its parts, keeps what a launcher has wrapped around it: autocast, and the
    gradients that processes exchange. What its head says is caught on the way.

    Args:
        model: a sequence classifier.
        ids: (B, T).
        mask: (B, T) or (B, 1, T, T), as for :func:`rlaif.prefix.read_after`.
        positions: (B, T), counted from the start of the prefix.
        prefix: token ids before every row.
    """
    caught: list[torch.Tensor] = []
    head = _head(getattr(model, "module", model))

    def widen(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        # The head is float32 also over bfloat16 weights.
        return (arguments[0].to(next(module.parameters()).dtype), *arguments[1:])

    before = head.register_forward_pre_hook(widen)
    after = head.register_forward_hook(lambda module, arguments, output: caught.append(output))
    try:
        model(**read_after(model, prefix, ids, mask, positions))
    finally:
        before.remove()
        after.remove()
    return caught[-1][..., 0].float()


def head_scores(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Scores of last hidden states: (B, H) -> (B,), float32."""
    head = _head(model)
    weight = next(head.parameters())
    return head(hidden.to(weight.dtype)).squeeze(-1).float()


def _head(model: Any) -> Any:
    """The head in use; PEFT keeps the one that it replaces beside it, which may have another precision."""
    head = inner(model).score
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head
