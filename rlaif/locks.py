"""One process at a time: a lock that the kernel releases when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from rlaif.records import UserError

log = logging.getLogger("rlaif")

_PATIENCE_S = 0.05
"""Long enough for a holder to write who it is."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF)


@contextlib.contextmanager
def exclusive(file: Path, output: Path) -> Iterator[None]:
    """Hold a lock for the length of a block.

    The file says which process holds it, and goes with the block. Where no file can be written there is no lock: nor
    can anything else be written there. A file system without locks costs a warning.

    Args:
        file: the lock.
        output: the folder that it guards, for messages.

    Raises:
        UserError: if another process holds it, or may hold it.
    """
    handle = _acquire(file, output)
    try:
        yield
    finally:
        if handle is not None:
            # While it is held: a file of this name that others hold is never deleted.
            with contextlib.suppress(OSError):
                file.unlink()
            os.close(handle)


def _acquire(file: Path, output: Path) -> int | None:
    deadline = time.monotonic() + _PATIENCE_S
    while (handle := _open(file, output)) is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if time.monotonic() > deadline:
                raise UserError(
                    f"output_dir={output}: {_holder(file)} is at work in it; wait until it has ended, or choose "
                    "another folder"
                ) from None
            time.sleep(_PATIENCE_S / 5)
        except OSError as error:
            os.close(handle)
            if error.errno not in _UNSUPPORTED:
                raise
            log.warning(
                "WARNING: the file system of %s has no locks (%s): nothing stops a second command from working in the "
                "same folder",
                output,
                error.strerror,
            )
            with contextlib.suppress(OSError):
                file.unlink()
            break
        else:
            # Its last holder may have deleted it since it was opened.
            if _is_current(handle, file):
                _sign(handle)
                return handle
            os.close(handle)
    return None


def _open(file: Path, output: Path) -> int | None:
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
    # Reading is enough for another user's.
    for flags in (os.O_RDWR | os.O_CREAT | os.O_EXCL, os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        try:
            handle = os.open(file, flags | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            problem = error
            continue
        if flags & os.O_EXCL:
            # Whatever the umask: others must be able to see that it is held.
            with contextlib.suppress(OSError):
                os.fchmod(handle, 0o644)
        return handle
    if os.path.lexists(file) and os.access(file.parent, os.W_OK):
        raise UserError(
            f"output_dir={output}: {file} cannot be opened ({problem.strerror}), so nothing says whether another "
            "process is at work there; if none is, delete it"
        )
    return None


def _is_current(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    # A disk that is full is told of by what needs more room.
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"
