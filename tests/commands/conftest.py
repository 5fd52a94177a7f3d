"""Fixtures of the command tests: commands as subprocesses, small input files, and one run of the smoke experiment."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from preloaded import Preloaded

REPO = Path(__file__).parents[2]
PROMPTS = REPO / "data" / "everyday_prompts.jsonl"
Result = subprocess.CompletedProcess[str]


def _arguments(command: str, overrides: tuple[Any, ...]) -> list[str]:
    return [sys.executable, "-m", f"rlaif.{command}", *map(str, overrides)]


@pytest.fixture(scope="session")
def run_command(command_env: dict[str, str], preloaded: Preloaded) -> Callable[..., Result]:
    """``run_command("train", "seed=1", ..., expect=0)``: run to the end and check the exit status.

    With ``env`` (may be empty), ``prefix`` or other arguments it is a process from scratch; else one that need not
    import everything, and has the same order of sets as others: what compares two runs has one of them from scratch.
    """

    def run(
        command: str,
        *overrides: Any,
        env: Mapping[str, str | None] | None = None,
        expect: int = 0,
        cwd: Path = REPO,
        prefix: tuple[str, ...] = (),
        timeout: float = 240,
        **arguments: Any,
    ) -> Result:
        if env is None and not prefix and not arguments:
            return checked(preloaded.run(command, [str(override) for override in overrides], cwd, timeout), expect)
        merged = {k: v for k, v in {**command_env, **(env or {})}.items() if v is not None}
        result = subprocess.run(
            [*prefix, *_arguments(command, overrides)],
            cwd=cwd,
            env=merged,
            capture_output=True,
            text=True,
            timeout=timeout,
            **arguments,
        )
        return checked(result, expect)

    def checked(result: Result, expect: int) -> Result:
        assert result.returncode == expect, f"exit {result.returncode}, not {expect}:\n{result.stderr[-4000:]}"
        return result

    return run


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start_command(command_env: dict[str, str], tmp_path: Path) -> Any:
    """``start_command("run", ...)``: start and return the process; standard error goes to ``process.log``."""
    started = []

    def start(command: str, *overrides: Any) -> subprocess.Popen[str]:
        log = tmp_path / f"stderr-{len(started)}.txt"
        with log.open("w", encoding="utf-8") as stderr:
            process = subprocess.Popen(
                _arguments(command, overrides),
                cwd=REPO,
                env=command_env,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                text=True,
                start_new_session=True,
                # Where the tests run in the background, SIGINT is ignored, and children would inherit that.
                preexec_fn=_heed_interrupts,
            )
        process.log = log  # type: ignore[attr-defined]
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="session")
def smoke(run_command: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one complete ``rlaif.run experiment=smoke``. Read only: copy it before changing it."""
    folder = tmp_path_factory.mktemp("run") / "smoke"
    secret = {"OPENAI_API_KEY": "sk-this-must-never-be-written"}
    run_command("run", "experiment=smoke", f"output_dir={folder}", env=secret)
    return folder


def write_lines(path: Path, lines: list[Any]) -> Path:
    """A JSONL file; texts are written as they are."""
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small good inputs: ``prompts.jsonl``, ``candidates.jsonl`` and ``preferences/train.jsonl``."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [
        json.loads(line)["prompt"][-1]["content"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:40]
    ]
    write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in texts])
    write_lines(
        folder / "candidates.jsonl",
        [{"prompt": text, "completions": [f"area {i}", f"rhythm {i}", f"oboe {i}"]} for i, text in enumerate(texts)],
    )
    (folder / "preferences").mkdir()
    write_lines(
        folder / "preferences" / "train.jsonl",
        [{"prompt": text, "chosen": f"area {i}", "rejected": f"rhythm {i}"} for i, text in enumerate(texts[:16])],
    )
    return folder
