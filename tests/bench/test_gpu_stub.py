"""The GPU call through the stub driver: what its stages launch, in which order, and what they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench.gpu.driver import ROOT, STAGES
from bench.run.store import read
from bench.run.stub import VARIABLE
from tests import stub_gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing())),
]


def test_every_stage_runs_and_no_line_of_it_can_pass_for_a_gpu(tmp_path):
    names = [stage.name for stage in STAGES if stage.name not in ("tests", "memory")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: "sm_90", "OUT": str(tmp_path / "out")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    environment.pop("TRITON_INTERPRET", None)
    # A machine that is shared by others takes several times as long as its stages' limits foresee.
    command = [sys.executable, "-m", "bench.gpu", "--stages", *names, "--budget", "2000", "--past"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    records, warnings = read(tmp_path / "out" / "gpu.jsonl")
    assert not warnings
    ended = [r for r in records if r["kind"] == "stage" and r["verdict"] != "begun"]
    assert [r["name"] for r in ended] == names, done.stdout + done.stderr
    verdicts = {r["name"]: (r["verdict"], r["said"]) for r in ended}
    assert all(verdict == "passed" for verdict, _ in verdicts.values()), verdicts
    assert all(r["stub"] is True for r in records)
    checked = [
        (r["key"], r["pdl"])
        for r in records
        if r["kind"] == "check" and "pdl" in r and r["rows"][0]["status"] == "ok"
    ]
    assert {pdl for _, pdl in checked} == {True, False} and len(set(checked)) == len(checked)
    assert {"ceilings", "time"} <= {r["kind"] for r in records}
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert {"gpu.jsonl", "gpu.log", "triton-cache-0.tar.gz"} <= set(files) and len(files) <= 8
    assert max(files.values()) <= 16 * 2**20
    assert (
        json.loads((tmp_path / "out" / "gpu.jsonl").read_text().splitlines()[0])["environment"]["stub"]
        is True
    )
