"""What the commands of bench/ share: one line for a wrong call, quiet pipes, files that are written whole."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .stub import stub_name

USAGE_ERROR, INTERRUPTED = 2, 130
# Errors of the system that a wrong path on the command line makes.
WRONG_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class Parser(argparse.ArgumentParser):
    """Answers a wrong call with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message} (--help says what is possible)\n")


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit code; 2 and one line for a wrong call, 130 for Ctrl-C.

    A wrong call is what raises ValueError, or an error of the system for a path. A reader of a pipe that has
    seen enough (head, less) ends the command quietly.
    """
    try:
        try:
            return command()
        finally:
            # Here, where a closed pipe can be answered; also after --help, which ends the process.
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more at exit, when it flushes.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        return _fail(name, error, USAGE_ERROR)
    except OSError as error:
        return _fail(name, error, USAGE_ERROR if isinstance(error, WRONG_PATHS) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _fail(name: str, error: Exception, code: int) -> int:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    print(f"{name}: {lines[0]}", file=sys.stderr)
    return code


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`: all of it, or, after an error or Ctrl-C, the previous file untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    aside = Path(name)
    try:
        aside.write_text(text, encoding="utf-8")
        aside.chmod(0o644)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_rows(path: Path, result: dict) -> None:
    """Write the result of a gate as JSON, one of its rows a line, whole as write_whole does."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    rows = ",\n".join(map(json.dumps, result["rows"]))
    write_whole(path, f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n')


def append_line(path: Path, record: dict) -> None:
    """Append a record to a file of JSON lines, whole, in one call, and synced. Raises ValueError for NaN,
    which JSON lacks.
    """
    line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        # A line that an earlier run was cut in must not swallow this one.
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line
        data = line.encode()
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, "the line was not written whole", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lines:
    """What has the `file` of a run's JSON lines, and the `run`."""

    file: Path
    run: str
    # Of the stub driver, whose lines must say so (stub.py).
    stub: bool | None = None

    def write(self, kind: str, **payload) -> dict:
        """Append a line with its run and the date (UTC), and return it; on disk before this returns."""
        stub = self.stub if self.stub is not None else stub_name() is not None
        marks = {"stub": True} if stub else {}
        record = {"kind": kind, **payload, **marks, "run": self.run, "date": now()}
        append_line(self.file, record)
        return record


def output(*command: str, cwd: Path | None = None, errors: str = "replace") -> str | None:
    """Return what a command prints, or None if it fails, takes too long, or is not there."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=60)
        return done.stdout.decode("utf-8", errors)
    return None


def git(folder: Path, *command: str, errors: str = "replace") -> str | None:
    """Return what git prints of the repository that `folder` is in, as output does."""
    return output("git", "-C", str(folder), *command, errors=errors)


def now() -> str:
    """Return the date in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
