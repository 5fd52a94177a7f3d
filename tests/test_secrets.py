"""Secrets that stand where they shouldn't, by their shape and by their name."""

from __future__ import annotations

import time

import pytest

from rlaif.text import redacted, redacted_settings


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


@pytest.mark.parametrize("part", ["a.", "\n", "a://", "key=", "{ ", "sk-", "bearer ", "@"])
def test_long_texts_take_no_time(part):
    started = time.process_time()
    redacted(part * (50_000 // len(part)))
    assert time.process_time() - started < 1
