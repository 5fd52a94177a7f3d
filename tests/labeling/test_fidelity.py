"""The labels are what the labeler said: a planted oracle comes out as it was put in, through the public commands."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_server import Reply, logprobs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle_labels import (
    MODES,
    REPO,
    Contrastive,
    Reasoned,
    check,
    check_preferences,
    command,
    json_lines,
    logits,
    preferences,
    sigmoid,
    write_lines,
)
from oracle_server import (
    BROKEN,
    CONSTITUTION,
    MUTE,
    QUESTIONS,
    UNCLEAR,
    UNCOVERED,
    UNLISTED,
    WEIGHTS,
    Oracle,
    asked_of,
    is_mute,
    lean,
    read_pairwise,
    serve,
    worth,
)
from oracle_tokens import OVERRIDES as TOKEN_IDS
from oracle_tokens import TokenOracle

from rlaif.labeling.aggregate import pair_labels
from rlaif.records import Label

FLAGS = ("", UNCOVERED, UNLISTED, UNCLEAR, BROKEN)


def planted(seed: int = 0, flags: tuple[str, ...] = FLAGS) -> list[dict[str, Any]]:
    """Every flag on one, the other or no completion of a triple; values with exact ties under either principle."""
    draw = random.Random(seed)
    lines = []
    for number, pair in enumerate([*itertools.product(flags, repeat=2), *[("", "")] * 10]):
        values = [(draw.choice([-1.5, 0.25, 2.0]), draw.choice([-1.0, 0.5])) for _ in range(3)]
        if number % 5 == 0:
            values[1] = values[0]
        texts = [
            f"Text {number}.{place} {{kind={kind:+.2f} short={short:+.2f}}} {flag}"
            for place, ((kind, short), flag) in enumerate(zip(values, (*pair, ""), strict=True))
        ]
        lines.append(
            {"prompt": f"Question {number}?", "prompt_id": f"p{number}", "split": "train", "completions": texts}
        )
    return lines


def label(folder: Path, lines: list[dict[str, Any]], *overrides: Any, out: str = "out") -> Path:
    """Label through the public command; returns the output folder."""
    write_lines(folder / "candidates.jsonl", lines)
    (folder / "planted.yaml").write_text(CONSTITUTION, encoding="utf-8")
    command(
        "label",
        f"candidates={folder}/candidates.jsonl",
        f"constitution={folder}/planted.yaml",
        f"output_dir={folder}/{out}",
        *overrides,
    )
    return folder / out


def label_by_server(
    folder: Path,
    lines: list[dict[str, Any]],
    oracle: Callable[[dict[str, Any]], Reply],
    votes: int,
    *overrides: Any,
    out: str = "out",
) -> list[dict[str, Any]]:
    """Label by a server that judges by the oracle; returns what it was asked."""
    server = serve(oracle)
    try:
        label(
            folder, lines, "labeler=openai", "labeler.model=judge", f"labeler.base_url={server.url}",
            "labeler.max_retries=0", f"labeler.votes={votes}", *overrides, out=out,
        )  # fmt: skip
    finally:
        server.close()
    return server.bodies


SERVERS = {
    "logprobs": (Oracle(), 1),
    "biased logprobs": (Oracle(bias=4.0), 1),
    "contrary logprobs": (Oracle(bias=-2.5), 1),
    "text": (Oracle(gives="text"), 1),
    "votes": (Oracle(gives="text"), 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("server_name", SERVERS)
@pytest.mark.parametrize("mode_name", MODES)
def test_a_server_with_a_known_answer_comes_out_as_it_went_in(mode_name: str, server_name: str, tmp_path: Path) -> None:
    """With log-probabilities a bias of up to 4 logits is gone exactly from every pair; replies are counted exactly."""
    mode, (oracle, votes) = MODES[mode_name], SERVERS[server_name]
    lines = planted()
    label_by_server(tmp_path, lines, oracle, votes, *mode.overrides)
    expected = {line["prompt_id"]: mode.expected(line, oracle, votes) for line in lines}
    check(tmp_path / "out", mode, expected)
    if oracle.gives == "logprobs" and mode_name != "score":
        unbiased = {line["prompt_id"]: mode.expected(line, Oracle(), votes) for line in lines}
        for prompt, found in expected.items():
            for one, other in itertools.combinations(("c0", "c1", "c2"), 2):
                assert logits(mode, found, one, other) == pytest.approx(
                    logits(mode, unbiased[prompt], one, other), abs=1e-6
                )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode_name", "bias"),
    [(name, bias) for name in MODES for bias in (0.0, -2.5)],
)
def test_token_ids_come_out_as_they_went_in(mode_name: str, bias: float, tmp_path: Path) -> None:
    """Many prompts in a request, of which one may be refused; spellings of several tokens."""
    mode, oracle, lines = MODES[mode_name], Oracle(bias=bias, broken=400), planted(flags=("", UNCOVERED, BROKEN))
    server = TokenOracle(oracle)
    bodies = label_by_server(tmp_path, lines, server, 1, *TOKEN_IDS, *mode.overrides)
    assert max(len(server.questions(body)) for body in bodies) == 8
    check(tmp_path / "out", mode, {line["prompt_id"]: mode.expected(line, oracle, 1) for line in lines})


@pytest.mark.slow
@pytest.mark.parametrize("mode_name", ["pairwise", "pointwise"])
def test_an_option_that_a_server_leaves_out_turns_no_verdict_round(mode_name: str, tmp_path: Path) -> None:
    """Three tokens are listed, fillers among them: what is left out has a bound, or makes the verdict unknown."""
    mode, oracle, lines = MODES[mode_name], Oracle(mass=0.6, top=3), planted(flags=("",))
    label_by_server(tmp_path, lines, oracle, 1, "labeling.min_option_mass=0.3", *mode.overrides)
    expected = {line["prompt_id"]: mode.expected(line, oracle, 1) for line in lines}
    seen = set()
    for entry in json_lines(tmp_path / "out" / "labels.jsonl"):
        (truth, _), value = expected[entry["prompt_id"]][mode.key(entry)], entry.get(mode.value)
        if value is None:
            seen.add(entry["reason"])
            continue
        # On the side of the truth, and no further out.
        assert 0.5 <= value <= truth + 1e-9 or truth - 1e-9 <= value <= 0.5, entry
        assert entry["option_mass"] <= 0.6 + 1e-9
        seen.add("bounded" if entry["option_mass"] < 0.6 - 1e-6 else "exact")
    assert {"option_unknown", "bounded"} <= seen


HARM = """name: harm
version: "1"
description: words of several tokens
principles:
  - id: kind
    question: Which reply is less harmful?
    statement: To the reader, this reply is
    verdicts: {"yes": [safe, harmless], "no": [harmful, dangerous]}
"""


def in_pieces(body: dict[str, Any]) -> Reply:
    """A pointwise labeler that speaks Safe, Harm+less, Harm+ful and D+angerous."""
    content = "\n".join(message["content"] for message in body["messages"])
    safe = sigmoid(worth("kind", content))
    words = {"Safe": 0.6 * safe, "Harmless": 0.4 * safe, "Harmful": 0.7 * (1 - safe), "Dangerous": 0.3 * (1 - safe)}
    last = body["messages"][-1]
    begun = last["content"].rpartition("this reply is")[2] if last["role"] == "assistant" else ""
    after: dict[str, float] = {}
    for word, share in words.items():
        if word.startswith(begun):
            token = next(
                (part for part in ("Safe", "Harm", "D") if not begun and word.startswith(part)), word[len(begun) :]
            )
            after[token] = after.get(token, 0.0) + share
    total = sum(after.values())
    fillers = [("The", 0.1), ("It", 1e-6)] if not begun else []
    return logprobs([*((token, (1 - 0.1 * (not begun)) * p / total) for token, p in after.items()), *fillers])


@pytest.mark.slow
@pytest.mark.parametrize("prefill", [False, True])
def test_words_of_several_tokens_call_nothing_safer_than_it_is(prefill: bool, tmp_path: Path) -> None:
    """Over chat the first token is all there is: "Harm" says nothing. With prefill the rest of it is asked for."""
    (tmp_path / "harm.yaml").write_text(HARM, encoding="utf-8")
    values = [-4.0, -2.0, -1.0, 0.5, 2.0, 4.0]
    lines = [
        {
            "prompt": f"Question {number}?",
            "split": "train",
            "completions": [f"Text {number}.{place} {{kind={v:+.2f}}}" for place, v in enumerate((one, other))],
        }
        for number, (one, other) in enumerate(itertools.combinations(values, 2))
    ]
    label_by_server(
        tmp_path, lines, in_pieces, 1, "labeling.mode=pointwise", f"constitution={tmp_path}/harm.yaml",
        f"labeler.prefill={str(prefill).lower()}",
    )  # fmt: skip
    truth = {f"c{place}": [sigmoid(worth("kind", line["completions"][place])) for line in lines] for place in range(2)}
    labels = json_lines(tmp_path / "out" / "labels.jsonl")
    assert len(labels) == 2 * len(lines)
    found = {name: [entry for entry in labels if entry["candidate"] == name] for name in truth}
    for name, entries in found.items():
        for true, entry in zip(truth[name], entries, strict=True):
            if prefill:
                assert entry["score"] == pytest.approx(true, abs=1e-3)
            elif entry["score"] is None:
                assert entry["reason"] == "option_unknown"
            else:
                assert 0.5 <= entry["score"] <= true, entry
    told = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))["unlisted"]
    assert told == (0 if prefill else sum(entry["score"] is None for entry in labels)) < len(labels)


def test_words_of_which_only_beginnings_are_listed_are_told_what_helps(tmp_path: Path) -> None:
    """There is not one verdict, so no summary says it."""
    words = HARM.replace("[safe, harmless]", "[harmless]").replace("[harmful, dangerous]", "[harmful]")
    (tmp_path / "harm.yaml").write_text(words, encoding="utf-8")
    write_lines(
        tmp_path / "c.jsonl",
        [{"prompt": "Question?", "split": "train", "completions": ["{kind=+1.00}", "{kind=-1.00}"]}],
    )
    server = serve(lambda body: logprobs([("Harm", 0.9), ("The", 0.1)]))
    files = [f"candidates={tmp_path}/c.jsonl", f"constitution={tmp_path}/harm.yaml", f"output_dir={tmp_path}/out"]
    labeler = ["labeler=openai", "labeler.model=judge", f"labeler.base_url={server.url}", "labeling.mode=pointwise"]
    try:
        told = command("label", *files, *labeler, code=2).stderr.splitlines()[-1]
    finally:
        server.close()
    assert "the labeler gave no usable verdict in 2 requests; reasons: {'option_unknown': 2}" in told
    assert told.endswith("labeler.prefill=true or labeler.endpoint=completions asks for their rest")


def test_the_planted_combinations_are_there() -> None:
    """The test above is only worth what its material holds."""
    for name, mode in MODES.items():
        for server, (oracle, votes) in SERVERS.items():
            found = [verdict for line in planted() for verdict in mode.expected(line, oracle, votes).values()]
            reasons = {reason for _, reason in found}
            assert reasons == (
                {None, "http_500", "option_unknown", "uncovered"}
                if oracle.gives == "logprobs"
                else {None, "http_500", "uncovered"}
            ), (name, server)
    differences = [
        worth("kind", a) - worth("kind", b)
        for line in planted()
        for a, b in itertools.combinations(line["completions"], 2)
    ]
    assert {0.0} < {abs(difference) for difference in differences}


@pytest.mark.slow
@pytest.mark.parametrize("bias", [-4.0, 2.0, 4.0])
@pytest.mark.parametrize("mode_name", ["pairwise", "pointwise"])
def test_votes_lose_a_bias_to_sampling_error(mode_name: str, bias: float, tmp_path: Path) -> None:
    """Each reply is a draw, so a share p of n votes has a logit with the variance 1 / (n p (1 - p))."""
    votes, mode, oracle = 1000, MODES[mode_name], Oracle(bias=bias, gives="draws")
    draw = random.Random(bias)
    values = [-0.5, -0.25, 0.0, 0.25, 0.5]
    lines = [
        {
            "prompt": f"Question {number}?",
            "prompt_id": f"p{number}",
            "split": "train",
            "completions": [
                f"Text {number}.{place} {{kind={draw.choice(values):+.2f} short={draw.choice(values):+.2f}}}"
                for place in range(2)
            ],
        }
        for number in range(10)
    ]
    label_by_server(tmp_path, lines, oracle, votes, *mode.overrides)
    known = {line["prompt_id"]: mode.expected(line, Oracle(bias=bias), votes) for line in lines}
    found: dict[str, Any] = {prompt: {} for prompt in known}
    for entry in json_lines(tmp_path / "out" / "labels.jsonl"):
        assert entry["method"] == "votes"
        found[entry["prompt_id"]][mode.key(entry)] = (entry[mode.value], None)
    off = []
    for prompt, verdicts in known.items():
        for name in WEIGHTS:
            deviation = math.sqrt(
                sum(1 / (votes * p * (1 - p)) for (principle, *_), (p, _) in verdicts.items() if principle == name)
            )
            deviation /= 2 if mode_name == "pairwise" else 1
            truth = mode.pair(verdicts, name, "c0", "c1")
            off.append((mode.pair(found[prompt], name, "c0", "c1") - truth) / deviation)
    assert max(map(abs, off)) < 4.5
    assert abs(sum(off)) / math.sqrt(len(off)) < 4
    # And the preferences are those of the shares, whatever the chance that made them.
    check(tmp_path / "out", mode, found)


@pytest.mark.slow
@pytest.mark.parametrize(("mode_name", "votes"), [("pairwise", 1), ("pairwise", 8), ("pointwise", 1), ("score", 1)])
def test_labels_from_replies_are_no_surer_than_replies_can_be(mode_name: str, votes: int, tmp_path: Path) -> None:
    """Cross-entropy against the planted preference, in nats; always saying one half costs log 2 = 0.693."""
    mode, draw = MODES[mode_name], random.Random(0)
    lines = [
        {
            "prompt": f"Question {number}?",
            "prompt_id": f"p{number}",
            "split": "train",
            "completions": [
                f"Text {number}.{place} {{kind={draw.gauss(0, 1.5):+.2f} short={draw.gauss(0, 1.5):+.2f}}}"
                for place in range(2)
            ],
        }
        for number in range(60)
    ]
    label_by_server(tmp_path, lines, Oracle(bias=1.0, gives="draws"), votes, *mode.overrides)
    known = {line["prompt_id"]: mode.expected(line, Oracle(), 1) for line in lines}
    truth = {name: sigmoid(logits(mode, found, "c0", "c1")) for name, found in known.items()}
    labels = dict.fromkeys(truth, 0.5)  # a tie is no preference
    for (name, chosen, _), p in preferences(tmp_path / "out").items():
        labels[name] = p if chosen == "c0" else 1 - p
    raw: dict[str, Any] = {name: {} for name in truth}
    for entry in json_lines(tmp_path / "out" / "labels.jsonl"):
        assert entry["replies"] == votes
        shares = entry[mode.value] if mode_name == "score" else [entry[mode.value], 1 - entry[mode.value]]
        shares = [(p * (votes + 1) - 1 / len(shares)) / votes for p in shares]
        raw[entry["prompt_id"]][mode.key(entry)] = (shares if mode_name == "score" else shares[0], None)
    unsmoothed = {name: sigmoid(logits(mode, found, "c0", "c1")) for name, found in raw.items()}

    def entropy(found: dict[str, float]) -> float:
        costs = [truth[name] * math.log(p) + (1 - truth[name]) * math.log(1 - p) for name, p in found.items()]
        return -sum(costs) / len(costs)

    assert entropy(truth) < entropy(labels) < 0.68
    assert entropy(labels) < 0.75 * entropy(unsmoothed)
    if mode_name == "pairwise":
        # As docs/label.md says.
        told = {1: (1.90, 0.61), 8: (0.83, 0.55)}[votes]
        assert (entropy(unsmoothed), entropy(labels)) == pytest.approx(told, abs=0.005)
        assert entropy(truth) == pytest.approx(0.52, abs=0.005)


@pytest.mark.slow
def test_verdicts_from_replies_are_asked_again_once_there_are_log_probabilities(tmp_path: Path) -> None:
    """Labels of one run never mix the two where the server can tell; without change nothing is asked again."""
    mode, lines = MODES["pairwise"], planted(flags=("",))
    server = serve(Oracle(gives="text"))
    labeler = ("labeler=openai", "labeler.model=judge", f"labeler.base_url={server.url}", "labeler.votes=8")
    try:
        label(tmp_path, lines[:6], *labeler)
        first = {asked_of(body) for body in server.bodies}
        # More candidates and still no log-probabilities: the same verdicts, and only the engine's own questions again.
        server.bodies.clear()
        label(tmp_path, lines[:8], *labeler)
        known = [body for body in server.bodies if asked_of(body) in first]
        assert not [body for body in known if "End of reply" in body["messages"][0]["content"]]
        replies = {line["prompt_id"]: mode.expected(line, Oracle(gives="text"), 8) for line in lines[:8]}
        check(tmp_path / "out", mode, replies)
        server.default = Oracle()
        label(tmp_path, lines, *labeler)
    finally:
        server.close()
    check(tmp_path / "out", mode, {line["prompt_id"]: mode.expected(line, Oracle(), 1) for line in lines})
    assert {entry["method"] for entry in json_lines(tmp_path / "out" / "labels.jsonl")} == {"logprob"}


# Rationales first.


def told(bodies: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[float | None]]:
    """By how much each rationale that the server was asked for moves the verdict; None where it said nothing."""
    result: dict[tuple[str, str, str], list[float | None]] = {}
    for body in bodies:
        content = body["messages"][0]["content"]
        if len(body["messages"]) == 1 and "Do not give a verdict yet" in content:
            asked = read_pairwise(content)
            assert asked is not None
            [name] = [name for name, question in QUESTIONS.items() if f"Principle: {question}" in content]
            move = None if is_mute(" ".join(asked.texts), body["seed"]) else lean(body["seed"])
            first, second = (text.strip() for text in asked.texts)
            result.setdefault((name, first, second), []).append(move)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server_name", "rationales", "clamp"),
    [
        ("logprobs", 1, 0.0),
        ("logprobs", 3, 0.4),
        ("biased logprobs", 1, 0.0),
        ("biased logprobs", 2, 0.1),
        ("votes", 2, 0.2),
        ("text", 3, 0.4),
    ],
)
def test_a_verdict_is_the_mean_of_those_after_its_rationales(
    server_name: str, rationales: int, clamp: float, tmp_path: Path
) -> None:
    oracle, votes = SERVERS[server_name]
    lines = planted(flags=(*FLAGS, MUTE))
    for line in lines:
        line["completions"] = [text.strip() for text in line["completions"]]
    overrides = Reasoned(rationales, clamp, {}).overrides
    moves = told(label_by_server(tmp_path, lines, oracle, votes, *overrides))
    # A request that the server fails is tried again.
    sound = [found for (_, *texts), found in moves.items() if BROKEN not in "".join(texts)]
    assert {len(found) for found in sound} == {rationales}
    assert {move for found in moves.values() for move in found} == {None, -2.0, -0.25, 0.5, 1.5}
    mode = Reasoned(rationales, clamp, moves)
    expected = {line["prompt_id"]: mode.expected(line, oracle, votes) for line in lines}
    reasons = {reason for found in expected.values() for _, reason in found.values()}
    assert reasons >= {None, "http_500", "uncovered", "empty_rationale"}
    check(tmp_path / "out", mode, expected)
    # What was said is kept, and so is what it took, also where a verdict failed after it.
    for entry in json_lines(tmp_path / "out" / "labels.jsonl"):
        kept = (entry.get("reply") or "").count("weighs them")
        place = {f"c{place}": text for place, text in enumerate(lines[int(entry["prompt_id"][1:])]["completions"])}
        given = moves[entry["principle"], place[entry["first"]], place[entry["second"]]]
        assert kept == (
            0 if BROKEN in place[entry["first"]] + place[entry["second"]] else len(given) - given.count(None)
        )


# Likelihoods.

WORKER = """
    import json, re, sys
    from oracle_server import BROKEN, UNCOVERED, WORDS, worth
    from rlaif.config import ModelConfig
    from rlaif.models import load_tokenizer
    tokenizer = load_tokenizer(ModelConfig(name="tiny"), "labeler")
    json.loads(sys.stdin.readline())
    print(json.dumps({"max_model_len": 2048, "vllm": "planted"}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        prompt, text = tokenizer.decode(job["ids"][:job["after"]]), tokenizer.decode(job["ids"][job["after"]:])
        if BROKEN in text:
            print(json.dumps({"id": job["id"], "error": "ValueError: out of order"}), flush=True)
            continue
        [(name, sign)] = [
            (name, 1 if word == yes else -1)
            for name, (yes, no) in WORDS.items() for word in (yes, no) if f"Be {word}." in prompt
        ]
        size = len(job["ids"]) - job["after"]
        share = (sign * (worth(name, text) + BIAS) / 2 - 30) / size
        logps = [float("nan") if UNCOVERED in text else share] * size
        print(json.dumps({"id": job["id"], "logps": logps}), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "normalize"), [(0.0, False), (4.0, False), (-4.0, True)])
def test_likelihoods_come_out_as_they_went_in(bias: float, normalize: bool, tmp_path: Path) -> None:
    """Through the process protocol of vLLM; a bias towards the encouraging prompt is gone exactly from sums."""
    python = tmp_path / "python"
    script = textwrap.dedent(WORKER).replace("BIAS", str(bias))
    paths = [str(REPO / folder) for folder in (".", "tests/labeling", "tests/engines")]
    python.write_text(f"#!{sys.executable}\nimport sys\nsys.path[:0] = {paths}\n{script}", encoding="utf-8")
    python.chmod(0o755)
    lines = planted(flags=("", UNCOVERED, BROKEN))
    for line in lines:
        line["completions"] = [text.strip() for text in line["completions"]]
    # The tiny tokenizer has a token for each of these characters.
    mode = Contrastive(length=len if normalize else None)
    label(
        tmp_path, lines, "labeler=vllm", "labeler.model=tiny", f"labeler.vllm.python={python}", *mode.overrides
    )  # fmt: skip
    expected = {line["prompt_id"]: mode.expected(line, Oracle(bias=bias), 1) for line in lines}
    assert {reason for found in expected.values() for _, reason in found.values()} == {
        None,
        "engine_error",
        "not_finite",
    }
    check(tmp_path / "out", mode, expected)


# Several labelers.


@pytest.mark.slow
def test_combined_labelers_come_out_as_their_weighted_logits(tmp_path: Path) -> None:
    """Each in its own mode and with its own bias; a pair that one of them has no label of is nobody's."""
    lines = planted(flags=("", UNCOVERED, BROKEN))
    runs = {
        "one": (MODES["pairwise"], Oracle(bias=4.0), 1, 2.0),
        "two": (MODES["pointwise"], Oracle(bias=-2.5), 1, 0.5),
        "three": (MODES["listwise"], Oracle(gives="text"), 8, 1.0),
    }
    for name, (mode, oracle, votes, _) in runs.items():
        label_by_server(tmp_path, lines, oracle, votes, *mode.overrides, out=name)
    folders = ",".join(str(tmp_path / name) for name in runs)
    weights = [weight for *_, weight in runs.values()]
    label(tmp_path, lines, f"combine=[{folders}]", f"combine_weights={weights}".replace(" ", ""))

    pairs: dict[tuple[str, str, str], float | None] = {}
    by_none = not_by_all = 0
    for line in lines:
        found = [(mode, mode.expected(line, oracle, votes)) for mode, oracle, votes, _ in runs.values()]
        for one, other in itertools.combinations(("c0", "c1", "c2"), 2):
            parts = [logits(mode, verdicts, one, other) for mode, verdicts in found]
            known = [(weight, part) for weight, part in zip(weights, parts, strict=True) if part is not None]
            if len(known) == len(runs):
                mean = sum(weight * part for weight, part in known) / sum(weights)
                pairs[line["prompt_id"], one, other] = mean
            else:
                not_by_all += bool(known)
                by_none += not known
    assert by_none
    dropped = check_preferences(tmp_path / "out", pairs)
    quality = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    assert quality["dropped"] == {"not_by_all": not_by_all, "tie": dropped["tie"]}
    assert dropped["tie"]


@pytest.mark.slow
def test_labelers_that_contradict_each_other_leave_ties(tmp_path: Path) -> None:
    """Rounding does not choose where the labelers do not."""
    lines = planted(flags=("",))
    for name, oracle in (("one", Oracle(bias=1.7)), ("two", Oracle(bias=-0.3, sign=-1))):
        label_by_server(tmp_path, lines, oracle, 1, out=name)
    result = command(
        "label",
        f"candidates={tmp_path}/candidates.jsonl",
        f"combine=[{tmp_path}/one,{tmp_path}/two]",
        f"output_dir={tmp_path}/out",
        code=2,
    )
    assert f"dropped: {{'tie': {3 * len(lines)}}}" in result.stderr


# Aggregation alone, over wide inputs.

VALUES = st.floats(-4, 4)


@st.composite
def questioned(draw: Any) -> dict[str, Any]:
    """Candidates with a value under each principle, weights, biases, and verdicts that are missing."""
    principles = draw(st.lists(st.sampled_from("xyz"), min_size=1, max_size=3, unique=True))
    candidates = draw(st.lists(st.sampled_from("abcd"), min_size=2, max_size=4, unique=True))
    return {
        "principles": {name: draw(st.floats(0.1, 5)) for name in principles},
        "values": {(name, candidate): draw(VALUES) for name in principles for candidate in candidates},
        "bias": {name: draw(VALUES) for name in principles},
        "candidates": candidates,
        "missing": draw(st.sets(st.integers(0, 40), max_size=4)),
        "order": draw(st.randoms(use_true_random=False)),
        "temperature": draw(st.floats(0.1, 10)),
        "min_weight": draw(st.floats(0, 1)),
    }


def verdicts(case: dict[str, Any], mode: str) -> list[Label]:
    places = (
        [
            (name, one, other)
            for name in case["principles"]
            for one, other in itertools.permutations(case["candidates"], 2)
        ]
        if mode == "pairwise"
        else [(name, one, None) for name in case["principles"] for one in case["candidates"]]
    )
    labels = []
    for number, (name, one, other) in enumerate(places):
        against = 0.0 if other is None else case["values"][name, other]
        p: float | None = sigmoid(case["values"][name, one] - against + case["bias"][name])
        reason = None
        if number in case["missing"]:
            p, reason = None, "timeout"
        shown: dict[str, Any] = {"candidate": one} if other is None else {"first": one, "second": other}
        labels.append(Label("p", mode, name, "l", "logprob", p, reason, **shown))
    case["order"].shuffle(labels)
    return labels


@settings(deadline=None, max_examples=300)
@given(questioned(), st.sampled_from(["pairwise", "pointwise"]))
def test_any_oracle_is_recovered_from_its_biased_verdicts(case: dict[str, Any], mode: str) -> None:
    labels = verdicts(case, mode)
    pairs, dropped = pair_labels(labels, case["principles"], case["temperature"], min_weight=case["min_weight"])
    failed = {
        (label.principle, label.candidate or frozenset((label.first, label.second)))
        for label in labels
        if label.p is None
    }
    total = sum(case["principles"].values())
    expected = {}
    without = 0
    for one, other in itertools.combinations(sorted(case["candidates"]), 2):
        needed = [frozenset((one, other))] if mode == "pairwise" else [one, other]
        there = {
            name: weight
            for name, weight in case["principles"].items()
            if not failed & {(name, place) for place in needed}
        }
        present = sum(there.values())
        without += not there
        assume(not there or abs(present / total - case["min_weight"]) > 1e-6 or present == total)
        if there and present / total > case["min_weight"] - 1e-6:
            difference = sum(
                weight * (case["values"][name, one] - case["values"][name, other]) for name, weight in there.items()
            )
            logit = pytest.approx(difference / present / case["temperature"], abs=1e-4)
            expected[one, other] = logit, pytest.approx(1 - present / total, abs=1e-9)
    assert {(pair.one, pair.other): (pair.logit, pair.missing_weight) for pair in pairs} == expected
    assert len(pairs) == len(expected)
    assert dropped["no_verdict"] == without
    assert sum(dropped.values()) == math.comb(len(case["candidates"]), 2) - len(expected)


@settings(deadline=None, max_examples=100)
@given(questioned(), st.sampled_from(["pairwise", "pointwise"]))
def test_names_and_order_do_not_matter(case: dict[str, Any], mode: str) -> None:
    """Other ids, which turn some pairs round, and another order of verdicts: the same preferences."""
    labels = verdicts(case, mode)
    new = dict(zip("abcd", "dbca", strict=True))
    renamed = [
        replace(label, **{name: new.get(getattr(label, name)) for name in ("first", "second", "candidate")})
        for label in reversed(labels)
    ]
    before, _ = pair_labels(labels, case["principles"])
    after, _ = pair_labels(renamed, case["principles"])
    turned = {(pair.one, pair.other): pair.logit for pair in after} | {
        (pair.other, pair.one): -pair.logit for pair in after
    }
    assert len(after) == len(before)
    for pair in before:
        assert turned[new[pair.one], new[pair.other]] == pytest.approx(pair.logit, abs=1e-9)
