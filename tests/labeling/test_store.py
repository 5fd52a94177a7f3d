"""What was stored stays stored."""

import os
import signal
import sqlite3
import subprocess
import sys
import tracemalloc

import pytest

from rlaif.labeling.store import Failures, VerdictStore
from rlaif.records import UserError


def test_put_and_get(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as store:
        store.put("a", {"masses": [0.1, None], "reply": "ü \ud800"})
        store.put("b", 1)
        assert store.get(["b", "a", "c"]) == {"a": {"masses": [0.1, None], "reply": "ü \ud800"}, "b": 1}
        store.put("b", 2)
        assert store.get(["b"]) == {"b": 2}
        assert store.get([]) == {}


def test_survives_reopening_and_leaves_one_file(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as store:
        store.put("a", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["s.sqlite"]
    with VerdictStore(tmp_path / "s.sqlite") as store:
        assert store.get(iter(["a"])) == {"a": 1}


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
        store.put("d", 4, together=True)
    with VerdictStore(tmp_path / "s.sqlite") as store:
        assert store.get(["d"]) == {"d": 4}


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
    store.put(str(number), {"n": number})
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
        assert store.get(map(str, returned)) == {str(number): {"n": number} for number in returned}
        store.put("after", 1)
        assert store.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


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


@pytest.mark.parametrize("make", ["folder", "text", "missing parent"])
def test_a_store_that_cannot_be_opened(tmp_path, make):
    path = tmp_path / "s.sqlite"
    if make == "folder":
        path.mkdir()
    elif make == "text":
        path.write_text("not a database " * 100)
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
    with VerdictStore(path) as store:
        for number in range(2000):
            store.put(str(number), "x" * 50)
        store.spend([1])
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    store = VerdictStore(path)
    for read in (lambda: store.get(["7"]), lambda: store.is_finished("7"), store.spent):
        with pytest.raises(UserError, match=r"s\.sqlite: the label store cannot be read .* delete it to ask"):
            read()


def test_failures_do_not_pile_up_in_memory():
    """A budget that is used up fails all that is left."""
    failures = Failures()
    assert failures.get(["a"]) == {}
    failures.add("first", "timeout")  # what opening takes is not counted
    tracemalloc.start()
    for number in range(20_000):
        failures.add(f"{number:064x}", "budget")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000
    assert failures.reasons == {"timeout": 1, "budget": 20_000}
    assert failures.get([f"{7:064x}", "first", "other"]) == {f"{7:064x}": "budget", "first": "timeout"}
