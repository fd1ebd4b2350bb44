"""A report that cannot be made leaves the page and its plots as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.report import page as report
from bench.run import store as results

BEFORE = {"performance.md": "the page", "plots/overhead-cpu.png": "a plot"}
ABOUT = {"date": "2026-01-01", "machine": {"cpu": "c", "threads": 1, "gpu": None}, "versions": {}}
RUN = {"kind": "run", "run": "r", "date": "2026-01-01", "identity": "i", "grid": "g", "command": "c"}
RUN["environment"] = {**ABOUT, "commit": None, "dirty": None}
TIME = {"kind": "time", "run": "r", "date": "2026-01-01", "key": "eager a", "mode": "eager"}


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """The folder of a page and a plot, which `bench report` would write over."""
    folder = tmp_path / "docs"
    (folder / "plots").mkdir(parents=True)
    for name, text in BEFORE.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(command, "PAGE", folder / "performance.md")
    monkeypatch.setattr(command, "PLOTS", folder / "plots")
    return folder


def found_in(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def written(folder: Path, *lines: object) -> None:
    folder.mkdir()
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "some.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "there is no such folder"),
        ((), "no results to report"),
        (('{"kind": "time"', "no JSON", "[1]", "[" * 10_000), "no results to report"),
        (({"format": 1, "entries": []}, {"rows": []}), "no results to report"),
        ((RUN, {"kind": "end", "run": "r", "date": "d", "done": 0, "left": []}), "no results to report"),
        ((RUN, {"kind": "stage", "run": "r", "date": "d", "name": "tests"}), "no results to report"),
        (({**RUN, "environment": {}}, {**TIME, "rows": []}), "no results to report"),
        ((RUN, TIME, {**TIME, "rows": [3]}, {**TIME, "key": 1, "rows": []}), "no results to report"),
    ],
    ids=[
        "no-folder",
        "empty",
        "damaged",
        "another-format",
        "no-measurement",
        "another-kind",
        "run-without-machine",
        "times-without-rows",
    ],
)
def test_without_results_nothing_is_touched(page, tmp_path, capsys, lines, said):
    folder = tmp_path / "results"
    if lines is not None:
        written(folder, *lines)
    assert command.main(["report", "--results", str(folder)]) == 2
    assert found_in(page) == BEFORE
    error = capsys.readouterr().err
    assert said in error and str(folder) in error
    assert "Traceback" not in error


def drawn_quickly(device, records, sources, folder) -> dict[str, Path]:
    """Stand for plots.draw, which takes seconds."""
    path = folder / f"overhead-{device}.png"
    path.write_bytes(b"new plot")
    return {"overhead": path}


@pytest.mark.parametrize("fails", ["plots", "text", "disk"])
def test_an_interrupted_report_leaves_the_old_one(page, tmp_path, monkeypatch, fails):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    def half_drawn(*arguments):
        drawn_quickly(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "draw", half_drawn if fails == "plots" else drawn_quickly)
    if fails == "text":
        monkeypatch.setattr(report, "device_section", interrupted)
    elif fails == "disk":
        monkeypatch.setattr(Path, "write_text", interrupted)
    assert command.main(["report", "--results", str(results.RESULTS)]) == 130
    assert found_in(page) == BEFORE


def test_a_report_replaces_the_page_and_removes_plots_without_data(page, monkeypatch):
    monkeypatch.setattr(report, "draw", drawn_quickly)
    (page / "plots" / "overhead-another-gpu.png").write_text("of results that are gone")
    (page / "plots" / "mine.png").write_text("not of a report")
    report.write(results.RESULTS, page / "performance.md", page / "plots")
    assert (page / "performance.md").read_text().startswith("# Performance")
    assert {path.name: path.read_text() for path in (page / "plots").iterdir()} == {
        "mine.png": "not of a report",
        "overhead-cpu.png": "new plot",
    }
    assert "](plots/overhead-cpu.png)" in (page / "performance.md").read_text()
