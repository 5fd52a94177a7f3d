"""Labeling loses nothing and repeats nothing: kills, a full disk, a bad server, Ctrl-C; and it never tells the key."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, error, text
from oracle_server import CONSTITUTION, QUESTIONS, UNCOVERED, Oracle, noisy, read_pairwise, serve
from oracle_tokens import OVERRIDES as TOKEN_IDS
from oracle_tokens import TokenOracle, is_check

from rlaif.engines.limits import AHEAD
from rlaif.records import iterate_candidates

REPO = Path(__file__).parents[2]
IN_FLIGHT = 4
PROMPTS = 30
VERDICTS = PROMPTS * 3 * 2 * 2
"""Pairs of three completions, in both orders, under two principles."""
TIMINGS = ("verdicts_per_s", "latency_median_s", "latency_p95_s", "spent")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Candidates whose values are planted, one in a dozen of them uncovered."""
    folder = tmp_path_factory.mktemp("planted")
    draw = random.Random(5)
    with (folder / "candidates.jsonl").open("w", encoding="utf-8") as file:
        for number in range(PROMPTS):
            texts = [
                f"Text {number}.{place} {{kind={draw.uniform(-2, 2):+.3f} short={draw.uniform(-2, 2):+.3f}}}"
                + (UNCOVERED if draw.random() < 1 / 12 else "")
                for place in range(3)
            ]
            file.write(json.dumps({"prompt": f"Question {number}?", "completions": texts}) + "\n")
    (folder / "planted.yaml").write_text(CONSTITUTION, encoding="utf-8")
    return folder


def arguments(inputs: Path, url: str, output: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "rlaif.label",
        f"candidates={inputs}/candidates.jsonl",
        f"constitution={inputs}/planted.yaml",
        f"output_dir={output}",
        "labeler=openai",
        "labeler.model=judge",
        f"labeler.base_url={url}",
        f"labeler.concurrency={IN_FLIGHT}",
        *more,
    ]


def finish(command: list[str], expect: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == expect, result.stderr[-3000:]
    return result


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, SIGINT is ignored, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def dataset(output: Path) -> dict[str, Any]:
    """Every byte of the dataset, and its quality but for what a clock says."""
    files = [output / "labels.jsonl", *sorted((output / "preferences").iterdir())]
    quality = json.loads((output / "quality.json").read_text(encoding="utf-8"))
    return {str(file.relative_to(output)): file.read_bytes() for file in files} | {
        "quality": {key: value for key, value in quality.items() if key not in TIMINGS}
    }


def committed(output: Path) -> int:
    """Verdicts in the store of a run that is not finished, or of one that is."""
    for folder in (output.with_name(f".{output.name}.partial"), output):
        if (folder / "store.sqlite").is_file():
            try:
                # Read only: the next run must find the write-ahead log as the kill left it.
                connection = sqlite3.connect(f"file:{folder}/store.sqlite?mode=ro", uri=True, timeout=10)
                try:
                    return int(connection.execute("SELECT count(*) FROM verdicts").fetchone()[0])
                finally:
                    connection.close()
            except sqlite3.OperationalError:  # killed before the table was made
                return 0
    return 0


def slow(delay_s: float, oracle: Callable[[dict[str, Any]], Reply] | None = None) -> Callable[[dict[str, Any]], Reply]:
    oracle = oracle or Oracle(bias=1.0)

    def answer(body: dict[str, Any]) -> Reply:
        reply = oracle(body)
        # The engine's own question comes before any other.
        reply.delay_s = 0 if "prompt" in body and is_check(body) else delay_s
        return reply

    return answer


@dataclass
class Line:
    """How the labeler talks to the server: chats, or token ids with many prompts in a request."""

    oracle: Any
    overrides: tuple[str, ...]
    dataset: dict[str, Any]
    """What a run gives that nothing happens to."""
    most: int
    """Verdicts that a request asks for."""

    def asked(self, bodies: list[dict[str, Any]]) -> list[tuple[str, ...]]:
        """The verdicts that were asked for: principle, first and second text."""
        found = []
        for shown in (shown for body in bodies for shown in self._texts(body)):
            verdict = read_pairwise(shown)
            assert verdict is not None
            [principle] = [name for name, question in QUESTIONS.items() if f"Principle: {question}" in shown]
            found.append((principle, *verdict.texts))
        return found

    def _texts(self, body: dict[str, Any]) -> list[str]:
        if isinstance(self.oracle, TokenOracle):
            return self.oracle.questions(body)
        content = body["messages"][0]["content"]
        return [content] if "[End of reply" in content else []  # else the engine's own question


@pytest.fixture(params=["chat", "completions"])
def line(request: pytest.FixtureRequest) -> Line:
    if request.param == "chat":
        return Line(Oracle(bias=1.0), (), request.getfixturevalue("undisturbed"), 1)
    found: Line = request.getfixturevalue("token_ids")
    return found


@pytest.fixture(scope="module")
def token_ids(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Line:
    output, oracle = tmp_path_factory.mktemp("token_ids") / "out", TokenOracle(Oracle(bias=1.0))
    server = serve(oracle)
    try:
        finish(arguments(inputs, server.url, output, *TOKEN_IDS))
    finally:
        server.close()
    found = Line(oracle, TOKEN_IDS, dataset(output), 8)
    asked = found.asked(server.bodies)
    assert len(asked) == len(set(asked)) == committed(output) == VERDICTS
    return found


def labelled(inputs: Path, output: Path) -> set[tuple[str, ...]]:
    """The verdicts that a run has: principle, first and second text."""
    texts = {
        (line.prompt.prompt_id, candidate.candidate_id): candidate.completion
        for line in iterate_candidates(inputs / "candidates.jsonl")
        for candidate in line.candidates
    }
    labels = [json.loads(text) for text in (output / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        (label["principle"], *(texts[label["prompt_id"], label[place]] for place in ("first", "second")))
        for label in labels
        if label["method"] != "none"
    }


def wait(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run gives that nothing happens to."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    server = serve(Oracle(bias=1.0))
    try:
        finish(arguments(inputs, server.url, output))
        assert len(server.bodies) == committed(output) == VERDICTS
    finally:
        server.close()
    found = dataset(output)
    assert 0 < found["quality"]["uncovered"] < VERDICTS / 2
    assert {"labels.jsonl", "preferences/train.parquet", "preferences/README.md"} < set(found)
    return found


@pytest.fixture
def server() -> Iterator[FakeServer]:
    running = serve(slow(0.02))
    yield running
    running.close()


@pytest.mark.slow
def test_twenty_kills_change_nothing_and_repeat_nothing(
    inputs: Path, undisturbed: dict[str, Any], server: FakeServer, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = arguments(inputs, server.url, output)
    draw = random.Random(20)
    lost, inside = [], 0
    for kill in range(20):
        calls, known = len(server.bodies), committed(output)
        process = start(command)
        if kill % 4 == 3:  # at any time, start-up included
            time.sleep(draw.uniform(0, 1.5))
        elif kill == 18:  # while the dataset is written
            wait(lambda calls=calls, known=known: len(server.bodies) - calls >= VERDICTS - known, process)
            time.sleep(draw.uniform(0, 0.3))
        else:
            wanted = draw.randint(1, 24)
            wait(lambda calls=calls, wanted=wanted: len(server.bodies) - calls >= wanted, process)
            time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.communicate()
        time.sleep(0.1)  # what the server has not read yet
        asked, stored = len(server.bodies) - calls, committed(output) - known
        inside += 0 < stored < VERDICTS - known
        lost.append(asked - stored)
    assert inside >= 8
    finish(command)
    # Asked again is only what was in flight when the process died, and as many answers that nobody had taken yet.
    assert all(0 <= calls <= 2 * IN_FLIGHT for calls in lost), lost
    assert len(server.bodies) == VERDICTS + sum(lost)
    assert dataset(output) == undisturbed
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_kills_between_batches_change_nothing(
    inputs: Path, token_ids: Line, server: FakeServer, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = arguments(inputs, server.url, output, *TOKEN_IDS, "labeler.concurrency=2")
    server.default = slow(0.03, token_ids.oracle)
    draw, lost, inside = random.Random(7), [], 0
    for _ in range(5):
        calls, known = len(server.bodies), committed(output)
        process = start(command)
        wanted = draw.randint(7, 14)
        wait(lambda calls=calls, wanted=wanted: len(server.bodies) - calls >= wanted, process)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.communicate()
        time.sleep(0.1)  # what the server has not read yet
        stored = committed(output) - known
        inside += 0 < stored < VERDICTS - known
        lost.append(len(token_ids.asked(server.bodies[calls:])) - stored)
    assert inside >= 3
    finish(command)
    assert all(0 <= verdicts <= 2 * 2 * token_ids.most for verdicts in lost), lost
    assert len(token_ids.asked(server.bodies)) == VERDICTS + sum(lost)
    assert dataset(output) == token_ids.dataset


@pytest.mark.slow
def test_a_budget_holds_over_all_runs_into_a_folder(inputs: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    server = serve(slow(0.01))
    command = [*arguments(inputs, server.url, tmp_path / "out"), "labeler.max_retries=0"]
    try:
        # Killed three times in the middle of its budget, then run to the end of it, then once more: never more than 200
        # requests, and less by what a killed run had set aside and not sent.
        most, least = 200, 200 - 3 * AHEAD
        for known in (40, 80, 120):
            process = start([*command, "labeler.budget.requests=200"])
            wait(lambda known=known: committed(tmp_path / "out") >= known, process)
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        for _ in range(2):
            finish([*command, "labeler.budget.requests=200"])
            spent = json.loads((tmp_path / "out" / "quality.json").read_text())["spent"]["requests"]
            assert spent == 200
            assert least <= len(server.bodies) <= most
            assert committed(tmp_path / "out") <= most < VERDICTS
        finish([*command, f"labeler.budget.requests={VERDICTS + 200}"])
        assert committed(tmp_path / "out") == VERDICTS
        assert dataset(tmp_path / "out") == undisturbed
    finally:
        server.close()


@pytest.mark.slow
def test_kills_of_the_scripted_labeler_change_nothing(inputs: Path, tmp_path: Path) -> None:
    command = [*arguments(inputs, "", tmp_path / "out")[:5], "labeler=scripted", "labeler.scripted.noise=1"]
    finish([*command, f"output_dir={tmp_path}/whole"])
    command += [f"output_dir={tmp_path}/out", "labeler.scripted.delay_s=0.003"]
    finish([*command[:-2], f"output_dir={tmp_path}/slow", command[-1]])
    draw = random.Random(6)
    for _ in range(4):
        known = committed(tmp_path / "out")
        process = start(command)
        wanted = known + draw.randint(0, 60)
        wait(lambda wanted=wanted: committed(tmp_path / "out") > wanted, process)
        process.kill()
        process.communicate()
        assert committed(tmp_path / "out") >= known
    finish(command)
    assert dataset(tmp_path / "out") == dataset(tmp_path / "slow")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["48k", "1200k"])
def test_a_full_disk_ends_with_one_line_and_goes_on(
    size: str, inputs: Path, undisturbed: dict[str, Any], server: FakeServer, tmp_path: Path
) -> None:
    """A small disk of the command's own, made larger between two runs of the same command."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    script = (
        f'mount -t tmpfs -o size={size} none "{disk}" || exit 99; '
        f'"$@" 2> "{kept}/first.txt"; echo $? > "{kept}/status"; ls -A "{disk}" > "{kept}/left"; '
        f'mount -o remount,size=64m "{disk}" && "$@" && cp -r "{disk}/out" "{kept}/out"'
    )
    prefix = [str(shutil.which("unshare")), "-m" if os.geteuid() == 0 else "-rm", "sh", "-c", script, "sh"]
    server.default = Oracle(bias=1.0)
    if prefix[0] == "None" or subprocess.run([*prefix, "true"], capture_output=True).returncode not in (0, 1):
        pytest.skip("no private mounts here")
    result = subprocess.run(
        [*prefix, *arguments(inputs, server.url, disk / "out")], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    said = (kept / "first.txt").read_text(encoding="utf-8")
    assert (kept / "status").read_text().strip() == "2", said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert str(disk) in last
    assert "full" in last or "space" in last
    assert dataset(kept / "out") == undisturbed
    # As many answers as are in flight may wait for the labeler while it works.
    assert len(server.bodies) <= VERDICTS + 2 * IN_FLIGHT


def test_a_server_that_goes_down_costs_nothing_that_was_answered(
    inputs: Path, undisturbed: dict[str, Any], server: FakeServer, tmp_path: Path
) -> None:
    """Gone for good, it ends the run with one line; gone for a while, it leaves no verdict missing."""
    output = tmp_path / "out"
    command = [*arguments(inputs, server.url, output), "labeler.max_retries=1"]
    process = start([*command, "labeler.outage_s=1"])
    wait(lambda: len(server.bodies) >= 60, process)
    server.go_down()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.search(r"^error: .*: no answer for \d+ seconds \(labeler\.outage_s=1\), .*$", said.splitlines()[-1])
    assert "Traceback" not in said
    known = committed(output)
    assert 60 - 2 * IN_FLIGHT <= known <= len(server.bodies)

    asked = len(server.bodies)
    server.come_back()
    process = start(command)
    wait(lambda: len(server.bodies) >= asked + 60, process)
    server.go_down()
    time.sleep(1)
    server.come_back()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert re.search(r"answers again after \d+ seconds", said)
    assert dataset(output) == undisturbed
    # Twice were only those in flight when it went, and the questions that found it back.
    assert len(server.bodies) <= VERDICTS + 2 * (2 * IN_FLIGHT + 2)


def test_what_was_sent_before_a_kill_is_counted(inputs: Path, server: FakeServer, tmp_path: Path) -> None:
    """Without a budget too; at most what is noted ahead is counted without having been sent."""
    output = tmp_path / "out"
    command = arguments(inputs, server.url, output, "labeler.concurrency=64")
    server.default = slow(0.5)
    for asked in (64, 160):  # sent together, while the labeler does nothing but wait
        process = start(command)
        wait(lambda asked=asked: len(server.bodies) >= asked, process)
        process.kill()
        process.communicate()
    server.default = Oracle(bias=1.0)
    finish(command)
    spent = json.loads((output / "quality.json").read_text(encoding="utf-8"))["spent"]
    assert VERDICTS < len(server.bodies) <= spent["requests"] <= len(server.bodies) + 2 * AHEAD


FAULTS = {
    "rate limit": error(429, "slow down", **{"Retry-After": "0.02"}),
    "server error": error(500, "out of order"),
    "no answer": Reply({}, delay_s=3),
    "cut before the answer": Reply(cut=True),
    "cut in the answer": Reply({"choices": []}, cut=True),
    "not JSON": Reply("<html>bad gateway</html>"),
    "cut JSON": Reply('{"choices": [{"message": {"content": "A"'),
    "empty": Reply(""),
    "no choices": Reply({"choices": []}),
    "no message": Reply({"choices": [{}]}),
    "no log-probabilities": text("A"),
}


@pytest.mark.slow
def test_a_server_that_fails_three_calls_in_ten_gives_the_same_dataset(
    inputs: Path, line: Line, server: FakeServer, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    bad = noisy(line.oracle, 3, 0.3, list(FAULTS.values()))
    server.default = lambda body: (line.oracle if "prompt" in body and is_check(body) else bad)(body)
    command = arguments(
        inputs, server.url, output, "labeler.max_retries=1", "labeler.timeout_s=0.4", "labeler.concurrency=16",
        *line.overrides,
    )  # fmt: skip
    failed = []
    known: set[tuple[str, ...]] = set()
    for _ in range(12):
        before = len(server.bodies)
        finish(command)
        failed.append(json.loads((output / "quality.json").read_text(encoding="utf-8"))["failed"])
        # What an earlier run has got is not asked again.
        assert known.isdisjoint(line.asked(server.bodies[before:]))
        known = labelled(inputs, output)
        assert len(known) == VERDICTS - failed[-1]
        if not failed[-1]:
            break
    assert failed[0] > 0  # or nothing was put to the test
    assert failed == sorted(failed, reverse=True)
    assert failed[-1] == 0
    assert dataset(output) == line.dataset


@pytest.mark.parametrize("delay_s", [0.02, 30.0], ids=["busy", "hanging"])
def test_ctrl_c_stops_at_once_with_everything_saved(
    delay_s: float, inputs: Path, line: Line, server: FakeServer, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = arguments(inputs, server.url, output, *line.overrides)
    # Token ids start with a few requests, and more only once some are answered.
    wanted = 25 if delay_s < 1 else IN_FLIGHT if line.most == 1 else 1
    server.default = slow(delay_s, line.oracle)
    process = start(command)
    wait(lambda: len(line.asked(server.bodies)) >= wanted, process)
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    # Answers under way would take longer; a busy machine takes its time to end a process.
    assert time.monotonic() - pressed < 5
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "interrupted; the same command goes on from here"
    assert "Traceback" not in said
    lost = len(line.asked(server.bodies)) - committed(output)
    # As many answers as are in flight may wait for the labeler while it works.
    assert 0 <= lost <= 2 * IN_FLIGHT * line.most
    server.default = line.oracle
    finish(command)
    assert len(line.asked(server.bodies)) == VERDICTS + lost
    assert dataset(output) == line.dataset


KEY = "sk-proj-3f9Q_secret/7Yx2LmN8"


def talkative(body: dict[str, Any]) -> Reply:
    """The oracle's verdict, in a reply that tells the key."""
    reply = Oracle()(body)
    reply.body["choices"][0]["message"]["content"] += f" {KEY}"
    return reply


def talkative_in_other_words(body: dict[str, Any]) -> Reply:
    """The same, with the key as JSON may spell it too."""
    reply = talkative(body)
    reply.body = json.dumps(reply.body).replace("/", r"\/").replace("secret", r"\u0073ecret")
    return reply


def holders_of_the_key(folder: Path) -> list[str]:
    """Files with the key, or with its end, however its beginning is spelt."""
    return [str(file) for file in folder.rglob("*") if file.is_file() and KEY[-8:].encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("answer", "expect"),
    [
        (None, 0),
        (error(401, f"Incorrect API key provided: {KEY}"), 2),
        (error(403, f"{KEY} may not use this model"), 2),
        (error(500, f"no worker for {KEY}"), 2),
        (error(400, f"bad header Authorization: Bearer {KEY}"), 2),
        (Reply(f"<html>{KEY}</html>"), 2),
        (Reply({"choices": f"{KEY}"}), 2),
        (talkative, 0),
        (talkative_in_other_words, 0),
    ],
    ids=[
        "all is well",
        "refused",
        "forbidden",
        "failing",
        "bad request",
        "not JSON",
        "malformed",
        "in the reply",
        "escaped in the reply",
    ],
)
def test_the_key_is_told_nobody(
    answer: Reply | None, expect: int, inputs: Path, server: FakeServer, tmp_path: Path
) -> None:
    """Not in any file, standard output or error, whatever a server does with it, and at any log level."""
    server.default = answer or Oracle()
    # An interrupted run leaves its work beside the output.
    command = arguments(
        inputs,
        server.url,
        tmp_path / "out",
        "labeler.max_retries=0",
        "hydra.verbose=true",
        "labeler.concurrency=64",
        "labeler.outage_s=1",
    )
    result = finish(command, expect, {**os.environ, "OPENAI_API_KEY": KEY})
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert KEY[-8:] not in result.stdout + result.stderr
    assert list(tmp_path.rglob("*"))
    assert holders_of_the_key(tmp_path) == []
    assert "Traceback" not in result.stderr
