"""A vLLM server that is given adapters, played by a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import FakeServer, Reply, error

from rlaif.engines.vllm_server import KEY_ENV, VLLMServer
from rlaif.records import UserError

BASE = {"id": "base", "parent": None, "max_model_len": 100}


def answer(body: dict[str, Any]) -> Reply:
    """Tokens that tell which request they are the answer to."""
    if not body:
        return error(400, "lora_name is missing")
    if "prompt" not in body:
        return Reply("Success: done")
    tokens = [*body["prompt"], body["seed"] % 1000]
    choice = {
        "index": 0,
        "text": "not the tokens",
        "token_ids": tokens,
        "logprobs": {"token_logprobs": [-token / 100 for token in tokens]},
        "finish_reason": "stop" if body["seed"] % 2 else "length",
    }
    return Reply({"object": "text_completion", "choices": [choice]})


@pytest.fixture
def served() -> Iterator[FakeServer]:
    server = FakeServer(adapters=True)
    server.models = Reply({"data": [{**BASE, "id": "old", "parent": "base"}, BASE]})
    server.default = answer
    yield server
    server.close()


def connect(server: FakeServer, needed: int = 100) -> VLLMServer:
    return VLLMServer(server.url, "ppo.vllm.url", needed, "kept")


def job(number: int, adapter: int | None = None) -> dict[str, Any]:
    parameters = {"max_tokens": 5, "temperature": 0.7, "seed": number, "logprobs": 0}
    return {
        "ids": [number, 7],
        "sample": {**parameters, "ignore_eos": True, "stop_token_ids": [3]},
        **({} if adapter is None else {"adapter": adapter}),
    }


def test_token_ids_go_in_and_come_out_in_order(served: FakeServer) -> None:
    engine = connect(served)
    found = engine.ask([job(number) for number in range(300)])
    engine.close()
    for number, each in enumerate(found):
        tokens = [number, 7, number]
        assert each == {
            "tokens": tokens,
            "finish": "stop" if number % 2 else "length",
            "logps": [-token / 100 for token in tokens],
        }
    body = next(body for body in served.bodies if body.get("seed") == 5)
    assert (body["model"], body["prompt"], body["return_token_ids"], body["logprobs"]) == ("base", [5, 7], True, 0)
    assert (body["temperature"], body["stop_token_ids"], body["ignore_eos"]) == (0.7, [3], True)
    # What the model's own generation settings would otherwise decide.
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)


def test_every_adapter_has_a_name_of_its_own_and_the_one_before_goes(served: FakeServer) -> None:
    names = []
    for _ in range(2):
        engine = connect(served)
        for number in (1, 2):
            engine.ask([{"load": f"/adapters/{number}", "adapter": number}])
            engine.ask([job(1, number)])
        engine.close()
    for body in served.bodies:
        if "lora_path" in body:
            names.append(body["lora_name"])
            assert body["lora_path"].endswith(body["lora_name"].rpartition("-")[2])
    assert len(set(names)) == 4
    steps = [
        ("load" if "lora_path" in body else "sample" if "prompt" in body else "unload", body.get("lora_name"))
        for body in served.bodies
        if body
    ]
    first, second = names[:2]
    expected = [("load", first), ("sample", None), ("load", second), ("unload", first), ("sample", None)]
    assert steps[:6] == [*expected, ("unload", second)]
    assert [body["model"] for body in served.bodies if "prompt" in body] == names


def test_a_server_that_cannot_do_it_is_said_at_once(served: FakeServer) -> None:
    with pytest.raises(UserError, match=r"takes 100 tokens, .* are 101; start it with --max-model-len 101"):
        connect(served, needed=101)
    for listing in ({"data": []}, {"data": [{"id": "gpt"}]}, [], "hello"):
        served.models = Reply(listing)
        with pytest.raises(UserError, match="does not answer as vLLM does"):
            connect(served)
    served.models = error(401, "who are you?")
    with pytest.raises(UserError, match=r"ppo\.vllm\.url=http.*/models: HTTP 401: who are you"):
        connect(served)
    plain = FakeServer()
    plain.models = Reply({"data": [BASE]})
    with pytest.raises(UserError, match="loads no adapters; start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA"):
        connect(plain)
    plain.close()
    with pytest.raises(UserError, match=r"ppo\.vllm\.url=http.*: cannot be reached"):
        connect(plain)
    with pytest.raises(UserError, match=r"ppo\.vllm\.url=nowhere: not a valid address"):
        VLLMServer("nowhere", "ppo.vllm.url", 1, "kept")


@pytest.mark.parametrize("lost", ["token_ids", "logprobs", "finish_reason"])
def test_an_answer_without_what_is_needed_ends_the_run(
    served: FakeServer, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlaif.engines.client.BACKOFF_S", 0.001)
    engine = connect(served)

    def less(body: dict[str, Any]) -> Reply:
        reply = answer(body)
        if "prompt" in body:
            reply.body["choices"][0][lost] = None
        return reply

    served.default = less
    with pytest.raises(UserError, match=r"ppo\.vllm\.url=.*: malformed: .*\(kept\)"):
        engine.ask([job(1)])
    engine.close()


def test_a_server_that_goes_away_is_one_line_and_closing_still_works(
    served: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlaif.engines.client.BACKOFF_S", 0.001)
    engine = connect(served)
    engine.ask([{"load": "/adapters/1", "adapter": 1}])
    served.default = error(500, "No adapter\nfound")
    with pytest.raises(UserError, match=r"/load_lora_adapter: HTTP 500: No adapter found \(kept\)"):
        engine.ask([{"load": "/adapters/2", "adapter": 2}])
    served.default = Reply(cut=True)
    with pytest.raises(UserError, match=r"ppo\.vllm\.url=.*: connection: .*\(kept\)"):
        engine.ask([job(1, 1)])
    engine.close()


def test_the_key_is_sent_and_never_said(served: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "a-very-secret-key")
    engine = connect(served)
    served.default = error(400, "bad key a-very-secret-key")
    with pytest.raises(UserError) as caught:
        engine.ask([{"load": "/adapters/1", "adapter": 1}])
    assert "secret" not in str(caught.value)
    assert {headers["Authorization"] for headers in served.headers} == {"Bearer a-very-secret-key"}
    engine.close()
