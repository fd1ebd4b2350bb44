"""Fill the study's tables into docs/quality.md, docs/choosing.md and docs/paper.md, and draw its plots."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from ..report.reading import markdown, provenance
from ..report.tables import fill
from ..run.environment import ROOT
from ..run.shell import write_whole
from ..run.store import read
from . import plots, records, tables
from .plan import choosing_task, whole
from .reading import missing
from .settings import SIZES, TASKS, VALIDATION, Sizes

# Not in docs/plots: what lies there is of docs/performance.md.
PLOTS = ROOT / "docs" / "images"
PAGES = {
    "docs/quality.md": ("verdict", "score", "difference", "rate", "rank", "task", "missing"),
    "docs/choosing.md": ("rank", "rate", "scaling", "targets"),
    "docs/paper.md": ("verdict", "kept"),
}


def write(path: Path) -> list[Path]:
    """Fill all pages from a result file, draw the plots, and return what was written. Raises ValueError for
    a file without a finished run.
    """
    done = records.finished(path)
    if not done:
        raise ValueError(f"{path}: no run of the study is in it; python -m bench quality makes them")
    made = plots.draw(done, PLOTS, digest(path))
    for page, text in filled(path).items():
        write_whole(ROOT / page, text)
        made.append(ROOT / page)
    return [path.relative_to(ROOT) for path in made]


def filled(path: Path) -> dict[str, str]:
    """Return the text of each page with the tables that the result file gives."""
    blocks = rendered(path)
    found = {}
    for page, names in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in names:
            text = fill(text, f"quality-{name}-table", blocks[name]())
        found[page] = text
    return found


def rendered(path: Path) -> dict[str, Callable[[], str]]:
    """Return what makes each block, by its name."""
    done, about = records.finished(path), records.tasks(path)
    source = origin(path)

    def sourced(text: str) -> str:
        return f"{source}\n\n{text}"

    return {
        "verdict": lambda: "\n".join([source, "", *tables.verdicts(done)]),
        "score": lambda: tables.score_table(done, about),
        "difference": lambda: tables.difference_table(done),
        "rate": lambda: sourced(tables.rate_table(done)),
        "rank": lambda: sourced(tables.rank_table(done)),
        "scaling": lambda: sourced(tables.scaling_table(done)),
        "targets": lambda: sourced(tables.targets_table(done)),
        "task": lambda: task_table(about),
        "missing": lambda: f"{missing_text(done)}\n\n{cpu_words(done, about)}",
        "kept": lambda: sourced(tables.memory_table(records.memory(path))),
    }


def digest(path: Path) -> str:
    """What a plot says of the file that it was made from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def origin(path: Path) -> str:
    """Say where the numbers come from: machine, dates, versions, commits; from the calls that made runs."""
    lines = read(path)[0]
    made = {record["run"] for record in lines if record["kind"] == records.RUN}
    calls = [record for record in lines if record["kind"] == "run" and record["run"] in made]
    last = calls[-1]["environment"]
    chips = ", ".join(sorted({call["environment"]["machine"]["cpu"] for call in calls}))
    commits = list(dict.fromkeys((call["environment"]["commit"] or "unknown")[:12] for call in calls))
    dates = sorted(call["date"][:10] for call in calls)
    date = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    named = "bench/results/quality.jsonl"
    machine = {"cpu": f"CPU ({chips})", "threads": 1}
    text = provenance(named, machine, "", last["versions"], "").replace("; ;", f"; {date};")
    text = text.replace(", 1 threads", ", one thread").replace(
        "commit unknown.", f"commits {', '.join(commits)};"
    )
    return f"{text} `python -m bench quality`."


def task_table(about: dict[str, dict]) -> str:
    """What each task trains on, and what came before it."""
    rows = []
    for key, task in TASKS.items():
        sizes: Sizes = SIZES[task.model]
        line = about.get(key)
        before = "published weights"
        if task.before:
            before = tables.NOT_RUN
            if line:
                first = line["pretraining"]
                size = f"{first['parameters']:,} parameters"
                before = f"{size}, {first['steps']} steps, {first['cpu_seconds']:.0f} s"
        items = f"{line['items']:,}" if line else tables.NOT_RUN
        unit = "tokens" if task.model == "minilm" else "bytes"
        rows.append(
            [
                task.title,
                items,
                f"{sizes.steps} × {sizes.batch}",
                f"{sizes.length} {unit}",
                f"{VALIDATION} / {sizes.test}",
                before,
                TASKS[choosing_task(key)].title,
            ]
        )
    header = [
        "",
        "snippets in all",
        "steps × batch",
        "length at most",
        "validation / test",
        "before",
        "rate chosen on",
    ]
    return markdown(header, rows)


def cpu_words(done: dict[str, dict], about: dict[str, dict]) -> str:
    """CPU time of training by model, that before adaptation included, without tests."""
    seconds: dict[str, float] = {}
    for record in done.values():
        model = TASKS[record["settings"]["task"]].model
        seconds[model] = seconds.get(model, 0.0) + record["cpu_seconds"]
    for task, line in about.items():
        model = TASKS[task].model
        seconds[model] = seconds.get(model, 0.0) + line["pretraining"].get("cpu_seconds", 0.0)
    words = ", ".join(f"{model} {found / 60:.0f}" for model, found in seconds.items())
    return f"CPU minutes of training: {words}."


def missing_text(done: dict[str, dict]) -> str:
    count, left = whole(done), missing(done)
    if not left:
        return f"All {count} runs were made."
    first = f"{len(done)} of {count} runs were made. What is incomplete is {tables.NOT_RUN}:"
    return "\n".join([first, "", *(f"- {line}" for line in left)])
