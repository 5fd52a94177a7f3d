"""Secrets that stand where they shouldn't, by their shape and by their name."""

from __future__ import annotations

import time

import pytest

from rlaif.redaction import redacted, redacted_settings


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("labeler.api_key_env=sk-proj-SECRET123456", "labeler.api_key_env=[hidden]"),
        ("labeler.api_key_env=hunter2", "labeler.api_key_env=[hidden]"),
        ("labeler={api_key_env: hunter2, model: m}", "labeler={api_key_env: [hidden], model: m}"),
        ("labeler.api_key=x1, then more", "labeler.api_key=[hidden], then more"),
        ("http://user:PASS@host/v1 and http://other/v1", "http://[hidden]@host/v1 and http://other/v1"),
        ("http://u:p@ss@h/v1", "http://[hidden]@h/v1"),
        ("http://h/v1?api-key=abc&x=1", "http://h/v1?api-key=[hidden]&x=1"),
        ("labeler.extra_body={api_key: abc, max_tokens: 4}", "labeler.extra_body={api_key: [hidden], max_tokens: 4}"),
        ('{"token": "abc"}', '{"token": [hidden]}'),
        ("pushed with hf_abcdefghijklmnopqrstuvwx", "pushed with [hidden]"),
        ("Bearer abcdefghijklm", "Bearer [hidden]"),
        # As Hydra writes the overrides of a sweep's job.
        ("labeler.base_url=http\\://bob\\:PASS@host\\:9/v1", "labeler.base_url=http\\://[hidden]@host\\:9/v1"),
        ("labeler.base_url=bob\\:PASS@host\\:9/v1", "labeler.base_url=[hidden]@host\\:9/v1"),
        ("{base_url: 'bob:PASS@host', model: m}", "{base_url: '[hidden]@host', model: m}"),
        ("labeler.base_url=host/v1?key=abc&x=1", "labeler.base_url=host/v1?key=[hidden]&x=1"),
        ("http://h/v1?sig=abc", "http://h/v1?sig=[hidden]"),
        ("{credentials: abc, n: 1}", "{credentials: [hidden], n: 1}"),
        ("{api_token: {value: abc}, n: 1}", "{api_token: [hidden], n: 1}"),
        ("{apikey: [abc, def], n: 1}", "{apikey: [hidden], n: 1}"),
        ('api_key="a\\"b c" n=1', "api_key=[hidden] n=1"),
        ("{clientSecret: abc, accessToken: def}", "{clientSecret: [hidden], accessToken: [hidden]}"),
        ("api_key = abc", "api_key = [hidden]"),
        ("{user: a, pass: abc}", "{user: a, pass: [hidden]}"),
    ],
)
def test_a_secret_is_hidden(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "labeler.api_key_env=OPENAI_API_KEY ppo.max_new_tokens=12 labeler.tokens_per_minute=4",
        "no API key: set the environment variable OPENAI_API_KEY (labeler.api_key_env names another)",
        "unknown key 'labeler.api_key': did you mean labeler.api_key_env?",
        "to use it as a list, use key=[value1,value2]",
        "x.yaml, line 3: key 'a' is given twice",
        "policy.name=task-oriented_model policy.revision=0123456789abcdef0123456789abcdef01234567",
        "labeler.base_url=http://127.0.0.1:8000/v1, hydra/launcher=basic: there is no such launcher",
        "labeler.base_url=http\\://127.0.0.1\\:8000/v1 output_dir=runs/a@b keyboard=1 monkey: 3 tokens=4 passed: 7",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


def test_settings_keep_their_shape():
    settings = {"labeler": {"api_key_env": "key", "headers": [{"authorization": "x"}], "n": 3, "base_url": "http://h"}}
    shown = {
        "labeler": {
            "api_key_env": "[hidden]",
            "headers": [{"authorization": "[hidden]"}],
            "n": 3,
            "base_url": "http://h",
        }
    }
    assert redacted_settings(settings) == shown
    assert redacted_settings({"api_key_env": "MY_KEY"}) == {"api_key_env": "MY_KEY"}
    assert redacted_settings({"api_key": {"value": "x"}, "token": [1, "x"], "pwd": 12345, "secret": None}) == {
        "api_key": "[hidden]",
        "token": ["[hidden]", "[hidden]"],
        "pwd": "[hidden]",
        "secret": None,
    }
    assert redacted_settings({"base_url": "bob:x@host/v1", "tokens_per_minute": 3, "key=sk-abcdefghijklmnop": 1}) == {
        "base_url": "[hidden]@host/v1",
        "tokens_per_minute": 3,
        "key=[hidden]": 1,
    }


@pytest.mark.parametrize(
    "part", ["a.", "\n", "a://", "key=", "{ ", "sk-", "bearer ", "@", "url=", "?a", "a_key=[", "token={", 'pw="\\\\']
)
def test_long_texts_take_no_time(part):
    started = time.process_time()
    redacted(part * (50_000 // len(part)))
    assert time.process_time() - started < 1
