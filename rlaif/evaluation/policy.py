"""Measuring a policy on held-out prompts against the policy it started from."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlaif.chat import encode_chat
from rlaif.config import EvalConfig, ModelConfig
from rlaif.evaluation.statistics import clustered_mean, clustered_share, paired_gain
from rlaif.generation import STREAM_EVALUATION, generate
from rlaif.gold import gold_score
from rlaif.models import eos_ids, load_causal_lm, load_tokenizer
from rlaif.policy import completion_logps
from rlaif.preference_model import load_scorer
from rlaif.processes import spread
from rlaif.progress import progress
from rlaif.records import Example, Message, Prompt, UserError, read_jsonl, write_json, write_jsonl

log = logging.getLogger("rlaif")


@dataclass
class Sample:
    """One evaluated completion: a line of ``samples.jsonl``. ``kl`` is log pi/ref summed over its tokens."""

    prompt_id: str
    prompt: list[Message]
    sample: int
    completion: str
    tokens: int
    finish_reason: str
    kl: float = 0.0
    gold_score: float | None = None
    pm_score: float | None = None

    @property
    def example(self) -> Example:
        """What a PM scores."""
        return Example(self.prompt, self.completion, self.finish_reason != "length")


def sample_policy(
    policy: ModelConfig,
    reference: ModelConfig | None,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    seed: int,
    stream: int = STREAM_EVALUATION,
) -> list[Sample]:
    """Sample completions and measure the KL of each to the reference (None: the policy is the reference).

    The random numbers of a completion depend on the seed, the prompt's place and the sample's number only, so
    two policies are compared under common random numbers. Another ``stream`` has other ones. Several processes share
    the work, and all get all samples.
    """
    jobs = [(index, number) for index in range(len(prompts)) for number in range(config.samples_per_prompt)]
    tokenizer = load_tokenizer(policy)
    encoded = [encode_chat(tokenizer, prompt.messages) for prompt in prompts]
    jobs.sort(key=lambda job: (len(encoded[job[0]]), job))

    def work(jobs: Sequence[tuple[int, int]]) -> list[Sample]:
        if not jobs:
            return []
        model = load_causal_lm(policy)
        pad, eos = tokenizer.pad_token_id, eos_ids(model, tokenizer)
        samples, tokens, own = [], [], []
        with progress(len(jobs), "evaluating", "completion") as bar:
            for start in range(0, len(jobs), config.batch_size):
                part = jobs[start : start + config.batch_size]
                generations = generate(
                    model,
                    [encoded[index] for index, _ in part],
                    [(seed, stream, index, number, 1) for index, number in part],
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    eos=eos,
                    pad=pad,
                )
                for (index, number), generation in zip(part, generations, strict=True):
                    text = tokenizer.decode(generation.tokens, skip_special_tokens=True).strip()
                    samples.append(
                        Sample(
                            prompts[index].prompt_id,
                            list(prompts[index].messages),
                            number,
                            text,
                            len(generation.tokens),
                            generation.finish_reason,
                        )
                    )
                    tokens.append(generation.tokens)
                    own.append(generation.logps)
                bar.update(len(part))
        if reference is not None:
            rows = [encoded[index] for index, _ in jobs]
            temperature = config.temperature or 1.0
            del model
            base = completion_logps(load_causal_lm(reference), rows, tokens, pad, temperature=temperature)
            for sample, left, right in zip(samples, own, base, strict=True):
                sample.kl = sum(left) - sum(right)
        return samples

    return spread(work, jobs)


def best_of_n(samples: Sequence[Sample], scores: Sequence[float | None], n: int) -> list[Sample]:
    """Of every n consecutive samples of a prompt the one with the highest score; one without a score is never best.

    The samples have the numbers 0, 1, ...: n times as many as are kept. Ties go to the first.
    """
    best: dict[tuple[str, int], tuple[float, int, Sample]] = {}
    for sample, score in zip(samples, scores, strict=True):
        key = (sample.prompt_id, sample.sample // n)
        rank = (float("-inf") if score is None else score, -sample.sample, sample)
        if key not in best or rank[:2] > best[key][:2]:
            best[key] = rank
    return [replace(sample, sample=number) for (_, number), (_, _, sample) in best.items()]


def best_of_n_kl(n: int) -> float:
    """Upper bound of KL(best of n || policy): log n - (n - 1) / n nats (Stiennon et al. 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def score_samples(samples: Sequence[Sample], gold: str | None, preference_model: ModelConfig | None) -> None:
    """Fill in gold and PM scores."""
    if gold is not None:
        for sample in samples:
            sample.gold_score = gold_score(gold, sample.completion)
    if preference_model is not None:
        scores = load_scorer(preference_model).score([sample.example for sample in samples])
        for sample, score in zip(samples, scores, strict=True):
            sample.pm_score = score


def policy_metrics(samples: Sequence[Sample], baseline: Sequence[Sample]) -> dict[str, Any]:
    """Estimates with intervals over prompts; gains and win rate are paired with the baseline by prompt and sample.

    ``win_rate`` is judged by the gold score; a tie counts half.

    Raises:
        UserError: if the baseline lacks some of the prompts.
    """
    prompts = [sample.prompt_id for sample in samples]
    other = {(sample.prompt_id, sample.sample): sample for sample in baseline}
    missing = [sample.prompt_id for sample in samples if (sample.prompt_id, sample.sample) not in other]
    if missing:
        raise UserError(f"baseline_samples lacks {len(missing)} of the evaluated prompts, first {missing[0]}")
    pairs = [other[sample.prompt_id, sample.sample] for sample in samples]
    changed = [one.prompt_id for one, two in zip(samples, pairs, strict=True) if list(one.prompt) != list(two.prompt)]
    if changed:
        raise UserError(f"baseline_samples has another text for {len(changed)} of the prompts, first {changed[0]}")
    estimates = {
        "length": clustered_mean([float(sample.tokens) for sample in samples], prompts, least=0.0),
        "eos_rate": clustered_share([float(sample.finish_reason == "stop") for sample in samples], prompts),
        "kl": clustered_mean([sample.kl for sample in samples], prompts),
    }
    for name in ("gold", "pm"):
        scores = _scores(samples, name)
        if scores is None:
            continue
        estimates[f"{name}_score"] = clustered_mean(scores, prompts)
        against = _scores(pairs, name)
        paired = paired_gain(scores, against, prompts) if against is not None else None
        if paired is not None:
            estimates[f"{name}_gain"] = paired.gain
            if name == "gold":
                estimates["win_rate"] = paired.win_rate
    result: dict[str, Any] = {"n_prompts": len(set(prompts)), "n_samples": len(samples)}
    for name, estimate in estimates.items():
        if estimate is not None:
            result |= estimate.flat(name)
    return result


def _scores(samples: Sequence[Sample], judge: str) -> list[float] | None:
    """The judge's score of each sample; None if it did not score them all."""
    scores = [score for sample in samples if (score := getattr(sample, f"{judge}_score")) is not None]
    return scores if len(scores) == len(samples) else None


def write_evaluation(folder: Path, samples: Sequence[Sample], metrics: dict[str, Any]) -> None:
    """Write ``samples.jsonl`` (in a fixed order) and ``metrics.json``."""
    ordered = sorted(samples, key=lambda sample: (sample.prompt_id, sample.sample))
    write_jsonl(folder / "samples.jsonl", (asdict(sample) for sample in ordered))
    write_json(folder / "metrics.json", metrics)


def read_samples(path: Path) -> list[Sample]:
    """Read ``samples.jsonl``.

    Raises:
        UserError: naming file and line.
    """

    def parse(line: dict[str, Any]) -> Sample:
        try:
            return Sample(**{key: line[key] for key in Sample.__dataclass_fields__ if key in line})
        except TypeError:
            raise ValueError("is not a line of samples.jsonl as rlaif.evaluate writes it") from None

    return list(read_jsonl(path, parse))
