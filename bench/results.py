"""Result files: JSON lines, one finished measurement a line, so that a run that is cut keeps what it has.

A run begins with a line of kind "run", which says machine, date, versions and commit, and ends with one of
kind "end". Every other line names its run and has a key that is the same for the same measurement in every
run.
"""

from __future__ import annotations

import datetime
import json
import os
import uuid
from pathlib import Path

from .environment import ROOT

RESULTS = ROOT / "bench" / "results"


class Store:
    """Appends the records of one run to a file; each line is written whole, in one call, and synced."""

    def __init__(self, path: Path, run: str | None = None):
        self.path = path
        self.run = run or uuid.uuid4().hex[:12]

    def append(self, kind: str, **payload) -> dict:
        """Append a record, with its run and the date (UTC). Raises ValueError for NaN, which JSON lacks."""
        record = {"kind": kind, **payload, "run": self.run, "date": now()}
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        descriptor = os.open(self.path, flags, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # A line that an earlier run was cut in must not swallow this one.
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = "\n" + line
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return record


def now() -> str:
    """Return the date in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def parse(text: str, name: Path | str) -> tuple[list[dict], list[str]]:
    """Return the records of a result file's text, and warnings about lines that are skipped.

    A record gets "_run" (the record of its run), "_file" and "_line" (its text). Skipped: lines that are no
    record, such as one that was cut, and records whose run is not described.
    """
    found, warnings, runs = [], [], {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"kind", "run", "date"} <= record.keys():
            warnings.append(f"{name}, line {number}: damaged, skipped")
            continue
        if record["kind"] == "run":
            runs[record["run"]] = record
        if record["run"] not in runs:
            warnings.append(f"{name}, line {number}: its run is not described, skipped")
            continue
        found.append({**record, "_run": runs[record["run"]], "_file": Path(name), "_line": line})
    return found, warnings


def read(path: Path) -> tuple[list[dict], list[str]]:
    """Return records and warnings of one file (parse); of a missing one, none."""
    if not path.exists():
        return [], []
    return parse(path.read_text(encoding="utf-8", errors="replace"), path)


def load(root: Path = RESULTS) -> tuple[list[dict], list[str]]:
    """Return records and warnings of all result files below `root`, oldest record first."""
    found, warnings = [], []
    for path in sorted(root.rglob("*.jsonl")):
        records, of_file = read(path)
        found += records
        warnings += of_file
    return sorted(found, key=lambda record: record["date"]), warnings


def unfinished(path: Path, identity: str, grid: str) -> tuple[str | None, set[str]]:
    """Return the run to go on with, and the keys that it has: the last run in the file, if it is of this
    identity and grid and was not completed; else None.
    """
    records, _ = read(path)
    runs = [record for record in records if record["kind"] == "run"]
    if not runs or (runs[-1]["identity"], runs[-1]["grid"]) != (identity, grid):
        return None, set()
    own = [record for record in records if record["run"] == runs[-1]["run"]]
    if any(record["kind"] == "end" and record["stopped"] == "complete" for record in own):
        return None, set()
    return runs[-1]["run"], {record["key"] for record in own if "key" in record}


def measured(root: Path, identity: str) -> set[str]:
    """Return the keys that any file below `root` has from code, machine and versions of this identity."""
    records, _ = load(root)
    return {record["key"] for record in records if "key" in record and record["_run"]["identity"] == identity}
