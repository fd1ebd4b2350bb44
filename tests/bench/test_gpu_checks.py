"""What the GPU call checks first: every kernel is in it, and its formulas are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import GPU

from bench.gpu.driver import ROOT
from tests import stub_gpu

pytest.importorskip("triton")
of_kernels = pytest.importorskip("bench.gpu.checks")
stages = pytest.importorskip("bench.gpu.stages")
# Small enough for the interpreter; a mixed batch has eight samples.
SIZES = 32, 128, 192
NAMES = [name for name, _, _ in of_kernels.checks("cpu", *SIZES)]

LAUNCHED = """
import importlib, json, pkgutil
from tests import stub_gpu
stub_gpu.install("sm_90", redirect=True)
import lorafa_kernels.kernels as package
from bench.gpu.checks import checks
# What is launched, and not called by a kernel, is named so.
kernels = set()
for module in pkgutil.iter_modules(package.__path__):
    names = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
    kernels |= {name for name in names if name.startswith("_") and name.endswith("_kernel")}
launched, behind = set(), set()
for name, make, pdls in checks("cuda", 256):
    compute, _, _ = make()
    with stub_gpu.recording() as found:
        for pdl in pdls:
            compute(pdl)
    assert found and not stub_gpu.faults(found), (name, stub_gpu.faults(found))
    launched |= {launch.kernel for launch in found}
    behind |= {(a.kernel, b.kernel) for a, b in zip(found, found[1:]) if b.dependent}
names = sorted(name.removeprefix("_") for name in kernels)
print(json.dumps([names, sorted(launched), sorted(behind)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing()))
def test_every_kernel_is_launched():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", LAUNCHED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels, launched, behind = json.loads(done.stdout.splitlines()[-1])
    assert len(kernels) >= 20 and set(kernels) <= set(launched)
    # What may start while another runs does so behind each kernel that lets it.
    dB = {(before, "grad_kernel") for before in ("expand_tma_kernel", "total_tma_kernel", "grad_kernel")}
    large = {(before, "expand_tma_kernel") for before in ("shrink_sum_kernel", "grad_sum_kernel")}
    assert dB | large <= {tuple(pair) for pair in behind}


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="the GPU call itself does it there")
@pytest.mark.parametrize("name", NAMES)
def test_the_formula_is_what_the_kernels_compute(name, monkeypatch):
    """Within the budget that the call judges by: a wrong formula would cry wolf on the GPU."""
    monkeypatch.setattr(stages, "REPEATS", 1)
    _, make, _ = next(check for check in of_kernels.checks("cpu", *SIZES) if check[0] == name)
    row: dict = {"repeats": 0}
    stages.run_check(make(), False, row, stub=False)
    assert row.get("status") != "failed", row
    assert row["errors"] and all(error["kept"] for error in row["errors"].values()), row
