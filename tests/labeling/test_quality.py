"""Quality figures of verdicts, by hand."""

from dataclasses import replace

import pytest

from rlaif.config import LabelingConfig, LabelMode, ScriptedConfig
from rlaif.constitution import Constitution, Principle
from rlaif.engines.scripted import ScriptedEngine
from rlaif.labeling.label import label_candidates
from rlaif.labeling.quality import latency, verdict_quality
from rlaif.labeling.store import VerdictStore
from rlaif.records import Candidates, Completion, Prompt


@pytest.fixture
def labels_of(tmp_path):
    def ask(line, principle, mode):
        constitution = Constitution("test", "1", "d", (principle,))
        with VerdictStore(tmp_path / "s.sqlite") as store:
            engine = ScriptedEngine(ScriptedConfig(), seed=0)
            return label_candidates([line], constitution, engine, LabelingConfig(mode=LabelMode(mode)), store)

    return ask


@pytest.mark.parametrize(
    ("mode", "asked", "marked"),
    [
        # c1 is long: it is in two of three pairs, each asked in both orders.
        ("pairwise", None, [True, True, None, None, True, True]),
        ("pointwise", None, [None, True, None]),
        ("pointwise", "What is the tone?", [None, True, None]),
    ],
)
def test_verdicts_on_cut_texts_are_marked_and_counted(mode, asked, marked, labels_of):
    principle = Principle("kind", 1.0, "Which?", "It is", asked, ("kind",), ("rude",))
    texts = ("a", "b" * 12_001, "c")
    line = Candidates(
        Prompt("p", ({"role": "user", "content": "q"},)),
        tuple(Completion(f"c{place}", text) for place, text in enumerate(texts)),
    )
    labels = labels_of(line, principle, mode)
    assert [found.truncated for found in labels] == marked
    assert verdict_quality(labels)["truncated"] == sum(map(bool, marked))
    assert [found.to_json().get("truncated") for found in labels] == marked


def test_a_long_conversation_counts_where_it_is_shown(labels_of):
    principle = Principle("kind", 1.0, "Which?", "It is", None, ("kind",), ("rude",))
    line = Candidates(Prompt("p", ({"role": "user", "content": "q" * 12_000},)), (Completion("c", "a"),))
    for asked, marked in ((None, True), ("What is the tone?", None)):
        [label] = labels_of(line, replace(principle, ask=asked), "pointwise")
        assert label.truncated is marked


def test_latency_has_median_and_95th_percentile():
    assert latency([place / 10 for place in range(21)]) == {"latency_median_s": 1.0, "latency_p95_s": 1.9}
    assert latency([]) == {}
