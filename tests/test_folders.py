"""Where stages work: one at a time, checked when finished, whole when published, also where nothing can be renamed."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from killing import forked, kill_before

from rlaif.artifacts import has_failures, run_stage
from rlaif.folders import MARKER, PROVENANCE, damage, recorded
from rlaif.records import UserError, atomic_file


def stage(output: Path, content: str = "one", **settings: Any) -> list[Path]:
    """Run a stage that writes one file; returns the folders that it was made in."""
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file.txt").write_text(content)

    run_stage("sample", output, {"content": content}, {}, make, seed=0, **settings)
    return made


def test_a_process_at_work_keeps_others_out(tmp_path: Path) -> None:
    """Also another one that would make something else; afterwards nothing is left of the lock."""
    output = tmp_path / "out"
    who = f"process {os.getpid()} on {socket.gethostname()}"

    def make(folder: Path) -> None:
        for content in ("one", "two"):
            with pytest.raises(UserError, match=f"output_dir={output}: {who} is at work in it"):
                stage(output, content)
        assert stage(tmp_path / "other") == [tmp_path / ".other.partial"]
        (folder / "file.txt").write_text("mine")

    run_stage("sample", output, {}, {}, make, seed=0)
    assert (output / "file.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_what_a_dead_process_held_is_free(tmp_path: Path) -> None:
    lock = tmp_path / ".out.lock"
    lock.write_text("process 1 on elsewhere\n")
    assert len(stage(tmp_path / "out")) == 1
    lock.write_text("process 1 on elsewhere\n")
    assert stage(tmp_path / "out") == []
    assert os.listdir(tmp_path) == ["out"]


def test_a_lock_that_is_deleted_while_it_is_taken_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking the file its holder ends, and a third process makes another one."""
    lock, flock = tmp_path / ".out.lock", fcntl.flock
    opened: list[int] = []

    def late(handle: int, how: int) -> None:
        opened.append(handle)
        if len(opened) == 1:
            lock.unlink()
        flock(handle, how)

    monkeypatch.setattr("fcntl.flock", late)

    def make(folder: Path) -> None:
        with pytest.raises(UserError, match="is at work in it"):
            stage(tmp_path / "out")

    run_stage("sample", tmp_path / "out", {}, {}, make, seed=0)
    assert len(opened) > 2


@pytest.mark.parametrize("what", ["link", "closed"])
def test_a_lock_that_cannot_be_opened_may_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """As that of another user, for whom new files are closed to others."""
    lock, opened = tmp_path / ".out.lock", os.open
    if what == "link":
        lock.symlink_to("nowhere")
    else:
        lock.touch()

        def closed(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if path == lock and not flags & os.O_EXCL:
                raise PermissionError(errno.EACCES, "Permission denied")
            return opened(path, flags, *rest, **more)

        monkeypatch.setattr("os.open", closed)
    with pytest.raises(UserError, match=rf"output_dir=.*: {lock} cannot be opened \(.*; if none is, delete it"):
        stage(tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.lock"]


def test_others_can_open_a_lock_whatever_the_umask(tmp_path: Path) -> None:
    modes: list[int] = []
    before = os.umask(0o077)
    try:
        run_stage(
            "sample", tmp_path / "out", {}, {}, lambda _: modes.append((tmp_path / ".out.lock").stat().st_mode), 0
        )
    finally:
        os.umask(before)
    assert modes[0] & 0o444 == 0o444


def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    assert len(stage(tmp_path / "out")) == 1
    assert "the file system of" in caplog.text
    assert "has no locks (No locks available)" in caplog.text
    assert os.listdir(tmp_path) == ["out"]


def test_finished_results_may_lie_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(tmp_path / "out")
    monkeypatch.setattr("rlaif.artifacts.exclusive", lambda *_: 1 / 0)
    assert stage(tmp_path / "out") == []


def test_a_folder_without_what_it_lists_replaces_nothing(tmp_path: Path) -> None:
    """As two processes on one partial folder would leave it: the first has taken it away."""
    stage(tmp_path / "out", "two")
    made = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    shutil.rmtree(tmp_path / "out")
    stage(tmp_path / "out", "one")
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / PROVENANCE).write_text(json.dumps(made))
    stage(tmp_path / "out", "one")
    assert (tmp_path / "out" / "file.txt").read_text() == "one"
    assert len(stage(tmp_path / "out", "two")) == 1
    assert (tmp_path / "out" / "file.txt").read_text() == "two"


def test_a_partial_folder_that_was_taken_away_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.out\.partial: was taken away while rlaif\.sample worked in it"):
        run_stage("sample", tmp_path / "out", {}, {}, lambda folder: shutil.rmtree(folder), seed=0)
    assert os.listdir(tmp_path) == []


def tree(output: Path, text: str = "x" * 100, **settings: Any) -> int:
    """Run a stage that writes several files, and a store that grows; returns how often it was made."""
    made = 0

    def make(folder: Path) -> None:
        nonlocal made
        made += 1
        for name in ("a.txt", "deep/er/b.txt", "deep/README.md"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "large").write_bytes(b"x" * (2**20 + 1))
        (folder / "empty").mkdir(exist_ok=True)
        with (folder / "store").open("a") as store:
            store.write("paid ")

    run_stage("sample", output, {"text": text}, {}, make, 0, carry_over=("store",), **settings)
    return made


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", None, "a.txt is missing"),
        ("a.txt", "x" * 99, "a.txt has 99 bytes, not the 100 that were written"),
        ("a.txt", "y" * 100, "a.txt is not what was written"),
        ("deep/er/b.txt", None, "deep/er/b.txt is missing"),
        ("deep/er/b.txt", "", "deep/er/b.txt has 0 bytes, not the 100"),
        ("large", "x", "large has 1 bytes, not the 1048577"),
        ("deep/README.md", None, "deep/README.md is missing"),
        ("empty", None, "empty/ is missing"),
    ],
)
def test_a_finished_stage_is_made_again_if_it_has_lost_something(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: str | None, told: str
) -> None:
    output = tmp_path / "out"
    assert tree(output) == 1
    whole = contents(output)
    path = output / name
    if content is not None:
        path.write_text(content)
    elif path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    assert tree(output) == 1
    assert f"sample: {output}: {told}" in caplog.text
    assert "making it again" in caplog.text
    assert contents(output) == whole | {"store": b"paid paid "}
    assert tree(output) == 0
    assert os.listdir(tmp_path) == ["out"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the provenance."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != PROVENANCE)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_card_may_be_edited_and_other_files_may_come(tmp_path: Path) -> None:
    output = tmp_path / "out"
    tree(output)
    (output / "deep" / "README.md").write_text("better words")
    (output / "deep" / "notes.txt").write_text("notes")
    assert tree(output) == 0


@pytest.mark.parametrize("content", [None, "paid", "PAID "])
@pytest.mark.parametrize("failed", [False, True])
def test_whole_results_without_their_store_ask_nothing_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None, failed: bool
) -> None:
    """Not even requests that failed: the others would be asked with them. A store that is there is used."""
    output = tmp_path / "out"
    tree(output)
    (output / "store").unlink()
    if content is not None:
        (output / "store").write_text(content)
    made = tree(output, unfinished=lambda folder: "requests failed" if failed else None)
    assert made == (failed and content is not None)
    if made:
        assert (output / "store").read_text() == f"{content}paid "
    else:
        assert "up to date, skipped" in caplog.text
        assert "store is missing" in caplog.text if content is None else "but store " in caplog.text
        assert "making them again asks again what is lost" in caplog.text


def test_provenance_that_lists_only_names(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    output = tmp_path / "out"
    tree(output)
    old = json.loads((output / PROVENANCE).read_text())
    names = sorted({name.split("/")[0] for name in old["files"]})
    assert names == ["a.txt", "deep", "empty", "large", "store"]
    (output / PROVENANCE).write_text(json.dumps(old | {"files": names}))
    (output / "a.txt").write_text("other")
    assert tree(output) == 0
    (output / "a.txt").unlink()
    assert tree(output) == 1
    (output / PROVENANCE).write_text(json.dumps(old | {"files": names}))
    assert tree(output, "other") == 1


NOT_JSON = [b"", b"\0" * 64, b'{"stage": "sample", "fing', b"[1, 2]", b"\xff\xfe{}", b"null", b'"x"', b"[" * 100_000]


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
def test_a_broken_marker_costs_no_more_than_going_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / MARKER).write_bytes(content)
    (partial / "store").write_text("paid ")
    (partial / "checkpoint").write_text("work")
    assert tree(tmp_path / "out") == 1
    assert (tmp_path / "out" / "store").read_text() == "paid paid "
    assert f"{partial / MARKER} is broken" in caplog.text
    assert (tmp_path / "out.unfinished-1" / "checkpoint").read_text() == "work"


def test_a_folder_in_the_place_of_a_marker_does_not_block(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".out.partial" / MARKER).mkdir(parents=True)
    (tmp_path / ".out.partial" / "store").write_text("paid ")
    assert tree(tmp_path / "out") == 1
    assert (tmp_path / "out" / "store").read_text() == "paid paid "
    assert f"{MARKER} is broken" in caplog.text
    assert os.listdir(tmp_path) == ["out"]


def test_a_marker_with_an_odd_time(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_stage("sample", tmp_path / "out", {}, {}, fail_with_work, seed=0)
    marker = tmp_path / ".out.partial" / MARKER
    for odd in (None, "x", -1, float("nan"), [], 10**400):
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"wall_s": odd}))
        with pytest.raises(RuntimeError):
            run_stage("sample", tmp_path / "out", {}, {}, fail_with_work, seed=0)
        assert 0 <= json.loads(marker.read_text())["wall_s"] < 10


def fail_with_work(folder: Path) -> None:
    (folder / "work").write_text("work")
    raise RuntimeError


@pytest.mark.parametrize(
    "content",
    [
        *NOT_JSON,
        *(b'{"fingerprint": 1}', b'{"fingerprint": "x", "files": 3}', b'{"fingerprint": "x", "files": {"a": 3}}'),
        *(b'{"fingerprint": "x", "files": {"../out": null}}', b'{"fingerprint": "x", "files": ["/etc"]}'),
    ],
    ids=range(len(NOT_JSON) + 5),
)
def test_broken_provenance_is_one_line_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    output = tmp_path / "out"
    tree(output)
    (output / PROVENANCE).write_bytes(content)
    before = contents(output)
    with pytest.raises(UserError) as caught:
        tree(output)
    assert str(caught.value) == (
        f"output_dir={output}: its provenance.json is broken, so nothing says what made the folder; move it away or "
        "choose another (a new folder that holds its store alone goes on with it)"
    )
    assert contents(output) == before
    os.replace(output, tmp_path / "away")
    output.mkdir()
    shutil.copy(tmp_path / "away" / "store", output)
    assert tree(output) == 1
    assert (output / "store").read_text() == "paid paid "


@pytest.mark.parametrize("content", [*NOT_JSON, None], ids=range(len(NOT_JSON) + 1))
def test_a_broken_summary_counts_as_unfinished(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "quality.json"
    if content is not None:
        file.write_bytes(content)
    assert str(file) in (has_failures(file) or "")
    for failed in (0, 3):
        file.write_text(json.dumps({"failed": failed}))
        assert has_failures(file) == ("requests failed last time" if failed else None)


def test_what_writing_that_was_killed_left_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_stage("sample", tmp_path / "out", {"content": "one"}, {}, fail_with_work, seed=0)
    partial = tmp_path / ".out.partial"
    (partial / "deep").mkdir()
    unfinished = [atomic_file(folder / "labels.jsonl") for folder in (partial, partial / "deep")]
    for file in unfinished:
        file.__enter__().write("half a")
    assert len(list(partial.rglob(".labels.jsonl.*"))) == 2
    stage(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["deep", "file.txt", PROVENANCE, "work"]


def test_an_interrupted_run_that_no_longer_fits_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "out"

    def make(folder: Path) -> None:
        (folder / "store").write_text("paid")
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "weights").write_text(content)
        raise RuntimeError

    for number, content in enumerate(("first", "second"), 1):
        with pytest.raises(RuntimeError):
            run_stage("sample", output, {"of": content}, {}, make, 0, carry_over=("store",))
        stage(output, f"other {number}", carry_over=("store",))
        kept = tmp_path / f"out.unfinished-{number}"
        assert (kept / "checkpoints" / "weights").read_text() == content
        assert f"an interrupted run with other inputs or settings is kept as {kept}" in caplog.text
        assert (output / "store").read_text() == "paid"
    # With its settings it goes on from there.
    os.replace(tmp_path / "out.unfinished-2", tmp_path / ".out.partial")
    content = "third"
    with pytest.raises(FileExistsError):
        run_stage("sample", output, {"of": "second"}, {}, make, 0, carry_over=("store",))


def test_a_partial_run_with_nothing_but_what_is_carried_over_leaves_nothing(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        for name in ("store", "store-shm", ".labels.jsonl.1234.tmp"):
            (folder / name).write_text("paid")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_stage("sample", tmp_path / "out", {"of": "something else"}, {}, make, 0, carry_over=("store",))
    stage(tmp_path / "out", carry_over=("store",))
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "store").read_text() == "paid"


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        events.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def seen_replace(old: Path, new: Path) -> None:
        events.append(("replace", Path(new).name))
        replace(old, new)

    monkeypatch.setattr("os.fsync", seen_fsync)
    monkeypatch.setattr("os.replace", seen_replace)
    output = tmp_path / "out"
    tree(output)
    place = events.index(("replace", "out"))
    written = {path.stat().st_ino for path in [output, *output.rglob("*")]}
    assert written <= {what for kind, what in events[:place] if kind == "fsync"}
    # Provenance, which says that the rest is whole, comes after it, and the folder that has the new name last.
    listed = events.index(("replace", PROVENANCE))
    assert {path.stat().st_ino for path in output.rglob("*") if path.name != PROVENANCE} <= {
        what for kind, what in events[:listed] if kind == "fsync"
    }
    assert ("fsync", tmp_path.stat().st_ino) in events[place:]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder whose parent is not ours."""
    output = tmp_path / "out"
    (output / "lost+found").mkdir(parents=True)
    monkeypatch.setattr("rlaif.folders.os.access", lambda path, mode: Path(path) != tmp_path)
    return output


def test_a_folder_that_cannot_be_renamed_is_filled_from_inside(inside: Path, tmp_path: Path) -> None:
    number = inside.stat().st_ino

    def make(folder: Path) -> None:
        assert folder == inside / ".partial"
        with pytest.raises(UserError, match="is at work in it"):
            tree(inside)
        (folder / "of the first").write_text("x")

    run_stage("sample", inside, {}, {}, make, 0)
    assert tree(inside) == 1
    assert tree(inside) == 0
    assert sorted(os.listdir(inside)) == ["a.txt", "deep", "empty", "large", "lost+found", PROVENANCE, "store"]
    assert tree(inside, "y" * 100) == 1
    assert (inside / "a.txt").read_text() == "y" * 100
    assert (inside / "store").read_text() == "paid paid "
    assert inside.stat().st_ino == number
    assert os.listdir(tmp_path) == ["out"]
    (inside / "notes").write_text("mine")
    with pytest.raises(UserError, match="it also holds notes"):
        tree(inside, "z")


def test_an_interrupted_run_inside_its_output(inside: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError):
        run_stage("sample", inside, {}, {}, fail_with_work, seed=0)
    assert tree(inside) == 1
    assert (inside / "unfinished-1" / "work").read_text() == "work"
    assert tree(inside, "other") == 1
    assert (inside / "unfinished-1" / "work").read_text() == "work"


def test_work_inside_an_output_goes_on_where_it_could_be_renamed(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a container began is finished on its host, for which the volume is a folder like any other."""
    (inside / "lost+found").rmdir()
    with pytest.raises(RuntimeError):
        run_stage("sample", inside, {"content": "one"}, {}, fail_with_work, seed=0)
    monkeypatch.undo()
    assert stage(inside) == [inside / ".partial"]
    assert sorted(os.listdir(inside)) == ["file.txt", PROVENANCE, "work"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_kill_before_any_change_of_the_file_system_loses_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, where: str, old: bool
) -> None:
    output = request.getfixturevalue("inside") if where == "inside" else tmp_path / "out"
    # These take most of the time, and a kill sees nothing of them.
    monkeypatch.setattr("rlaif.artifacts.environment", dict)
    monkeypatch.setattr("os.fsync", lambda handle: None)
    for number in itertools.count():
        shutil.rmtree(output, ignore_errors=True)
        if where == "inside":
            output.mkdir()
        if old:
            tree(output, "old")

        def make() -> None:
            kill_before(number, str(tmp_path))  # noqa: B023
            tree(output, "new")

        status = forked(make)
        # What has provenance is whole, at any time.
        record = recorded(output)
        assert record is None or damage(output, record["files"]) == {}
        other = number % 2
        if other:
            assert tree(output, "other") == 1
        assert tree(output, "new") <= 1
        assert tree(output, "new") == 0
        found = {name: content for name, content in contents(output).items() if "unfinished" not in name}
        assert found.pop("store").decode().count("paid ") >= 1 + old + other
        new = dict.fromkeys(("a.txt", "deep/README.md", "deep/er/b.txt"), b"new")
        assert found == new | {"large": b"x" * (2**20 + 1)}
        left = {name for folder in (tmp_path, output) for name in os.listdir(folder) if "unfinished" not in name}
        assert left == {"out", "a.txt", "deep", "empty", "large", "store", PROVENANCE}
        if status != -signal.SIGKILL:
            assert status == 0
            break
    assert number > 25
