"""Labeling with a scripted labeler gives back what was scripted."""

import time
from dataclasses import replace

import pytest
from fake_server import FakeServer, logprobs

from rlaif.config import LabelerConfig, LabelerType, LabelingConfig, LabelMode, ScriptedConfig
from rlaif.constitution import Constitution, Exemplar, Principle
from rlaif.engines import build_labeler
from rlaif.engines.base import Engine, Failure, OptionMass, Sampled
from rlaif.engines.limits import Spend
from rlaif.engines.scripted import ScriptedEngine
from rlaif.labeling.aggregate import pair_labels
from rlaif.labeling.label import Labeling, label_candidates
from rlaif.labeling.modes import Setup
from rlaif.labeling.quality import verdict_quality
from rlaif.labeling.store import VerdictStore
from rlaif.records import Candidates, Completion, Prompt, UserError

KIND = Principle("kind", 1.0, "Which is kinder?", "The reply is", None, ("kind",), ("rude",))
SHORT = Principle("short", 1.0, "Which is shorter?", "The reply is", None, ("short",), ("long",))
CONSTITUTION = Constitution("test", "1", "d", (KIND,))
PAIRWISE, POINTWISE = LabelingConfig(mode=LabelMode.pairwise), LabelingConfig(mode=LabelMode.pointwise)


def lines(n=20, completions=("a", "a b", "a b c", "a b c d e")):
    return [
        Candidates(
            Prompt(f"p{i}", ({"role": "user", "content": f"question {i}"},)),
            tuple(Completion(f"c{k}", f"{text} {i}") for k, text in enumerate(completions)),
        )
        for i in range(n)
    ]


def engine(**settings):
    return ScriptedEngine(ScriptedConfig(**({"utility": "length", "sharpness": 0.5} | settings)), seed=0)


@pytest.fixture
def store(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as opened:
        yield opened


class Recording(Engine):
    """Passes requests on and remembers them."""

    def __init__(self, inner):
        self.inner, self.identity, self.asked = inner, inner.identity, []

    def sample(self, requests):
        raise NotImplementedError

    def score_options(self, requests):
        def seen():
            for request in requests:
                self.asked.append(request)
                yield request

        return self.inner.score_options(seen())


@pytest.mark.parametrize("config", [PAIRWISE, POINTWISE], ids=["pairwise", "pointwise"])
def test_the_oracle_is_recovered(store, config):
    candidates = lines()
    labels = label_candidates(candidates, CONSTITUTION, engine(), config, store)
    # 4 candidates: 6 pairs in 2 orders, or 4 verdicts.
    assert len(labels) == 20 * (12 if config is PAIRWISE else 4)
    pairs, dropped = pair_labels(labels, {"kind": 1.0})
    assert dropped == {"no_verdict": 0}
    assert len(pairs) == 20 * 6
    words = {"c0": 1, "c1": 2, "c2": 3, "c3": 5}
    for pair in pairs:
        assert pair.logit == pytest.approx(0.5 * (words[pair.one] - words[pair.other]), abs=1e-5)


def test_the_labels_say_what_was_shown(store):
    [one, other] = label_candidates(lines(1, ("a", "b c")), CONSTITUTION, engine(), PAIRWISE, store)
    assert (one.prompt_id, one.mode, one.principle, one.labeler) == ("p0", "pairwise", "kind", "scripted")
    assert (one.first, one.second, other.first, other.second) == ("c0", "c1", "c1", "c0")
    assert (one.method, one.reason) == ("logprob", None)
    assert one.option_mass == pytest.approx(0.9)
    # One word fewer at 0.5 logits a word: sigmoid(-0.5) = 0.377541.
    assert one.p == pytest.approx(0.377541, abs=1e-6)
    assert other.p == pytest.approx(1 - 0.377541, abs=1e-6)


def test_a_planted_position_bias_is_removed_by_both_orders(store):
    labels = label_candidates(lines(), CONSTITUTION, engine(position_bias=4.0), PAIRWISE, store)
    pairs, _ = pair_labels(labels, {"kind": 1.0})
    words = {"c0": 1, "c1": 2, "c2": 3, "c3": 5}
    for pair in pairs:
        assert pair.logit == pytest.approx(0.5 * (words[pair.one] - words[pair.other]), abs=1e-5)
    # The bias is seen before it is removed: differences reach 2 logits, so 4 always wins.
    quality = verdict_quality(labels)
    assert quality["position_bias"] == pytest.approx(4.0, abs=1e-4)
    assert quality["same_position_rate"] == 1.0


def test_the_bias_is_measured_where_both_orders_are_known(store):
    """Second orders are asked by what the first said, so single orders are a selection with another mean."""
    config = LabelingConfig(second_order_below=3.0)
    labels = label_candidates(lines(), CONSTITUTION, engine(position_bias=2.0), config, store)
    assert len(labels) < 20 * 12
    quality = verdict_quality(labels)
    assert quality["position_bias"] == pytest.approx(2.0, abs=1e-4)
    single = label_candidates(lines(), CONSTITUTION, engine(), LabelingConfig(both_orders=False), store)
    assert "position_bias" not in verdict_quality(single)


def test_one_order_keeps_the_bias(store):
    config = LabelingConfig(both_orders=False)
    labels = label_candidates(lines(1, ("a", "b")), CONSTITUTION, engine(position_bias=4.0), config, store)
    [pair], _ = pair_labels(labels, {"kind": 1.0}, both_orders=False)
    assert abs(pair.logit) == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize("mode", [LabelMode.pairwise, LabelMode.listwise])
def test_where_one_order_is_all_there_is_chance_decides_which(store, mode):
    """Shown in the order of the file, whoever comes first there would always gain by a position bias."""
    config = LabelingConfig(mode=mode, both_orders=False)
    labels = label_candidates(lines(200, ("a", "b")), CONSTITUTION, engine(), config, store)
    assert len(labels) == 200
    first = sum((label.first or label.order[0]) == "c0" for label in labels)
    assert 70 < first < 130  # 4 standard deviations
    # It is the pair's own: whatever the principle and the order in the file, the same text comes first.
    turned = [replace(line, candidates=line.candidates[::-1]) for line in lines(200, ("a", "b"))]
    again = label_candidates(turned, CONSTITUTION, engine(), config, store)
    if mode is LabelMode.pairwise:
        assert [label.first for label in again] == [label.first for label in labels]
    other = label_candidates(lines(200, ("a", "b")), CONSTITUTION, engine(), config, store, seed=1)
    assert [label.first or label.order for label in other] != [label.first or label.order for label in labels]


@pytest.mark.parametrize("config", [PAIRWISE, POINTWISE], ids=["pairwise", "pointwise"])
def test_faults_are_not_stored_and_a_rerun_asks_only_them(store, config):
    labeler = Recording(engine(fault_rate=0.3))
    first = label_candidates(lines(), CONSTITUTION, labeler, config, store)
    assert len(labeler.asked) == len(first)
    failed = [label for label in first if label.p is None]
    assert 0 < len(failed) < len(first)
    assert {(label.method, label.reason) for label in failed} == {("none", "scripted_fault")}
    [(stored,)] = store.connection.execute("SELECT COUNT(*) FROM verdicts")
    assert stored == len(first) - len(failed)
    for _ in range(20):
        before = sum(label.p is None for label in first)
        labeler.asked.clear()
        again = label_candidates(lines(), CONSTITUTION, labeler, config, store)
        assert len(labeler.asked) == before
        for old, new in zip(first, again, strict=True):
            assert old.p is None or old == new
        first = again
        if before == 0:
            break
    assert all(label.p is not None for label in first)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        *('["a", "stop", 3]', '{"text": "a", "finish_reason": "stop", "tokens": 3}', '{"logp": -3.5, "tokens": 2}'),
        *('{"masses": [0.1, 0.2, 0.3], "method": "logprob"}', '{"masses": [0.1, 0.2, "x"], "method": "logprob"}'),
    ],
)
def test_a_row_that_answers_something_else_is_asked_again(store, caplog, value, finished):
    whole = label_candidates(lines(2), CONSTITUTION, engine(), PAIRWISE, store)
    [(key,)] = store.connection.execute("SELECT key FROM verdicts LIMIT 1").fetchall()
    store.connection.execute("UPDATE verdicts SET value = ? WHERE key = ?", (value, key))
    if not finished:
        store.connection.execute("DELETE FROM finished")
    first = label_candidates(lines(2), CONSTITUTION, engine(), PAIRWISE, store)
    assert f"row {key} is no answer to what it is stored for; it is asked again" in caplog.text
    # What was marked as finished is looked at too late; the next run asks it.
    assert sum(label.reason == "not_asked" for label in first) == finished
    recording = Recording(engine())
    assert label_candidates(lines(2), CONSTITUTION, recording, PAIRWISE, store) == whole
    assert len(recording.asked) == finished


def test_too_little_mass_is_uncovered(store):
    for minimum, reason in ((0.31, "uncovered"), (0.29, None)):
        config = LabelingConfig(min_option_mass=minimum)
        labels = label_candidates(lines(2), CONSTITUTION, engine(option_mass=0.3), config, store)
        assert {label.reason for label in labels} == {reason}
        assert all((label.p is None) == (reason is not None) for label in labels)
        assert all(label.option_mass == pytest.approx(0.3) for label in labels)


@pytest.mark.parametrize(("config", "reason"), [(PAIRWISE, "uncovered"), (POINTWISE, None)])
def test_the_default_minimum_depends_on_the_mode(store, config, reason):
    labels = label_candidates(lines(1), CONSTITUTION, engine(option_mass=0.3), config, store)
    assert {label.reason for label in labels} == {reason}


def test_no_mass_at_all_is_uncovered_even_without_a_minimum(store):
    config = LabelingConfig(min_option_mass=0.0)
    labels = label_candidates(lines(1), CONSTITUTION, engine(option_mass=0.0), config, store)
    assert {label.reason for label in labels} == {"uncovered"}


class HalfBlind(Recording):
    def score_options(self, requests):
        for index, _ in enumerate(requests):
            yield index, OptionMass((0.7, None), "logprob")


def test_an_option_that_the_engine_cannot_see_is_unknown(store):
    labels = label_candidates(lines(1), CONSTITUTION, HalfBlind(engine()), PAIRWISE, store)
    assert {(label.p, label.reason) for label in labels} == {(None, "option_unknown")}


class Dying(Recording):
    def score_options(self, requests):
        for index, result in super().score_options(requests):
            if index == 7:
                raise RuntimeError("power cut")
            yield index, result


def test_an_interrupted_run_keeps_what_it_has(store):
    with pytest.raises(RuntimeError):
        label_candidates(lines(), CONSTITUTION, Dying(engine()), PAIRWISE, store)
    labeler = Recording(engine())
    labels = label_candidates(lines(), CONSTITUTION, labeler, PAIRWISE, store)
    assert len(labeler.asked) == len(labels) - 7


class DyingAtWork(Dying):
    in_bursts = True


def test_a_run_that_is_interrupted_within_a_burst_keeps_it(store):
    with pytest.raises(RuntimeError):
        label_candidates(lines(), CONSTITUTION, DyingAtWork(engine()), PAIRWISE, store)
    with VerdictStore(store.path) as other:
        assert other.connection.execute("SELECT count(*) FROM verdicts").fetchone() == (7,)


def test_answers_are_stored_before_the_next_are_waited_for(store, server):
    """Not only when the run ends: the server answers each question only once the answers before it can be read."""

    def reply(body):
        asked.append(body)
        deadline = time.monotonic() + 10
        with VerdictStore(store.path) as other:
            while time.monotonic() < deadline:
                [[stored]] = other.connection.execute("SELECT count(*) FROM verdicts")
                if stored == len(asked) - 1:
                    seen.append(stored)
                    break
                time.sleep(0.01)
        return logprobs([("A", 0.7), ("B", 0.2)])

    asked, seen = [], []
    server.default = reply
    config = LabelerConfig(type=LabelerType.openai, model="judge", base_url=server.url, concurrency=1)
    with build_labeler(config, seed=0) as labeler:
        labels = label_candidates(lines(2, ("a", "b")), CONSTITUTION, labeler, PAIRWISE, store)
    assert len(labels) == 4
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("part", ["rlaif.labeling.prompts._PAIRWISE_HEAD", "rlaif.labeling.label._code"])
def test_other_prompt_code_is_asked_again(store, monkeypatch, part):
    """That everything was answered is a mark on what was asked, not on the line alone."""
    label_candidates(lines(), CONSTITUTION, engine(), PAIRWISE, store)
    calls = []
    known = store.get
    monkeypatch.setattr(store, "get", lambda keys: calls.append(0) or known(keys))
    monkeypatch.setattr(part, "Other words." if "HEAD" in part else lambda: "other code")
    labeler = Recording(engine())
    labels = label_candidates(lines(), CONSTITUTION, labeler, PAIRWISE, store)
    assert all(label.p is not None for label in labels)
    if "HEAD" in part:
        assert len(labeler.asked) == len(labels)
    # Every line is looked at again, before its labels are read.
    assert len(calls) >= 2 * 20


def test_a_finished_line_is_not_looked_at_again(store, monkeypatch):
    label_candidates(lines(), CONSTITUTION, engine(), PAIRWISE, store)
    setup = Setup(CONSTITUTION, "scripted", PAIRWISE)
    labeling = Labeling(lines, setup, engine(), store)
    monkeypatch.setattr(store, "get", None)
    labeling.ask(0)


def test_equal_requests_of_one_line_are_asked_once(store):
    labeler = Recording(engine())
    labels = label_candidates(lines(3, ("same", "same", "other")), CONSTITUTION, labeler, POINTWISE, store)
    assert len(labels) == 9
    assert len(labeler.asked) == 6
    assert all(label.p is not None for label in labels)
    # The lines are finished nevertheless.
    assert store.connection.execute("SELECT count(*) FROM finished").fetchone() == (3,)


@pytest.mark.parametrize(("config", "each"), [(PAIRWISE, 12), (POINTWISE, 4)], ids=["pairwise", "pointwise"])
def test_the_verdicts_of_a_line_lie_together_in_the_store(store, config, each):
    labeler = Recording(engine())
    label_candidates(lines(5), CONSTITUTION, labeler, config, store)
    stored = [key for (key,) in store.connection.execute("SELECT key FROM verdicts ORDER BY key")]
    assert len(stored) == len(labeler.asked) == 5 * each
    together = [{key[:8] for key in stored[start : start + each]} for start in range(0, 5 * each, each)]
    assert [len(starts) for starts in together] == [1] * 5
    # The conversation is told apart by its text, not by its name.
    renamed = [replace(line, prompt=replace(line.prompt, prompt_id=f"new {i}")) for i, line in enumerate(lines(5))]
    label_candidates(renamed, CONSTITUTION, labeler, config, store)
    assert len(labeler.asked) == 5 * each


def test_a_question_without_the_conversation_is_asked_once_for_all_prompts(store):
    alone = Constitution("test", "1", "d", (replace(KIND, ask="What is the tone of this text?"),))
    same = [replace(line, candidates=lines(1)[0].candidates) for line in lines(5)]
    labeler = Recording(engine())
    assert len(label_candidates(same, alone, labeler, POINTWISE, store)) == 20
    assert len(labeler.asked) == 4


class Costing(Recording):
    """An engine that costs a request each, and may break down."""

    spent = Spend()

    def __init__(self, inner, breaks=None):
        super().__init__(inner)
        self.breaks = breaks

    def score_options(self, requests):
        for index, result in super().score_options(requests):
            self.spent = self.spent._replace(requests=self.spent.requests + 1)
            if index == 7 and self.breaks is not None:
                raise self.breaks
            yield index, result


@pytest.mark.parametrize("breaks", [KeyboardInterrupt(), UserError("the server refuses the key")])
def test_what_was_spent_is_remembered_however_a_run_ends(store, monkeypatch, breaks):
    monkeypatch.setattr("rlaif.labeling.label._ACCOUNT_S", 1e9)
    with pytest.raises(type(breaks)):
        label_candidates(lines(), CONSTITUTION, Costing(engine(), breaks), PAIRWISE, store)
    assert store.spent()[0] == 8
    # Asked in another way (votes, another model), it is the same purse.
    labels = label_candidates(lines(), CONSTITUTION, Costing(engine(sharpness=1.0)), PAIRWISE, store)
    assert store.spent()[0] == 8 + len(labels)


def test_identical_completions_are_a_tie(store):
    candidates = [
        Candidates(Prompt("p", ({"role": "user", "content": "q"},)), (Completion("a", "same"), Completion("b", "same")))
    ]
    labels = label_candidates(candidates, CONSTITUTION, engine(position_bias=1.0), PAIRWISE, store)
    [pair], _ = pair_labels(labels, {"kind": 1.0})
    assert pair.logit == pytest.approx(0.0, abs=1e-9)


def test_pointwise_needs_statements():
    bare = Constitution("bare", "1", "d", (KIND, Principle("x", 1.0, "Which?")))
    with pytest.raises(UserError, match=r"constitution bare: labeling.mode=pointwise needs .* x has none"):
        Setup(bare, "l", POINTWISE)


def test_exemplars_of_the_principle_are_shown_when_asked_for():
    exemplars = (Exemplar("q", "f", "s", "first", "kind"), Exemplar("other", "f", "s", "first", "short"))
    constitution = Constitution("c", "1", "d", (KIND, SHORT), exemplars)
    shown = requests(Setup(constitution, "l", LabelingConfig(exemplars=True)))
    assert [len(request.messages) for request in shown] == [3, 3, 3, 3]
    assert "User: q\n" in shown[0].messages[0]["content"]
    assert "User: other\n" in shown[2].messages[0]["content"]
    assert {len(request.messages) for request in requests(Setup(constitution, "l", PAIRWISE))} == {1}


def requests(setup, candidates=None):
    """What is asked first about each line."""
    return [request for line in candidates or lines(1, ("a", "b")) for request in next(setup.talk(line))]


def keys(candidates=None, constitution=CONSTITUTION, config=PAIRWISE, labeler=None, seed=0):
    labeler = labeler or engine()
    setup = Setup(constitution, labeler.name, config, seed)
    labeling = Labeling(lambda: (), setup, labeler, VerdictStore(":memory:"))
    return [labeling.key(request) for request in requests(setup, candidates)]


@pytest.fixture
def openai():
    """Makes clients of a server that does nothing."""
    servers = FakeServer(), FakeServer()

    def client(server=0, **settings):
        config = {"type": LabelerType.openai, "model": "judge", "base_url": servers[server].url, **settings}
        with build_labeler(LabelerConfig(**config), seed=0) as labeler:
            return labeler

    yield client
    for server in servers:
        server.close()


def test_the_store_key_holds_everything_that_can_change_the_answer(monkeypatch):
    base = keys()
    assert len(set(base)) == 2  # the two orders
    assert keys() == base
    changed = {
        "completion": keys(lines(1, ("a", "c"))),
        "principle": keys(constitution=Constitution("c", "1", "d", (replace(KIND, question="Which is nicer?"),))),
        "labeler": keys(labeler=engine(sharpness=1.0)),
        "seed": keys(seed=1),
        "prompt": keys([replace(lines(1, ("a", "b"))[0], prompt=Prompt("p0", ({"role": "user", "content": "?"},)))]),
    }
    monkeypatch.setattr("rlaif.labeling.prompts._PAIRWISE_HEAD", "Other words.")
    changed["template"] = keys()
    for name, found in changed.items():
        assert not set(found) & set(base), name


def test_the_pointwise_key_holds_stem_and_words():
    base = keys(config=POINTWISE)
    for change in ({"statement": "It is"}, {"yes": ("nice",)}, {"no": ("mean",)}, {"ask": "How is it?"}):
        constitution = Constitution("c", "1", "d", (replace(KIND, **change),))
        assert not set(keys(constitution=constitution, config=POINTWISE)) & set(base), change


def test_the_store_key_of_a_server_ignores_speed_and_names(openai):
    base = keys(labeler=openai())
    assert keys(labeler=openai(concurrency=3, timeout_s=5, max_retries=0)) == base
    # Ids are names for the same texts.
    [line] = lines(1, ("a", "b"))
    renamed = tuple(replace(candidate, candidate_id=f"x{candidate.candidate_id}") for candidate in line.candidates)
    assert keys([replace(line, candidates=renamed)], labeler=openai()) == base
    for other in ({"server": 1}, {"votes": 3}, {"top_logprobs": 5}, {"prefill": True}):
        assert not set(keys(labeler=openai(**other))) & set(base)


REASONED = LabelingConfig(rationales=3, rationale_tokens=20, clamp=0.0)


class Reasoning(Recording):
    """Reasons, unless told not to for some prompts, and remembers what it is asked."""

    def __init__(self, inner, silent=()):
        super().__init__(inner)
        self.sampled, self.silent = [], silent

    def sample(self, requests):
        for index, request in enumerate(requests):
            self.sampled.append(request)
            text = request.messages[0]["content"]
            if any(word in text for word in self.silent):
                yield index, Failure("timeout")
            else:
                yield index, Sampled(f"thought {request.seed} <|im_end|>", "stop", 3)


def test_rationales_come_before_the_verdict_and_their_verdicts_are_averaged(store):
    labeler = Reasoning(engine(position_bias=2.0, noise=0.5))
    data = lines(5, ("a", "a b c"))
    labels = label_candidates(data, CONSTITUTION, labeler, REASONED, store)
    assert len(labels) == 10
    assert len(labeler.sampled) == len(labeler.asked) == 30
    assert len({request.seed for request in labeler.sampled}) == 30
    first = labeler.asked[0]
    assert [message["role"] for message in first.messages] == ["user", "assistant", "user"]
    assert "Do not give a verdict yet" in first.messages[0]["content"]
    assert "Answer with one letter" not in first.messages[0]["content"]
    assert "Answer with one letter" in first.messages[2]["content"]
    # The label is the mean over its three answers, and shows the three rationales.
    masses = [answer.masses for _, answer in engine(position_bias=2.0, noise=0.5).score_options(labeler.asked[:3])]
    assert labels[0].p == pytest.approx(sum(yes / (yes + no) for yes, no in masses) / 3)
    assert labels[0].reply.count("thought") == 3
    # Both orders together remove the bias, up to the noise.
    pairs, _ = pair_labels(labels, {"kind": 1.0})
    assert all(pair.logit < 0 for pair in pairs)


def test_a_label_counts_what_its_rationales_took(store):
    """Each of the three rationales 40 tokens of prompt and 3 of completion, each verdict after it 50 and 1."""

    class Counting(Reasoning):
        def sample(self, requests):
            for index, answer in super().sample(requests):
                yield index, replace(answer, prompt_tokens=40)

        def score_options(self, requests):
            for index, answer in super().score_options(requests):
                yield index, replace(answer, prompt_tokens=50, completion_tokens=1)

    data = lines(5, ("a", "a b c"))
    labeler = Counting(engine())
    labeling = Labeling(lambda: data, Setup(CONSTITUTION, "scripted", REASONED), labeler, store)
    labeling.ask(10)
    found = [label for _, labels in labeling.labels() for label in labels]
    assert {(label.prompt_tokens, label.completion_tokens) for label in found} == {(3 * 90, 3 * 4)}
    # Ten labels of three answers each; rationales are none.
    assert labeling.answered == len(found) * labeling.setup.answers_per_label == 30


def test_nothing_is_reasoned_or_asked_twice(store):
    data = lines(4, ("a", "a b c"))
    labels = label_candidates(data, CONSTITUTION, Reasoning(engine()), REASONED, store)
    again = Reasoning(engine())
    assert label_candidates(data, CONSTITUTION, again, REASONED, store) == labels
    assert not again.sampled
    assert not again.asked
    # Another number of rationales keeps those that are there.
    more = Reasoning(engine())
    label_candidates(data, CONSTITUTION, more, replace(REASONED, rationales=4), store)
    assert len(more.sampled) == len(more.asked) == 8


def test_a_missing_rationale_is_no_verdict_and_is_asked_again(store):
    data = lines(4, ("a", "a b c"))
    labels = label_candidates(data, CONSTITUTION, Reasoning(engine(), silent=["question 2"]), REASONED, store)
    missing = [label for label in labels if label.p is None]
    assert {(label.prompt_id, label.reason) for label in missing} == {("p2", "timeout")}
    healed = Reasoning(engine())
    labels = label_candidates(data, CONSTITUTION, healed, REASONED, store)
    assert all(label.p is not None for label in labels)
    assert len(healed.sampled) == 6


def test_reasoned_verdicts_are_clamped(store):
    data = lines(4, ("a", "a b c d e f g h"))
    labels = label_candidates(data, CONSTITUTION, Reasoning(engine(sharpness=5)), replace(REASONED, clamp=0.4), store)
    assert {round(label.p, 6) for label in labels} == {0.4, 0.6}


@pytest.mark.parametrize(
    "settings",
    [
        {"rationales": -1},
        {"rationales": 1, "mode": LabelMode.pointwise},
        {"rationales": 1, "exemplars": True},
        {"clamp": 0.5},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"labeling\.(rationales|clamp)="):
        LabelingConfig(**settings)


class Replying(Recording):
    """Gives no log-probabilities: one reply of some is for the first."""

    def __init__(self, votes):
        super().__init__(engine())
        self.votes = votes

    def gives_logprobs(self):
        return False

    def score_options(self, requests):
        for index, request in enumerate(requests):
            self.asked.append(request)
            method = "votes" if self.votes > 1 else "text"
            yield index, OptionMass((1 / self.votes, 1 - 1 / self.votes), method, replies=self.votes)


@pytest.mark.parametrize(("votes", "asked"), [(1, 0), (4, 1)])
def test_a_stored_verdict_from_votes_that_does_not_say_how_many_is_asked_again(store, votes, asked):
    """As earlier versions stored it; of text it is known that it is one."""
    [line] = lines(1, ("a", "b"))
    labels = label_candidates([line], CONSTITUTION, Replying(votes), PAIRWISE, store)
    assert [(label.replies, label.p) for label in labels] == [(votes, pytest.approx(1.5 / (votes + 1)))] * 2
    first = "(SELECT min(key) FROM verdicts)"
    store.connection.execute(f"UPDATE verdicts SET value = json_remove(value, '$.replies') WHERE key = {first}")
    again = Replying(votes)
    assert label_candidates([line], CONSTITUTION, again, PAIRWISE, store) == labels
    assert len(again.asked) == asked
