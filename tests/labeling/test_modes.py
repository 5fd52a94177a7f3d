"""Every mode gives back what was scripted, with a bias planted, and asks what it says it asks."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from fake_server import text

from rlaif.config import LabelerConfig, LabelerType, LabelingConfig, LabelMode, Principles, ScriptedConfig
from rlaif.constitution import Constitution, Principle, load_constitution
from rlaif.engines import build_labeler
from rlaif.engines.base import Engine, Failure, Likelihood, OptionMass
from rlaif.engines.scripted import ScriptedEngine
from rlaif.labeling.aggregate import p_higher, pair_labels
from rlaif.labeling.label import label_candidates
from rlaif.labeling.modes import Setup
from rlaif.labeling.quality import verdict_quality
from rlaif.labeling.store import VerdictStore
from rlaif.records import Candidates, Completion, Prompt, UserError

KIND = Principle(
    "kind", 3.0, "Which is kinder?", "It is", None, ("kind",), ("rude",), encourage="Be kind.", discourage="Be rude."
)
SHORT = Principle(
    "short", 1.0, "Which is shorter?", "It is", None, ("short",), ("long",), encourage="Stop.", discourage="Go on."
)
ONE, TWO = Constitution("one", "1", "d", (KIND,)), Constitution("two", "1", "d", (KIND, SHORT))
SCORE, LISTWISE, CONTRASTIVE = (LabelingConfig(mode=LabelMode(name)) for name in ("score", "listwise", "contrastive"))
NEW = [SCORE, LISTWISE, CONTRASTIVE]
WORDS = {"c0": 1, "c1": 2, "c2": 3, "c3": 5}


def lines(n=5, completions=("a", "a b", "a b c", "a b c d e")):
    return [
        Candidates(
            Prompt(f"p{i}", ({"role": "user", "content": f"question {i}"},)),
            tuple(Completion(f"c{k}", text) for k, text in enumerate(completions)),
        )
        for i in range(n)
    ]


def engine(**settings):
    return ScriptedEngine(ScriptedConfig(**({"utility": "length", "sharpness": 0.5} | settings)), seed=0)


def labeled(config, labeler=None, constitution=ONE, data=None, *, store):
    return label_candidates(data or lines(), constitution, labeler or engine(), config, store)


@pytest.fixture
def store(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as opened:
        yield opened


class Answering(Engine):
    """Answers by a function of the request, and remembers what it was asked."""

    identity = {"engine": "answering"}  # noqa: RUF012

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def sample(self, requests):
        raise NotImplementedError

    def score_options(self, requests):
        for index, request in enumerate(requests):
            self.asked.append(request)
            yield index, self.answer(request)

    score_completions = score_options


@pytest.mark.parametrize("config", [LISTWISE, CONTRASTIVE], ids=["listwise", "contrastive"])
def test_the_oracle_is_recovered_in_logits(store, config):
    labels = labeled(config, store=store)
    assert {(label.mode, label.method, label.reason) for label in labels} == {(config.mode.value, "logprob", None)}
    pairs, dropped = pair_labels(labels, {"kind": 3.0})
    assert dropped == {"no_verdict": 0}
    assert len(pairs) == 5 * 6
    for pair in pairs:
        assert pair.logit == pytest.approx(0.5 * (WORDS[pair.one] - WORDS[pair.other]), abs=1e-5)


def test_scores_are_expectations_and_their_pairs_come_from_whole_distributions(store):
    labels = labeled(SCORE, store=store)
    for label in labels:
        # A binomial distribution with the mean 1 + 8 sigmoid(words / 2).
        assert label.score == pytest.approx(1 + 8 / (1 + math.exp(-0.5 * WORDS[label.candidate])))
        assert sum(label.probs) == pytest.approx(1)
        assert label.option_mass == pytest.approx(0.9)
        assert label.to_json()["score"] == label.score
        assert len(label.to_json()["probs"]) == 9
    pairs, _ = pair_labels(labels, {"kind": 3.0})
    probs = {label.candidate: label.probs for label in labels}
    for pair in pairs:
        assert pair.p == pytest.approx(p_higher(probs[pair.one], probs[pair.other]))
        assert pair.logit < 0
    assert verdict_quality(labels)["score_mean"] == pytest.approx(sum(label.score for label in labels) / len(labels))


POSITIONS = (1.5, 0.0, -2.0, 0.7)


def biased(request):
    """A labeler with a bias for every position, and the utility of the scripted one."""
    weights = [
        math.exp(0.5 * len(text.split()) + bias)
        for text, bias in zip(request.meta["completions"], POSITIONS, strict=False)
    ]
    return OptionMass(tuple(0.9 * weight / sum(weights) for weight in weights), "logprob")


def test_a_bias_of_every_position_cancels_over_all_rotations(store):
    labels = labeled(LISTWISE, Answering(biased), store=store)
    assert [label.order for label in labels[:4]] == [
        ("c0", "c1", "c2", "c3"),
        ("c1", "c2", "c3", "c0"),
        ("c2", "c3", "c0", "c1"),
        ("c3", "c0", "c1", "c2"),
    ]
    for pair in pair_labels(labels, {"kind": 3.0})[0]:
        assert pair.logit == pytest.approx(0.5 * (WORDS[pair.one] - WORDS[pair.other]), abs=1e-9)
    quality = verdict_quality(labels)
    # 1.5 against the mean of the others.
    assert quality["position_bias"] == pytest.approx(1.5 - (0.0 - 2.0 + 0.7) / 3)
    # Favourites: c3 in position 4 (2.5 + 0.7), then c1, c2, c3 against 1.5 for the first place.
    favourites = [label.probs.index(max(label.probs)) for label in labels[:4]]
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert quality["same_position_rate"] == pytest.approx(sum(favourites[a] == favourites[b] for a, b in pairs) / 6)


def test_fewer_rotations_are_spread_and_leave_some_of_the_bias(store):
    config = LabelingConfig(mode=LabelMode.listwise, rotations=2)
    labels = labeled(config, Answering(biased), data=lines(1), store=store)
    assert [label.order[0] for label in labels] == ["c0", "c2"]
    pairs = {(pair.one, pair.other): pair.logit for pair in pair_labels(labels, {"kind": 3.0})[0]}
    # c0 and c2 change places, c0 and c1 do not.
    assert pairs["c0", "c2"] == pytest.approx(-1.0)
    assert pairs["c0", "c1"] == pytest.approx(-0.5 + (1.5 - 2.0 - 0.0 - 0.7) / 2)
    single = LabelingConfig(mode=LabelMode.listwise, both_orders=False)
    labels = labeled(single, Answering(biased), data=lines(1), store=store)
    assert len(labels) == 1
    [pair] = [pair for pair in pair_labels(labels, {"kind": 3.0})[0] if (pair.one, pair.other) == ("c0", "c1")]
    assert pair.logit == pytest.approx(-0.5 + 1.5)


def test_a_list_with_an_order_missing_makes_no_pairs(store):
    def answer(request):
        first_is_c2 = request.meta["completions"][0] == "a b c"
        return Failure("timeout") if first_is_c2 else biased(request)

    labels = labeled(LISTWISE, Answering(answer), data=lines(2), store=store)
    missing = [label.to_json() for label in labels if label.verdict is None]
    assert {(line["order"][0], line["probs"], line["reason"]) for line in missing} == {("c2", None, "timeout")}
    assert pair_labels(labels, {"kind": 3.0}) == ([], {"no_verdict": 12})


def test_a_list_is_asked_by_letters_up_to_z():
    many = lines(1, [f"text {n}" for n in range(26)])
    request = next(Setup(ONE, "l", LISTWISE).talk(many[0]))[0]
    assert [options[0] for options in request.options] == [chr(ord("A") + n) for n in range(26)]
    with pytest.raises(UserError, match=r"labeling.mode=listwise takes up to 26 candidates a prompt, .* has 27"):
        Setup(ONE, "l", LISTWISE).expected(27)


class TestContrastive:
    def test_both_prompts_go_before_the_same_completion(self, store):
        labeler = Answering(lambda request: Likelihood(-3.0, 2))
        system = ({"role": "system", "content": "You sell tea."}, {"role": "user", "content": "Hi"})
        data = [replace(lines(1)[0], prompt=Prompt("p", system))]
        labeled(CONTRASTIVE, labeler, data=data, store=store)
        one, other = labeler.asked[:2]
        assert one.completion == other.completion == "a"
        assert one.messages == ({"role": "system", "content": "You sell tea.\n\nBe kind."}, system[1])
        assert other.messages == ({"role": "system", "content": "You sell tea.\n\nBe rude."}, system[1])

    def test_length_normalised(self, store):
        config = LabelingConfig(mode=LabelMode.contrastive, length_normalize=True)
        labels = labeled(config, data=lines(1), store=store)
        # Half a nat a word, and a token a word.
        assert [label.score for label in labels] == pytest.approx([0.5] * 4)

    def test_a_completion_without_tokens_has_no_verdict(self, store):
        labels = labeled(CONTRASTIVE, data=lines(1, ("a", "")), store=store)
        assert [(label.score, label.reason) for label in labels] == [
            (pytest.approx(0.5), None),
            (None, "empty_completion"),
        ]

    def test_half_of_a_contrast_is_no_verdict_and_only_it_is_asked_again(self, store):
        def answer(request):
            return Failure("too_long") if request.messages[0]["content"] == "Be rude." else Likelihood(-3.0, 2, 7)

        labels = labeled(CONTRASTIVE, Answering(answer), store=store)
        assert {(label.verdict, label.reason) for label in labels} == {(None, "too_long")}
        healed = Answering(lambda request: Likelihood(-4.0, 2, 7))
        labels = labeled(CONTRASTIVE, healed, store=store)
        assert {(label.score, label.prompt_tokens) for label in labels} == {(1.0, 18)}
        assert {request.messages[0]["content"] for request in healed.asked} == {"Be rude."}

    def test_what_a_constitution_lacks_is_named(self):
        bare = Constitution("bare", "1", "d", (KIND, Principle("x", 1.0, "Which?")))
        with pytest.raises(
            UserError, match=r"bare: labeling.mode=contrastive needs encourage and discourage, and x has"
        ):
            Setup(bare, "l", CONTRASTIVE)

    @pytest.mark.parametrize(
        "name", ["concise", "harmless", "helpful", "honest", "instruction_following", "summarize", "warm"]
    )
    def test_every_shipped_constitution_has_it(self, name):
        constitution = load_constitution(name)
        Setup(constitution, "l", CONTRASTIVE)
        texts = [text for p in constitution.principles for text in (p.encourage, p.discourage)]
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("config", NEW, ids=["score", "listwise", "contrastive"])
def test_a_rerun_asks_only_what_failed(store, config):
    labeler = engine(fault_rate=0.3)
    first = labeled(config, labeler, store=store)
    assert 0 < sum(label.verdict is None for label in first) < len(first)
    assert {label.reason for label in first if label.verdict is None} == {"scripted_fault"}
    again = labeled(config, engine(fault_rate=0.3), store=store)
    assert all(old.verdict is None or old == new for old, new in zip(first, again, strict=True))
    for _ in range(20):
        again = labeled(config, labeler, store=store)
    assert all(label.verdict is not None for label in again)


@pytest.mark.parametrize("config", [SCORE, LISTWISE], ids=["score", "listwise"])
def test_too_little_mass_and_unknown_options_are_no_verdict(store, config):
    labels = labeled(config, engine(option_mass=0.3), data=lines(1), store=store)
    assert {(label.verdict, label.reason, label.option_mass) for label in labels} == {(None, "uncovered", 0.3)}
    blind = Answering(lambda request: OptionMass((None, *(0.1 for _ in request.options[1:])), "logprob"))
    labels = labeled(config, blind, data=lines(1), store=store)
    assert {(label.verdict, label.reason) for label in labels} == {(None, "option_unknown")}


class TestWithoutLogProbabilities:
    """A server that gives none: verdicts come from replies, and the label says so."""

    @staticmethod
    def labeler(server, **settings):
        config = LabelerConfig(type=LabelerType.openai, model="judge", base_url=server.url, **settings)
        return build_labeler(config, seed=0)

    def test_numbers_in_a_reply(self, store, server):
        replies = {"a": "8/9", "b": "Score: 3", "c": "I like it."}
        # What is not about one of these is the engine's own question, whether there are log-probabilities.
        server.default = lambda body: text(
            replies.get(body["messages"][0]["content"].partition("[Reply]\n")[2][:1], "I like it.")
        )
        with self.labeler(server) as labeler:
            labels = labeled(SCORE, labeler, data=lines(1, ("a", "b", "c")), store=store)
        # One reply more is shared evenly between 1 to 9: the means of 8 and 5, and of 3 and 5.
        assert [(label.score, label.reason, label.method) for label in labels] == [
            (pytest.approx(6.5), None, "text"),
            (pytest.approx(4.0), None, "text"),
            (None, "uncovered", "text"),
        ]
        [pair], dropped = pair_labels(labels, {"kind": 3.0})
        # (1 + 7.5/9 + 6.5/9 + 1/2) / 4: 8 against 3, 8 and any, any and 3, any and any.
        assert (pair.one, pair.other, pair.p) == ("c0", "c1", pytest.approx(0.763889, abs=1e-6))
        assert dropped == {"no_verdict": 2}

    def test_votes_on_a_list(self, store, server):
        # Two of three replies prefer the reply "b", wherever it stands.
        def reply(body):
            shown = body["messages"][0]["content"]
            place = "AB"[shown.find("\nb\n") > shown.find("\na\n")]
            other = "AB".replace(place, "")
            return text(*(place, other, f"Answer: {place}")[: body.get("n", 1)])

        server.default = reply
        with self.labeler(server, votes=3) as labeler:
            labels = labeled(LISTWISE, labeler, data=lines(1, ("a", "b")), store=store)
        assert [(label.order, label.method) for label in labels] == [(("c0", "c1"), "votes"), (("c1", "c0"), "votes")]
        [pair], _ = pair_labels(labels, {"kind": 3.0})
        # 2 and 1 of 3: log((2 + 1/2) / (1 + 1/2)).
        assert pair.logit == pytest.approx(-math.log(5 / 3))


MODES = [mode for mode in LabelMode if mode is not LabelMode.pointwise]


class TestPrinciples:
    @pytest.mark.parametrize("mode", LabelMode)
    @pytest.mark.parametrize("principles", Principles)
    def test_as_many_requests_as_expected(self, mode, principles):
        if (mode, principles) == (LabelMode.pointwise, Principles.together):
            pytest.skip("refused")
        setup = Setup(TWO, "l", LabelingConfig(mode=mode, principles=principles))
        for size in (2, 4):
            line = lines(1, [f"text {n}" for n in range(size)])[0]
            assert len(next(setup.talk(line))) == setup.expected(size)

    def test_a_sampled_principle_is_the_same_in_both_orders_and_drawn_by_weight(self, store):
        config = LabelingConfig(principles=Principles.sample)
        labels = labeled(config, constitution=TWO, data=lines(200), store=store)
        asked = {}
        for label in labels:
            pair = (label.prompt_id, *sorted((label.first, label.second)))
            assert asked.setdefault(pair, label.principle) == label.principle
        counts = Counter(asked.values())
        assert counts["kind"] / counts.total() == pytest.approx(0.75, abs=0.04)
        # It depends on the pair, not on the prompt alone.
        assert any(asked[f"p{n}", "c0", "c1"] != asked[f"p{n}", "c0", "c2"] for n in range(200))
        pairs, dropped = pair_labels(labels, {"kind": 3.0, "short": 1.0})
        assert dropped == {"no_verdict": 0}
        assert len(pairs) == 1200
        assert {len(pair.principles) for pair in pairs} == {1}
        for pair in pairs:
            assert pair.logit == pytest.approx(0.5 * (WORDS[pair.one] - WORDS[pair.other]), abs=1e-5)

    def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_candidates(self):
        config = LabelingConfig(principles=Principles.sample)
        line = lines(1)[0]
        one, other = line.candidates[:2]

        def drawn(seed, *pair):
            return [
                Setup(TWO, "l", config, seed).principles(Prompt("p", ({"role": "user", "content": str(n)},)), pair)
                for n in range(50)
            ]

        assert drawn(0, one, other) == drawn(0, other, one)
        assert drawn(0, one, other) != drawn(1, one, other)

    @pytest.mark.parametrize("mode", [LabelMode.pointwise, LabelMode.score, LabelMode.contrastive])
    def test_completions_of_a_prompt_share_the_sampled_principle(self, store, mode):
        config = LabelingConfig(mode=mode, principles=Principles.sample)
        labels = labeled(config, constitution=TWO, data=lines(50), store=store)
        by_prompt = {}
        for label in labels:
            assert by_prompt.setdefault(label.prompt_id, label.principle) == label.principle
        assert set(by_prompt.values()) == {"kind", "short"}
        assert len(pair_labels(labels, {"kind": 3.0, "short": 1.0})[0]) == 300

    @pytest.mark.parametrize("mode", MODES)
    def test_together_is_one_verdict_on_all(self, store, mode):
        config = LabelingConfig(mode=mode, principles=Principles.together)
        setup = Setup(TWO, "l", config)
        text = next(setup.talk(lines(1)[0]))[0].messages[0]["content"]
        if mode is LabelMode.contrastive:
            assert text == "Be kind.\nStop."
        else:
            assert "by several principles" in text
            assert ":\n1. Which is kinder? (weight 3)\n2. Which is shorter? (weight 1)\n\n" in text
            even = replace(TWO, principles=tuple(replace(principle, weight=2.0) for principle in TWO.principles))
            text = next(Setup(even, "l", config).talk(lines(1)[0]))[0].messages[0]["content"]
            assert ":\n1. Which is kinder?\n2. Which is shorter?\n\n" in text
            assert "weight" not in text
        labels = labeled(config, constitution=TWO, store=store)
        assert {label.principle for label in labels} == {"all"}
        assert setup.weights == {"all": 1.0}
        assert len(pair_labels(labels, setup.weights)[0]) == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": LabelMode.pointwise, "principles": Principles.together}, r"labeling\.principles=together"),
        ({"rotations": 2}, r"labeling\.rotations=2: only with labeling\.mode=listwise"),
        ({"mode": LabelMode.listwise, "rotations": 0}, r"labeling\.rotations=0"),
        ({"mode": LabelMode.listwise, "rotations": 2, "both_orders": False}, r"labeling\.both_orders=false for one"),
        ({"mode": LabelMode.score, "exemplars": True}, r"labeling\.exemplars=true"),
        ({"length_normalize": True}, r"labeling\.length_normalize=true"),
        ({"mode": LabelMode.listwise, "rationales": 1}, r"labeling\.rationales=1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LabelingConfig(**settings)


@pytest.mark.parametrize("config", NEW, ids=["score", "listwise", "contrastive"])
def test_a_model_in_process_answers_in_every_mode(store, config):
    """Random weights: what comes out is no truth, but every line has its verdict."""
    from rlaif.config import ModelConfig
    from rlaif.engines.hf import HFEngine

    with HFEngine(ModelConfig(name="tiny", device="cpu")) as labeler:
        labels = labeled(replace(config, min_option_mass=0.0), labeler, data=lines(2), store=store)
        assert {(label.method, label.reason, label.labeler) for label in labels} == {("logprob", None, "tiny")}
        pairs, dropped = pair_labels(labels, {"kind": 3.0})
    assert (len(pairs), dropped) == (12, {"no_verdict": 0})
    assert any(pair.logit for pair in pairs)
    assert all(label.prompt_tokens > 0 for label in labels)
