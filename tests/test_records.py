"""Files are read and written exactly, and a broken line is named."""

import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.records import (
    Candidates,
    Completion,
    Label,
    Prompt,
    UserError,
    atomic_file,
    bounded_examples,
    content_hash,
    existing_dir,
    existing_file,
    iterate_candidates,
    parse_messages,
    read_json,
    read_prompts,
    write_json,
    write_jsonl,
)

GOOD = '{"prompt": "hello"}\n'


def read_candidates(path):
    return list(iterate_candidates(path))


def error_of(read, path):
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not valid JSON"),
        ("{'prompt': 1}", "not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("1" * 5000, "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected a JSON object, found a list"),
        ("null", "expected a JSON object, found null"),
        ('"text"', "expected a JSON object, found a text"),
        ("{}", 'has no "prompt" (found: nothing)'),
        ('{"text": "x", "id": 1}', 'has no "prompt" (found: id, text)'),
        ('{"prompt": ""}', "prompt is empty"),
        ('{"prompt": " \\n"}', "prompt is empty"),
        ('{"prompt": 3}', "prompt must be a text or a list of messages, found a number"),
        ('{"prompt": true}', "found true/false"),
        ('{"prompt": null}', "found null"),
        ('{"prompt": []}', "prompt is an empty list"),
        ('{"prompt": ["hi"]}', 'prompt[0] must be an object with "role" and "content"'),
        ('{"prompt": [{"role": "user"}]}', 'prompt[0] must be an object with "role" and "content"'),
        ('{"prompt": [{"role": "human", "content": "x"}]}', "prompt[0].role is 'human', expected one of system, user"),
        ('{"prompt": [{"role": ["user"], "content": "x"}]}', "expected one of system, user, assistant"),
        ('{"prompt": [{"role": "user", "content": 1}]}', "prompt[0].content must be a text, found a number"),
        ('{"prompt": [{"role": "user", "content": ""}]}', "prompt[0].content is empty"),
        (
            '{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "prompt must end with a user turn, ends with assistant",
        ),
        (
            '{"prompt": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
            "prompt[1]: a system message must come first",
        ),
        ('{"prompt": "x", "prompt_id": ""}', '"prompt_id" must be a non-empty text or a number'),
        ('{"prompt": "x", "prompt_id": false}', '"prompt_id" must be a non-empty text or a number'),
        ('{"prompt": "x", "prompt_id": [1]}', '"prompt_id" must be a non-empty text or a number'),
    ],
)
def test_broken_prompt_lines_are_named(tmp_path, line, part):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    message = error_of(read_prompts, file)
    assert f"{file}, line 3: " in message
    assert part in message


def test_duplicate_ids(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "prompt_id": 1}\n{"prompt": "b", "id": "1"}\n')
    assert "line 2: prompt_id '1' was used on an earlier line" in error_of(read_prompts, file)
    # Without ids the text is the id, so the same prompt twice is a duplicate as well.
    file.write_text(GOOD + GOOD)
    assert "line 2: prompt_id" in error_of(read_prompts, file)


def test_prompts_without_ids_get_stable_ones(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c", "prompt_id": 0}\n')
    first, second, third = read_prompts(file)
    assert first.prompt_id == content_hash(({"role": "user", "content": "a"},))
    assert first.prompt_id != second.prompt_id
    assert third.prompt_id == "0"
    assert first.messages == ({"role": "user", "content": "a"},)


def test_text_leaves_the_system_message_out():
    prompt = Prompt("1", parse_messages([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]))
    assert prompt.text == "u"


def test_empty_files(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("\n \n")
    assert "has no prompts" in error_of(read_prompts, file)
    assert "has no candidates" in error_of(read_candidates, file)


def test_gzip(tmp_path):
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress(GOOD.encode()))
    assert len(read_prompts(file)) == 1
    file.write_bytes(GOOD.encode())
    assert "cannot be read" in error_of(read_prompts, file)
    whole = gzip.compress("".join(f'{{"prompt": "{content_hash(i)}"}}\n' for i in range(200)).encode())
    file.write_bytes(whole[:-30])
    assert "cannot be read" in error_of(read_prompts, file)
    # A header of 10 bytes, then a block of a type that does not exist.
    file.write_bytes(whole[:10] + b"\x07" + whole[11:])
    assert "cannot be read" in error_of(read_prompts, file)


def test_encodings(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert len(read_prompts(file)) == 1
    file.write_bytes(GOOD.encode() + '{"prompt": "caf\xe9"}\n'.encode("latin-1"))
    assert "not UTF-8" in error_of(read_prompts, file)
    file.write_bytes(GOOD.encode("utf-16"))
    assert "not UTF-8" in error_of(read_prompts, file)
    file.write_bytes(GOOD.replace("\n", "\r\n").encode())
    assert len(read_prompts(file)) == 1


def test_unreadable_path(tmp_path):
    assert "cannot be read" in error_of(read_prompts, tmp_path / "none.jsonl")


def test_completions_of_ones_own(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "q", "completions": ["one", "two"]}\n')
    [line] = read_candidates(file)
    assert [(c.candidate_id, c.completion) for c in line.candidates] == [("c0", "one"), ("c1", "two")]
    assert line.split is None


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, 'has no "candidates" (objects) or "completions" (texts) list'),
        ({"completions": "one"}, 'has no "candidates"'),
        ({"completions": []}, "has 0 completion(s); a preference needs at least 2"),
        ({"completions": ["one"]}, "has 1 completion(s)"),
        ({"completions": ["one", " "]}, "completions[1] is empty"),
        ({"completions": ["one", 2]}, "candidates[1] must be an object, found a number"),
        ({"candidates": [{"completion": "a"}, {"text": "b"}]}, 'candidates[1] has no "completion" text'),
        ({"candidates": [{"completion": "a"}, {"completion": None}]}, 'candidates[1] has no "completion" text'),
        (
            {"candidates": [{"completion": "a", "candidate_id": "x"}, {"completion": "b", "candidate_id": "x"}]},
            "candidate ids repeat: x, x",
        ),
    ],
)
def test_broken_candidates_are_named(tmp_path, fields, part):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"prompt": "q", **fields}) + "\n")
    message = error_of(read_candidates, file)
    assert f"{file}, line 1: " in message
    assert part in message


def test_an_empty_sampled_completion_is_legitimate(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "q", "candidates": [{"completion": ""}, {"completion": "b"}]}\n')
    assert read_candidates(file)[0].candidates[0].completion == ""


def test_candidates_roundtrip(tmp_path):
    lines = [
        Candidates(
            Prompt("p1", ({"role": "system", "content": "s"}, {"role": "user", "content": "ü\u2028\n"})),
            (
                Completion("a", "x", "m", "warm", "be warm", 0.0, 0, "stop", 0),
                Completion("b", ""),
            ),
            "test",
        ),
        Candidates(Prompt("p2", ({"role": "user", "content": "q"},)), (Completion("a", "x"), Completion("b", "y"))),
    ]
    file = tmp_path / "new" / "candidates.jsonl"
    write_jsonl(file, (line.to_json() for line in lines))
    assert read_candidates(file) == lines


# Lone surrogates have a test of their own: two of them side by side are one character in JSON.
text = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(text.filter(str.strip), min_size=1, max_size=5, unique=True))
def test_any_text_roundtrips(contents):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "x.jsonl"
        write_jsonl(file, ({"prompt": content, "prompt_id": n} for n, content in enumerate(contents)))
        assert [prompt.messages[0]["content"] for prompt in read_prompts(file)] == contents


def test_half_of_a_surrogate_pair_is_replaced(tmp_path):
    # JSON from other tools may hold one: text that was cut in the middle of an emoji. No tokenizer takes it.
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "cut \\ud83d, whole \\ud83d\\ude00"}\n')
    [prompt] = read_prompts(file)
    assert prompt.messages[0]["content"] == "cut \ufffd, whole \U0001f600"


def test_label_names_its_probability_by_mode():
    pair = Label("p", "pairwise", "k", "l", "logprob", 0.25, first="a", second="b").to_json()
    assert pair["p_first"] == 0.25
    assert "score" not in pair
    point = Label("p", "pointwise", "k", "l", "none", None, reason="timeout", candidate="a").to_json()
    assert point["score"] is None
    assert point["reason"] == "timeout"
    assert "p_first" not in point
    rated = Label("p", "score", "k", "l", "logprob", candidate="a", score=1.75, probs=(0.25, 0.75)).to_json()
    assert (rated["score"], rated["probs"]) == (1.75, (0.25, 0.75))
    ranked = Label("p", "listwise", "k", "l", "none", reason="timeout", order=("b", "a")).to_json()
    assert (ranked["order"], ranked["probs"], ranked["reason"]) == (("b", "a"), None, "timeout")
    assert "score" not in ranked
    contrast = Label("p", "contrastive", "k", "l", "logprob", candidate="a", score=-3.5).to_json()
    assert (contrast["score"], "probs" in contrast) == (-3.5, False)


def test_atomic_file_keeps_the_old_file_on_error(tmp_path):
    file = tmp_path / "x.txt"

    def write(fail):
        with atomic_file(file) as out:
            out.write("new")
            if fail:
                raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write(fail=True)
    assert list(tmp_path.iterdir()) == []
    file.write_text("old")
    with pytest.raises(RuntimeError):
        write(fail=True)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    write(fail=False)
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_write_jsonl_leaves_nothing_when_a_line_cannot_be_written(tmp_path):
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "x.jsonl", [{"a": 1}, {"a": object()}])
    assert list(tmp_path.iterdir()) == []


def test_read_json(tmp_path):
    file = tmp_path / "x.json"
    assert "cannot be read" in error_of(read_json, file)
    file.write_text('{\n"a": }')
    assert "not valid JSON (line 2" in error_of(read_json, file)
    write_json(file, {"ü": [1, Path("x")]})
    assert read_json(file) == {"ü": [1, "x"]}


def test_existing_paths(tmp_path):
    file = tmp_path / "x"
    for check, missing in ((existing_file, "=FILE"), (existing_dir, "=DIR")):
        with pytest.raises(UserError, match=f"candidates is not set: give candidates{missing}"):
            check(None, "candidates")
        with pytest.raises(UserError, match=f"candidates={file}: no such"):
            check(file, "candidates")
    with pytest.raises(UserError, match="is a folder, expected a file"):
        existing_file(tmp_path, "candidates")
    (tmp_path / "candidates.jsonl").touch()
    with pytest.raises(UserError, match=r"expected a file; give .*/candidates\.jsonl$"):
        existing_file(tmp_path, "candidates")
    file.touch()
    with pytest.raises(UserError, match="no such folder"):
        existing_dir(file, "preferences")
    assert existing_file(str(file), "candidates") == file
    assert existing_dir(tmp_path, "preferences") == tmp_path


def test_bounded_examples():
    assert bounded_examples(["a", "b"], 2) == "a, b"
    assert bounded_examples(list("abcdefg"), 3) == "a, b, c and 4 more"


def test_content_hash_is_stable_and_tells_parts_apart():
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert content_hash("\ud800") != content_hash("\ud801")


@pytest.mark.parametrize(
    "label",
    [
        Label("p", "pairwise", "k", "l", "logprob", 0.25, None, 0.9, first="a", second="b", reply="A", prompt_tokens=3),
        Label("p", "pairwise", "k", "l", "none", None, "timeout", first="a", second="b"),
        Label("p", "pointwise", "k", "l", "logprob", 1.0, candidate="a"),
        Label("p", "pointwise", "k", "l", "none", None, "timeout", candidate="a"),
        Label("p", "score", "k", "l", "logprob", candidate="a", score=2.5, probs=(1 / 9,) * 9, truncated=True),
        Label("p", "listwise", "k", "l", "logprob", order=("a", "b"), probs=(0.25, 0.75)),
        Label("p", "listwise", "k", "l", "none", None, "timeout", order=("a", "b")),
        Label("p", "contrastive", "k", "l", "logprob", candidate="a", score=-3.5),
    ],
)
def test_labels_roundtrip(label):
    assert Label.from_json(json.loads(json.dumps(label.to_json()))) == label


@pytest.mark.parametrize("line", [{"p_first": 2, "mode": "pairwise"}, {"score": True, "mode": "pointwise"}, {}])
def test_what_is_not_a_label(line):
    with pytest.raises(ValueError, match=r"must be between 0 and 1|not a label"):
        Label.from_json(line)
