"""Splits keep near-duplicates together, stay put, and are exact."""

import random
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif import near_duplicates
from rlaif.config import DataConfig, Split
from rlaif.near_duplicates import near_duplicate_clusters
from rlaif.records import Prompt, UserError
from rlaif.splits import assign_splits, check_no_leak, read_split

WORDS = [f"w{number}" for number in range(3000)]


def prompt(name, text):
    return Prompt(name, ({"role": "user", "content": text},))


def random_prompts(n, seed=0):
    rng = random.Random(seed)
    return [prompt(f"p{i}", " ".join(rng.sample(WORDS, 8))) for i in range(n)]


def same(partition, other):
    """Whether two labelings are the same partition."""
    return len(set(partition)) == len(set(other)) == len(set(zip(partition, other, strict=True)))


# Ten words; one changed: 9 / 11 = 0.82 shared. Four changed: 6 / 14 = 0.43.
BASE = "tell me a long story about one very old house"


def test_duplicates_and_near_duplicates_share_a_cluster():
    texts = [
        BASE,
        BASE.upper() + "?!",
        BASE.replace("house", "castle"),
        "house old very one about story long a me tell",
        "tell me a long story concerning two quite new houses",
        "something else entirely",
    ]
    assert same(near_duplicate_clusters(texts, 0.7), [0, 0, 0, 0, 1, 2])


def test_threshold_is_inclusive():
    # {a, b, c, d} and {a, b, c, e} share 3 of 5 words.
    texts = ["a b c d", "a b c e"]
    assert same(near_duplicate_clusters(texts, 0.6), [0, 0])
    assert same(near_duplicate_clusters(texts, 0.61), [0, 1])


def test_clusters_are_transitive():
    texts = ["a b c d", "b c d e", "c d e f"]
    assert same(near_duplicate_clusters(texts, 0.6), [0, 0, 0])
    assert same(near_duplicate_clusters([texts[0], texts[2]], 0.6), [0, 1])


def brute_force(texts, threshold):
    """Connected components of the pairs at or above the threshold, from every pair."""
    sets = [set(text.split()) for text in texts]
    cluster = list(range(len(sets)))
    for i in range(len(sets)):
        for j in range(i):
            union = sets[i] | sets[j]
            jaccard = len(sets[i] & sets[j]) / len(union) if union else 1.0
            if jaccard >= threshold - 1e-9:
                old, new = cluster[i], cluster[j]
                cluster = [new if value == old else value for value in cluster]
    return cluster


small_texts = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6).map(" ".join), max_size=14)


@settings(max_examples=300, deadline=None)
@given(small_texts, st.sampled_from([0.01, 0.2, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 1.0]))
def test_clusters_equal_brute_force(texts, threshold):
    assert same(near_duplicate_clusters(texts, threshold), brute_force(texts, threshold))


@pytest.fixture(params=["alone", "blocks"])
def sizes(request, monkeypatch):
    """Both ways of comparing, and bounds so small that few texts reach them."""
    monkeypatch.setattr(near_duplicates, "_FEW", 2**30 if request.param == "alone" else 0)
    monkeypatch.setattr(near_duplicates, "_MANY", 3)
    monkeypatch.setattr(near_duplicates, "_CELLS", 20)
    near_duplicates._clusters.cache_clear()
    yield
    near_duplicates._clusters.cache_clear()


@pytest.mark.parametrize("threshold", [1e-6, 0.01, 0.1, 0.3, 0.5, 0.6, 2 / 3, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["few words", "templates", "long"])
def test_every_way_of_comparing_equals_brute_force(kind, threshold, sizes):
    rng = random.Random(0)
    if kind == "few words":
        texts = [" ".join(rng.choices(WORDS[:30], k=rng.randint(0, 9))) for _ in range(150)]
    elif kind == "templates":
        starts = ["a b c d e f g h", "a b c d i j k", "l m n", "", "o p q r s t u v w x y z"]
        texts = [" ".join([rng.choice(starts), *rng.choices(WORDS[:40], k=rng.randint(0, 3))]) for _ in range(150)]
    else:
        texts = [" ".join(word for word in WORDS[:130] if rng.random() < 0.75) for _ in range(80)]
    assert same(near_duplicate_clusters(texts, threshold), brute_force(texts, threshold))


def test_nothing_has_no_clusters():
    assert near_duplicate_clusters([], 0.7) == ()
    assert same(near_duplicate_clusters(["", "?!"], 0.7), [0, 0])


@pytest.mark.parametrize("start", ["tell me about", "please write a short funny poem in rhyme about the name"])
def test_the_number_of_prompts_costs_no_square(start):
    """Comparing every pair that shares a word took over a minute; so does one template that all prompts come from."""
    rng = random.Random(0)
    slots = 8 if start.startswith("tell") else 1
    texts = [" ".join([start, *rng.choices(WORDS[:400], k=slots), str(i)]) for i in range(50_000)]
    before = time.process_time()
    clusters = near_duplicate_clusters(texts, 0.7)
    assert time.process_time() - before < 20
    assert len(set(clusters)) == (50_000 if slots == 8 else 1)


def test_a_file_is_compared_once(tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "{p.text}"}}\n' for p in random_prompts(100, seed=1)))
    train = read_split(file, DataConfig(), Split.train)
    monkeypatch.setattr(near_duplicates._Sets, "connect", None)
    test = read_split(file, DataConfig(), Split.test)
    assert not {p.text for p in train} & {p.text for p in test}


def test_near_duplicates_share_a_split():
    prompts = random_prompts(300)
    twins = [prompt(f"t{i}", p.text.replace(p.text.split()[0], "changed")) for i, p in enumerate(prompts)]
    splits = assign_splits([*prompts, *twins], DataConfig())
    for original, twin in zip(prompts, twins, strict=True):
        assert splits[original.prompt_id] == splits[twin.prompt_id]
    assert set(splits.values()) == set(Split)


def test_fractions_are_about_right():
    # 2000 draws: the standard deviation of a share of 0.2 is 0.009, of 0.1 is 0.0067.
    splits = assign_splits(random_prompts(2000), DataConfig(validation_fraction=0.1, test_fraction=0.2))
    counts = Counter(splits.values())
    assert counts[Split.test] / 2000 == pytest.approx(0.2, abs=4 * 0.009)
    assert counts[Split.validation] / 2000 == pytest.approx(0.1, abs=4 * 0.0067)


def test_order_and_more_prompts_move_nothing():
    prompts = random_prompts(400)
    before = assign_splits(prompts[:200], DataConfig())
    after = assign_splits(prompts[::-1], DataConfig())
    assert {name: after[name] for name in before} == before
    assert assign_splits(prompts[:200], DataConfig()) == before


def test_ids_and_system_messages_do_not_matter():
    prompts = random_prompts(100)
    renamed = [
        Prompt(f"x{i}", ({"role": "system", "content": f"system {i}"}, *p.messages)) for i, p in enumerate(prompts)
    ]
    assert list(assign_splits(prompts, DataConfig()).values()) == list(assign_splits(renamed, DataConfig()).values())


def test_zero_fractions_mean_no_such_split():
    splits = assign_splits(random_prompts(50), DataConfig(validation_fraction=0, test_fraction=0))
    assert set(splits.values()) == {Split.train}


def test_too_few_prompts():
    with pytest.raises(UserError, match="1 prompts in 1 groups are too few to split: nothing falls into"):
        assign_splits(random_prompts(1), DataConfig())
    # Many prompts, but all the same.
    with pytest.raises(UserError, match="50 prompts in 1 groups are too few"):
        assign_splits([prompt(f"p{i}", BASE) for i in range(50)], DataConfig())


def test_leaks_in_given_splits_are_refused():
    prompts = [prompt("a", BASE), prompt("b", BASE.replace("house", "castle")), prompt("c", "something else")]
    check_no_leak(prompts, {"a": "train", "b": "train", "c": "test"}, 0.7)
    check_no_leak(prompts, {"a": "train", "b": "test", "c": "test"}, 0.95)
    with pytest.raises(UserError, match=r"both sides: a \(train\) and b \(test\); remove `split`"):
        check_no_leak(prompts, {"a": "train", "b": "test", "c": "test"}, 0.7)


def test_many_leaks_are_summarised():
    prompts = [prompt(f"p{i}", BASE) for i in range(9)]
    splits = defaultdict(lambda: "test", {"p0": "train"})
    with pytest.raises(UserError, match="and 5 more"):
        check_no_leak(prompts, splits, 0.7)


def test_own_splits_have_no_leak():
    prompts = [*random_prompts(200), prompt("x", BASE), prompt("y", BASE)]
    splits = {name: split.value for name, split in assign_splits(prompts, DataConfig()).items()}
    check_no_leak(prompts, splits, DataConfig().near_duplicate_threshold)
