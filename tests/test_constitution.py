"""Shipped constitutions load, and every kind of breakage names the file, the line and the key."""

import re

import pytest

from rlaif.config import LabelMode
from rlaif.constitution import check_mode, find_constitution, load_constitution
from rlaif.records import UserError, shipped

GOOD = """\
name: mine
version: 2
description: A test.
principles:
  - id: tone
    weight: 2
    question: Which is warmer?
    statement: The tone is
    verdicts:
      "yes": [warm, kind]
      "no": [cold]
  - id: length
    question: Which is shorter?
exemplars:
  - prompt: Hi
    first: Hello
    second: Go away
    preferred: first
    principle: tone
"""
SHIPPED = sorted(path.stem for path in shipped("constitutions").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_constitutions_load(name):
    constitution = load_constitution(name)
    assert constitution.name == name
    assert constitution.principles
    assert constitution.description
    # Each principle has exemplars that end with A and with B, or the position would give the answer away.
    for principle in constitution.principles:
        own = [exemplar for exemplar in constitution.exemplars if exemplar.principle == principle.id]
        assert {exemplar.preferred for exemplar in own} == {"first", "second"}, principle.id
    # Nor does the length.
    longer = [
        (len(shown.first) > len(shown.second)) == (shown.preferred == "first") for shown in constitution.exemplars
    ]
    assert 0.25 <= sum(longer) / len(longer) <= 0.75


def test_principles_without_exemplars_are_named(file):
    file.write_text(GOOD)
    constitution = load_constitution(str(file))
    check_mode(constitution, LabelMode.pairwise)
    with pytest.raises(UserError, match=r"constitution mine: labeling\.exemplars=true, and .* no exemplars: length$"):
        check_mode(constitution, LabelMode.pairwise, exemplars=True)


def test_the_promised_ones_are_shipped():
    assert {"harmless", "helpful", "honest", "summarize", "concise", "warm", "instruction_following"} <= set(SHIPPED)


def test_everything_is_read(file):
    file.write_text(GOOD)
    constitution = load_constitution(str(file))
    assert (constitution.name, constitution.version, constitution.description) == ("mine", "2", "A test.")
    tone, length = constitution.principles
    assert (tone.id, tone.weight, tone.statement) == ("tone", 2.0, "The tone is")
    assert (tone.yes, tone.no) == (("warm", "kind"), ("cold",))
    assert (length.weight, length.statement, length.yes) == (1.0, None, ())
    [exemplar] = constitution.exemplars
    assert (exemplar.preferred, exemplar.principle) == ("first", "tone")


@pytest.mark.parametrize(
    ("old", "new", "line", "part"),
    [
        # Keys of the file.
        ("name: mine", "nmae: mine", 1, "the file has an unknown key 'nmae'"),
        ("name: mine\n", "", 1, "the file has no 'name'"),
        ("name: mine", "name:", 1, "the file.name must be a non-empty text"),
        ("description: A test.", "description: [a]", 3, "the file.description must be a non-empty text"),
        ("version: 2", "version: true", 2, "the file.version must be a non-empty text"),
        ("version: 2", "name: again", 2, "key 'name' is given twice"),
        ("version: 2", "2: version", 2, "key 2 is not a text"),
        # Keys of a principle.
        (
            "    question: Which is warmer?",
            "    qestion: Which is warmer?",
            7,
            "principles[0] has an unknown key 'qest",
        ),
        ("    question: Which is warmer?\n", "", 5, "principles[0] has no 'question'"),
        ("question: Which is shorter?", "question: ' '", 13, "principles[1].question must be a non-empty text"),
        ("id: length", "id: tone", 12, "principle id 'tone' is used twice"),
        ("  - id: length\n    question: Which is shorter?", "  - length", 4, "principles[1] must be a mapping"),
        ("weight: 2", "weight: 0", 6, "principles[0].weight must be a number above 0, found 0"),
        ("weight: 2", "weight: -1.5", 6, "principles[0].weight must be a number above 0, found -1.5"),
        ("weight: 2", "weight: true", 6, "principles[0].weight must be a number above 0, found True"),
        ("weight: 2", "weight: heavy", 6, "principles[0].weight must be a number above 0, found 'heavy'"),
        ("weight: 2", "weight: .nan", 6, "principles[0].weight must be a number above 0, found nan"),
        ("weight: 2", "weight: .inf", 6, "principles[0].weight must be a number above 0, found inf"),
        ("weight: 2", "weight: 1\n    weight: 2", 7, "key 'weight' is given twice"),
        # Verdict words.
        ('"yes": [warm', "yes: [warm", 10, 'key True is not a text; quote it ("yes":, "no":)'),
        ('      "no": [cold]\n', "", 10, "principles[0].verdicts has no 'no'"),
        ("[cold]", "[]", 11, "principles[0].verdicts.no must be a non-empty list of words"),
        ("[cold]", "cold", 11, "principles[0].verdicts.no must be a non-empty list of words"),
        ("[cold]", "[very cold]", 11, "principles[0].verdicts.no: 'very cold' is not a single word"),
        ("[cold]", "[no]", 11, "principles[0].verdicts.no: False is not a single word (quote true, false, yes, no)"),
        ("[cold]", "[cold, warm]", 11, "principles[0].verdicts: warm stands under yes and no"),
        ('      "yes": [warm, kind]\n      "no": [cold]', "      words", 9, "principles[0].verdicts must be a mapping"),
        ("    statement: The tone is\n", "", 5, "principles[0] needs both statement and verdicts, or neither"),
        (
            '    verdicts:\n      "yes": [warm, kind]\n      "no": [cold]\n',
            "",
            5,
            "principles[0] needs both statement and verdicts, or neither",
        ),
        # Exemplars.
        ("principle: tone", "principle: tune", 19, "exemplars[0].principle 'tune' is not a principle id"),
        ("preferred: first", "preferred: third", 18, "exemplars[0].preferred must be first or second"),
        ("    preferred: first\n", "", 15, "exemplars[0] has no 'preferred'"),
        ("    second: Go away", "    second: Go away\n    third: x", 18, "exemplars[0] has an unknown key 'third'"),
        # YAML itself.
        ("id: tone", "id: [tone", 6, "expected ',' or ']', but got ':'"),
        ("description: A test.", "description: a: b", 3, "mapping values are not allowed here"),
        ("version: 2", "\tversion: 2", 2, "cannot start any token"),
        ("id: tone", "id: !!python/object:os.system {}", 5, "could not determine a constructor"),
        ("id: tone", "id: *nothing", 5, "found undefined alias"),
    ],
)
def test_breakage_is_named(file, old, new, line, part):
    assert GOOD.count(old) == 1
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_constitution(str(file))
    message = str(caught.value)
    assert message.startswith(f"{file}, line {line}: ")
    assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "just text", "- a\n- b\n", "3"])
def test_a_file_that_is_not_a_mapping(file, text):
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{file}, line 1: expected a mapping with name")):
        load_constitution(str(file))


@pytest.mark.parametrize("entries", ["[]", "", "text", "{id: a}"])
def test_principles_must_be_a_list(file, entries):
    file.write_text(f"name: n\nversion: v\ndescription: d\nprinciples: {entries}\n")
    with pytest.raises(UserError, match="line 4: principles must be a non-empty list"):
        load_constitution(str(file))


def test_the_texts_of_a_contrast_come_in_pairs(file):
    file.write_text(GOOD + "    encourage: Be warm.\n")
    with pytest.raises(UserError, match="unknown key 'encourage'"):
        load_constitution(str(file))
    good = GOOD.replace("    question: Which is shorter?", "    question: Which is shorter?\n    encourage: Be brief.")
    file.write_text(good)
    with pytest.raises(UserError, match=r"line 12: principles\[1\] needs both encourage and discourage, or neither"):
        load_constitution(str(file))
    file.write_text(good.replace("    encourage: Be brief.", "    encourage: Be brief.\n    discourage: Go on."))
    tone, length = load_constitution(str(file)).principles
    assert (tone.encourage, length.encourage, length.discourage) == (None, "Be brief.", "Go on.")


def test_exemplars_must_be_a_list(file):
    file.write_text(GOOD.split("exemplars:")[0] + "exemplars: {a: b}\n")
    with pytest.raises(UserError, match="line 14: exemplars must be a list"):
        load_constitution(str(file))


@pytest.mark.parametrize(
    "content",
    [
        b"name: caf\xe9\n",
        b"name: a\x07b\n",
        # A date that does not exist.
        b"version: 2024-13-45\n",
    ],
)
def test_unreadable_content_is_one_line(file, content):
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_constitution(str(file))
    assert str(caught.value).startswith(f"{file}: cannot be read (")
    assert "\n" not in str(caught.value)


def test_unknown_name_lists_what_is_shipped():
    with pytest.raises(UserError) as caught:
        find_constitution("harmles")
    assert f"constitution=harmles: no such constitution. Shipped: {', '.join(SHIPPED)}" in str(caught.value)


def test_missing_file_and_missing_setting():
    with pytest.raises(UserError, match=r"constitution=none/such\.yaml: no such file"):
        find_constitution("none/such.yaml")
    for nothing in (None, ""):
        with pytest.raises(UserError, match="constitution is not set"):
            find_constitution(nothing)
