"""Small files that people and other processes write: read with bounds, replaced whole, by one writer at a
time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MOST_BYTES = 16 * 2**20
SHOWN = 80
# How long a writer waits for another. Each holds the lock for milliseconds.
PATIENCE_S = 20.0
# A lock file this old was left by a process that was killed.
ABANDONED_S = 60.0
LOCK_FILE = ".lock"
# The end of the name of a file that is being written.
ASIDE = ".part"


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> object:
    """Return what the JSON file at `path` holds.

    Raises OSError, or ValueError saying what is wrong with it: no regular file (a pipe would block, a device
    never end), larger than `most_bytes`, no UTF-8, no JSON, or nested too deeply.
    """
    content = read_bytes(path, most_bytes)
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the bytes of a regular file of at most `most_bytes`. Raises OSError or ValueError."""
    # Looked at before it is opened, which on a device can have an effect; and again what was opened.
    _check_regular(os.stat(path))
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        _check_regular(os.fstat(file.fileno()))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes} bytes")
    return content


def replace_file(path: Path, text: str) -> None:
    """Write `text` into the file at `path`: all of it or, after an error or Ctrl-C, none, and the file before
    is untouched.

    It is written aside under a random name that must not exist, so neither another writer nor a link that
    somebody planted can take it. A link at `path` is replaced, not followed. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode) and not path.is_symlink():
            raise OSError(f"{path} is not a regular file, it cannot be replaced")
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}{ASIDE}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def one_writer(path: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Keep other processes and threads out that come here for `path`, from reading the file to replacing it.

    The lock is that of the folder, which must exist: nothing stays behind, whatever ends the process. Where
    a folder cannot be locked (Windows, some network file systems) it is a file in it. Whoever waits for more
    than patience_s goes on without, with a warning: what the other writes may be lost, never damaged.
    """
    with contextlib.ExitStack() as stack:
        held = _lock_folder(path.parent, patience_s, stack)
        if held is None:
            held = _lock_by_file(path.parent / LOCK_FILE, patience_s, stack)
        if held:
            for left in path.parent.iterdir():
                # Of a writer that was killed: there is no other now.
                if left.name.startswith(f".{path.name}.") and left.name.endswith(ASIDE):
                    with contextlib.suppress(OSError):
                        left.unlink()
        else:
            warnings.warn(
                f"{path.parent} has been locked by another process for {patience_s:g} s: writing without the "
                "lock, so entries that the other process writes now may be lost",
                stacklevel=4,
            )
        yield


def _lock_folder(folder: Path, patience_s: float, stack: contextlib.ExitStack) -> bool | None:
    """Return whether the lock is held, None if a folder cannot be locked here."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    stack.callback(os.close, descriptor)
    for _ in _tries(patience_s):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            continue
        except OSError:
            return None
    return False


def _lock_by_file(lock: Path, patience_s: float, stack: contextlib.ExitStack) -> bool:
    for _ in _tries(patience_s):
        try:
            os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            with contextlib.suppress(OSError):
                if time.time() - lock.lstat().st_mtime > ABANDONED_S:
                    lock.unlink()
        except OSError:
            return False
        else:
            stack.callback(lock.unlink, missing_ok=True)
            return True
    return False


def _tries(patience_s: float) -> Iterator[None]:
    end = time.monotonic() + patience_s
    yield
    while time.monotonic() < end:
        time.sleep(0.005)
        yield


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")


def shown(value: object) -> str:
    """Return repr(value) for a message: one line, not long, whatever a file holds."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        # Nested too deeply, or an integer of more digits than Python prints.
        text = f"something of type {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
