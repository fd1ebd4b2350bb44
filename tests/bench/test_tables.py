"""README's tables are what the committed result files give, and nobody typed them."""

from __future__ import annotations

import subprocess

import pytest

from bench.report import page as report
from bench.report import reading, tables
from bench.report.reading import wrapped
from bench.run import store as results
from bench.run.environment import ROOT


def test_tables_are_up_to_date():
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_changed_result_changes_the_table(name):
    table = tables.TABLES[name]
    result = table.read(ROOT / table.source)
    text = (ROOT / table.page).read_text(encoding="utf-8")
    assert wrapped(table.render(result)) in text
    if isinstance(result, list):
        del result[1:-2]
        result += [record for record in table.read(ROOT / table.source) if record["kind"] == "time"][:1]
    else:
        del result["rows" if "rows" in result else "runs"][:-1]
    assert wrapped(table.render(result)) not in text


def test_performance_page_is_what_the_result_files_give(tmp_path):
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "bench/results"], cwd=ROOT, capture_output=True, text=True
    )
    if changed.returncode or changed.stdout:
        pytest.skip("there are results that are not committed, or this is no git checkout")
    report.write(results.RESULTS, tmp_path / "docs" / "performance.md", tmp_path / "docs" / "plots")
    written = (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == written
    plots = {path.name for path in (ROOT / "docs" / "plots").glob("*.png")}
    assert plots == {path.name for path in (tmp_path / "docs" / "plots").glob("*.png")}


def test_provenance_says_machine_date_versions_and_commit():
    line = reading.provenance(
        "a.json", {"cpu": "Chip", "threads": 2}, "2026-01-02T03:04", {"torch": "2", "peft": None}, "c" * 40
    )
    assert line == "From `a.json`: Chip, 2 threads; 2026-01-02; torch 2; commit cccccccccccc."


def test_missing_comments_are_an_error():
    with pytest.raises(ValueError, match="nothing-table"):
        tables.fill("text", "nothing-table", "x")
