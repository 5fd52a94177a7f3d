"""The process that holds a vLLM engine: jobs as JSON lines on stdin, answers as JSON lines on stdout.

Needs nothing but vLLM, so it can run under another interpreter than the labeler (``labeler.vllm.python``). It ends
when stdin does, and with it every process that it started.

The first line holds the arguments of vLLM's engine. A job is one of

- ``{"id", "ids", "want"}``: log-probabilities of the tokens ``want`` after the prompt ``ids``;
- ``{"id", "ids", "after"}``: log-probability of each token of ``ids`` after the first ``after``;
- ``{"id", "ids", "sample"}``: a completion with these sampling parameters; with ``adapter`` by the model under the
  adapter of that number, with ``logprobs`` among the parameters also the log-probabilities of its tokens;
- ``{"id", "load", "adapter"}``: load the LoRA adapter in the folder ``load`` under a number that was never used;
- ``{"id", "weights"}``: take the weights of the model in this folder (safetensors) instead of the present ones.

The answer is ``{"id", "logps"}``, ``{"id", "tokens", "finish"}`` (and ``logps``), ``{"id"}`` or ``{"id", "error"}``.
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
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    if current_platform.is_cpu():
        # GiB; without a bound the cache takes a share of the whole machine's memory.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # Without a context vLLM takes its smallest batches, whatever the device.
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings), usage_context=UsageContext.LLM_CLASS)
    send({"max_model_len": engine.model_config.max_model_len, "vllm": vllm.__version__})

    adapters: dict[int, Any] = {}

    async def run(name: str, ids: list[int], params: Any, adapter: Any = None) -> Any:
        prompt = {"prompt_token_ids": ids}
        *_, last = [output async for output in engine.generate(prompt, params, request_id=name, lora_request=adapter)]
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
        adapter = adapters[job["adapter"]] if "adapter" in job else None
        params = SamplingParams(detokenize=False, **job["sample"])
        output = (await run(str(job["id"]), job["ids"], params, adapter)).outputs[0]
        tokens = list(output.token_ids)
        found = {"tokens": tokens, "finish": output.finish_reason}
        if params.logprobs is not None:
            found["logps"] = [each[token].logprob for each, token in zip(output.logprobs, tokens, strict=True)]
        return found

    async def load(job: dict[str, Any]) -> dict[str, Any]:
        # A new number and a new name: vLLM knows adapters by the one, and what it has cached by the other.
        adapter = LoRARequest(f"adapter-{job['adapter']}", job["adapter"], job["load"])
        if not await engine.add_lora(adapter):
            raise ValueError(f"vLLM did not load {job['load']}")
        adapters.clear()
        adapters[job["adapter"]] = adapter
        return {}

    async def reload(job: dict[str, Any]) -> dict[str, Any]:
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": job["weights"]})
        if not await engine.reset_prefix_cache():
            raise ValueError("vLLM did not forget what it had computed with the old weights")
        return {}

    kinds = {"want": logps, "after": likelihood, "sample": sample, "load": load, "weights": reload}

    async def answer(job: dict[str, Any]) -> None:
        try:
            [kind] = kinds.keys() & job.keys()
            result = await kinds[kind](job)
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
