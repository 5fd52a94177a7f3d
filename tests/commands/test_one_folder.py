"""What may happen to one output folder: simultaneous starts, kills, links, mounts and damage; nothing paid is lost."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracle_server import CONSTITUTION, Oracle, serve
from preloaded import Preloaded, run_script

from rlaif.folders import PROVENANCE, damage, recorded

REPO = Path(__file__).parents[2]
PROMPTS = 12
VERDICTS = PROMPTS * 3 * 2 * 2
"""Pairs of three completions, in both orders, under two principles."""
BUDGET = 100
AT_WORK = re.compile(r"error: output_dir=\S+: process (\d+) on (\S+) is at work in it; wait until it has ended, or .*")
CLOCKS = re.compile(r"seconds|_per_s|latency|spent")

CHAIN = REPO / "tests" / "commands" / "killed_chain.py"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Candidates whose values are planted."""
    folder = tmp_path_factory.mktemp("planted")
    draw = random.Random(1)
    with (folder / "candidates.jsonl").open("w", encoding="utf-8") as file:
        for number in range(PROMPTS):
            values = [(draw.uniform(-2, 2), draw.uniform(-2, 2)) for _ in range(3)]
            texts = [f"Text {number} {{kind={kind:+.3f} short={short:+.3f}}}" for kind, short in values]
            file.write(json.dumps({"prompt": f"Question {number}?", "completions": texts}) + "\n")
    (folder / "planted.yaml").write_text(CONSTITUTION, encoding="utf-8")
    return folder / "candidates.jsonl"


@pytest.fixture(scope="module")
def scripted(candidates: Path) -> list[str]:
    """Settings of ``rlaif.label`` but the output."""
    return [f"candidates={candidates}", "constitution=warm", "labeler=scripted", "labeler.scripted.noise=1"]


@pytest.fixture
def commands(scripted: list[str], run_command: Run, tmp_path: Path) -> dict[str, list[str]]:
    """Each command with all of its settings but the output."""
    labels = tmp_path / "of_training"
    run_command("label", *scripted, f"output_dir={labels}")
    return {
        "label": scripted,
        "sample": ["prompts=everyday", "data.max_prompts=12", "model@policy=tiny", "sampling.max_new_tokens=8"],
        "train": [
            *("method=dpo", "model@policy=tiny", f"preferences={labels}/preferences", "eval.enabled=false"),
            "dpo.batch_size=8",
        ],
    }


def without_clocks(value: Any) -> Any:
    """Figures without those that a clock gave."""
    return {key: each for key, each in value.items() if not CLOCKS.search(key)}


def result(output: Path) -> dict[str, Any]:
    """Everything that a command made, but for what a clock says; of a store the keys."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = path.relative_to(output).as_posix()
        if path.name == PROVENANCE:
            record = recorded(path.parent)
            assert record is not None
            assert damage(path.parent, record["files"]) == {}
        elif path.suffix == ".sqlite":
            with sqlite3.connect(path) as connection:
                found[name] = connection.execute("SELECT key FROM verdicts ORDER BY key").fetchall()
        elif path.name in ("quality.json", "training.jsonl"):
            lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
            found[name] = [without_clocks(json.loads(line)) for line in lines]
        elif "tfevents" not in path.name:
            found[name] = path.read_bytes()
    return found


def verdicts(output: Path) -> int:
    with sqlite3.connect(output / "store.sqlite") as connection:
        return int(connection.execute("SELECT count(*) FROM verdicts").fetchone()[0])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["label", "sample", "train"])
def test_simultaneous_starts_leave_one_complete_result(
    command: str, commands: dict[str, list[str]], preloaded: Preloaded, tmp_path: Path
) -> None:
    """One of each pair is told who the other is, or comes when that has ended."""
    where = tmp_path / "pairs"
    arguments = commands[command]
    started = time.monotonic()
    alone = preloaded.start(command, [*arguments, f"output_dir={tmp_path}/whole"], REPO).ended(240)
    takes = time.monotonic() - started
    assert alone.returncode == 0, alone.stderr
    whole = result(tmp_path / "whole")
    draw, refused = random.Random(command), 0
    for number in range(6):
        output = where / str(number)
        offset = draw.uniform(0, takes) * (number > 0)
        pair = [preloaded.start(command, [*arguments, f"output_dir={output}"], REPO)]
        time.sleep(offset)
        pair.append(preloaded.start(command, [*arguments, f"output_dir={output}"], REPO))
        pids = [str(each.process.pid) for each in pair]
        ended = [each.ended(240) for each in pair]
        refused += check_refusal(ended, pids)
        assert result(output) == whole
        assert sorted(os.listdir(where)) == sorted(map(str, range(number + 1)))
    assert refused >= 1


def check_refusal(ended: list[subprocess.CompletedProcess[str]], pids: list[str]) -> bool:
    """At least one of two has done its work; whether the other was told in one line who does it."""
    assert all("Traceback" not in each.stderr for each in ended)
    status = [each.returncode for each in ended]
    assert sorted(status) in ([0, 0], [0, 2]), [each.stderr[-2000:] for each in ended]
    if 2 not in status:
        return False
    loser = status.index(2)
    told = AT_WORK.fullmatch(ended[loser].stderr.strip().splitlines()[-1])
    assert told is not None, ended[loser].stderr
    assert told.groups() == (pids[1 - loser], socket.gethostname())
    return True


@pytest.mark.slow
def test_simultaneous_starts_keep_a_budget_and_all_that_was_paid(
    candidates: Path, preloaded: Preloaded, tmp_path: Path
) -> None:
    draw, refused = random.Random(0), 0
    for number in range(4):
        server = serve(Oracle(bias=1.0))
        output = tmp_path / "pairs" / str(number)
        arguments = [
            *(f"candidates={candidates}", f"constitution={candidates.parent}/planted.yaml", f"output_dir={output}"),
            *("labeler=openai", "labeler.model=judge", f"labeler.base_url={server.url}", "labeler.concurrency=4"),
            f"labeler.budget.requests={BUDGET}",
        ]
        try:
            pair = [preloaded.start("label", arguments, REPO)]
            time.sleep(draw.uniform(0, 1))
            pair.append(preloaded.start("label", arguments, REPO))
            pids = [str(each.process.pid) for each in pair]
            ended = [each.ended(240) for each in pair]
            refused += check_refusal(ended, pids)
            assert len(server.bodies) == verdicts(output) == BUDGET < VERDICTS
            assert damage(output, recorded(output)["files"]) == {}  # type: ignore[index]
        finally:
            server.close()
    assert refused >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "moments", "old", "at_least"),
    [
        ("label", "1", False, 22),
        ("label", "1", True, 22),
        ("label", "random", False, 3),
        ("sample", "1", False, 20),
        ("train", "3", False, 26),
    ],
)
def test_kills_change_no_byte(
    command: str,
    moments: str,
    old: bool,
    at_least: int,
    commands: dict[str, list[str]],
    preloaded: Preloaded,
    run_command: Run,
    tmp_path: Path,
) -> None:
    """Killed before one change of the file system after the other, or at random, and gone on with each time."""
    where = tmp_path / "where"
    arguments = [*commands[command], *["labeler.scripted.delay_s=0.01"] * (moments == "random")]
    run_command(command, *arguments, f"output_dir={tmp_path}/whole")
    if old:
        # There is a result that is replaced.
        run_command(command, *arguments, "labeling.min_margin=0.1", f"output_dir={where}/out")
    chain = run_script(preloaded, CHAIN, [moments, str(where), command, *arguments, f"output_dir={where}/out"])
    assert chain.returncode == 0, chain.stderr[-3000:]
    assert "Traceback" not in chain.stderr
    assert int(chain.stdout) >= at_least, chain.stdout
    assert result(where / "out") == result(tmp_path / "whole")
    assert os.listdir(where) == ["out"]


def test_a_link_is_followed(scripted: list[str], run_command: Run, tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "labels", tmp_path / "labels"
    target.mkdir(parents=True)
    link.symlink_to(Path("disk") / "labels")
    for more in ([], ["labeling.temperature=2"]):
        run_command("label", *scripted, *more, f"output_dir={link}")
        assert (target / "labels.jsonl").is_file()
        assert link.is_symlink()
        assert sorted(os.listdir(tmp_path)) == ["disk", "labels"]
        assert os.listdir(tmp_path / "disk") == ["labels"]
    assert "up to date" in run_command("label", *scripted, *more, f"output_dir={target}").stderr


def test_where_no_output_can_ever_be_fails_before_any_work(
    scripted: list[str], run_command: Run, tmp_path: Path
) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    cases = {
        "dangling": f"{tmp_path}/dangling is a link to nowhere, which is not there; make that folder, or remove",
        "dangling/below": f"{tmp_path}/dangling is a link to nowhere, which is not there",
        "loop": f"{tmp_path}/loop is a link to loop, which is not there",
        "file": "is a file, expected a folder",
        "/": "is the root of the file system; name a folder in it",
        "/../": "is the root of the file system; name a folder in it",
    }
    for name, told in cases.items():
        output = f"{tmp_path / name}" if name.strip("/.") else name
        result = run_command("label", *scripted, f"output_dir={output}", expect=2)
        assert told in result.stderr.strip().splitlines()[-1]
        assert "labeling" not in result.stderr
    for command in ("sample", "train", "audit", "evaluate", "run", "report"):
        assert cases["/"] in run_command(command, "output_dir=/", expect=2).stderr


RUNS = """
import hydra, json, pyarrow, runpy, sys
import rlaif.labeling.label
from killing import forked

def run(arguments):
    sys.argv = ["label", *arguments]
    runpy.run_module("rlaif.label", run_name="__main__", alter_sys=True)

for arguments in json.loads(sys.argv[1]):
    if status := forked(lambda: run(arguments)):
        sys.exit(status)
"""


@pytest.mark.parametrize("mount", ["-t tmpfs none", "--bind {}/source"])
def test_a_mount_is_filled_from_inside(
    scripted: list[str], run_command: Run, command_env: dict[str, str], tmp_path: Path, mount: str
) -> None:
    """A volume of its own, and a folder of the same file system, which only the kernel knows to be one."""
    for folder in ("mounts/volume", "source", "kept"):
        (tmp_path / folder).mkdir(parents=True)
    script = f'mount {mount.format(tmp_path)} "$0/mounts/volume" && "$@" && ls -A "$0/mounts" > "$0/beside" && ' + (
        'cp -r "$0/mounts/volume" "$0/kept"'
    )
    private = [str(shutil.which("unshare")), "-m" if os.geteuid() == 0 else "-rm"]
    if private[0] == "None" or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here")
    runs = [[*scripted, *more, f"output_dir={tmp_path}/mounts/volume"] for more in ([], ["labeling.temperature=2"])]
    done = subprocess.run(
        [
            *private,
            "sh",
            "-c",
            script,
            str(tmp_path),
            sys.executable,
            "-c",
            RUNS,
            json.dumps([runs[0], runs[1], runs[1]]),
        ],
        cwd=REPO,
        env=command_env | {"PYTHONPATH": f"{command_env['PYTHONPATH']}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("up to date") == 1
    assert (tmp_path / "beside").read_text() == "volume\n"
    run_command("label", *scripted, "labeling.temperature=2", f"output_dir={tmp_path}/whole")
    assert result(tmp_path / "kept" / "volume") == result(tmp_path / "whole")
    assert not list((tmp_path / "kept" / "volume").glob(".*"))


def test_what_was_paid_is_not_asked_again_for_a_lost_file(candidates: Path, run_command: Run, tmp_path: Path) -> None:
    server = serve(Oracle(bias=1.0))
    output = tmp_path / "out"
    arguments = [
        *(f"candidates={candidates}", f"constitution={candidates.parent}/planted.yaml", f"output_dir={output}"),
        *("labeler=openai", "labeler.model=judge", f"labeler.base_url={server.url}"),
    ]
    try:
        run_command("label", *arguments)
        whole, asked = result(output), len(server.bodies)
        (output / "labels.jsonl").unlink()
        (output / "quality.json").write_text("[]")
        (output / "preferences" / "train.parquet").write_bytes(b"")
        told = run_command("label", *arguments).stderr
        for damaged in (
            "labels.jsonl is missing",
            "preferences/train.parquet has 0 bytes, not the",
            "quality.json has 2 bytes, not the",
        ):
            assert damaged in told
        assert "making it again" in told
        assert result(output) == whole
        (output / "store.sqlite").unlink()
        told = run_command("label", *arguments).stderr
        assert "up to date, skipped" in told
        assert "but store.sqlite is missing; the results are whole" in told
        assert len(server.bodies) == asked
    finally:
        server.close()


def test_a_broken_summary_of_an_earlier_version_is_made_again(
    scripted: list[str], run_command: Run, tmp_path: Path
) -> None:
    """Whose provenance lists names alone."""
    output = tmp_path / "out"
    arguments = [*scripted, f"output_dir={output}"]
    run_command("label", *arguments)
    whole = result(output)
    made = json.loads((output / PROVENANCE).read_text())
    names = sorted({name.split("/")[0] for name in made["files"]})
    for broken, told in {"[1, 2]": "is no summary", "": "not valid JSON"}.items():
        (output / PROVENANCE).write_text(json.dumps(made | {"files": names}))
        (output / "quality.json").write_text(broken)
        said = run_command("label", *arguments).stderr
        assert re.search(rf"quality\.json: {told}.*; making it again", said)
        assert "requests failed" not in said
        assert result(output) == whole
