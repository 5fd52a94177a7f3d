"""The openai engine against a real HTTP server that can misbehave."""

import itertools
import logging
import math
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from fake_server import FakeServer, Reply, error, logprobs, text
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.config import BudgetConfig, LabelerConfig, LabelerType
from rlaif.engines import build_labeler, client, wire
from rlaif.engines.base import Failure, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.engines.openai import OpenAIEngine
from rlaif.engines.options import UNDECIDED, Bounds, accepted_tokens, option_bounds, option_masses, parse_reply
from rlaif.labeling.prompts import letter_spellings
from rlaif.records import UserError

KEY = "sk-secret-0123456789"
AB = ((" A", "A"), (" B", "B"))
LETTERED = tuple(letter_spellings(letter) for letter in "AB")
"""As prompts that ask for a letter have them."""
TONE = (("positive", "warm"), ("negative", "cold"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def build(server: FakeServer, **settings: Any) -> OpenAIEngine:
    settings = {
        "base_url": server.url,
        "model": "judge",
        "timeout_s": 5.0,
        "max_retries": 2,
        "outage_s": 1.0,
    } | settings
    return OpenAIEngine(LabelerConfig(type=LabelerType.openai, **settings), seed=5)


def ask(number: int = 0, options: Any = AB, stem: str = "", content: str = "Which?") -> OptionRequest:
    return OptionRequest(({"role": "user", "content": f"{content} {number}"},), options, stem)


def score(engine: OpenAIEngine, request: OptionRequest | None = None) -> OptionMass | Failure:
    [(index, result)] = engine.score_options([request or ask()])
    assert index == 0
    return result


def masses(server: FakeServer, **settings: Any) -> tuple[float | None, ...]:
    with build(server, **settings) as engine:
        result = score(engine)
    assert isinstance(result, OptionMass)
    return result.masses


class TestOptionMasses:
    """The arithmetic, without a server."""

    def bounds(self, listed: list[tuple[str, float]], options: Any = AB, sampled: str = "") -> Bounds:
        return option_bounds([(token, math.log(p)) for token, p in listed], sampled, accepted_tokens(options))

    def mass(self, listed: list[tuple[str, float]], options: Any = AB, sampled: str = "") -> Any:
        return option_masses(self.bounds(listed, options, sampled))

    def test_all_spellings_are_summed(self) -> None:
        listed = [("A", 0.3), (" A", 0.2), ("▁A", 0.05), ("ĠA", 0.01), (" a", 0.04), ("B", 0.1), ("b", 0.02)]
        assert self.mass([*listed, ("Apple", 0.2), ("AB", 0.05)]) == pytest.approx((0.6, 0.12))

    def test_two_tokens_of_the_same_text_are_both_counted(self) -> None:
        assert self.mass([("A", 0.3), ("A", 0.1), ("B", 0.5)]) == pytest.approx((0.4, 0.5))

    def test_words_match_in_any_case_but_whole(self) -> None:
        listed = [(" Positive", 0.2), ("WARM", 0.1), ("positively", 0.3), (" cold", 0.25), ("negligible", 0.1)]
        assert self.mass(listed, TONE) == pytest.approx((0.3, 0.25))

    def test_case_matters_where_two_options_differ_only_in_case(self) -> None:
        assert self.mass([("a", 0.3), ("A", 0.6)], (("A",), ("a",))) == pytest.approx((0.6, 0.3))
        assert accepted_tokens([("A",), ("a",)]) == ({"A", " A"}, {"a", " a"})

    def test_unlisted_option_gets_the_smallest_listed_probability_times_its_spellings(self) -> None:
        # B can be "B", " B", "b" or " b"; none is likelier than 0.02, and the list leaves 1 - 0.82 = 0.18.
        assert self.mass([("A", 0.8), ("The", 0.02)]) == pytest.approx((0.8, 0.08))

    def test_unlisted_option_gets_at_most_what_the_list_leaves(self) -> None:
        assert self.mass([("A", 0.9), ("The", 0.07)]) == pytest.approx((0.9, 0.03))
        assert self.mass([("A", 0.95), ("The", 0.06)]) == pytest.approx((0.95, 0.0))

    def test_an_unlisted_option_that_may_have_as_much_as_the_listed_one_leaves_both_unknown(self) -> None:
        """Its bound is no estimate then: it would turn the verdict round."""
        filler = [(f"x{number}", 0.8 / 19) for number in range(19)]
        assert self.mass([(" polite", 0.05), *filler], (("polite",), ("rude",))) == (None, None)
        assert self.mass([("A", 0.2), *[(word, 0.1) for word in ("The", "I", "It", "So")]]) == (None, None)
        assert self.mass([("A", 0.2), ("The", 0.05), ("I", 0.7)]) == pytest.approx((0.2, 0.05))
        assert self.mass([("A", 0.5), ("The", 0.125)]) == pytest.approx((0.5, 0.375))
        assert self.mass([("A", 0.5), ("The", 0.1)], (("A",), ("B",), ("C",))) == pytest.approx((0.5, 0.4, 0.4))

    def test_of_many_options_an_unlisted_one_is_never_put_ahead_of_a_listed_one(self) -> None:
        options = (("A",), ("B",), ("C",))
        assert self.mass([("A", 0.8), ("B", 0.02), ("The", 0.01)], options) == pytest.approx((0.8, 0.02, 0.02))
        assert self.mass([("A", 0.3), ("B", 0.1), ("The", 0.1)], options) == (None, None, None)

    @given(st.data())
    @settings(deadline=None)
    def test_whatever_a_server_leaves_out_the_verdict_is_not_turned_round(self, data: st.DataObject) -> None:
        """Of a true distribution over tokens the server lists the likeliest ones."""
        options = data.draw(st.sampled_from([AB, TONE, (("A",), ("B",), ("C",), ("D",))]))
        words = [*sorted(set().union(*accepted_tokens(options))), *(f"filler {n}" for n in range(6))]
        weights = data.draw(st.lists(st.floats(1e-6, 1), min_size=len(words), max_size=len(words)))
        truth = sorted(((w, x / sum(weights)) for w, x in zip(words, weights, strict=True)), key=lambda one: -one[1])
        listed = truth[: data.draw(st.integers(1, len(words)))]
        true = [sum(p for word, p in truth if word in group) for group in accepted_tokens(options)]
        seen = [sum(p for word, p in listed if word in group) for group in accepted_tokens(options)]
        found = self.mass(listed, options)
        assert self.bounds(listed, options).seen == pytest.approx(sum(seen))
        if None in found:
            assert found == (None,) * len(options)
            return
        for one, other in itertools.permutations(range(len(options)), 2):
            if seen[one] and not seen[other]:
                assert found[one] >= found[other] - 1e-9
                if len(options) == 2:
                    assert true[one] / true[other] >= seen[one] / found[other] - 1e-6

    def test_sampled_token_at_the_end_of_the_list_bounds_nothing(self) -> None:
        listed = [("Zebra", 1e-6), ("A", 0.8), ("The", 0.01)]
        assert self.mass(listed, sampled="Zebra") == pytest.approx((0.8, 0.04))

    def test_a_token_that_words_of_an_option_go_on_from_may_be_all_of_it(self) -> None:
        # Two words, each in three cases, with and without a space: at most 12 * 0.001 beside "Harm".
        listed = [("Safe", 0.6), ("Harm", 0.3), ("The", 0.001)]
        assert self.mass(listed, SAFETY) == pytest.approx((0.6, 0.312))
        assert self.bounds(listed, SAFETY).least == pytest.approx((0.6, 0.0))
        assert self.bounds(listed, SAFETY).seen == pytest.approx(0.6)
        # It may be as likely as what is listed whole, so nobody can say which is ahead.
        assert self.mass([("Harm", 0.5), ("Safe", 0.4), ("The", 0.001)], SAFETY) == (None, None)
        assert self.mass([("Harm", 0.9), ("The", 0.001)], SAFETY) == (None, None)
        # What is listed whole is not spelt in pieces: then "Harm" can only become "Harmful".
        assert self.mass([("Harmless", 0.6), ("Harm", 0.3), ("The", 0.001)], SAFETY) == pytest.approx((0.6, 0.312))

    def test_a_word_that_another_options_word_goes_on_from_may_be_of_either(self) -> None:
        options = (("harmless",), ("harm", "danger"))
        listed = [("danger", 0.6), ("harm", 0.2), ("harming", 0.001)]
        # danger is certain, harm may be its own or the other's: 0.2, and 6 * 0.001 of spellings that are not listed.
        assert self.mass(listed, options) == pytest.approx((0.206, 0.6))
        assert self.bounds(listed, options).seen == pytest.approx(0.8)
        assert self.mass([("harm", 0.8), ("danger", 0.1), ("x", 0.001)], options) == (None, None)
        # Of one option alone it is its own, whatever it goes on to be.
        assert self.mass([("harm", 0.8), ("safe", 0.1)], (("safe",), ("harm", "harmful"))) == pytest.approx((0.1, 0.8))

    def test_a_beginning_that_hardly_matters_leaves_a_tie_and_no_doubt(self) -> None:
        for b, bracket, found in ((0.449, 0.005, (0.45, 0.45)), (0.3, 0.005, (0.45, 0.305))):
            assert self.mass([("A", 0.45), ("B", b), ("(", bracket)], LETTERED) == pytest.approx(found)
        assert self.mass([("A", 0.45), ("B", 0.4), ("(", 0.1)], LETTERED) == (None, None)

    @given(st.data())
    @settings(deadline=None, max_examples=300)
    def test_no_label_is_more_extreme_than_what_is_spelt_behind_it(self, data: st.DataObject) -> None:
        """A vocabulary cuts each word of two options somewhere; the server lists the likeliest first tokens."""
        stems = st.sampled_from(["harm", "safe", "un", "d", "right"])
        ends = st.sampled_from(["less", "ful", "", "ly", "anger", "kind"])
        words = st.lists(st.tuples(stems, ends).map("".join), min_size=2, max_size=6, unique=True)
        spelt = data.draw(words)
        options = (tuple(spelt[: len(spelt) // 2]), tuple(spelt[len(spelt) // 2 :]))
        cuts = {word: data.draw(st.integers(1, len(word)), label=word) for word in spelt}
        others = ["The", "x", " "]
        weights = {word: data.draw(st.floats(1e-4, 1), label=word) for word in [*spelt, *others]}
        total = sum(weights.values())
        tokens: dict[str, float] = defaultdict(float)
        for word, weight in weights.items():
            tokens[word[: cuts.get(word, len(word))]] += weight / total
        ranked = sorted(tokens.items(), key=lambda entry: -entry[1])
        listed = ranked[: data.draw(st.integers(1, len(ranked)), label="listed")]
        found = self.mass(listed, options)
        if None in found:
            assert found == (None, None)
            return
        # A word of a listed option that is not begun by a listed token is left out.
        whole = {word for word, _ in listed}
        shown = [any(word in whole for word in option) for option in options]
        true = [
            sum(weights[word] / total for word in option if word[: cuts[word]] in whole or not shown[place])
            for place, option in enumerate(options)
        ]
        p, truth = found[0] / sum(found), true[0] / sum(true)
        slack = UNDECIDED / 4 + 1e-9 if found[0] == found[1] else 1e-9
        assert 0.5 - slack <= p <= truth + slack or truth - slack <= p <= 0.5 + slack

    def test_nothing_listed_is_unknown(self) -> None:
        assert self.mass([("The", 0.5), ("I", 0.4)]) == (None, None)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A", 0),
        (" b\n", 1),
        ("(A)", 0),
        ("**B**", 1),
        ("A.", 0),
        ("B. It answers the question.", 1),
        ("A: because it is short", 0),
        ("Answer: A", 0),
        ("**Answer:** (B)", 1),
        ("The answer is B.", 1),
        ("Answer: A\nWait.\nAnswer: B", 1),
        ("A\nNo, on reflection:\nB", 1),
        ("<think>A or B? A seems fine</think>\nB", 1),
        ("<think>A", None),
        ("A good reply would say more", None),
        ("A is worse than B", None),
        ("(A) is worse than (B)", None),
        ("A or B", None),
        ("(A) and (B) are equal", None),
        ("A, B", None),
        ("Answer: A or B", None),
        ("Answer: A\nFinal answer: neither", None),
        ("Reply B", 1),
        ("reply a.", 0),
        ("**Reply B**", 1),
        ("[Reply B]", 1),
        ("Reply (A)", 0),
        ("Reply B is better.", 1),
        ("Reply B is better than Reply A.", 1),
        ("Reply A is the better reply because it is short", 0),
        ("B is better", 1),
        ("Answer: Reply B", 1),
        ("The answer is Reply A.", 0),
        ("**Verdict:** [Reply B]", 1),
        ("B) because it is kinder", 1),
        ("(A) since it is short", 0),
        ("Both are polite.\nReply B", 1),
        ("Reply A\nNo, on reflection:\nReply B.", 1),
        ("B\n\nA: rambling.\nB: concise.", 1),
        ("Answer: B. A: rambling. B: concise.", 1),
        ("Reply A or Reply B", None),
        ("Reply A and Reply B are equal", None),
        ("Answer: Reply A or B", None),
        ("Reply A is longer", None),
        ("Reply A is better at being short, but Reply B is kinder", None),
        ("Reply A: It is polite.\nReply B: It is rude.", None),
        ("Reply A, in contrast to Reply B, is rude", None),
        ("A: polite. B: rude.", None),
        ("A. It is polite.\nB. It is rude.", None),
        ("A) is polite, B) is rude", None),
        ("By kindness:\nReply A is better.\nBy length:\nReply B is better.\nThey are equal.", None),
        ("The answer is not Reply A", None),
        ("Reply C is better", None),
        ("A reply is better", None),
        ("Both are fine. I like option B because A", None),
        ("The answer is not A", None),
        ("Apple", None),
        ("C", None),
        ("", None),
    ],
)
def test_parse_letter(reply: str, expected: int | None) -> None:
    assert parse_reply(reply, AB) == expected
    assert parse_reply(reply, LETTERED) == expected


REASONS = (
    "Reply {} is polite but long", "Reply {} says more than Reply {}.", "I like option {} because {} is rude.",
    "({}) is worse than ({}).", "A good reply would be short.", "Reply {}: it is kind.", "{}: kind. {}: short.",
    "[Reply {}] has a point, and so has [Reply {}].", "In tone {}, in length {}.", "What {} says, {} says better.",
)  # fmt: skip
VERDICTS = ("{}", "{}.", "({})", "**{}**", "Reply {}", "[Reply {}]", "Reply {}.", "Answer: Reply {}", "Answer: ({})")


@given(
    reasons=st.lists(st.tuples(st.sampled_from(REASONS), st.permutations("AB")), min_size=1, max_size=4),
    verdicts=st.lists(st.tuples(st.sampled_from(VERDICTS), st.sampled_from("AB")), max_size=3),
)
def test_a_letter_in_reasoning_is_no_verdict_and_the_last_verdict_wins(reasons: Any, verdicts: Any) -> None:
    lines = [reason.format(*letters) for reason, letters in reasons]
    lines += [verdict.format(letter) for verdict, letter in verdicts]
    expected = "AB".index(verdicts[-1][1]) if verdicts else None
    assert parse_reply("\n".join(lines), LETTERED) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("positive", 0),
        ("Negative.", 1),
        ("*warm* and open", 0),
        ("The tone is cold.", 1),
        ("the tone is: warm", 0),
        ("positively warm", None),
        ("positive or negative", None),
        ("not positive", None),
        ("It is warm", None),
    ],
)
def test_parse_word(reply: str, expected: int | None) -> None:
    assert parse_reply(reply, TONE, stem="The tone is") == expected


def test_logprob_request_and_result(server: FakeServer) -> None:
    server.default = logprobs([("A", 0.6), (" A", 0.1), ("B", 0.2)])
    with build(server, top_logprobs=7) as engine:
        result = score(engine)
    assert isinstance(result, OptionMass)
    assert result.masses == pytest.approx((0.7, 0.2))
    assert (result.method, result.reply) == ("logprob", "A")
    assert (result.prompt_tokens, result.completion_tokens) == (11, 2)
    assert result.observed == pytest.approx(0.9)
    assert result.latency_s is not None
    assert result.latency_s > 0
    assert server.bodies == [
        {
            "model": "judge",
            "messages": [{"role": "user", "content": "Which? 0"}],
            "max_tokens": 1,
            "temperature": 1.0,
            "logprobs": True,
            "top_logprobs": 7,
        }
    ]


def test_stem_is_asked_for_or_prefilled(server: FakeServer) -> None:
    server.default = logprobs([("warm", 0.6), ("cold", 0.2)])
    for prefill in (False, True):
        with build(server, prefill=prefill) as engine:
            score(engine, ask(options=TONE, stem="The tone is"))
    asked, prefilled = server.bodies
    assert asked["messages"] == [
        {"role": "user", "content": "Which? 0\n\nFinish this sentence with one word: The tone is"}
    ]
    assert prefilled["messages"] == [
        {"role": "user", "content": "Which? 0"},
        {"role": "assistant", "content": "The tone is"},
    ]
    assert prefilled["continue_final_message"] is True
    assert prefilled["add_generation_prompt"] is False


SAFETY = (("safe", "harmless"), ("harmful", "dangerous"))
STEM = "This reply is"


def spelling(body: dict[str, Any]) -> Reply:
    """A server whose tokenizer knows "Safe", and the others in pieces: Harm+less, Harm+ful, D+anger+ous."""
    begun = body["messages"][-1]["content"].removeprefix(STEM) if body["messages"][-1]["role"] == "assistant" else ""
    return logprobs(
        {
            "": [("Safe", 0.4), ("Harm", 0.3), ("D", 0.2), ("The", 0.0001)],
            "Harm": [("less", 0.5), ("ful", 0.4), ("ony", 0.1)],
            "D": [("anger", 0.9), ("oes", 0.1)],
            "Danger": [("ous", 0.75), (".", 0.25)],
        }[begun]
    )


def test_words_of_several_tokens_are_asked_for_to_their_end_with_prefill(server: FakeServer) -> None:
    server.default = spelling
    with build(server, prefill=True) as engine:
        result = score(engine, ask(options=SAFETY, stem=STEM))
    assert isinstance(result, OptionMass)
    # Safe and 0.3 * 0.5; 0.3 * 0.4 and 0.2 * 0.9 * 0.75.
    assert result.masses == pytest.approx((0.55, 0.255))
    assert result.mass == pytest.approx(0.805)
    assert [body["messages"][-1]["content"][len(STEM) :] for body in server.bodies] == ["", "Harm", "D", "Danger"]


def test_a_word_that_goes_on_to_be_another_options_keeps_what_does_not_with_prefill(server: FakeServer) -> None:
    after = logprobs([("less", 0.8), (".", 0.2)])
    server.default = lambda body: (
        after
        if body["messages"][-1]["content"].endswith("harm")
        else logprobs([("harm", 0.5), ("safe", 0.25), ("x", 0.01)])
    )
    with build(server, prefill=True) as engine:
        result = score(engine, ask(options=(("safe", "harmless"), ("harm",)), stem=STEM))
    assert isinstance(result, OptionMass)
    assert result.masses == pytest.approx((0.65, 0.1))
    assert result.mass == pytest.approx(0.75)


def test_what_hardly_matters_is_not_asked_for(server: FakeServer) -> None:
    server.default = logprobs([("A", 0.6), ("B", 0.3), ("(", 0.01)])
    with build(server, prefill=True) as engine:
        result = score(engine, ask(options=LETTERED))
    assert isinstance(result, OptionMass)
    assert result.masses == pytest.approx((0.6, 0.31))
    assert len(server.bodies) == 1


def test_words_of_several_tokens_are_unknown_without_prefill(server: FakeServer) -> None:
    server.default = spelling
    with build(server) as engine:
        result = score(engine, ask(options=SAFETY, stem=STEM))
    assert isinstance(result, OptionMass)
    assert result.masses == (None, None)
    assert len(server.bodies) == 1


def test_hostile_text_is_sent(server: FakeServer) -> None:
    server.default = logprobs([("A", 0.6), ("B", 0.2)])
    with build(server) as engine:
        assert isinstance(score(engine, ask(content="\ud800 \x00 🙂 <|im_end|>")), OptionMass)
    # What looks like a control token is sent with a space in it: the server would read it as one.
    assert server.bodies[0]["messages"][0]["content"] == "\ufffd \x00 🙂 < |im_end|> 0"


class TestVotes:
    """Servers without log-probabilities."""

    def test_share_of_replies_in_one_request(self, server: FakeServer, caplog: Any) -> None:
        server.default = lambda body: text(*["A", "B.", "(A)", "A nice day"][: body.get("n", 1)])
        with build(server, votes=4) as engine, caplog.at_level(logging.WARNING):
            results = [score(engine, ask(number)) for number in range(5)]
        for result in results:
            assert isinstance(result, OptionMass)
            assert result.masses == (0.5, 0.25)  # the fourth reply is prose: uncovered
            assert result.method == "votes"
            assert result.reply == "A | B. | (A) | A nice day"
        tried = [body for body in server.bodies if "logprobs" in body]
        votes = [body for body in server.bodies if "logprobs" not in body]
        assert len(tried) == 6  # the first request three times, and three questions of the engine's own
        assert {(body["n"], body["max_tokens"], body["temperature"]) for body in votes} == {(4, 16, 1.0)}
        assert len({body["seed"] for body in votes}) == 5
        warnings = [record.getMessage() for record in caplog.records if record.name == "rlaif.engines.openai"]
        assert len(warnings) == 1
        assert "gives no log-probabilities" in warnings[0]
        assert "4 sampled replies" in warnings[0]

    def test_server_that_ignores_n_is_asked_again_with_other_seeds(self, server: FakeServer) -> None:
        server.plan = [*[text("x")] * 6, text("A"), text("A"), text("B")]
        assert masses(server, votes=3) == pytest.approx((2 / 3, 1 / 3))
        assert [body.get("n") for body in server.bodies[6:]] == [3, 2, None]
        assert len({body["seed"] for body in server.bodies[6:]}) == 3

    def test_server_that_refuses_n(self, server: FakeServer) -> None:
        server.default = lambda body: error(400, "n must be 1") if body.get("n", 1) > 1 else text("B")
        assert masses(server, votes=2) == (0.0, 1.0)

    def test_one_reply_is_greedy_text(self, server: FakeServer) -> None:
        server.default = text("Answer: B")
        with build(server) as engine:
            result = score(engine)
        assert isinstance(result, OptionMass)
        assert (result.masses, result.method) == ((0.0, 1.0), "text")
        assert server.bodies[6]["temperature"] == 0.0

    def test_server_that_refuses_logprobs(self, server: FakeServer) -> None:
        server.default = lambda body: error(400, "unknown field") if "logprobs" in body else text("A")
        with build(server) as engine:
            results = [score(engine, ask(number)) for number in range(4)]
        assert all(isinstance(result, OptionMass) and result.method == "text" for result in results)
        assert [body.get("top_logprobs") for body in server.bodies[:4]] == [20, 5, None, 5]
        assert sum("logprobs" in body for body in server.bodies) == 5  # the request twice, and the engine's own

    def test_a_request_without_logprobs_fails_where_the_server_gives_them(self, server: FakeServer) -> None:
        """Never a hard label from a reply: it would be stored for good as if it were a log-probability verdict."""
        server.plan = [logprobs([("A", 0.6), ("B", 0.3)])]
        server.default = text("A")
        with build(server) as engine:
            good, bad = score(engine, ask(0)), score(engine, ask(1))
        assert isinstance(good, OptionMass)
        assert isinstance(bad, Failure)
        assert bad.reason == "no_logprobs"
        assert all("logprobs" in body for body in server.bodies)

    @pytest.mark.parametrize("strange", [text("A"), error(400, "no logprobs for you")])
    def test_one_request_without_is_no_proof_that_the_server_gives_none(
        self, server: FakeServer, strange: Reply
    ) -> None:
        server.default = lambda body: (
            strange
            if "logprobs" in body and body["messages"][0]["content"] == "Which? 0"
            else logprobs([("A", 0.6), ("B", 0.3)])
        )
        with build(server) as engine:
            bad, good = score(engine, ask(0)), score(engine, ask(1))
        assert isinstance(bad, Failure)
        assert isinstance(good, OptionMass)
        assert good.method == "logprob"

    def test_withheld_replies_say_nothing_of_logprobs(self, server: FakeServer) -> None:
        server.plan = [text("", finish_reason="content_filter")]
        server.default = logprobs([("A", 0.6), ("B", 0.3)])
        with build(server) as engine:
            withheld, good = score(engine, ask(0)), score(engine, ask(1))
        assert isinstance(withheld, Failure)
        assert withheld.reason == "content_filter"
        assert isinstance(good, OptionMass)
        assert good.method == "logprob"
        assert len(server.bodies) == 2

    def test_withheld_votes_are_no_verdict(self, server: FakeServer) -> None:
        server.plan = [*[text("x")] * 6, text("", "", finish_reason="content_filter")]
        with build(server, votes=2) as engine:
            result = score(engine)
        assert isinstance(result, Failure)
        assert result.reason == "content_filter"

    def test_a_probe_without_an_answer_decides_nothing(self, server: FakeServer) -> None:
        server.plan = [*[text("x")] * 3, *[error(500)] * 3]
        server.default = logprobs([("A", 0.6), ("B", 0.3)])
        with build(server) as engine:
            bad, good = score(engine, ask(0)), score(engine, ask(1))
        assert isinstance(bad, Failure)
        assert bad.reason == "http_500"
        assert isinstance(good, OptionMass)
        assert good.method == "logprob"

    def test_server_with_a_lower_cap(self, server: FakeServer) -> None:
        def reply(body: dict[str, Any]) -> Reply:
            return error(400, "max 5") if body["top_logprobs"] > 5 else logprobs([("A", 0.6), ("B", 0.3)])

        server.default = reply
        with build(server) as engine:
            results = [score(engine, ask(number)) for number in range(2)]
        assert all(isinstance(result, OptionMass) and result.method == "logprob" for result in results)
        assert [body["top_logprobs"] for body in server.bodies] == [20, 5, 5]

    def test_a_bad_request_is_not_taken_for_missing_logprobs(self, server: FakeServer) -> None:
        server.default = lambda body: (
            error(400, "prompt too long")
            if "long" in body["messages"][0]["content"]
            else logprobs([("A", 0.6), ("B", 0.3)])
        )
        with build(server) as engine:
            before, good, after = (score(engine, ask(content=word)) for word in ("long", "short", "long"))
        assert isinstance(before, Failure)
        assert (before.reason, before.detail) == ("http_400", "prompt too long")
        assert isinstance(good, OptionMass)
        assert good.method == "logprob"
        assert isinstance(after, Failure)
        assert len(server.bodies) == 3 + 1 + 1


def reasoning(body: dict[str, Any]) -> Reply:
    """A model as OpenAI's newer ones: one complaint at a time."""
    if "max_tokens" in body:
        return error(
            400,
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
        )
    if body.get("temperature", 1) != 1:
        return error(
            400,
            f"Unsupported value: 'temperature' does not support {body['temperature']} with this model. "
            "Only the default (1) value is supported.",
        )
    if "top_p" in body:
        return error(400, "Unsupported parameter: 'top_p' is not supported with this model.")
    if "logprobs" in body:
        return error(403, "You are not allowed to request logprobs from this model")
    return text("Reply B", finish_reason="stop")


class TestDialect:
    """Servers that do not take the parameters that others do."""

    def test_a_reasoning_model_labels_by_replies(self, server: FakeServer, caplog: Any) -> None:
        server.default = reasoning
        with build(server) as engine, caplog.at_level(logging.WARNING):
            results = dict(engine.score_options(ask(number) for number in range(12)))
            [(_, sampled)] = engine.sample([SampleRequest(({"role": "user", "content": "Hi"},), 30, 0.7)])
            start = len(server.bodies)
            again = score(engine, ask(99))
        for result in [*results.values(), again]:
            assert isinstance(result, OptionMass)
            assert (result.masses, result.method, result.reply) == ((0.0, 1.0), "text", "Reply B")
        assert isinstance(sampled, Sampled)
        # Once known, nothing is tried again.
        [body] = server.bodies[start:]
        assert body == {"model": "judge", "messages": body["messages"], "max_completion_tokens": 16}
        said = [record.getMessage() for record in caplog.records if record.name == "rlaif.engines.openai"]
        for what in ("takes max_completion_tokens, not max_tokens", "takes no temperature", "takes no top_p"):
            assert sum(what in line for line in said) == 1
        assert len(said) == 4  # and that there are no log-probabilities

    def test_log_probabilities_stay_where_only_the_name_is_another(self, server: FakeServer) -> None:
        good = logprobs([("A", 0.6), ("B", 0.2)])
        server.default = lambda body: reasoning(body) if "max_tokens" in body else good
        with build(server) as engine:
            assert isinstance(score(engine), OptionMass)
            assert isinstance(score(engine), OptionMass)
        assert [("max_tokens" in body, body.get("max_completion_tokens")) for body in server.bodies] == [
            (True, None),
            (False, 1),
            (False, 1),
        ]
        assert server.bodies[-1]["temperature"] == 1.0

    def test_a_request_that_is_too_long_teaches_nothing(self, server: FakeServer) -> None:
        """vLLM names both parameters then."""
        good = logprobs([("A", 0.6), ("B", 0.2)])
        server.plan = [good, error(400, "'max_tokens' or 'max_completion_tokens' is too large: 1."), good]
        with build(server) as engine:
            results = [score(engine) for _ in range(3)]
        assert isinstance(results[1], Failure)
        assert all("max_tokens" in body for body in server.bodies)

    def test_another_403_still_ends_the_run(self, server: FakeServer) -> None:
        server.default = error(403, "no access to model")
        with build(server) as engine, pytest.raises(UserError, match="may not use this model"):
            score(engine)

    def test_what_the_user_adds_is_in_every_body_and_in_the_identity(self, server: FakeServer) -> None:
        server.default = reasoning
        extra = {"reasoning_effort": "low", "max_completion_tokens": 500, "nested": {"a": [1, None]}}
        with build(server, extra_body=extra, budget=BudgetConfig(tokens=100_000)) as engine:
            assert isinstance(score(engine), OptionMass)
            assert engine.identity["extra_body"] == extra
            # Of a request whose cost nobody knows the most counts, and that is what the user has asked for.
            server.default = Reply(text("A").body | {"usage": None})
            before = engine.spent.completion_tokens
            assert isinstance(score(engine), OptionMass)
            assert engine.spent.completion_tokens == before + 500
        assert all(body | extra == body for body in server.bodies)
        assert not any("max_tokens" in body for body in server.bodies)

    def test_what_the_user_has_set_is_not_left_out(self, server: FakeServer) -> None:
        server.default = reasoning
        with build(server, extra_body={"temperature": 0.5}) as engine:
            result = score(engine)
        assert isinstance(result, Failure)
        assert "'temperature' does not support 0.5" in result.detail

    @pytest.mark.parametrize("name", ["model", "messages", "prompt", "n", "stream", "logprobs"])
    def test_the_question_cannot_be_replaced(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"labeler\.extra_body: {name} can't be set"):
            LabelerConfig(extra_body={name: 1})

    def test_variables_of_the_template_travel_with_the_messages(self, server: FakeServer) -> None:
        server.default = logprobs([("A", 0.6), ("B", 0.2)])
        with build(server, chat_template_kwargs={"enable_thinking": False}) as engine:
            score(engine)
            list(engine.sample([SampleRequest(({"role": "user", "content": "Hi"},), 30)]))
            assert engine.identity["chat_template_kwargs"] == {"enable_thinking": False}
        assert [body["chat_template_kwargs"] for body in server.bodies] == [{"enable_thinking": False}] * 2


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (error(429), "rate_limited"),
        (error(408), "http_408"),
        (error(409), "http_409"),
        (error(500), "http_500"),
        (error(503), "http_503"),
        (Reply(cut=True), "connection"),
        (Reply({"choices": []}, cut=True), "connection"),
        (Reply(delay_s=30), "timeout"),
        (Reply("<html>not json"), "malformed"),
        (Reply([1, 2]), "malformed"),
        (Reply({"error": "overloaded"}), "malformed"),
        (Reply({"choices": [{"text": "completion"}]}), "malformed"),
        (text("A", logprobs={"content": [{"token": "A", "top_logprobs": [{"token": "A"}]}]}), "malformed"),
        (Reply({"choices": []}), "empty"),
    ],
)
def test_passing_trouble_is_retried_and_lasting_trouble_is_a_failure(
    server: FakeServer, bad: Reply, reason: str
) -> None:
    good = logprobs([("A", 0.6), ("B", 0.2)])
    server.plan = [bad, bad, good, bad, bad, bad]
    with build(server, timeout_s=0.3) as engine:
        recovered, failed = score(engine), score(engine)
    assert isinstance(recovered, OptionMass)
    assert recovered.masses == pytest.approx((0.6, 0.2))
    assert isinstance(failed, Failure)
    assert failed.reason == reason
    assert failed.latency_s is not None
    # Where the server may be down, a plain question shows that it is not.
    assert sum("logprobs" in body for body in server.bodies) == 6


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_at_fault_is_not_retried(server: FakeServer, status: int) -> None:
    server.plan = [logprobs([("A", 0.6), ("B", 0.2)]), error(status, "too long")]
    with build(server) as engine:
        score(engine)
        failed = score(engine)
    assert isinstance(failed, Failure)
    assert (failed.reason, failed.detail) == (f"http_{status}", "too long")
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("headers", "wait"), [({"Retry-After": "0.5"}, 0.5), ({"retry-after-ms": "400", "Retry-After": "9"}, 0.4)]
)
def test_retry_after_is_honoured(server: FakeServer, headers: dict[str, str], wait: float) -> None:
    server.plan = [Reply({}, 429, headers), logprobs([("A", 0.6), ("B", 0.2)])]
    assert masses(server) == pytest.approx((0.6, 0.2))
    assert wait <= server.times[1] - server.times[0] < wait + 1.5


def test_retry_after_holds_back_other_requests_too(server: FakeServer) -> None:
    server.plan = [Reply({}, 429, {"Retry-After": "0.4"})]
    server.default = logprobs([("A", 0.6), ("B", 0.2)])
    with build(server, concurrency=1) as engine, build(server, concurrency=4) as wide:
        score(engine)
        server.plan = [Reply({}, 429, {"Retry-After": "0.4"}), *[Reply({}, 429)] * 3]
        start = len(server.times)
        assert len(list(wide.score_options(ask(number) for number in range(4)))) == 4
    late = [moment - server.times[start] for moment in server.times[start + 4 :]]
    assert len(late) == 4
    assert min(late) >= 0.35


def test_retry_after_as_a_date() -> None:
    wait = wire.retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert wait == pytest.approx(100, abs=2)
    assert wire.retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0
    assert [wire.retry_after({"retry-after": value}) for value in ("soon", "nan", "-1", "inf")] == [None] * 4


def test_a_wait_of_hours_fails_at_once(server: FakeServer) -> None:
    server.plan = [Reply({}, 429, {"Retry-After": "7200"})]
    with build(server) as engine:
        result = score(engine)
    assert isinstance(result, Failure)
    assert result.reason == "rate_limited"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_or_model_ends_the_run(server: FakeServer, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.default = error(status, f"bad key {KEY} or model\nline two " + "x" * 500)
    with build(server) as engine, pytest.raises(UserError) as raised:
        list(engine.score_options(ask(number) for number in range(100)))
    message = str(raised.value)
    assert f"HTTP {status}: bad key *** or model line two xxx" in message
    assert "\n" not in message
    assert len(message) < 450
    assert KEY not in message


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_after_answers_is_about_that_request(server: FakeServer, status: int) -> None:
    """Some servers answer a moderated text with 403: the other requests go on."""
    server.plan = [logprobs([("A", 0.6), ("B", 0.2)]), error(status, "moderated")]
    server.default = logprobs([("A", 0.6), ("B", 0.2)])
    with build(server, concurrency=1) as engine:
        results = dict(engine.score_options(ask(number) for number in range(4)))
    assert isinstance(results[1], Failure)
    assert (results[1].reason, results[1].detail) == (f"http_{status}", "moderated")
    assert all(isinstance(results[number], OptionMass) for number in (0, 2, 3))


def test_why_requests_fail_is_told_once_for_each_reason(server: FakeServer, caplog: Any) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        number = int(body["messages"][0]["content"].split()[-1])
        if number == 9:
            return logprobs([("A", 0.6), ("B", 0.2)])
        return error(400, f"too long {number}") if number % 2 else error(413, f"too large {number}")

    server.default = reply
    with build(server, concurrency=1) as engine, caplog.at_level(logging.WARNING):
        results = [score(engine, ask(number)) for number in range(10)]
    assert sum(isinstance(result, Failure) for result in results) == 9
    assert [record.getMessage() for record in caplog.records if record.name == "rlaif.engines.base"] == [
        f"{server.url}: verdicts fail with http_413: too large 0",
        f"{server.url}: verdicts fail with http_400: too long 1",
    ]


def test_a_servers_words_cannot_move_the_cursor(server: FakeServer) -> None:
    server.default = error(404, "no\x1b[1A\x1b[2K\rsuch \x9bmodel\u202e")
    with build(server) as engine, pytest.raises(UserError) as raised:
        score(engine)
    assert "no\\u001b[1A\\u001b[2K such \\u009bmodel\\u202e" in str(raised.value)


def test_spent_quota_ends_the_run(server: FakeServer) -> None:
    server.default = Reply({"error": {"message": "no quota", "code": "insufficient_quota"}}, 429)
    with build(server) as engine, pytest.raises(UserError, match="no quota; the account has no credit"):
        score(engine)


def test_the_key_is_sent_and_appears_nowhere(server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    key = "my_private_token_abcdef"
    monkeypatch.setenv("JUDGE_KEY", key)
    server.plan = [error(500, "y" * 190 + key), error(500, key), error(500, f"Bearer {key}")]
    with caplog.at_level(logging.DEBUG), build(server, api_key_env="JUDGE_KEY") as engine:
        result = score(engine)
        server.default = text("A")
        list(engine.score_options([ask()]))
        seen = repr(engine) + str(engine.identity) + repr(result) + caplog.text
        seen += "".join(str(record.__dict__) for record in caplog.records)
    assert all(headers["Authorization"] == f"Bearer {key}" for headers in server.headers)
    assert isinstance(result, Failure)
    assert result.detail == "Bearer ***"
    assert key not in seen
    assert key[:12] not in seen


ESCAPED = {
    "slash": lambda key: key.replace("/", "\\/"),
    "codes": lambda key: "".join(f"\\u{ord(one):04X}" for one in key),
    "one code": lambda key: key.replace("/", "\\u002f"),
    "quoted twice": lambda key: key.replace("/", "\\\\/"),
}


@pytest.mark.parametrize("escape", ESCAPED)
def test_the_key_is_found_however_json_spells_it(
    escape: str, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "my/private/token+abcdef"
    spelt = ESCAPED[escape](key)
    monkeypatch.setenv("JUDGE_KEY", key)
    reply = f'{{"choices": [{{"message": {{"content": "B. {spelt}"}}, "finish_reason": "stop"}}]}}'
    for name in ("answer", "error", "cut error"):
        server.default = {
            "answer": Reply(reply),
            "error": Reply(f'{{"error": {{"message": "bad {spelt}"}}}}', 418),
            "cut error": Reply(f'{{"error": {{"message": "bad {spelt}', 418),
        }[name]
        with build(server, api_key_env="JUDGE_KEY", votes=1) as engine:
            result = score(engine)
        assert "private" not in repr(result)
        assert "006b" not in repr(result).lower()
        if name == "answer":
            assert isinstance(result, OptionMass)
            assert (result.masses, result.reply) == ((0.0, 1.0), "B. ***")
        else:
            assert isinstance(result, Failure)
            assert "bad ***" in result.detail


def test_identity(server: FakeServer) -> None:
    with build(server, votes=1) as engine:
        assert engine.name == "judge"
        assert engine.identity == {
            "engine": "openai",
            "base_url": server.url,
            "model": "judge",
            "votes": 1,
            "top_logprobs": 20,
            "prefill": False,
        }
    with build(server, votes=3) as engine:
        assert engine.identity["seed"] == 5


class TestBeforeAnyWork:
    """What the constructor refuses."""

    @pytest.mark.parametrize("base_url", [None, "https://models.example.org/v1", "http://10.1.2.3:8000/v1"])
    def test_no_key(self, base_url: str | None) -> None:
        config = LabelerConfig(type=LabelerType.openai, model="judge", base_url=base_url)
        with pytest.raises(UserError, match=r"^no API key: set the environment variable OPENAI_API_KEY"):
            build_labeler(config, seed=0)

    @pytest.mark.parametrize(
        ("base_url", "message"),
        [
            ("127.0.0.1:8000/v1", "not a valid address"),
            ("ftp://127.0.0.1/v1", "not a valid address"),
            ("http://", "not a valid address"),
            ("http://127.0.0.1:99999/v1", "not a valid address"),
            ("http://[::1/v1", "not a valid address"),
            ("http://local host/v1", "not a valid address"),
            ("http://me:hunter2@127.0.0.1/v1", "a user, a query or a fragment is refused"),
            ("http://127.0.0.1/v1?key=hunter2", "a user, a query or a fragment is refused"),
            ("http://me:hunter2@127.0.0.1:port/v1", "not a valid address"),
            ("http://me:hunter2@127.0.0.1:99999/v1", "not a valid address"),
            ("http://me:hunter2@[::1/v1", "not a valid address"),
            ("ht tp://me:hunter2@127.0.0.1/v1", "not a valid address"),
            ("http://host@me:hunter2/v1", "not a valid address"),
        ],
    )
    def test_address(self, base_url: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as raised:
            OpenAIEngine(LabelerConfig(model="judge", base_url=base_url), seed=0)
        assert "hunter2" not in str(raised.value)

    @pytest.mark.parametrize("pasted", [KEY, "hf_abcdefghijkl", "$OPENAI_API_KEY", ""])
    def test_a_key_in_the_place_of_its_name_is_not_told(self, server: FakeServer, pasted: str) -> None:
        with pytest.raises(ValueError, match=r"labeler.api_key_env: must be the name of an env") as raised:
            build(server, api_key_env=pasted)
        assert not pasted or pasted not in str(raised.value)

    def test_key_that_no_header_can_hold(self, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "clé\x01")
        with pytest.raises(UserError, match="OPENAI_API_KEY has characters that no key has") as raised:
            build(server)
        assert "cl" not in str(raised.value).replace("characters", "")

    def test_unreachable(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(UserError) as raised:
            OpenAIEngine(LabelerConfig(model="judge", base_url=url), seed=0)
        assert str(raised.value).startswith(f"labeler.base_url={url}: cannot be reached (")
        assert "\n" not in str(raised.value)

    def test_silent_server(self, server: FakeServer) -> None:
        server.models.delay_s = 30
        with pytest.raises(UserError, match=r"cannot be reached \(no answer within 0.3 s\)"):
            build(server, timeout_s=0.3)

    def test_broken_server(self, server: FakeServer) -> None:
        server.models = error(503, "loading model")
        with pytest.raises(UserError, match=r"cannot be reached \(HTTP 503: loading model\)"):
            build(server)

    def test_wrong_key(self, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.models = error(401, f"Incorrect API key provided: {KEY}")
        with pytest.raises(UserError, match=r"HTTP 401.*check the key in the environment variable") as raised:
            build(server)
        assert KEY not in str(raised.value)

    def test_unknown_model_lists_ten(self, server: FakeServer) -> None:
        server.models = Reply({"data": [{"id": f"m{number}"} for number in range(12)]})
        with pytest.raises(UserError) as raised:
            build(server)
        assert str(raised.value) == (
            f"labeler.model=judge: not served by {server.url}; "
            "available: m0, m1, m2, m3, m4, m5, m6, m7, m8, m9 and 2 more"
        )

    def test_names_of_models_are_hostile(self, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("JUDGE_KEY", "my_private_token_abcdef")
        names = ["\x1b[2Jgone", "two\nlines", "say my_private_token_abcdef", "\u202eredro", "long" * 100]
        server.models = Reply({"data": [{"id": name} for name in names]})
        with pytest.raises(UserError) as raised:
            build(server, api_key_env="JUDGE_KEY")
        shown = str(raised.value).partition("available: ")[2].split(", ")
        assert shown[:4] == ["\\u001b[2Jgone", "two lines", "say ***", "\\u202eredro"]
        assert len(shown[4]) == 200

    def test_not_such_a_server(self, server: FakeServer) -> None:
        server.models = Reply("<html>welcome</html>")
        with pytest.raises(UserError, match="usually ends in /v1"):
            build(server)

    @pytest.mark.parametrize(
        "models",
        [
            error(404),
            error(405),
            error(403),
            Reply({"data": []}),
            Reply({"data": [{"id": "other"}], "has_more": True}),
            Reply({"data": [{"id": "judge:latest"}]}),
        ],
    )
    def test_a_listing_that_proves_nothing_is_no_obstacle(self, server: FakeServer, models: Reply) -> None:
        server.models = models
        build(server).close()

    def test_address_from_the_environment(self, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with build(server, base_url=None) as engine:
            assert engine.identity["base_url"] == server.url


class TestStream:
    """Lazy pulling, the cap on requests in flight, and cancelling."""

    def test_requests_in_flight_are_capped_and_pulled_lazily(self, server: FakeServer) -> None:
        answer = logprobs([("A", 0.6), ("B", 0.2)])
        answer.delay_s = 0.05
        server.default = answer
        pulled: list[int] = []

        def source() -> Iterator[OptionRequest]:
            for number in range(24):
                pulled.append(number)
                yield ask(number)

        with build(server, concurrency=6) as engine:
            stream = engine.score_options(source())
            assert pulled == []
            next(stream)
            assert len(pulled) <= 12  # as many wait as are in flight
            rest = list(stream)
        assert len(rest) == 23
        assert len(pulled) == 24
        assert server.peak == 6

    def test_results_come_as_they_complete_under_their_index(self, server: FakeServer) -> None:
        def reply(body: dict[str, Any]) -> Reply:
            number = int(body["messages"][0]["content"].split()[-1])
            answer = logprobs([("A", 0.1 * (number + 1)), ("B", 0.05)])
            answer.delay_s = 0.4 if number == 0 else 0
            return answer

        server.default = reply
        with build(server, concurrency=4) as engine:
            results = list(engine.score_options(ask(number) for number in range(4)))
        assert results[-1][0] == 0
        for index, result in results:
            assert isinstance(result, OptionMass)
            assert result.masses[0] == pytest.approx(0.1 * (index + 1))

    def test_no_requests(self, server: FakeServer) -> None:
        with build(server) as engine:
            assert list(engine.score_options([])) == []

    def test_abandoning_cancels_at_once(self, server: FakeServer) -> None:
        slow = logprobs([("A", 0.6), ("B", 0.2)])
        slow.delay_s = 60
        server.default = slow
        server.plan = [logprobs([("A", 0.6), ("B", 0.2)])]
        engine = build(server, concurrency=8, timeout_s=60)
        stream = engine.score_options(ask(number) for number in range(100))
        next(stream)
        deadline = time.monotonic() + 10
        while len(server.bodies) < 9 and time.monotonic() < deadline:
            time.sleep(0.01)  # until all that may be in flight are
        start = time.monotonic()
        stream.close()  # type: ignore[attr-defined]
        while server.cancelled < len(server.bodies) - 1 and time.monotonic() - start < 2:
            time.sleep(0.01)
        engine.close()
        assert time.monotonic() - start < 2
        assert len(server.bodies) <= 9
        assert server.cancelled == len(server.bodies) - 1

    def test_an_error_in_the_source_cancels_and_is_raised(self, server: FakeServer) -> None:
        slow = text("A")
        slow.delay_s = 60
        server.default = slow

        def source() -> Iterator[OptionRequest]:
            yield ask()
            raise KeyboardInterrupt

        start = time.monotonic()
        with build(server) as engine, pytest.raises(KeyboardInterrupt):
            list(engine.score_options(source()))
        assert time.monotonic() - start < 2

    def test_close_twice(self, server: FakeServer) -> None:
        engine = build(server)
        engine.close()
        engine.close()


class TestSample:
    """Sampling completions."""

    def sample(self, server: FakeServer) -> Sampled | Failure:
        request = SampleRequest(({"role": "user", "content": "Hi"},), 30, 0.7, 0.9, seed=42)
        with build(server) as engine:
            [(_, result)] = engine.sample([request])
        return result

    @pytest.mark.parametrize(("given", "expected"), [("stop", "stop"), ("length", "length"), ("eos", "stop")])
    def test_request_and_finish_reason(self, server: FakeServer, given: str, expected: str) -> None:
        server.default = text("Hello.", finish_reason=given)
        assert self.sample(server) == Sampled("Hello.", expected, tokens=2, prompt_tokens=11)
        assert server.bodies == [
            {
                "model": "judge",
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 30,
                "temperature": 0.7,
                "top_p": 0.9,
                "seed": 42,
            }
        ]

    def test_empty_completion_is_a_completion(self, server: FakeServer) -> None:
        server.default = text(None)
        assert self.sample(server) == Sampled("", "stop", tokens=2, prompt_tokens=11)

    def test_withheld_completion_is_a_failure(self, server: FakeServer) -> None:
        server.default = text("", finish_reason="content_filter")
        result = self.sample(server)
        assert isinstance(result, Failure)
        assert result.reason == "content_filter"
