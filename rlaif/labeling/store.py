"""Verdicts in one SQLite file, content-addressed: what was paid for once is never asked again."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlaif.records import UserError

_BATCH = 500
_PUT = "INSERT OR REPLACE INTO verdicts VALUES (?, ?)"
_FINISH = "INSERT OR IGNORE INTO finished VALUES (?)"
_SPEND = "INSERT OR REPLACE INTO account VALUES (0, ?)"
STORE = "store.sqlite"
# A run that was killed leaves its newest verdicts in the write-ahead log.
STORE_FILES = (STORE, f"{STORE}-wal")


class VerdictStore:
    """Key -> verdict. What has been put (and committed, if together) survives the process, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._together: list[tuple[str, str]] = []
        self._finished: list[tuple[str]] = []
        self._beside: sqlite3.Connection | None = None
        try:
            self.connection = sqlite3.connect(path, isolation_level=None, timeout=60)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=NORMAL")
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
            )
            self.connection.execute("CREATE TABLE IF NOT EXISTS finished (key TEXT PRIMARY KEY) WITHOUT ROWID")
            self.connection.execute("CREATE TABLE IF NOT EXISTS account (id INTEGER PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise UserError(f"{path}: the label store cannot be opened ({error})") from None

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
            found.update((key, json.loads(value)) for key, value in rows)
        return found

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
        return list(json.loads(rows[0][0])) if rows else None

    def spend(self, value: Iterable[Any]) -> None:
        """Remember what all requests have cost."""
        self._write(_SPEND, [(json.dumps(list(value)),)])

    def set_aside(self, value: Iterable[Any]) -> None:
        """As :meth:`spend`, from another thread (always the same one) and past what is put together.

        Raises:
            UserError: if it cannot be written.
        """
        try:
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
                f"{self.path}: the label store cannot be read ({error}); restore it from a copy, or delete it to ask "
                "everything again"
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


class Failures:
    """Key -> reason of every request that failed in this run.

    On the disk, in a file of SQLite's that ends with the process: a dead server or a budget that is used up fails a
    million requests, and they must not pile up in memory.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._opened: sqlite3.Connection | None = None

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._opened is None:
            self._opened = sqlite3.connect("", isolation_level=None)
            self._opened.execute("PRAGMA journal_mode=OFF")
            self._opened.execute("CREATE TABLE failed (key TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID")
        return self._opened

    def add(self, key: str, reason: str) -> None:
        """One request more.

        Raises:
            UserError: if the disk is full.
        """
        self.reasons[reason] += 1
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
