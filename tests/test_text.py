# ruff: noqa: RUF001
"""Words, near-duplicates and lengths where a script puts no spaces between words."""

import random
import time
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.gold import gold_score
from rlaif.near_duplicates import near_duplicate_clusters
from rlaif.text import count_words, words_of

# Two questions that differ by a word, and another one.
TRIPLES = {
    "Chinese": ("怎么做红烧肉", "怎样做红烧肉", "推荐几本书给初学者"),
    "Chinese with a comma": (
        "我下周去北京出差，请帮我列一个行李清单。",
        "我下周去上海出差，请帮我列一个行李清单。",
        "请帮我写一封给老师的感谢信，语气要诚恳。",
    ),
    "Chinese with English": (
        "请用Python写一个读取CSV文件的函数",
        "请用Python写一个读取JSON文件的函数",
        "Python里的列表和元组有什么区别",
    ),
    "Japanese": ("東京の天気を教えてください", "大阪の天気を教えてください", "犬と猫はどちらが飼いやすいですか"),
    "Thai": (
        "ช่วยเขียนอีเมลลาป่วยถึงหัวหน้าให้หน่อยได้ไหมครับ",
        "ช่วยเขียนอีเมลลากิจถึงหัวหน้าให้หน่อยได้ไหมครับ",
        "แนะนำร้านอาหารอร่อยแถวสยามที่เปิดตอนกลางคืน",
    ),
    "Lao": (
        "ກະລຸນາຊ່ວຍຂຽນຈົດໝາຍຂໍລາພັກເຖິງຫົວໜ້າຂອງຂ້ອຍ",
        "ກະລຸນາຊ່ວຍຂຽນຈົດໝາຍຂໍລາອອກເຖິງຫົວໜ້າຂອງຂ້ອຍ",
        "ຮ້ານອາຫານໃດໃນວຽງຈັນທີ່ແຊບແລະລາຄາຖືກ",
    ),
    "Khmer": (
        "សូមជួយសរសេរសំបុត្រសុំច្បាប់ឈប់សម្រាកទៅកាន់នាយករបស់ខ្ញុំ",
        "សូមជួយសរសេរសំបុត្រសុំច្បាប់ឈប់សម្រាកទៅកាន់គ្រូរបស់ខ្ញុំ",
        "តើភោជនីយដ្ឋានណានៅភ្នំពេញឆ្ងាញ់ជាងគេ",
    ),
    "Burmese": (
        "ကျွန်တော့်ဆရာထံသို့ခွင့်တိုင်စာတစ်စောင်ရေးပေးပါ",
        "ကျွန်တော့်သူဌေးထံသို့ခွင့်တိုင်စာတစ်စောင်ရေးပေးပါ",
        "ရန်ကုန်မှာဘယ်စားသောက်ဆိုင်ကအကောင်းဆုံးလဲ",
    ),
}


@pytest.mark.parametrize("language", TRIPLES)
def test_one_changed_word_is_a_near_duplicate_in_every_script(language: str) -> None:
    one, other, different = near_duplicate_clusters(TRIPLES[language], 0.7)
    assert one == other != different


def test_long_texts_in_the_same_characters_are_no_near_duplicates() -> None:
    """Of 20,000 characters two thirds and more are in every other text of that length."""
    rng = random.Random(0)
    for alphabet, length in ((range(0x4E00, 0x4E00 + 1500), 20_000), (range(0x0E01, 0x0E2F), 2_000)):
        characters = [chr(code) for code in alphabet]
        weights = [1 / (rank + 10) for rank in range(len(characters))]
        texts = ["".join(rng.choices(characters, weights, k=length)) for _ in range(5)]
        assert len(set(texts[0]) & set(texts[1])) / len(set(texts[0]) | set(texts[1])) > 0.7
        assert len(set(near_duplicate_clusters(texts, 0.3))) == 5
        changed = texts[0][: length // 2] + texts[1][:5] + texts[0][length // 2 + 5 :]
        assert len(set(near_duplicate_clusters([texts[0], changed], 0.7))) == 1


def test_words_by_hand() -> None:
    assert words_of("Hello, World_1!") == ["hello", "world_1"]
    # The second 好 counts with what follows it.
    assert words_of("好人好事多") == ["好", "人", "好事多", "事", "多"]
    assert words_of("用Python3写") == ["用", "python3", "写"]
    assert words_of("") == []


@pytest.mark.parametrize(
    "change",
    [
        lambda text: f"{text}.",
        lambda text: "\u200b".join(text),
        lambda text: "\u00ad".join(text),
        lambda text: f"\ufeff{text}\u200e",
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
        lambda text: text.upper(),
    ],
    ids=["stop", "zero width", "soft hyphens", "marks of order", "decomposed", "full width", "capitals"],
)
def test_what_looks_the_same_is_the_same(change: Callable[[str], str]) -> None:
    for text in ("Où est le café, s'il vous plaît", "How do I bake bread", "मुझे एक अच्छी कहानी सुनाओ", "怎么做红烧肉"):
        assert words_of(change(text)) == words_of(text)


def test_combining_marks_break_no_word() -> None:
    assert words_of("मुझे एक अच्छी कहानी सुनाओ") == ["मुझे", "एक", "अच्छी", "कहानी", "सुनाओ"]
    assert words_of("எனக்கு ஒரு கதை சொல்") == ["எனக்கு", "ஒரு", "கதை", "சொல்"]
    # Each language has some forty consonants, which long texts share.
    rng = random.Random(0)
    letters, vowels = [chr(code) for code in range(0x915, 0x93A)], [chr(code) for code in range(0x93E, 0x94D)]
    words = ["".join(rng.choice(letters) + rng.choice(vowels) for _ in range(3)) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=40)) for _ in range(20)]
    assert len(set(near_duplicate_clusters(texts, 0.7))) == 20


def test_emoji_are_compared_where_there_are_no_words() -> None:
    texts = ["\U0001f600" * 3, "\U0001f600!", "\U0001f621", "?", "", " "]
    assert [near_duplicate_clusters(texts, 0.7).index(cluster) for cluster in near_duplicate_clusters(texts, 0.7)] == [
        *(0, 0, 2),
        *(3, 3, 3),
    ]


mixed = st.lists(st.sampled_from(["红", "烧", "肉", "の", "ด", "a", "bc", " ", "。", "d e"]), max_size=9).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(mixed, max_size=10), st.sampled_from([0.2, 0.5, 0.7, 1.0]))
def test_clusters_of_mixed_texts_equal_brute_force(texts: list[str], threshold: float) -> None:
    sets = [set(words_of(text)) for text in texts]
    cluster = list(range(len(sets)))
    for i, one in enumerate(sets):
        for j, other in enumerate(sets[:i]):
            if len(one & other) >= (threshold - 1e-9) * len(one | other):
                cluster = [cluster[j] if value == cluster[i] else value for value in cluster]
    found = near_duplicate_clusters(texts, threshold)
    assert len(set(found)) == len(set(cluster)) == len(set(zip(found, cluster, strict=True)))


def test_many_chinese_prompts_cost_no_square() -> None:
    rng = random.Random(0)
    topics = [chr(code) for code in range(0x4E00, 0x4E00 + 800)]
    texts = [f"请给我讲一讲{''.join(rng.choices(topics, k=12))}的故事{i}" for i in range(20_000)]
    before = time.process_time()
    clusters = near_duplicate_clusters(texts, 0.7)
    assert time.process_time() - before < 10
    assert len(set(clusters)) > 19_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one  two\nthree - four", 5),
        ("", 0),
        ("你好，世界。", 4),
        ("用 Python 写 code", 4),
        ("用Python写code吧", 5),
        ("こんにちは", 5),
        # Seven consonants; three vowel signs stand above them.
        ("สวัสดีครับ", 7),
        ("你好 - hello", 4),
    ],
)
def test_lengths_by_hand(text: str, words: int) -> None:
    assert count_words(text) == words
    assert gold_score("length", text) == words
    assert gold_score("brevity", text) == -words
