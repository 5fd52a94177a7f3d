"""What was stored stays stored."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from typing import get_args

import pytest

from rlaif.engines.base import Failure, Likelihood, OptionMass, Sampled
from rlaif.labeling.store import Failures, VerdictStore
from rlaif.labeling.verdicts import Answer
from rlaif.records import UserError

KINDS = [
    OptionMass((0.1, None), "logprob", prompt_tokens=3, latency_s=0.5, observed=0.0),
    OptionMass((1.0, 0.0), "text", reply="A, \ud800 ü", completion_tokens=1, replies=1),
    Sampled("", "stop", 0),
    Likelihood(-3.0, 4),
    Failure("content_filter", "refused"),
]
ANSWERS = {
    str(number): json.loads(json.dumps({name: field for name, field in vars(answer).items() if field is not None}))
    for number, answer in enumerate(KINDS)
} | {"revision": ["text", "length", 9]}
"""One of each kind that is stored, as labeling and revising store them."""


def test_put_and_get(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as store:
        store.put("a", {"masses": [0.1, None], "reply": "ü \ud800"})
        store.put("b", 1)
        assert store.get(["b", "a", "c"]) == {"a": {"masses": [0.1, None], "reply": "ü \ud800"}, "b": 1}
        store.put("b", 2)
        assert store.get(["b"]) == {"b": 2}
        assert store.get([]) == {}


def test_survives_reopening_and_leaves_one_file(tmp_path):
    assert {type(answer) for answer in KINDS} == set(get_args(Answer))
    with VerdictStore(tmp_path / "s.sqlite") as store:
        for name, answer in ANSWERS.items():
            store.put(name, answer)
    assert [file.name for file in tmp_path.iterdir()] == ["s.sqlite"]
    with VerdictStore(tmp_path / "s.sqlite") as store:
        assert store.get(iter(ANSWERS)) == ANSWERS


def test_many_keys(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as store:
        for number in range(1203):
            store.put(str(number), number)
        assert store.get(map(str, range(2000))) == {str(number): number for number in range(1203)}


def test_a_put_is_there_for_others_when_it_returns(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as store, VerdictStore(tmp_path / "s.sqlite") as other:
        store.put("a", 1)
        assert other.get(["a"]) == {"a": 1}


def test_what_is_put_together_is_there_for_others_once_committed(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as store, VerdictStore(tmp_path / "s.sqlite") as other:
        store.put("a", 1, together=True)
        store.put("b", 2, together=True)
        store.finish("line")
        assert (other.get(["a", "b"]), other.is_finished("line")) == ({}, False)
        store.commit()
        assert (other.get(["a", "b"]), other.is_finished("line")) == ({"a": 1, "b": 2}, True)
        store.commit()
        store.put("e", 5, together=True)
        assert store.get(["e"]) == {"e": 5}
        store.put("c", 3)
        assert other.get(["c"]) == {"c": 3}
    with VerdictStore(tmp_path / "s.sqlite") as store:
        store.put("d", ANSWERS["1"], together=True)
    with VerdictStore(tmp_path / "s.sqlite") as store:
        assert store.get(["d"]) == {"d": ANSWERS["1"]}


@pytest.mark.parametrize("problem", [KeyboardInterrupt, UserError])
def test_a_commit_that_was_cut_short_can_be_made_again(tmp_path, monkeypatch, problem):
    with VerdictStore(tmp_path / "s.sqlite") as store, VerdictStore(tmp_path / "s.sqlite") as other:
        store.put("a", 1, together=True)
        store.finish("line")
        write = store._write

        def cut(statement, rows=None):
            write(statement, rows)
            if rows:
                raise problem

        monkeypatch.setattr(store, "_write", cut)
        with pytest.raises(problem):
            store.commit()
        monkeypatch.undo()
        store.spend([9])
        assert (other.get(["a"]), other.is_finished("line"), other.spent()) == ({}, False, [9])
        store.commit()
        assert (other.get(["a"]), other.is_finished("line")) == ({"a": 1}, True)


WRITER = """
import sys
from pathlib import Path
from rlaif.labeling.store import VerdictStore
store = VerdictStore(Path(sys.argv[1]))
for number in range(10**9):
    store.put(str(number), ["text", "stop", number])
    print(number, flush=True)
"""


def test_a_killed_writer_loses_nothing(tmp_path):
    path = tmp_path / "s.sqlite"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as writer:
        returned = [int(writer.stdout.readline()) for _ in range(300)]
        writer.send_signal(signal.SIGKILL)
        # The last line may have been cut.
        returned += [int(line) for line in writer.stdout if line.endswith("\n")]
    assert writer.returncode == -signal.SIGKILL
    with VerdictStore(path) as store:
        assert store.get(map(str, returned)) == {str(number): ["text", "stop", number] for number in returned}
        store.put("after", 1)
        assert store.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


NOTER = """
import contextlib, sys, threading
from pathlib import Path
from rlaif.labeling.store import VerdictStore
from rlaif.records import UserError
noted = []
def note(store):
    with contextlib.suppress(UserError):
        for number in range(200):
            store.set_aside([number])
            noted[:] = [number]
for number in range(30):
    path = Path(sys.argv[1]) / f"{number}.sqlite"
    store = VerdictStore(path)
    store.set_aside([0])
    noted[:] = [0]
    thread = threading.Thread(target=note, args=(store,))
    thread.start()
    store.close()
    thread.join()
    with VerdictStore(path) as again:
        assert again.spent() == noted
"""


def test_a_store_may_be_closed_while_another_thread_notes_what_it_spends(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", NOTER, str(tmp_path)], env=environment, timeout=60)
    assert result.returncode == 0


def test_a_closed_store_takes_no_note(tmp_path):
    store = VerdictStore(tmp_path / "s.sqlite")
    store.close()
    with pytest.raises(UserError, match=r"what may be spent cannot be noted \(the store is closed\)"):
        store.set_aside([1])
    assert [path.name for path in tmp_path.iterdir()] == ["s.sqlite"]


def test_a_store_that_cannot_be_written(tmp_path):
    path = tmp_path / "s.sqlite"
    with VerdictStore(path) as store:
        store.put("a", 1)
        # Also what a full disk looks like from here: the statement fails.
        store.connection.execute("PRAGMA query_only=ON")
        with pytest.raises(UserError, match=r"s.sqlite: a verdict cannot be stored \(attempt to write a readonly"):
            store.put("b", 2)
        assert store.get(["a", "b"]) == {"a": 1}


def test_a_full_disk(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as store:
        store.put("a", 1)
        pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
        store.connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(UserError, match="a verdict cannot be stored"):
            store.put("b", "x" * 100_000)
        assert store.get(["a", "b"]) == {"a": 1}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file(tmp_path):
    path = tmp_path / "s.sqlite"
    VerdictStore(path).close()
    path.chmod(0o400)
    with pytest.raises(UserError, match=r"s\.sqlite"), VerdictStore(path) as store:
        store.put("a", 1)


@pytest.mark.parametrize("make", ["folder", "missing parent"])
def test_a_store_that_cannot_be_opened(tmp_path, make):
    path = tmp_path / "s.sqlite"
    if make == "folder":
        path.mkdir()
    else:
        path = tmp_path / "none" / "s.sqlite"
    with pytest.raises(UserError, match="the label store cannot be opened"):
        VerdictStore(path)


def test_the_file_is_plain_sqlite(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as store:
        store.put("a", {"b": 1})
    connection = sqlite3.connect(tmp_path / "s.sqlite")
    assert connection.execute("SELECT key, value FROM verdicts").fetchall() == [("a", '{"b": 1}')]
    connection.close()


def test_a_store_that_breaks_while_it_is_read(tmp_path):
    """One clear line, whatever is read."""
    path = tmp_path / "s.sqlite"
    filled(path)
    store = VerdictStore(path)
    store.connection.execute("PRAGMA shrink_memory")
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    for read in (lambda: store.get(["00007"]), lambda: store.is_finished("7"), store.spent):
        with pytest.raises(UserError, match=r"s\.sqlite: the label store cannot be read .* run the same command again"):
            read()


def filled(path, count=2000):
    """A store with many answers, closed; they are what is returned."""
    answers = {f"{number:05}": [f"text {number}", "stop", number] for number in range(count)}
    with VerdictStore(path) as store:
        for key, answer in answers.items():
            store.put(key, answer, together=True)
        store.commit()
        store.finish("line")
        store.spend([7, 8, 9, 0.5])
    return answers


@pytest.mark.parametrize("damage", ["middle", "cut", "text", "empty"])
def test_what_can_be_read_of_a_damaged_store_is_kept(tmp_path, caplog, damage):
    path = tmp_path / "s.sqlite"
    answers = filled(path)
    whole = path.read_bytes()
    half = len(whole) // 8192 * 4096
    broken = {
        "middle": whole[:half] + b"\xff" * 8192 + whole[half + 8192 :],
        "cut": whole[:half],
        "text": b"not a database " * 100,
        "empty": b"",
    }[damage]
    path.write_bytes(broken)
    for _ in range(2):
        with VerdictStore(path) as store:
            found = store.get(answers)
            assert found.items() <= answers.items()
            assert store.is_finished("line") is False
            assert (store.spent() == [7, 8, 9, 0.5]) == (damage in ("middle", "cut"))
    assert {"middle": 1000, "cut": 500, "text": 0, "empty": 0}[damage] <= len(found) < 2000
    if damage == "empty":
        # To SQLite that is a new file.
        assert caplog.messages == []
        return
    assert (tmp_path / "s.sqlite.damaged").read_bytes() == broken
    [message] = caplog.messages
    assert f"is kept as s.sqlite.damaged; {len(found)} verdicts could be read from it, the others are asked" in message
    path.write_bytes(b"again" * 1000)
    VerdictStore(path).close()
    assert sorted(os.listdir(tmp_path)) == ["s.sqlite", "s.sqlite.damaged", "s.sqlite.damaged-2"]


@pytest.mark.parametrize(
    "value",
    [
        *("", "{", "[]", "7", "null", '"text"', "{}", '["text", "stop"]', '["text", "stop", "9"]'),
        *('{"masses": [0.5, 0.5]}', '{"masses": "x", "method": "text"}', '{"masses": [1, "x"], "method": "text"}'),
        *('{"text": 1, "finish_reason": "stop", "tokens": 1}', '{"logp": "x", "tokens": 1}'),
        *('{"masses": [1, 0], "method": "text", "reply": 5}', '{"masses": [1, 0], "method": "text", "latency_s": "x"}'),
        *('{"masses": [1, 0], "method": "te\0xt"}', '{"logp": NaN, "tokens": 1}', "[" * 5000),
        *(b'["text", "stop", 9]', b"\xff\xfe", 5, 0.5),
    ],
)
def test_rows_that_are_no_verdicts_are_dropped(tmp_path, caplog, value):
    path = tmp_path / "s.sqlite"
    answers = filled(path, 3)
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO verdicts VALUES ('odd', ?)", (value,))
    connection.execute("INSERT INTO verdicts VALUES ('text', CAST(x'ff' AS TEXT))")
    connection.commit()
    connection.close()
    with VerdictStore(path) as store:
        assert store.get([*answers, "odd", "text"]) == answers
        assert store.is_finished("line") is False
    assert "2 rows are no verdicts; they are dropped, and asked again" in caplog.text
    caplog.clear()
    VerdictStore(path).close()
    assert caplog.messages == []


@pytest.mark.parametrize(
    "other",
    [
        *("TABLE verdicts (a)", "TABLE verdicts (key, value, more)", "VIEW verdicts AS SELECT 1 key, 2 value"),
        *("TABLE account (x)", "TABLE finished (a, b)"),
    ],
)
def test_a_database_of_somebody_else_is_set_aside(tmp_path, caplog, other):
    path = tmp_path / "s.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(f"CREATE {other}")
    connection.commit()
    connection.close()
    with VerdictStore(path) as store:
        store.put("a", {"reason": "content_filter"})
        assert store.get(["a"]) == {"a": {"reason": "content_filter"}}
        assert store.spent() is None
    assert "is kept as s.sqlite.damaged; 0 verdicts could be read" in caplog.text
    assert (tmp_path / "s.sqlite.damaged").is_file()


@pytest.mark.parametrize("value", ["", "{}", "7", '["x"]', "[null]", "[NaN]", "[-1]", "[[1]]", "[true]"])
def test_an_account_that_is_not_readable_counts_the_verdicts(tmp_path, caplog, value):
    path = tmp_path / "s.sqlite"
    filled(path, 3)
    with VerdictStore(path) as store:
        store.connection.execute("UPDATE account SET value = ?", (value,))
        assert store.spent() == [3]
    assert "what was spent is not readable; 3 requests are assumed" in caplog.text


def test_failures_do_not_pile_up_in_memory():
    """A budget that is used up fails all that is left."""
    failures = Failures()
    assert failures.get(["a"]) == {}
    failures.add("first", Failure("timeout"))  # what opening takes is not counted
    tracemalloc.start()
    for number in range(20_000):
        failures.add(f"{number:064x}", Failure("budget"))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000
    assert failures.reasons == {"timeout": 1, "budget": 20_000}
    assert failures.get([f"{7:064x}", "first", "other"]) == {f"{7:064x}": "budget", "first": "timeout"}
