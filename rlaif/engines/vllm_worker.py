"""The process that holds a vLLM engine: jobs as JSON lines on stdin, answers as JSON lines on stdout.

Needs nothing but vLLM, so it can run under another interpreter than the labeler (``labeler.vllm.python``). It ends
when stdin does, and with it every process that it started.

The first line holds the arguments of vLLM's engine. A job is one of

- ``{"id", "ids", "want"}``: log-probabilities of the tokens ``want`` after the prompt ``ids``;
- ``{"id", "ids", "after"}``: log-probability of each token of ``ids`` after the first ``after``;
- ``{"id", "ids", "sample"}``: a completion with these sampling parameters.

The answer is ``{"id", "logps"}``, ``{"id", "tokens", "finish"}`` or ``{"id", "error"}``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from typing import Any

# A script's own folder comes first on the path, and in this one lies another module called vllm.
sys.path[:] = [
    place for place in sys.path if os.path.abspath(place or ".") != os.path.dirname(os.path.abspath(__file__))
]

# vLLM's limit for the tokens of one request (MAX_LOGPROB_TOKEN_IDS).
_MOST_TOKENS = 128


def read_lines(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str]) -> None:
    """Pass stdin on; at its end, end this process and all that it started, also if vLLM is still starting."""
    for line in sys.stdin:
        loop.call_soon_threadsafe(lines.put_nowait, line)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


async def serve(channel: Any) -> None:
    """Start the engine and answer jobs until stdin ends."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    threading.Thread(target=read_lines, args=(asyncio.get_running_loop(), lines), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    settings = json.loads(await lines.get())
    # Nobody asked for usage reports to be sent from a labeling run.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if current_platform.is_cpu():
        # GiB; without a bound the cache takes a share of the whole machine's memory.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    send({"max_model_len": engine.model_config.max_model_len, "vllm": vllm.__version__})

    async def run(name: str, ids: list[int], params: Any) -> Any:
        *_, last = [output async for output in engine.generate({"prompt_token_ids": ids}, params, request_id=name)]
        return last

    async def logps(job: dict[str, Any]) -> dict[str, Any]:
        found: list[float] = []
        for start in range(0, len(job["want"]), _MOST_TOKENS):
            want = job["want"][start : start + _MOST_TOKENS]
            params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=want, detokenize=False)
            output = (await run(f"{job['id']}-{start}", job["ids"], params)).outputs[0]
            found += [output.logprobs[0][token].logprob for token in want]
        return {"logps": found}

    async def likelihood(job: dict[str, Any]) -> dict[str, Any]:
        # 0: of each token of the prompt alone, no alternatives.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        found = (await run(str(job["id"]), job["ids"], params)).prompt_logprobs
        return {"logps": [found[place][job["ids"][place]].logprob for place in range(job["after"], len(job["ids"]))]}

    async def sample(job: dict[str, Any]) -> dict[str, Any]:
        output = (await run(str(job["id"]), job["ids"], SamplingParams(detokenize=False, **job["sample"]))).outputs[0]
        return {"tokens": list(output.token_ids), "finish": output.finish_reason}

    async def answer(job: dict[str, Any]) -> None:
        try:
            ask = logps if "want" in job else likelihood if "after" in job else sample
            result = await ask(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        send({"id": job["id"], **result})
        if engine.errored:
            os._exit(1)

    running: set[asyncio.Task[None]] = set()
    while True:
        task = asyncio.create_task(answer(json.loads(await lines.get())))
        running.add(task)
        task.add_done_callback(running.discard)


def main() -> None:
    """Keep stdout for answers; whatever else is printed goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asyncio.run(serve(channel))


if __name__ == "__main__":
    main()
