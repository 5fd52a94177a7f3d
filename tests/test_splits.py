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
from rlaif.splits import assign_splits, check_no_leak, read_split, read_splits

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


def counts(prompts, **data):
    splits = Counter(assign_splits(prompts, DataConfig(**data)).values())
    return tuple(splits[split] for split in (Split.train, Split.validation, Split.test))


def test_few_prompts_are_split_exactly():
    """Each its own cluster; of 10 and 40 a coin for each often left a split empty."""
    for seed in range(20):
        assert counts(random_prompts(40, seed)) == (28, 4, 8)
        assert counts(random_prompts(10, seed)) == (7, 1, 2)
        assert counts(random_prompts(3, seed)) == (1, 1, 1)
        assert counts(random_prompts(10, seed), validation_fraction=0.0) == (8, 0, 2)
        assert counts(random_prompts(10, seed), validation_fraction=0.01, test_fraction=0.98) == (1, 1, 8)
    assert counts(random_prompts(5)) == (3, 1, 1)


def test_many_prompts_have_their_shares_within_a_tenth():
    for seed in range(10):
        train, validation, test = counts(random_prompts(400, seed))
        assert 72 <= test <= 88
        assert 36 <= validation <= 44
        assert train + validation + test == 400


def test_one_and_two_prompts_train(caplog):
    assert counts(random_prompts(1)) == (1, 0, 0)
    assert counts(random_prompts(2)) == (1, 0, 1)
    # Many prompts, but all the same.
    assert counts([prompt(f"p{i}", BASE) for i in range(50)]) == (50, 0, 0)
    assert "50 prompts in 1 groups of near-duplicates, which stay together: nothing falls into validation, test" in (
        caplog.text
    )


def test_order_moves_nothing():
    prompts = random_prompts(41)
    assert assign_splits(prompts[::-1], DataConfig()) == assign_splits(prompts, DataConfig())


def moved(before, after):
    return sum(after[name] is not split for name, split in before.items())


def test_more_prompts_move_few_where_prompts_are_few_and_none_where_they_are_many():
    prompts = random_prompts(2200)
    for n in (20, 40, 80):
        before = assign_splits(prompts[:n], DataConfig())
        assert moved(before, assign_splits(prompts[: n + 1], DataConfig())) <= 2
        assert moved(before, assign_splits(prompts[: 2 * n], DataConfig())) <= max(3, n / 10)
    large = assign_splits(prompts[:1100], DataConfig())
    assert moved(large, assign_splits(prompts, DataConfig())) == 0
    assert moved(assign_splits(prompts[1100:], DataConfig()), assign_splits(prompts, DataConfig())) == 0


def test_fewer_of_the_same_file_are_split_alike(tmp_path):
    """``max_prompts`` of one stage and not of another must put nothing that was trained on into the test split."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "{p.text}"}}\n' for p in random_prompts(90)))
    whole, splits = read_splits(file, DataConfig())
    assert len(whole) == 90
    for most in (1, 2, 3, 10, 25, 89, 90, 200):
        some, same_splits = read_splits(file, DataConfig(max_prompts=most))
        assert len(some) == min(most, 90)
        assert same_splits == splits
        places = [whole.index(one) for one in some]
        assert places == sorted(places)
        found = Counter(splits[one.prompt_id] for one in some)
        assert found[Split.train] >= 1
        if most >= 3:
            for split in Split:
                assert found[split] == pytest.approx(len(some) * Counter(splits.values())[split] / 90, abs=1.1)
                assert read_split(file, DataConfig(max_prompts=most), split) == [
                    one for one in some if splits[one.prompt_id] is split
                ]


def test_a_split_without_prompts_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "{BASE}"}}\n{{"prompt": "{BASE}!"}}\n')
    assert len(read_split(file, DataConfig(), Split.train)) == 2
    with pytest.raises(UserError, match="no prompt falls into the test split: 2 prompts make 1 groups of near-dup"):
        read_split(file, DataConfig(), Split.test)


def test_ids_and_system_messages_do_not_matter():
    prompts = random_prompts(100)
    renamed = [
        Prompt(f"x{i}", ({"role": "system", "content": f"system {i}"}, *p.messages)) for i, p in enumerate(prompts)
    ]
    assert list(assign_splits(prompts, DataConfig()).values()) == list(assign_splits(renamed, DataConfig()).values())


def test_zero_fractions_mean_no_such_split():
    splits = assign_splits(random_prompts(50), DataConfig(validation_fraction=0, test_fraction=0))
    assert set(splits.values()) == {Split.train}


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
