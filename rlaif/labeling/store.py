"""Verdicts in one SQLite file, content-addressed: what was paid for once is never asked again.

A row holds an answer: a JSON object with the fields of one of :mod:`rlaif.engines.base`, or a list with those of a
text. Whatever else is found when the file is opened is dropped, and so asked again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlaif.engines.base import Failure
from rlaif.records import UserError

_BATCH = 500
_PUT = "INSERT OR REPLACE INTO verdicts VALUES (?, ?)"
_FINISH = "INSERT OR IGNORE INTO finished VALUES (?)"
_SPEND = "INSERT OR REPLACE INTO account VALUES (0, ?)"
_TABLES = {"verdicts": {"key", "value"}, "finished": {"key"}, "account": {"id", "value"}}
STORE = "store.sqlite"
# A run that was killed leaves its newest verdicts in the write-ahead log.
STORE_FILES = (STORE, f"{STORE}-wal", f"{STORE}.damaged*")


log = logging.getLogger("rlaif")


_TYPES = {
    **dict.fromkeys(("text", "finish_reason", "method", "reply", "reason", "detail"), ("text",)),
    **dict.fromkeys(("tokens", "prompt_tokens", "completion_tokens", "replies"), ("integer",)),
    **dict.fromkeys(("logp", "latency_s", "observed"), ("integer", "real")),
    **dict.fromkeys(("masses[0]", "masses[1]"), ("integer", "real", "null")),
}
"""SQLite's names for what each field of an answer may be."""
_KINDS = (("masses[0]", "masses[1]", "method"), ("text", "finish_reason", "tokens"), ("logp", "tokens"), ("reason",))
"""What each kind of answer has in any case."""


def _broken() -> str:
    """SQL for a row that is no answer; the type of a field that is not there is NULL, which makes nothing true."""
    wrong = (
        " AND ".join(f"json_type(value, '$.{name}') <> '{kind}'" for kind in kinds) for name, kinds in _TYPES.items()
    )
    known = (" AND ".join(f"json_type(value, '$.{name}') IS NOT NULL" for name in names) for names in _KINDS)
    # What was written is ASCII: as many characters as bytes.
    return f"""CASE
        WHEN typeof(value) <> 'text' OR length(value) <> length(CAST(value AS BLOB)) OR NOT json_valid(value) THEN 1
        WHEN json_type(value) = 'array' THEN json_array_length(value) <> 3 OR json_type(value, '$[0]') <> 'text'
            OR json_type(value, '$[1]') <> 'text' OR json_type(value, '$[2]') <> 'integer'
        WHEN {" OR ".join(wrong)} THEN 1
        ELSE NOT ({" OR ".join(known)}) END"""


_BROKEN = _broken()
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class VerdictStore:
    """Key -> verdict. What has been put (and committed, if together) survives the process, however it ends.

    A file that is damaged is set aside as ``NAME.damaged``; what can be read of it is taken over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._together: list[tuple[str, str]] = []
        self._finished: list[tuple[str]] = []
        self._beside: sqlite3.Connection | None = None
        # A connection that one thread closes while another uses it crashes the process.
        self._beside_lock = threading.Lock()
        self._closed = False
        try:
            try:
                self.connection = self._open()
                self._drop_broken_rows()
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                    raise
                self._set_aside_damaged(error)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path}: the label store cannot be opened ({error})") from None

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=60)
        connection.text_factory = _readable_text
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
            )
            connection.execute("CREATE TABLE IF NOT EXISTS finished (key TEXT PRIMARY KEY) WITHOUT ROWID")
            connection.execute("CREATE TABLE IF NOT EXISTS account (id INTEGER PRIMARY KEY, value TEXT NOT NULL)")
            problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise _damaged(problem)
            for table, columns in _TABLES.items():
                found = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
                kind = connection.execute("SELECT type FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]
                if found != columns or kind != "table":
                    raise _damaged(f"its table {table} is not that of a label store")
        except BaseException:
            connection.close()
            raise
        return connection

    def _drop_broken_rows(self) -> None:
        broken = self.connection.execute(f"SELECT count(*) FROM verdicts WHERE {_BROKEN}").fetchone()[0]
        if broken:
            self.connection.execute(f"DELETE FROM verdicts WHERE {_BROKEN}")
            # Of whom they are is unknown: every prompt is looked at again.
            self.connection.execute("DELETE FROM finished")
            log.warning("WARNING: %s: %d rows are no verdicts; they are dropped, and asked again", self.path, broken)

    def _set_aside_damaged(self, error: sqlite3.Error) -> None:
        """Go on in a new file with what can be read of a damaged one."""
        if hasattr(self, "connection"):
            self.connection.close()
        kept = _free_name(self.path)
        os.replace(self.path, kept)
        for end in ("-wal", "-shm"):
            if self.path.with_name(self.path.name + end).exists():
                os.replace(self.path.with_name(self.path.name + end), kept.with_name(kept.name + end))
        self.connection = self._open()
        self.connection.execute("BEGIN")
        for table in ("account", "verdicts"):
            self.connection.executemany(f"INSERT OR IGNORE INTO {table} VALUES (?, ?)", _readable(kept, table))
        self.connection.execute("COMMIT")
        self._drop_broken_rows()
        found = self.connection.execute("SELECT count(*) FROM verdicts").fetchone()[0]
        log.warning(
            "WARNING: %s: the label store was damaged (%s) and is kept as %s; %d verdicts could be read from it, the "
            "others are asked again",
            self.path,
            str(error).splitlines()[-1],
            kept.name,
            found,
        )

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The verdicts that are known.

        Raises:
            UserError: if the file cannot be read; so do all that read it.
        """
        wanted = list(keys)
        found: dict[str, Any] = {}
        for start in range(0, len(wanted), _BATCH):
            part = wanted[start : start + _BATCH]
            marks = ",".join("?" * len(part))
            rows = self._read(f"SELECT key, value FROM verdicts WHERE key IN ({marks})", *part)
            found.update((key, json.loads(value, strict=False)) for key, value in rows)
        return found

    def drop(self, key: str) -> None:
        """Forget what is no answer to the request with this key, and which prompts have all of theirs.

        Raises:
            UserError: if the file cannot be written.
        """
        log.warning("WARNING: %s: row %s is no answer to what it is stored for; it is asked again", self.path, key)
        self._write("DELETE FROM verdicts WHERE key = ?", [(key,)])
        self._write("DELETE FROM finished")

    def put(self, key: str, value: Any, together: bool = False) -> None:
        """Store one verdict; ``together`` with what else is put until :meth:`commit` or until anything is read: faster.

        Raises:
            UserError: if the disk is full or the file cannot be written; everything committed so far is safe.
        """
        row = key, json.dumps(value)
        if together:
            self._together.append(row)
        else:
            self._write(_PUT, [row])

    def commit(self) -> None:
        """Make what was put together safe.

        Raises:
            UserError: if the disk is full or the file cannot be written. Then, and if it is interrupted, nothing of it
                is written yet, and it can be called again.
        """
        if not self._together:
            return
        try:
            self._write("BEGIN IMMEDIATE")
            self._write(_PUT, self._together)
            self._write(_FINISH, self._finished)
            self._write("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.connection.rollback()
            raise
        self._together, self._finished = [], []

    def finish(self, key: str) -> None:
        """Mark something of which every verdict is stored, so that a later run need not look at each of them."""
        if self._together:
            # Not before the verdicts.
            self._finished.append((key,))
        else:
            self._write(_FINISH, [(key,)])

    def is_finished(self, key: str) -> bool:
        """Whether it is marked."""
        return bool(self._read("SELECT 1 FROM finished WHERE key = ?", key))

    def spent(self) -> list[Any] | None:
        """What all requests have cost so far, whatever was asked of whom, as :meth:`spend` was told."""
        rows = self._read("SELECT value FROM account")
        if not rows:
            return None
        with contextlib.suppress(ValueError, TypeError):
            found = json.loads(rows[0][0])
            if isinstance(found, list) and all(type(each) in (int, float) and 0 <= each < math.inf for each in found):
                return found
        requests = self._read("SELECT count(*) FROM verdicts")[0][0]
        log.warning(
            "WARNING: %s: what was spent is not readable; %d requests are assumed, one for each verdict",
            self.path,
            requests,
        )
        return [requests]

    def spend(self, value: Iterable[Any]) -> None:
        """Remember what all requests have cost."""
        self._write(_SPEND, [(json.dumps(list(value)),)])

    def set_aside(self, value: Iterable[Any]) -> None:
        """As :meth:`spend`, from another thread (always the same one) and past what is put together.

        Raises:
            UserError: if it cannot be written.
        """
        try:
            with self._beside_lock:
                if self._closed:
                    raise sqlite3.ProgrammingError("the store is closed")
                if self._beside is None:
                    self._beside = sqlite3.connect(self.path, isolation_level=None, timeout=60, check_same_thread=False)
                    self._beside.execute("PRAGMA synchronous=NORMAL")
                self._beside.execute(_SPEND, (json.dumps(list(value)),))
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: what may be spent cannot be noted ({error})") from None

    def _read(self, statement: str, *values: str) -> list[Any]:
        self.commit()
        try:
            return self.connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path}: the label store cannot be read ({error}); restore it from a copy, or run the same "
                "command again, which keeps what can be read of it"
            ) from None

    def _write(self, statement: str, rows: Sequence[tuple[str, ...]] | None = None) -> None:
        try:
            if rows is None:
                self.connection.execute(statement)
            else:
                self.connection.executemany(statement, rows)
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: a verdict cannot be stored ({error})") from None

    def close(self) -> None:
        """Fold the write-ahead log into the file and close it."""
        self.commit()
        with self._beside_lock:
            self._closed = True
            if self._beside is not None:
                self._beside.close()
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.connection.close()

    def __enter__(self) -> VerdictStore:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.close()
            return
        # What went wrong already must not be hidden by what follows from it (a full disk).
        with contextlib.suppress(sqlite3.Error, UserError):
            self.close()


def _damaged(problem: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(problem)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _readable_text(text: bytes) -> str:
    return text.decode(errors="replace")


def _free_name(path: Path) -> Path:
    """``NAME.damaged``, or ``NAME.damaged-2`` and so on where there is one."""
    number = 1
    while (found := path.with_name(f"{path.name}.damaged{f'-{number}' * (number > 1)}")).exists():
        number += 1
    return found


def _readable(path: Path, table: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a damaged file from both ends up to the damage."""
    for order in ("ASC", "DESC"):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as connection:
            connection.text_factory = _readable_text
            # Then a file that was cut is read as far as it goes.
            connection.execute("PRAGMA writable_schema=ON")
            columns = "id, value" if table == "account" else "key, value"
            yield from connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1 {order}")


class Failures:
    """Key -> reason of every request that failed in this run.

    On the disk, in a file of SQLite's that ends with the process: a dead server or a budget that is used up fails a
    million requests, and they must not pile up in memory.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.details: dict[str, str] = {}
        """What was said of the first failure for each reason."""
        self._opened: sqlite3.Connection | None = None

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._opened is None:
            self._opened = sqlite3.connect("", isolation_level=None)
            self._opened.execute("PRAGMA journal_mode=OFF")
            self._opened.execute("CREATE TABLE failed (key TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID")
        return self._opened

    def add(self, key: str, failure: Failure) -> None:
        """One request more.

        Raises:
            UserError: if the disk is full.
        """
        reason = failure.reason
        self.reasons[reason] += 1
        self.details.setdefault(reason, failure.detail)
        try:
            self._connection.execute("INSERT OR REPLACE INTO failed VALUES (?, ?)", (key, reason))
        except sqlite3.Error as error:
            raise UserError(f"a failure cannot be noted in a temporary file ({error})") from None

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Those of the keys that failed."""
        if not self.reasons:
            return {}
        ask = "SELECT reason FROM failed WHERE key = ?"
        found = ((key, self._connection.execute(ask, (key,)).fetchone()) for key in keys)
        return {key: row[0] for key, row in found if row is not None}
