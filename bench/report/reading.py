"""Reading result records: which of them count, what a row may say, in which words, and where it comes from.

    newest(records)                    the records that count
    status, time_of, ratio             what a row has; a row that is not "ok" has no time and no ratio, and no
                                       ratio is formed with one as the baseline
    cell, time_cell, number, spread    the same in words
    Sources                            the runs that a device's records come from, and their marks

Every number of the page, the plots, the console and a comparison passes through `status`, `time_of` and
`ratio`.
"""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..measure.cases import MODELS
from ..measure.contenders import FROZEN
from ..measure.contenders import TITLES as LAYER_TITLES
from ..measure.kernels import TITLES as KERNEL_TITLES
from ..measure.models import TITLES as MODEL_TITLES
from ..run.environment import ROOT, device_slug
from ..run.shell import git
from ..run.store import MEASURED as MEASURED
from ..run.stub import is_stub, refuse_stub
from ..run.tree import fitting_commit, has_git

Record = dict
Row = dict
# Columns of a page, as in every page of docs/.
WIDTH = 110

MODES = {
    "eager": "one layer",
    "wall": "wall time of one layer",
    "graph": "one layer in a CUDA graph",
    "host": "host time of one layer",
    "kernel": "kernels by themselves",
    "block": "blocks of a Transformer layer",
}
SCOPES = {
    "layer": "memory of a layer",
    "block": "memory of a block",
    "family": "memory of a layer of each family of models",
}
# Kinds of lines that are no measurement.
FRAMES = ("run", "begin", "sitting", "end", "stage", "check", "test")
TARGET_ROWS = 8192
PLOTS = ("overhead", "roofline", "block-time", "blocks", "training")
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes")


def device_of(record: Record) -> str:
    """Return "cpu" or the slug of the GPU's name, as in bench/results/<device>/."""
    return device_slug(record["_run"]["environment"])


def newest(records: Iterable[Record]) -> dict[tuple[str, str, str], Record]:
    """Return the newest record of every (device, kind, key), without the lines that only frame a run or tell
    of a call (bench.gpu). Raises ValueError for a record of the stub driver.
    """
    found: dict[tuple[str, str, str], Record] = {}
    for record in records:
        if is_stub({**record, "_line": None, "_file": None}):
            refuse_stub({"stub": True}, record["_file"])
        if record["kind"] in FRAMES:
            continue
        name = (device_of(record), record["kind"], record["key"])
        if name not in found or record["date"] >= found[name]["date"]:
            found[name] = described(record)
    return found


def described(record: Record) -> Record:
    """A measurement that raised as a whole may not have come to describe its case: then by its key."""
    return {"case": {"label": record["key"]}, "mode": "eager", "scope": "layer", **record}


def status(row: Row | None) -> str | None:
    """Return "ok", "failed" or "not run"; an error outside its budget is a failure whatever the row says."""
    if row is None:
        return None
    if row.get("status") == "ok" and not all(error["kept"] for error in (row.get("errors") or {}).values()):
        return "failed"
    return row.get("status")


def row_of(record: Record, contender: str, part: str | None = None, **wanted) -> Row | None:
    """Return the contender's row, for this part where rows have parts."""
    wanted |= {"contender": contender} | ({"part": part} if part else {})
    rows = (row for row in record["rows"] if all(row.get(name) == value for name, value in wanted.items()))
    return next(rows, None)


def time_of(record: Record, contender: str, part: str) -> dict | None:
    """Return the summary of a time in ms, or None where there is no sound one."""
    row = row_of(record, contender, part)
    return usable(row.get("ms")) if row and status(row) == "ok" else None


def ratio(record: Record, contender: str, part: str, baseline: str = FROZEN) -> dict | None:
    """Return the summary of the contender's time over the baseline's, or None where one of them is not
    "ok".
    """
    row = row_of(record, contender, part)
    if not row or status(row) != "ok" or status(row_of(record, baseline, part)) != "ok":
        return None
    return usable((row.get("ratios") or {}).get(baseline))


def usable(summary: dict | None) -> dict | None:
    """Return the summary if all of its numbers are there and positive."""
    numbers = [(summary or {}).get(name) for name in ("median", "p20", "p80")]
    return summary if all(number is not None and 0 < number < math.inf for number in numbers) else None


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in ratios))


# Titles and orderings


def titles_of(record: Record) -> dict[str, str]:
    """Return the titles of a record's contenders."""
    if record["kind"] == "training" or (record["kind"] == "memory" and record["scope"] != "layer"):
        return MODEL_TITLES
    if record.get("mode") == "block":
        return MODEL_TITLES
    return KERNEL_TITLES if record.get("mode") == "kernel" else LAYER_TITLES


def full_title(row: Row, titles: dict[str, str]) -> str:
    return titles.get(row["contender"], row["contender"]) + (
        ", checkpointing" if row.get("checkpointing") else ""
    )


def title_of(record: Record, row: Row) -> str:
    return full_title(row, titles_of(record))


def ordered(keys: Iterable[str], titles: dict[str, str]) -> list[str]:
    """Return the distinct contender keys in the order of their titles, unknown ones last."""
    known = list(titles)
    return sorted(set(keys), key=lambda key: (known.index(key) if key in titles else len(known), key))


def arranged(rows: Iterable[Row], titles: dict[str, str]) -> list[Row]:
    """Sort rows: without checkpointing first, then as the contenders are ordered."""
    rows = list(rows)
    order = ordered((row["contender"] for row in rows), titles)
    return sorted(rows, key=lambda row: (bool(row.get("checkpointing")), order.index(row["contender"])))


def case_order(record: Record) -> tuple:
    """Sort cases by model, projection, dtypes, rank and rows."""
    case = record["case"]
    models = list(MODELS)
    model = case.get("model") or ""
    numbers = [case.get(name) or 0 for name in ("R", "M")]
    position = models.index(model) if model in models else len(models)
    shape = (case.get("K") or 0, case.get("N") or 0, case.get("projection") or "")
    dtypes = (case.get("dtype") or "", case.get("adapter") or "", case.get("dropout") or 0)
    return (position, model, *shape, *dtypes, *numbers, case["label"])


# Numbers and words


def number(value: float | None, digits: int = 3) -> str:
    """Format to so many significant digits, without an exponent between 1e-4 and 1e15."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def spread(summary: dict, scale: float = 1.0) -> str:
    """Format a median with p20–p80, all to the digits that the spread leaves."""
    median, low, high = (summary[name] * scale for name in ("median", "p20", "p80"))
    most = 3 if median >= 0.1 else 5
    digits = max(0, min(most, 1 - math.floor(math.log10(max(high - low, median * 1e-3)))))
    return f"{median:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def size(value: int | None) -> str:
    """Format bytes."""
    if value is None:
        return "–"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{value} B"


def label_of(case: dict) -> str:
    return re.sub(r"(?<=\d)x(?=\d)", "×", case["label"])


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def wrapped(text: str) -> str:
    """Return Markdown with its paragraphs and items broken into lines of WIDTH; tables and links to pictures
    stay as they are.
    """
    how = {"break_long_words": False, "break_on_hyphens": False}

    def broken(line: str) -> str:
        if len(line) <= WIDTH or line.startswith(("|", "#", "!")):
            return line
        return textwrap.fill(line, WIDTH, subsequent_indent="  " * line.startswith("- "), **how)

    return "\n".join(map(broken, text.split("\n")))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, numbers to the right of the first column."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(record: Record, contender: str, part: str, baseline: str = FROZEN) -> str:
    """A ratio with its spread, or the word that says why there is none."""
    found = status(row_of(record, contender, part))
    if found is None:
        return "–"
    if found != "ok":
        return found
    if value := ratio(record, contender, part, baseline):
        return spread(value)
    return "baseline failed" if status(row_of(record, baseline, part)) == "failed" else "–"


def time_cell(record: Record, contender: str, part: str) -> str:
    found = status(row_of(record, contender, part))
    if found != "ok":
        return found or "–"
    value = time_of(record, contender, part)
    return number(value["median"]) if value else "–"


def rate_cell(row: Row) -> str:
    """The rate of a row of ceilings."""
    found = usable(row["tflops"] if row["what"] == "product" else row["gb_per_s"])
    return spread(found) if found else "–"


def main_loop_lines(record: Record) -> list[str]:
    """Say at which rate expand runs, a line for each sound row with the card's name."""
    return [
        f"{record['card']}: expand ({row['variant']}) runs at {row['share']:.2f} of the library's product, "
        f"{'×'.join(map(str, record['size']))}, R = {record['rank']}, bf16{_kept(row)}"
        for row in record["rows"]
        if status(row) == "ok" and row.get("share")
    ]


def _kept(row: Row) -> str:
    """Whether what was measured after it was planned with it; nothing of records that do not say so."""
    if row.get("kept"):
        return "; later plans follow it"
    return f"; plans do not follow it: {row['not_kept']}" if row.get("not_kept") else ""


LOSS = "loss, first → last"
# What a table of memory or training says of a row that is "ok".
COLUMNS: dict[str, Callable[[Row], str]] = {
    "in hidden states": lambda row: number(row.get("units")),
    "kept for backward": lambda row: size(row.get("saved_bytes")),
    "temporary, forward": lambda row: size(row.get("forward_temporary_bytes")),
    "temporary, backward": lambda row: size(row.get("backward_temporary_bytes")),
    "batch": lambda row: f"{row.get('batch', '')}",
    "step, ms (p20–p80)": lambda row: spread(step) if (step := usable(row.get("step_ms"))) else "–",
    "tokens/s": lambda row: number(row.get("tokens_per_s")),
    "peak allocated": lambda row: size(row.get(PEAKS[0])),
    "peak reserved": lambda row: size(row.get(PEAKS[1])),
    "trained parameters": lambda row: (
        "–" if row.get("trained_parameters") is None else f"{row['trained_parameters']:,}"
    ),
    LOSS: lambda row: (
        f"{number(losses[0], 4)} → {number(losses[-1], 4)}" if (losses := row.get("losses")) else "–"
    ),
}


def reason_of(row: Row) -> str:
    """Return why a row has no numbers, with the errors outside their budget."""
    errors = [
        f"{name}: error {number(one['error']) if one['error'] is not None else 'not finite'}, "
        f"allowed {number(one['allowed'])}"
        for name, one in (row.get("errors") or {}).items()
        if not one["kept"]
    ]
    text = row.get("reason") or ("outside the error budget" if errors else "no reason given")
    return f"{text} ({'; '.join(errors)})" if errors else text


def reasons(records: Sequence[Record]) -> str:
    """Say why nobody ran."""
    found = {row.get("reason") or "no reason given" for record in records for row in record["rows"]}
    return "; ".join(sorted(found))


def device_title(device: str, records: list[Record]) -> tuple[str, str]:
    """Return a section's heading and, on a CPU, what its numbers are good for."""
    machines = [record["_run"]["environment"]["machine"] for record in records]
    if device != "cpu":
        return machines[0]["gpu"]["name"], ""
    chips = list(dict.fromkeys(f"{m['cpu']}, {m['threads']} threads" for m in machines))
    return (
        f"CPU numbers: {listed(sorted(chips))}",
        "These are CPU numbers: they compare the Python side and the arrangement of library products, and "
        "say nothing about a GPU.",
    )


# What a number's line has to admit


class Sources:
    """Which runs the records of a device come from, and the marks of those that need one."""

    def __init__(self, records: Sequence[Record], root: Path):
        self.root = root
        self.committed: dict[Path, set[str] | None] = {}
        self.fits: dict[tuple, str | None] = {}
        self.runs: dict[tuple[str, str], Record] = {}
        for record in sorted(records, key=lambda record: (record["date"], record["key"])):
            self.runs.setdefault((self.name(record), record["run"]), record)
        self.order = sorted(self.runs, key=lambda name: (self.runs[name]["_run"]["date"], name))
        self.seen: set[str] = set()

    def name(self, record: Record) -> str:
        """The result file's path in the repository, without the machine's folders."""
        file = Path(record["_file"]).absolute()
        for top in (ROOT, self.root.absolute()):
            if file.is_relative_to(top):
                return file.relative_to(top).as_posix()
        return file.name

    def marks(self, record: Record) -> str:
        """† a line that is not committed, ‡ a tree with uncommitted changes, § files of a GPU's run that are
        not those of a commit; [n] the run, if several.
        """
        found = ""
        file = Path(record["_file"])
        if file not in self.committed:
            self.committed[file] = committed_lines(file)
        lines = self.committed[file]
        if lines is None:
            self.seen.add("unknown")
        elif record["_line"].strip() not in lines:
            found += "†"
        if record["_run"]["environment"].get("dirty"):
            found += "‡"
        if device_of(record) != "cpu" and has_git(ROOT) and self.commit(record) is None:
            found += "§"
        self.seen.update(found)
        if len(self.order) > 1:
            found += f" [{self.order.index((self.name(record), record['run'])) + 1}]"
        return found

    def commit(self, record: Record) -> str | None:
        """Return the commit whose files the run's hash is of, or None."""
        now = record["_run"]["environment"]
        name = (now.get("tree"), now.get("commit"))
        if name not in self.fits:
            self.fits[name] = fitting_commit(*name, ROOT) if name[0] else None
        return self.fits[name]

    def of(self, record: Record) -> str:
        return label_of(record["case"]) + (f" {marks.strip()}" if (marks := self.marks(record)) else "")

    def lines(self) -> list[str]:
        """A line for each run: file, machine, date, versions, commit."""
        numbered = len(self.order) > 1
        return [
            (f"[{index}] " if numbered else "") + origin(self.runs[name], name[0]) + self.checked(name)
            for index, name in enumerate(self.order, 1)
        ]

    def checked(self, name: tuple[str, str]) -> str:
        """Say of a GPU's run which commit has the files that measured, if git is here to tell."""
        record = self.runs[name]
        if device_of(record) == "cpu" or not has_git(ROOT):
            return ""
        now = record["_run"]["environment"]
        if not now.get("tree"):
            return " The run has no hash of its files."
        commit = self.commit(record)
        if commit is None:
            return f" The hash of its files, {now['tree'][:12]}, fits no commit."
        same = commit == now.get("commit")
        return " The hash of its files fits the commit." if same else f" Its files are of {commit[:12]}."

    def legend(self) -> str:
        words = {
            "†": "† the row's line is not in the committed version of its file.",
            "‡": "‡ measured on a tree with uncommitted changes, so the commit does not say which code ran.",
            "§": "§ the files that measured, by their hash, are those of no commit.",
            "unknown": "Whether the lines are committed could not be checked: there is no git here.",
        }
        return " ".join(text for mark, text in words.items() if mark in self.seen)


def provenance(path: str, machine: dict, date: str, versions: dict, commit: str | None) -> str:
    """Say where a table's numbers come from, in one line."""
    chip = (machine.get("gpu") or {}).get("name") or f"{machine['cpu']}, {machine['threads']} threads"
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"From `{path}`: {chip}; {date[:10]}; {named}; commit {(commit or 'unknown')[:12]}."


# Of a GPU, as environment.py names it.
GPU_STATE = {
    "driver": "driver {}",
    "runtime": "CUDA {}",
    "sm_clock_mhz": "SM clock {} MHz",
    "memory_clock_mhz": "memory clock {} MHz",
    "power_limit_w": "power limit {} W",
}


def origin(record: Record, path: str) -> str:
    """Say where a run's numbers come from, in one line."""
    run = record["_run"]
    now = run["environment"]
    text = provenance(path, now["machine"], run["date"], now["versions"], now.get("commit"))
    tree = {True: " with uncommitted changes", False: "", None: " (tree not checked)"}[now.get("dirty")]
    gpu = now["machine"].get("gpu") or {}
    state = ", ".join(words.format(gpu[name]) for name, words in GPU_STATE.items() if gpu.get(name))
    return "; ".join([f"{text[:-1]}{tree}", *([state] if state else []), f"`{run['command']}`."])


def committed_lines(file: Path) -> set[str] | None:
    """Return the lines of the file's committed version, or None where git cannot tell."""
    if git(file.parent, "rev-parse", "--verify", "--quiet", "HEAD") is None:
        return None
    shown = git(file.parent, "show", f"HEAD:./{file.name}") or ""
    return {line.strip() for line in shown.splitlines()}
