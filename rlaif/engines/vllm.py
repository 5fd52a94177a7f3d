"""vLLM's offline engine in a process of its own: log-probabilities of exactly the tokens that spell an option.

Prompts are tokenised here, by the same code as for the in-process engine, and travel as token ids. The process
starts with the first request, so a run that knows every verdict already never starts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlaif.artifacts import input_hash
from rlaif.chat import ChatEncoder, encode_text
from rlaif.config import LabelerConfig, ModelConfig
from rlaif.engines.base import (
    CompletionRequest,
    Engine,
    Failure,
    Likelihood,
    OptionMass,
    OptionRequest,
    Sampled,
    SampleRequest,
)
from rlaif.engines.options import Spelling, beginnings, sequence_masses, spellings
from rlaif.engines.vllm_process import Job, VLLMProcess, check_installed
from rlaif.models import load_tokenizer, resolve_model
from rlaif.records import content_hash

T = TypeVar("T")
Talk = Generator[list[Job], list[Job], T]
"""A request's talk with the engine: yields jobs, is sent their answers, returns the result."""

IN_FLIGHT = 1024
"""Requests given to vLLM at once; it makes its own batches of them."""


@dataclass
class _Open:
    """A talk that waits for answers."""

    index: int
    talk: Talk[Any]
    missing: int
    answers: list[Job] = field(default_factory=list)


class VLLMEngine(Engine):
    """Serves a model with vLLM.

    Raises:
        UserError: if vLLM is not installed, the model does not exist, or vLLM cannot start or ends early.
    """

    def __init__(self, config: LabelerConfig) -> None:
        settings = config.vllm
        check_installed(settings.python, "labeler=vllm", "labeler.vllm.python")
        model = ModelConfig(
            name=config.model,
            revision=config.revision,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            chat_template_kwargs=config.chat_template_kwargs,
        )
        self.tokenizer = load_tokenizer(model, "labeler")
        self._encode = ChatEncoder(self.tokenizer)
        # A branch moves: both processes take the commit that it stands for now.
        revision = _commit(config) or config.revision
        arguments = {
            "model": resolve_model(config.model, "labeler.model"),
            "revision": revision,
            "dtype": config.dtype.value,
            "trust_remote_code": config.trust_remote_code,
            "enable_prefix_caching": True,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "data_parallel_size": settings.data_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "max_model_len": settings.max_model_len,
            "enforce_eager": settings.enforce_eager,
            "enable_log_requests": False,
            "disable_log_stats": True,
            **settings.engine_args,
        }
        self.process = VLLMProcess(
            arguments,
            settings.python,
            f"labeler=vllm, labeler.model={config.model}",
            "answers that came before are stored",
        )
        self.identity = {
            "engine": "vllm",
            "model": config.model,
            "revision": revision,
            "weights": input_hash(Path(config.model)) if config.model and Path(config.model).is_dir() else None,
            "dtype": config.dtype.value,
            "engine_args": dict(settings.engine_args),
            "template": content_hash(self.tokenizer.chat_template),
        }
        self._spelled: dict[tuple[tuple[str, ...], ...], list[Spelling]] = {}

    def score_options(self, requests: Iterable[OptionRequest]) -> Iterator[tuple[int, OptionMass | Failure]]:
        """One prompt a request, and one more for each beginning of a longer spelling that may have mass."""
        return self.told(self._stream(requests, self._score), "verdicts")

    def sample(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[int, Sampled | Failure]]:
        """Sample a completion for each request."""
        return self.told(self._stream(requests, self._complete), "completions")

    def score_completions(self, requests: Iterable[CompletionRequest]) -> Iterator[tuple[int, Likelihood | Failure]]:
        """One prompt a request, with the completion as its end."""
        return self.told(self._stream(requests, self._weigh), "likelihoods")

    def _score(self, request: OptionRequest) -> Talk[OptionMass | Failure]:
        started = time.perf_counter()
        ids = self._encode(request.messages, request.stem)
        if request.options not in self._spelled:
            self._spelled[request.options] = spellings(self.tokenizer, request.options)
        spelled = self._spelled[request.options]
        if len(ids) + max(len(spelling.tokens) for spelling in spelled) > self.process.max_length:
            return self._too_long(len(ids))
        firsts = sorted({spelling.tokens[0] for spelling in spelled})
        [answer] = yield [{"ids": ids, "want": firsts}]
        if "error" in answer:
            return Failure("engine_error", answer["error"], time.perf_counter() - started)
        logps: dict[tuple[int, ...], float] = {
            (token,): logp for token, logp in zip(firsts, answer["logps"], strict=True)
        }
        wanted = beginnings(spelled, logps)
        asked = sorted(wanted, key=len)
        answers = (yield [{"ids": [*ids, *begun], "want": sorted(wanted[begun])} for begun in asked]) if asked else []
        for begun, answer in zip(asked, answers, strict=True):
            if "error" in answer:
                return Failure("engine_error", answer["error"], time.perf_counter() - started)
            for token, logp in zip(sorted(wanted[begun]), answer["logps"], strict=True):
                logps[*begun, token] = logps[begun] + logp
        masses = sequence_masses(spelled, logps, len(request.options))
        return OptionMass(masses, "logprob", prompt_tokens=len(ids), latency_s=time.perf_counter() - started)

    def _weigh(self, request: CompletionRequest) -> Talk[Likelihood | Failure]:
        started = time.perf_counter()
        ids, tokens = self._encode(request.messages), encode_text(self.tokenizer, request.completion)
        if not tokens:
            return Likelihood(0.0, 0, len(ids))
        # vLLM always samples a token after the prompt.
        if len(ids) + len(tokens) + 1 > self.process.max_length:
            return self._too_long(len(ids) + len(tokens))
        [answer] = yield [{"ids": [*ids, *tokens], "after": len(ids)}]
        if "error" in answer:
            return Failure("engine_error", answer["error"], time.perf_counter() - started)
        return Likelihood(sum(answer["logps"]), len(tokens), len(ids), time.perf_counter() - started)

    def _complete(self, request: SampleRequest) -> Talk[Sampled | Failure]:
        ids = self._encode(request.messages)
        if len(ids) + 1 > self.process.max_length:
            return self._too_long(len(ids))
        parameters = {
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        [answer] = yield [{"ids": ids, "sample": parameters}]
        if "error" in answer:
            return Failure("engine_error", answer["error"])
        text = self.tokenizer.decode(answer["tokens"], skip_special_tokens=True).strip()
        finish = "length" if answer["finish"] == "length" else "stop"
        return Sampled(text, finish, len(answer["tokens"]), len(ids))

    def _too_long(self, length: int) -> Failure:
        return Failure("too_long", f"{length} tokens, and the model takes {self.process.max_length}")

    def _stream(self, requests: Iterable[Any], begin: Callable[[Any], Talk[T]]) -> Iterator[tuple[int, T]]:
        """Hold up to ``IN_FLIGHT`` talks; results come in the order in which they end."""
        source = enumerate(requests)
        jobs: dict[int, tuple[_Open, int]] = {}
        talking = 0
        more = True
        while True:
            while more and talking < IN_FLIGHT:
                index, request = next(source, (-1, None))
                if request is None:
                    more = False
                    break
                self.process.start()
                opened = _Open(index, begin(request), 0)
                try:
                    self._submit(opened, next(opened.talk), jobs)
                    talking += 1
                except StopIteration as end:
                    yield index, end.value
            if not talking:
                return
            answer = self.process.receive()
            job = jobs.pop(answer["id"], None)
            if job is None:
                continue  # of a stream that was given up
            opened, place = job
            opened.answers[place] = answer
            opened.missing -= 1
            if opened.missing:
                continue
            try:
                self._submit(opened, opened.talk.send(opened.answers), jobs)
            except StopIteration as end:
                talking -= 1
                yield opened.index, end.value

    def _submit(self, opened: _Open, batch: list[Job], jobs: dict[int, tuple[_Open, int]]) -> None:
        opened.missing, opened.answers = len(batch), [{}] * len(batch)
        for place, job in enumerate(batch):
            jobs[self.process.submit(job)] = (opened, place)

    def close(self) -> None:
        """End the process and everything that it started."""
        self.process.close()


def _commit(config: LabelerConfig) -> str | None:
    """The hub commit that a model's name and revision stand for, once its tokenizer is loaded; none for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if not config.model or config.model in ("embedded", "tiny") or Path(config.model).is_dir():
        return None
    for name in ("tokenizer_config.json", "tokenizer.json", "config.json"):
        found = try_to_load_from_cache(config.model, name, revision=config.revision)
        if isinstance(found, str):
            return Path(found).parent.name  # .../snapshots/COMMIT/NAME
    return None
