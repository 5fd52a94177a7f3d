"""Prompts -> candidate completions, in named styles."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from rlaif.config import SamplingConfig, Split
from rlaif.engines.base import Engine, Failure, Sampled, SampleRequest
from rlaif.progress import progress
from rlaif.records import Candidates, Completion, Message, Prompt, UserError, content_hash, write_jsonl

log = logging.getLogger("rlaif")


def sample_candidates(
    prompts: Sequence[Prompt],
    splits: dict[str, Split],
    engine: Engine,
    config: SamplingConfig,
    folder: Path,
    seed: int,
) -> Path:
    """Write ``candidates.jsonl`` into ``folder``: every style's completions for each prompt.

    Each completion has a seed of its own, made from ``seed``, the prompt and its place. Finished completions are
    appended to ``samples.partial.jsonl``, so an interrupted run goes on from there. Completions that repeat
    another of the same prompt are dropped and counted.

    Raises:
        UserError: if no prompt has two different ones.
    """
    jobs: list[tuple[int, str, SampleRequest]] = []
    for index, prompt in enumerate(prompts):
        for name, style in sorted(config.styles.items()):
            for number in range(style.n):
                request = SampleRequest(
                    messages=with_system(prompt.messages, style.system),
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    seed=int(content_hash(seed, prompt.prompt_id, name, number)[:12], 16),
                )
                jobs.append((index, name, request))
    journal = folder / "samples.partial.jsonl"
    done = _read_journal(journal)
    pending = [number for number in range(len(jobs)) if number not in done]
    failed = 0
    with (
        journal.open("a", encoding="utf-8") as file,
        progress(len(jobs), "sampling", "completion", initial=len(done)) as bar,
    ):
        results = engine.sample(jobs[number][2] for number in pending)
        for place, result in results:
            number = pending[place]
            bar.update()
            if isinstance(result, Failure):
                failed += 1
                log.warning("a completion failed (%s) %s", result.reason, result.detail)
                continue
            done[number] = result
            file.write(json.dumps([number, result.text, result.finish_reason, result.tokens]) + "\n")
            file.flush()
    lines, repeated = _assemble(prompts, splits, jobs, done, engine)
    if not lines:
        raise UserError(
            f"none of {len(prompts)} prompts has two different completions ({repeated} repeat another, "
            f"{failed} failed): sample more (sampling.styles.plain.n), warmer (sampling.temperature), longer or from "
            "another model"
        )
    write_jsonl(folder / "candidates.jsonl", (line.to_json() for line in lines))
    journal.unlink()
    kept = sum(len(line.candidates) for line in lines)
    log.info("%d prompts, %d candidates (%d repeated ones dropped, %d failed)", len(lines), kept, repeated, failed)
    return folder / "candidates.jsonl"


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """The conversation under a style's system prompt; null leaves it as it is."""
    if system is None:
        return messages
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return ({"role": "system", "content": system}, *rest)


def _read_journal(journal: Path) -> dict[int, Sampled]:
    done: dict[int, Sampled] = {}
    if not journal.is_file():
        return done
    good = 0
    with journal.open("rb") as file:
        for line in file:
            try:
                number, text, finish_reason, tokens = json.loads(line)
            except (ValueError, TypeError):
                break  # The last line of a killed run may be cut.
            done[number] = Sampled(text, finish_reason, tokens)
            good += len(line)
    with journal.open("r+b") as file:
        file.truncate(good)
    return done


def _assemble(
    prompts: Sequence[Prompt],
    splits: dict[str, Split],
    jobs: Sequence[tuple[int, str, SampleRequest]],
    done: dict[int, Sampled],
    engine: Engine,
) -> tuple[list[Candidates], int]:
    by_prompt: dict[int, list[Completion]] = {index: [] for index in range(len(prompts))}
    repeated = 0
    for number, (index, style, request) in enumerate(jobs):
        sampled = done.get(number)
        if sampled is None:
            continue
        if any(other.completion == sampled.text for other in by_prompt[index]):
            repeated += 1
            continue
        system = request.messages[0]["content"] if request.messages[0]["role"] == "system" else None
        by_prompt[index].append(
            Completion(
                candidate_id=f"{style}-{len(by_prompt[index])}",
                completion=sampled.text,
                model=engine.name,
                style=style,
                system=system,
                temperature=request.temperature,
                seed=request.seed,
                finish_reason=sampled.finish_reason,
                tokens=sampled.tokens,
            )
        )
    lines = [
        Candidates(prompt, tuple(by_prompt[index]), splits[prompt.prompt_id].value)
        for index, prompt in enumerate(prompts)
        if len(by_prompt[index]) >= 2
    ]
    return lines, repeated
