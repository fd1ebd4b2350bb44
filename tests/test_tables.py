"""README's tables are what the committed result files give, and nobody typed them."""

from __future__ import annotations

import json

import pytest

from bench import tables
from bench.environment import ROOT


def test_tables_are_up_to_date():
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_changed_result_changes_the_table(name):
    page, source, render = tables.TABLES[name]
    result = json.loads((ROOT / source).read_text(encoding="utf-8"))
    text = (ROOT / page).read_text(encoding="utf-8")
    assert render(result) in text
    del result["rows" if "rows" in result else "runs"][:-1]
    assert render(result) not in text


def test_provenance_says_machine_date_versions_and_commit():
    line = tables.provenance(
        "a.json", {"cpu": "Chip", "threads": 2}, "2026-01-02T03:04", {"torch": "2", "peft": None}, "c" * 40
    )
    assert line == "From `a.json`: Chip, 2 threads; 2026-01-02; torch 2; commit cccccccccccc."


def test_missing_comments_are_an_error():
    with pytest.raises(ValueError, match="nothing-table"):
        tables.fill("text", "nothing-table", "x")
