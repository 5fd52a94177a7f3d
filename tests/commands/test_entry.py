"""What the shared entry of the commands says and with which status it ends, whatever comes up."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from drive import drive

SAMPLE = ["output_dir=nowhere"]


def done(config: Any, output: Path) -> None:
    pass


def sample(*arguments: str) -> tuple[int, str]:
    """Status and last line of a command that does nothing but read its settings."""
    end = drive("sample", [*SAMPLE, *arguments], task=done)
    return end.status, (end.errors.rstrip().splitlines() or [""])[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"prompts: a\nseed: [1\n",
            "line 4: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence that begins on line 3)",
        ),
        (b"sampling:\n\tbatch_size: 1\n", "mine.yaml, line 3: found character '\\t'"),
        (b"seed: 1\nseed: 2\n", "mine.yaml, line 3: found duplicate key seed"),
        (b"title: caf\xe9\n", "mine.yaml: not UTF-8 (invalid continuation byte at byte 30)"),
        (b"- seed: 1\n", "mine.yaml: expected settings (key: value), found a list"),
        (b"sampling: " + b"[" * 1000, "mine.yaml: cannot be read (maximum recursion depth exceeded"),
        (b"sed: 1\n", "unknown key 'sed' in experiment/mine: did you mean seed?"),
    ],
)
def test_a_mistake_in_a_users_experiment(text, message, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(b"# @package _global_\n" + text)
    for given in ([f"--config-dir={tmp_path}"], ["--config-dir", str(tmp_path)]):
        status, line = sample("experiment=mine", *given)
        assert status == 2
        assert line.startswith("error: ")
        assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"seed: 7\n", "begin the file with the line `# @package _global_`"),
        (b"\xef\xbb\xbf# @package _global_\nseed: 7\n", "begins with a byte order mark"),
    ],
)
def test_an_experiment_that_would_be_ignored(text, message, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(text)
    status, line = sample("experiment=mine", f"--config-dir={tmp_path}")
    assert status == 2
    assert message in line


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            "label",
            ["labeler=anthropic"],
            "error: labeler=anthropic: there is no labeler/anthropic (there are hf, openai, scripted, vllm; any server "
            "with OpenAI's interface is labeler=openai labeler.base_url=URL labeler.model=NAME)",
        ),
        ("run", ["experiment=smok"], "error: experiment=smok: there is no experiment/smok (there are demo, "),
        ("report", ["labeler=hf"], "error: unknown key 'labeler': rlaif.report has no such group of settings"),
        ("sample", ["hydra.mode=MULTIRUN"], "error: hydra.mode: a sweep is asked for with -m"),
        ("sample", ["output_dir=a,b", "-m"], "error: output_dir can't be swept: give one folder"),
        ("sample", ["seed=interval(0,1)", "-m"], "error: seed=interval(0,1): a sweep takes a list of values"),
        ("sample", ["seed=1,2", "-m", "hydra/launcher=ray"], "pip install 'rlaif[sweep]'"),
        ("sample", ["seed=" + "9" * 5000], "error: the settings cannot be read (Exceeds the limit"),
        ("sample", ["eval=" + "[" * 3000], "is not a valid override"),
    ],
)
def test_wrong_choices(command, arguments, message):
    end = drive(command, [*SAMPLE, *arguments], task=done)
    (line,) = end.errors.splitlines()
    assert end.status == 2
    assert message in line
    assert len(line) < 1000
    assert "schema" not in line
    assert "search path" not in line


@pytest.mark.parametrize("name", ["{here}", "{here}/typo", "typo"])
def test_constitutions_that_are_none(name, inputs, tmp_path):
    (tmp_path / "own.yaml").touch()
    arguments = [f"candidates={inputs}/candidates.jsonl", "labeler=scripted", f"constitution={name}", "output_dir=x"]
    end = drive("label", [argument.format(here=tmp_path) for argument in arguments])
    assert end.status == 2
    expected = (
        "is a folder, expected a .yaml file; it has own.yaml" if name == "{here}" else "concise, harmless, helpful"
    )
    assert expected in end.errors


def test_ctrl_c_while_settings_compose():
    """Also where a library's own clean-up stumbles over it."""

    def stumble(*ignored: Any, **more: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            None.flags  # type: ignore[attr-defined]  # noqa: B018

    for where in ("omegaconf.OmegaConf.to_object", "rlaif.cli.register", "hydra._internal.hydra.Hydra.run"):
        for interrupt in (KeyboardInterrupt, stumble):
            with mock.patch(where, side_effect=interrupt):
                assert sample() == (130, "interrupted; the same command goes on from here"), (where, interrupt)


def test_no_memory_is_no_fault_of_the_program():
    def greedy(config: Any, output: Path) -> None:
        import torch

        torch.empty(2**50)

    end = drive("sample", SAMPLE, task=greedy)
    assert end.status == 2
    assert end.errors.startswith("error: not enough memory (")


def test_a_fault_of_the_program_has_its_traceback_and_no_secret():
    def faulty(config: Any, output: Path) -> None:
        raise RuntimeError("labeler.extra_body={api_key: hunter2}\x1b[2J")

    end = drive("sample", SAMPLE, task=faulty)
    assert end.status == 1
    assert end.fault == "traceback"
    assert end.errors.splitlines()[-1] == "RuntimeError: labeler.extra_body={api_key: [hidden]}\\u001b[2J"
