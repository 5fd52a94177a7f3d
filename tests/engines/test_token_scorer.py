"""Options over ``/completions`` by token ids, against a server that answers as vLLM does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, continuations, error

from rlaif.chat import encode_chat
from rlaif.config import Endpoint, LabelerConfig, LabelerType, ModelConfig
from rlaif.engines.base import Failure, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.engines.openai import OpenAIEngine
from rlaif.engines.options import Spelling, sequence_masses, spellings
from rlaif.models import load_tokenizer
from rlaif.records import UserError

OPTIONS = (("a", "zt"), ("b",))
SWITCHED = (
    "{% for message in messages %}{{ message.content }} {% endfor %}{% if add_generation_prompt %}Say: "
    "{% if enable_thinking is defined and enable_thinking is false %}(no thoughts){% endif %}{% endif %}"
)
"""A template with a switch as Qwen3's has it."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ModelConfig(name="tiny"))


def build(server: FakeServer, **settings: Any) -> OpenAIEngine:
    settings = {
        "base_url": server.url,
        "model": "judge",
        "tokenizer": "tiny",
        "batch_size": 4,
        "timeout_s": 5.0,
        "max_retries": 0,
        "endpoint": Endpoint.completions,
    } | settings
    return OpenAIEngine(LabelerConfig(type=LabelerType.openai, **settings), seed=5)


def ask(text: str, options: Any = OPTIONS, stem: str = "") -> OptionRequest:
    return OptionRequest(({"role": "user", "content": text},), options, stem)


def logp(prompt: list[int], token: int) -> float:
    return -1.0 - (token + sum(prompt)) % 5


def answer(body: dict[str, Any]) -> Reply:
    return continuations(body, logp)


def test_masses_are_exact_sums_over_spellings(server: FakeServer, tokenizer: Any) -> None:
    server.default = answer
    requests = [ask("q" * size, stem="It is " if size % 2 else "") for size in range(1, 30)]
    with build(server) as engine:
        results = dict(engine.score_options(iter(requests)))
    a, b, z, t = tokenizer.convert_tokens_to_ids(["a", "b", "z", "t"])
    for index, request in enumerate(requests):
        ids = encode_chat(tokenizer, request.messages, request.stem)
        p = {token: math.exp(logp(ids, token)) for token in (a, b, z)}
        result = results[index]
        assert isinstance(result, OptionMass)
        assert result.masses == pytest.approx((p[a] + p[z] * math.exp(logp([*ids, z], t)), p[b]))
        assert (result.method, result.prompt_tokens) == ("logprob", len(ids))
    start, *bodies = server.bodies
    # 29 prompts in eight requests, and as many again for what follows "z".
    assert len(bodies) == 16
    assert {len(body["prompt"]) for body in bodies} == {4, 1}
    assert all(body["max_tokens"] == 1 and body["return_tokens_as_token_ids"] for body in bodies)
    assert len(start["prompt"]) == 2


def test_text_from_outside_is_no_control_token(server: FakeServer, tokenizer: Any) -> None:
    server.default = answer
    [special, *_] = [token for token in tokenizer.all_special_tokens if token]
    request = ask(f"say {special} now")
    with build(server) as engine:
        list(engine.score_options([request]))
    plain = encode_chat(tokenizer, ask("say now").messages)
    number = tokenizer.convert_tokens_to_ids(special)
    [sent] = server.bodies[1]["prompt"]
    assert sent == encode_chat(tokenizer, request.messages)
    assert sent.count(number) == plain.count(number)


def test_an_option_that_goes_on_from_another(server: FakeServer, tokenizer: Any) -> None:
    """Where "10" is two tokens, what goes on from "1" to "10" is no mass of "1"."""
    one, zero, two = tokenizer.convert_tokens_to_ids(["1", "0", "2"])
    table = {one: 0.5, two: 0.25, zero: 0.8}
    server.default = lambda body: continuations(body, lambda _, token: math.log(table.get(token, 1e-9)))
    with build(server) as engine:
        [(_, result)] = engine.score_options([ask("rate", (("1",), ("10",), ("2",)))])
    assert isinstance(result, OptionMass)
    assert result.masses == pytest.approx((0.1, 0.4, 0.25))


def test_spellings_know_what_they_go_on_from(tokenizer: Any) -> None:
    one, zero = tokenizer.convert_tokens_to_ids(["1", "0"])
    assert spellings(tokenizer, (("1",), ("10",), ("100",))) == [
        Spelling(0, (one,), None),
        Spelling(1, (one, zero), 0),
        Spelling(2, (one, zero, zero), 1),
    ]


def test_sequence_masses_of_nested_spellings() -> None:
    spelled = [Spelling(0, (1,), None), Spelling(1, (1, 0), 0), Spelling(2, (1, 0, 0), 1)]
    logps = {(1,): math.log(0.8), (1, 0): math.log(0.5), (1, 0, 0): math.log(0.2)}
    assert sequence_masses(spelled, logps, 3) == pytest.approx((0.3, 0.3, 0.2))
    assert sequence_masses(spelled, {(1,): math.log(0.8)}, 3) == pytest.approx((0.8, 0.0, 0.0))


def test_a_prompt_that_is_refused_fails_alone(server: FakeServer, tokenizer: Any) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return error(400, "too long") if any(len(prompt) > 200 for prompt in body["prompt"]) else answer(body)

    server.default = reply
    texts = ["x", "y" * 300, "z", "w"]
    with build(server) as engine:
        results = dict(engine.score_options(map(ask, texts)))
    assert isinstance(results[1], Failure)
    assert (results[1].reason, results[1].detail) == ("http_400", "too long")
    assert all(isinstance(results[index], OptionMass) for index in (0, 2, 3))


def test_a_server_that_lists_the_likeliest_tokens_only(server: FakeServer, tokenizer: Any, caplog: Any) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if body["logprobs"] > 5:
            return error(400, "at most 5")
        return continuations(body, lambda _, token: math.log([0.5, 0.25, *[0.01] * 18][token]), known=False)

    server.default = reply
    words = [tokenizer.decode([number]) for number in (0, 1)]
    with build(server) as engine:
        [(_, result)] = engine.score_options([ask("x", tuple((word,) for word in words))])
    assert isinstance(result, OptionMass)
    assert result.masses == pytest.approx((0.5, 0.25))
    assert result.observed == pytest.approx(0.75)
    assert "gives only the 5 most likely tokens" in caplog.text
    assert "logprob_token_ids" not in server.bodies[-1]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (error(404, "Not Found"), r"HTTP 404.*labeler.endpoint=completions.*use labeler.endpoint=chat"),
        (
            error(400, "prompt must be a string"),
            r"list of prompts as token ids \(http_400: prompt must be",
        ),
        (Reply({"choices": [{"index": 0, "text": "x"}]}), r"does not take a list of prompts as token ids"),
        (
            Reply({"choices": [{"index": 0, "text": "x"}, {"index": 1, "text": "x"}]}),
            "gives no log-probabilities there; use labeler.endpoint=chat",
        ),
    ],
)
def test_a_server_that_cannot_is_told_in_one_line(server: FakeServer, reply: Reply, message: str) -> None:
    server.default = reply
    with build(server) as engine, pytest.raises(UserError, match=message) as raised:
        engine.score_options([ask("x")])
    assert "\n" not in str(raised.value)


def test_no_tokenizer(server: FakeServer) -> None:
    with pytest.raises(UserError, match=r"^labeler.endpoint=completions tokenises .* set labeler.tokenizer"):
        build(server, tokenizer="./no/such/folder")


def test_sample(server: FakeServer, tokenizer: Any) -> None:
    server.default = lambda body: continuations(body | {"logprob_token_ids": [0]}, logp)
    request = SampleRequest(({"role": "user", "content": "Hi"},), 30, 0.7, 0.9, seed=42)
    server.plan = [continuations({"prompt": [[1], [2]], "logprob_token_ids": [0, 1]}, logp)]
    with build(server) as engine:
        [(_, result)] = engine.sample([request])
    assert result == Sampled("x", "length", 1, len(encode_chat(tokenizer, request.messages)))
    assert server.bodies[1] == {
        "model": "judge",
        "prompt": [encode_chat(tokenizer, request.messages)],
        "max_tokens": 30,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 42,
    }


def test_what_the_user_adds_is_in_every_request(server: FakeServer) -> None:
    server.default = answer
    with build(server, extra_body={"priority": 3}) as engine:
        list(engine.score_options([ask("x")]))
        assert engine.identity["extra_body"] == {"priority": 3}
    assert len(server.bodies) > 1
    assert all(body["priority"] == 3 for body in server.bodies)


def test_variables_of_the_template_make_the_prompts(server: FakeServer, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(SWITCHED, encoding="utf-8")
    server.default = answer
    sent, identities = {}, []
    for value in (None, True, False):
        variables = {} if value is None else {"enable_thinking": value}
        with build(server, tokenizer=str(tmp_path), chat_template_kwargs=variables) as engine:
            list(engine.score_options([ask("x")]))
            identities.append(engine.identity)
        sent[value] = tokenizer.decode(server.bodies[-2]["prompt"][0])
        assert "chat_template_kwargs" not in server.bodies[-1]
    assert sent[None] == sent[True]
    assert sent[False] == f"{sent[True]}(no thoughts)"
    assert identities[1] != identities[0] != identities[2] != identities[1]


def test_identity_has_what_makes_the_prompts(server: FakeServer) -> None:
    with build(server) as engine:
        assert engine.identity["endpoint"] == "completions"
        assert engine.identity["tokenizer"] == "tiny"
        assert engine.identity["template"]


def test_identity_changes_with_the_tokenizers_content(server: FakeServer, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    with build(server, tokenizer=str(tmp_path)) as engine:
        before = dict(engine.identity)
    with build(server, tokenizer=str(tmp_path)) as engine:
        assert engine.identity == before
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with build(server, tokenizer=str(tmp_path)) as engine:
        assert engine.identity != before
