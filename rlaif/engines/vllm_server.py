"""A ``vllm serve`` that takes LoRA adapters while it runs, behind the same jobs as the process of one's own."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from typing import Any

from rlaif.engines.address import check_url
from rlaif.engines.client import Client
from rlaif.engines.limits import Limits, Usage
from rlaif.engines.vllm_process import Job
from rlaif.engines.wire import AttemptError, checked_logprob, parse_json
from rlaif.records import UserError

KEY_ENV = "VLLM_API_KEY"
"""The environment variable with the server's key (``vllm serve --api-key``), if it has one."""
CONCURRENCY = 256
"""Requests in flight; vLLM makes its own batches of them."""
CHECK_TIMEOUT_S = 10.0
TIMEOUT_S = 600.0

# A server takes what a request leaves out from the model's generation_config.json.
_PLAIN = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class VLLMServer:
    """Answers the jobs ``load`` and ``sample`` of ``vllm_worker.py``. The constructor asks the server what it can do.

    Args:
        url: its address, ending in /v1.
        key: the setting that holds the address, for messages.
        needed: tokens that a prompt and its completion may have together.
        kept: what stays of the run if the server fails.

    Raises:
        UserError: if the server cannot be reached, is not vLLM with adapters that can be loaded, or takes fewer tokens.
    """

    def __init__(self, url: str, key: str, needed: int, kept: str) -> None:
        address, loopback = check_url(url, key, f"it is recorded with the policy; give the key in {KEY_ENV}")
        self._where, self._kept = f"{key}={address}", kept
        # No two runs, and no two steps, may take each other's adapters.
        self._prefix = f"rlaif-{secrets.token_hex(6)}"
        self._loaded: str | None = None
        self._client = Client(
            address,
            os.environ.get(KEY_ENV, "").strip(),
            Limits(CONCURRENCY),
            headers={},
            proxied=not loopback,
            concurrency=CONCURRENCY,
            timeout_s=TIMEOUT_S,
            max_retries=3,
            where=self._where,
            key_env=KEY_ENV,
        )
        try:
            self._base = self._check(needed)
        except BaseException:
            self._client.close()
            raise

    def _check(self, needed: int) -> str:
        """See that the server can do what it is needed for; returns the name of its base model."""
        content = self._request("GET", "/models", timeout_s=CHECK_TIMEOUT_S)
        try:
            [base, *_] = [entry for entry in parse_json(content)["data"] if entry.get("parent") is None]
            name, length = str(base["id"]), int(base["max_model_len"])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"{self._where}: GET /models does not answer as vLLM does; check the address (it ends in /v1)"
            ) from None
        if length < needed:
            raise UserError(
                f"{self._where}: the server takes {length} tokens, ppo.max_prompt_length + ppo.max_new_tokens are "
                f"{needed}; start it with --max-model-len {needed}"
            )
        # Without a name it loads nothing; where there is no such address, it never will.
        status, _ = self._status("POST", "/load_lora_adapter", {}, CHECK_TIMEOUT_S)
        if status == 404:
            raise UserError(
                f"{self._where}: the server loads no adapters; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        return name

    def ask(self, jobs: Sequence[Job]) -> list[Job]:
        """Answers to jobs, in their order."""
        if "load" in jobs[0]:
            return [self._load(job) for job in jobs]
        found: list[Job] = [{}] * len(jobs)
        try:
            for place, answer in self._client.stream(jobs, self._complete):
                found[place] = answer
        except AttemptError as problem:
            raise self._failed(f"{problem.reason}: {problem}") from None
        return found

    def _load(self, job: Job) -> Job:
        name = f"{self._prefix}-{job['adapter']}"
        self._request("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": job["load"]})
        self._unload()
        self._loaded = name
        return {}

    def _unload(self) -> None:
        if self._loaded is not None:
            self._request("POST", "/unload_lora_adapter", {"lora_name": self._loaded})
            self._loaded = None

    async def _complete(self, jobs: Sequence[Job]) -> list[Job]:
        [job] = jobs
        body = {
            **_PLAIN,
            **job["sample"],
            "model": f"{self._prefix}-{job['adapter']}" if "adapter" in job else self._base,
            "prompt": job["ids"],
            "return_token_ids": True,
        }
        return [await self._client.post("/completions", body, Usage(), _parse)]

    def _request(self, method: str, path: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> bytes:
        status, content = self._status(method, path, body, timeout_s)
        if status >= 400:
            raise self._failed(f"{path}: HTTP {status}: {self._client.server_message(content)[0]}")
        return content

    def _status(self, method: str, path: str, body: Any, timeout_s: float) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        try:
            status, _, content = self._client.call(self._client.request(method, path, data, timeout_s))
        except AttemptError as problem:
            raise self._failed(f"cannot be reached ({problem.detail})") from None
        return status, content

    def _failed(self, what: str) -> UserError:
        return UserError(f"{self._where}: {what} ({self._kept})")

    def close(self) -> None:
        """Unload the adapter and close the connections."""
        try:
            self._unload()
        except UserError:
            pass  # The server is gone, and what it had loaded too.
        finally:
            self._client.close()


def _parse(payload: dict[str, Any]) -> Job:
    """Token ids, finish reason and log-probabilities of a response.

    Raises:
        AttemptError: if one is missing.
    """
    choice = payload["choices"][0]
    try:
        tokens, finish = [int(token) for token in choice["token_ids"]], choice["finish_reason"]
        logps = [checked_logprob(logp) for logp in choice["logprobs"]["token_logprobs"]]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise AttemptError("malformed", "no token ids or no log-probabilities: is it vLLM 0.11 or newer?") from None
    if finish not in ("stop", "length") or len(tokens) != len(logps):
        raise AttemptError("malformed", f"{len(tokens)} tokens, {len(logps)} log-probabilities, ended by {finish}")
    return {"tokens": tokens, "finish": finish, "logps": logps}
