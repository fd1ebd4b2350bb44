"""The time on the host: measured beside a stub driver, in empty launches of the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gate.host import EMPTY, FEW, MANY
from bench.report.page import HOST_TIME, host_section
from tests import stub_gpu

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("a layer", "q, k and v", "a gated MLP")
NAMES = [
    EMPTY,
    *(f"{kind}, M = {M}, {way}" for M in (FEW, MANY) for kind in KINDS for way in ("forward", "backward")),
]


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((ROOT / "bench" / "results" / HOST_TIME).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_everything_is_timed_and_compared_with_an_empty_launch(tmp_path):
    if lacks := stub_gpu.missing():
        pytest.skip(lacks)
    out = tmp_path / "host.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host_time", "--rounds", "3", "--out", str(out)]
    for before in ([], ["--before", str(out)]):
        done = subprocess.run([*command, *before], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(out.read_text())
        assert set(found["rows"]) >= {*NAMES, "a layer, another M in each call, forward and backward"}
        assert found["rows"][EMPTY]["empty_launches"] == 1
        for name, row in found["rows"].items():
            assert 0 < row["least_us"] <= row["median_us"], name
            assert name not in NAMES[1:] or row["empty_launches"] > 1, name
    assert set(found["before"]["rows"]) == set(found["rows"])
    assert "| a layer, M = 1, forward |" in host_section(found)


def test_committed_figures_are_within_what_was_aimed_at(committed):
    """A layer's forward at 6 empty launches, its backward at 9, blocks at 60 % of before."""
    rows, before = committed["rows"], committed["before"]["rows"]
    assert set(rows) >= set(NAMES) == set(before)
    for name in NAMES:
        row = rows[name]
        if name.startswith("a layer"):
            assert row["empty_launches"] <= (6 if name.endswith("forward") else 9), name
        elif name != EMPTY:
            assert row["empty_launches"] <= 0.6 * before[name]["empty_launches"], name


def test_the_page_says_that_no_gpu_was_there(committed):
    text = host_section(committed)
    assert "no GPU was present" in text and "stub driver" in text
    assert committed["commit"][:12] in text and committed["before"]["commit"][:12] in text
