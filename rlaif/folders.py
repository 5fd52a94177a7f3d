"""Where a stage works, how its folder gets its name, and whether what it wrote is still there.

A stage works in a hidden *partial* folder beside its output folder. Where the output folder cannot be renamed (a mount
point, or a parent folder that is not ours) the partial folder is inside it, and its entries are moved one by one.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.records import UserError, read_json, write_json

log = logging.getLogger("rlaif")

PROVENANCE = "provenance.json"
FAILED = "failed.json"
"""What a sweep leaves in the folder of a job that failed."""
MARKER = ".fingerprint"
"""In a partial folder: what it is being made from."""
CARD = "README.md"
"""Cards are for people to edit: that one is there is all that is checked."""
MISSING = "is missing"
_PUBLISHING = ".publishing"
"""In a partial folder whose entries are being moved: the names of those that they replace."""
_CHECKED_BYTES = 2**20
"""Up to this size a file is checked by its hash too."""
_SET_ASIDE = re.compile(r"(?:^|\.)unfinished-\d+$")

FilesRecord = Mapping[str, Mapping[str, Any] | None]


def check_output(output: Path) -> None:
    """Refuse what can never be an output folder.

    Raises:
        UserError: naming it.
    """
    path = output.absolute()
    for part in (path, *path.parents):
        if os.path.islink(part) and not os.path.exists(part):
            raise UserError(
                f"output_dir={output}: {part} is a link to {os.readlink(part)}, which is not there; make that folder, "
                "or remove the link"
            )
    if os.path.realpath(path) == os.path.realpath(path.anchor):
        raise UserError(f"output_dir={output}: is the root of the file system; name a folder in it")
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"output_dir={output}: is a file, expected a folder")


@dataclass(frozen=True)
class Places:
    """An output folder, and those that a stage needs beside it, or ``inside`` it where it cannot be renamed."""

    output: Path
    inside: bool

    @staticmethod
    def of(output: Path) -> Places:
        """Follow links, and find out where there is room.

        Raises:
            UserError: for what can never be an output folder.
        """
        check_output(output)
        path = Path(os.path.realpath(output))
        inside = path.is_dir() and (
            is_mount(path)
            or not os.access(path.parent, os.W_OK | os.X_OK)
            # Somebody for whom it is one of these has begun, in a container perhaps.
            or any(os.path.lexists(Places(path, True)._place(what)) for what in ("partial", "lock"))
        )
        return Places(path, inside)

    def _place(self, what: str) -> Path:
        return self.output / f".{what}" if self.inside else self.output.with_name(f".{self.output.name}.{what}")

    @property
    def partial(self) -> Path:
        """Where the stage works."""
        return self._place("partial")

    @property
    def fresh(self) -> Path:
        """A partial folder while it is being prepared."""
        return self._place("partial.new")

    @property
    def outdated(self) -> Path:
        """The old output while the new one gets its name."""
        return self._place("outdated")

    @property
    def lock(self) -> Path:
        """The file that the process at work holds."""
        return self._place("lock")

    @property
    def leftovers(self) -> bool:
        """Whether somebody is at work here, or was killed."""
        return any(os.path.lexists(path) for path in (self.lock, self.outdated))

    def free_aside(self) -> Path:
        """A name for a partial folder that is set aside: visible, and not taken."""
        stem = "unfinished" if self.inside else f"{self.output.name}.unfinished"
        number = 1
        while os.path.lexists(found := self.partial.with_name(f"{stem}-{number}")):
            number += 1
        return found


def is_mount(folder: Path) -> bool:
    """Whether something is mounted at a folder; bind mounts within a file system are known only to the kernel."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = (line.split()[4] for line in lines if line.count(b" ") > 4)
    return os.fsencode(folder) in {re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), point) for point in points}


def is_set_aside(name: str) -> bool:
    """Whether a folder of this name is an interrupted run that no longer fitted."""
    return bool(_SET_ASIDE.search(name))


def is_temporary(path: Path) -> bool:
    """Whether a file is what :class:`rlaif.records.atomic_file` leaves when it is killed."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def is_bookkeeping(name: str, inside: bool) -> bool:
    """Whether something in an output folder is no result, and no stranger's either.

    Args:
        name: in the folder.
        inside: whether the stage works inside the folder, which may be where something is mounted.
    """
    if not inside:
        return name == FAILED or is_temporary(Path(name))
    places = Places(Path(), inside)
    ours = {place.name for place in (places.partial, places.fresh, places.lock)}
    return name in ours or name == "lost+found" or is_set_aside(name) or is_bookkeeping(name, False)


def remove_temporaries(folder: Path) -> None:
    """Delete what writing that was killed has left below a folder."""
    for path in folder.rglob(".*.tmp"):
        if path.is_file():
            path.unlink()


def describe(folder: Path) -> dict[str, dict[str, Any] | None]:
    """Every file below a folder with its size and, if it is small, its hash; and folders without any."""
    found: dict[str, dict[str, Any] | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in (PROVENANCE, MARKER, _PUBLISHING):
            continue
        if path.is_dir():
            if not any(path.iterdir()):
                found[f"{name}/"] = None
        elif path.name == CARD:
            found[name] = None
        else:
            size = path.stat().st_size
            found[name] = {"bytes": size} | ({"sha256": _hash(path)} if size <= _CHECKED_BYTES else {})
    return found


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def damage(folder: Path, files: FilesRecord) -> dict[str, str]:
    """What is wrong with each of the files that is no longer as it was written."""
    found: dict[str, str] = {}
    for name, about in files.items():
        path = folder / name
        if not path.exists():
            found[name] = MISSING
        elif about is not None:
            size = path.stat().st_size
            if size != about.get("bytes"):
                found[name] = f"has {size} bytes, not the {about.get('bytes')} that were written"
            elif "sha256" in about and (not path.is_file() or _hash(path) != about["sha256"]):
                found[name] = "is not what was written"
    return found


def recorded(folder: Path) -> dict[str, Any] | None:
    """What a stage wrote of itself into a folder; ``None`` where there is nothing, or nothing that makes sense.

    ``files`` are as :func:`describe` has them: earlier versions listed the names in the folder alone.
    """
    try:
        value = read_json(folder / PROVENANCE)
    except UserError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("fingerprint"), str):
        return None
    files = value.get("files", [])
    if isinstance(files, list):
        files = {name: None for name in files if isinstance(name, str)}
    if not isinstance(files, dict) or not all(about is None or isinstance(about, dict) for about in files.values()):
        return None
    if any(not name.strip("./") or Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        return None
    return value | {"files": files}


def top_names(files: Iterable[str]) -> set[str]:
    """The entries of the folder itself that hold some files."""
    return {Path(name).parts[0] for name in files}


def sync(folder: Path) -> None:
    """Have the disk hold all files below a folder before another name or a note says that they are whole."""
    for current, _, names in os.walk(folder):
        for path in (*(os.path.join(current, name) for name in names), current):
            if not os.path.islink(path):
                _sync_one(path)


def _sync_one(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot do that with folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def whole(places: Places) -> dict[str, Any] | None:
    """The record of a partial folder that has everything that its provenance lists, or had until it was published."""
    record = recorded(places.partial)
    if record is None:
        return None
    lacking = {name: record["files"][name] for name in damage(places.partial, record["files"])}
    if lacking and (not is_begun(places) or damage(places.output, lacking)):
        return None
    return record


def is_begun(places: Places) -> bool:
    """Whether entries of a partial folder with provenance have been moved into their places."""
    return (places.partial / _PUBLISHING).exists()


def publish(places: Places) -> None:
    """Give a whole partial folder its name. After a kill the next start does the rest."""
    partial, output, outdated = places.partial, places.output, places.outdated
    (partial / MARKER).unlink(missing_ok=True)
    if places.inside or is_begun(places):
        _move_in(partial, output)
        return
    try:
        if output.exists():
            shutil.rmtree(outdated, ignore_errors=True)
            os.replace(output, outdated)
    except OSError as error:
        # Something is mounted there after all, or it is of a lower layer of an overlay.
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        _move_in(partial, output)
        return
    os.replace(partial, output)
    _sync_one(output.parent)


def _move_in(partial: Path, output: Path) -> None:
    """Replace what is in a folder entry by entry. It has no provenance until all of them are there."""
    notes = partial / _PUBLISHING
    if not notes.exists():
        old = recorded(output)
        write_json(notes, sorted(top_names(old["files"])) if old else [])
    (output / PROVENANCE).unlink(missing_ok=True)
    _sync_one(output)
    record = recorded(partial)
    assert record is not None
    new = top_names(record["files"])
    for name in new.union(read_json(notes)):
        if name not in new or os.path.lexists(partial / name):
            remove(output / name)
        if os.path.lexists(partial / name):
            os.replace(partial / name, output / name)
    _sync_one(output)
    os.replace(partial / PROVENANCE, output / PROVENANCE)
    _sync_one(output)
    shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _marker(partial: Path) -> dict[str, Any]:
    """What a partial folder is being made from; nothing where it does not say."""
    try:
        found = read_json(partial / MARKER)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _goes_on(marker: Mapping[str, Any], made_from: Mapping[str, Any]) -> bool:
    """Whether what is to be made goes on from a partial folder with this marker."""
    before, now = marker.get("extents", []), made_from["extents"]
    same = marker.get("fingerprint") == made_from["fingerprint"] and isinstance(before, list)
    numbers = same and len(before) == len(now) and all(isinstance(value, (int, float)) for value in before)
    return numbers and all(old <= new for old, new in zip(before, now, strict=True))


def wall_s(partial: Path) -> float:
    """How long an interrupted stage has worked."""
    seconds = _marker(partial).get("wall_s")
    return float(seconds) if isinstance(seconds, (int, float)) and 0 <= seconds < 1e12 else 0.0


def prepare_partial(places: Places, made_from: Mapping[str, Any], carry_over: Sequence[str], stage: str) -> bool:
    """A partial folder to work in; returns whether it is that of an interrupted run.

    Args:
        places: of the stage.
        made_from: ``fingerprint`` of what an interrupted run must have been made from to be gone on with, and
            ``extents``, how far it may have meant to go at most.
        carry_over: patterns of files that stay useful.
        stage: for messages.
    """
    partial, fresh = places.partial, places.fresh
    marker = _marker(partial)
    if _goes_on(marker, made_from):
        write_json(partial / MARKER, {**marker, **made_from})
        # A kill may have left a copy beside it, which ages from here on.
        _discard(fresh)
        remove_temporaries(partial)
        log.info("%s: going on where an interrupted run stopped", stage)
        return True
    if not marker and (partial / MARKER).exists():
        log.warning("%s: %s is broken, so nothing says what was being made there", stage, partial / MARKER)
    # The marker is written last: with it the copy is whole, and what it was made from may be half deleted.
    if not (fresh / MARKER).is_file():
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        copied = (_carried(folder, carry_over) for folder in (partial, places.output))
        for file in next((files for files in copied if files), []):
            shutil.copy2(file, fresh / file.name)
        sync(fresh)
    write_json(fresh / MARKER, made_from)
    _set_aside(places, carry_over, stage)
    os.replace(fresh, partial)
    return False


def _carried(folder: Path, carry_over: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in carry_over for file in folder.glob(pattern) if file.is_file()})


def _set_aside(places: Places, carry_over: Sequence[str], stage: str) -> None:
    """Make room for another partial folder; keep the old one if there is more in it than what is carried over."""
    partial = places.partial
    worthless = {MARKER, *(f"{name}-shm" for name in carry_over)}
    work = [
        path
        for path in partial.rglob("*")
        if path.is_file() and not (is_temporary(path) or is_carried(path.name, carry_over) or path.name in worthless)
    ]
    if not work:
        _discard(partial)
        return
    kept = places.free_aside()
    os.replace(partial, kept)
    log.warning(
        "%s: an interrupted run with other inputs or settings is kept as %s; delete it if you do not need it",
        stage,
        kept,
    )


def _discard(folder: Path) -> None:
    """Delete a partial folder, its marker first: what a kill leaves of it is not taken for the whole."""
    remove(folder / MARKER)
    shutil.rmtree(folder, ignore_errors=True)


def is_carried(name: str, carry_over: Sequence[str]) -> bool:
    """Whether a file is of those that are carried over."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in carry_over)
