"""Promise: every configuration that the heuristics pick compiles cleanly, without the GPU it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")

from bench.gate import ARCHS, Case, failures
from lorafa_kernels.tuning.config import KNOWN_DEVICES, OPS, KernelConfig, all_default_configs

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results" / "compile-gate.json"


def run_gate(out: Path, *options: str) -> dict:
    # A process that interprets kernels cannot compile them.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gate", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run_gate(tmp_path_factory.mktemp("gate") / "quick.json", "--quick")


@pytest.mark.gate
@pytest.mark.parametrize("arch", ARCHS)
def test_defaults_compile(quick, arch):
    rows = [row for row in quick["rows"] if row["arch"] == arch and row["dtype"] == "bf16"]
    compiled = {
        (row["kernel"], row["layout"], row["R"]) for row in rows if row["kernel"] != "grad_sum_kernel"
    }
    assert compiled == {
        (kernel, layout, R)
        for kernel, layout in (
            ("shrink_kernel", "z"),
            ("expand_kernel", "y"),
            ("expand_kernel", "dx"),
            ("grad_kernel", "dz, dB"),
        )
        for R in (16, 64)
    }
    assert not [row for row in rows if row["failures"]]


@pytest.mark.gate
def test_fp32_products_are_tf32_only_on_request(quick):
    rows = [row for row in quick["rows"] if row["dtype"] == "fp32" and row["kernel"] != "grad_sum_kernel"]
    assert {(row["kernel"], row["asked_tf32"], row["tf32"] > 0) for row in rows} == {
        (f"{op}_kernel", asked, asked) for op in OPS for asked in (False, True)
    }


@pytest.mark.gate_all
@pytest.mark.timeout(7200)
def test_every_configuration_compiles(tmp_path):
    assert run_gate(tmp_path / "all.json")["failed"] == 0


def test_committed_result_covers_the_heuristics():
    """After a change of the heuristics, run `make gate` and commit the result."""
    result = json.loads(COMMITTED.read_text())
    assert result["failed"] == 0
    assert not [row for row in result["rows"] if row["failures"]]
    compiled = {
        (row["arch"], row["kernel"].removesuffix("_kernel"), row["dtype"], KernelConfig(**row["config"]))
        for row in result["rows"]
        if row["kernel"] != "grad_sum_kernel" and row["dtype"] != "fp16"
    }
    assert compiled == {
        (arch, op, dtype, config)
        for arch in ARCHS
        for op in OPS
        for dtype, operand_bytes in (("bf16", 2), ("fp32", 4))
        for config in all_default_configs(op, KNOWN_DEVICES[arch], operand_bytes)
    }


CASE = Case("sm_90", "expand", "bf16", "fp32", "y", "even", 8192, 16, bias=True)
FP32 = Case("sm_90", "expand", "fp32", "fp32", "y", "even", 8192, 16, bias=True)
TF32 = Case("sm_90", "expand", "fp32", "fp32", "y", "even", 8192, 16, bias=True, asked_tf32=True)
ROW = {
    "kernel": "expand_kernel",
    "spills": 0,
    "shared_memory": 100_000,
    "estimate": 100_000,
    "tensor_memory": None,
    "instructions": {"wgmma": 4},
    "tf32": 0,
    "pendings": [0, 1],
    "serialized": False,
}


def test_rules_accept_clean_code():
    assert failures(CASE, ROW) == []
    assert failures(FP32, {**ROW, "instructions": {}, "pendings": []}) == []


@pytest.mark.parametrize(
    ("case", "broken", "named"),
    [
        pytest.param(CASE, {"spills": 8}, "spills 8", id="spills"),
        pytest.param(
            CASE, {"shared_memory": 300_000, "estimate": 300_000}, "shared memory 300000 of", id="shared"
        ),
        pytest.param(CASE, {"shared_memory": 100_001}, "above the estimate", id="estimate"),
        pytest.param(CASE, {"tensor_memory": 1024}, "tensor memory 1024", id="tensor-memory"),
        pytest.param(CASE, {"instructions": {"mma": 4}}, "no wgmma", id="matrix-instruction"),
        pytest.param(CASE, {"pendings": [0]}, "in flight", id="waits"),
        pytest.param(CASE, {"serialized": True}, "in flight", id="serialized"),
        pytest.param(FP32, {"tf32": 3}, "TF32 product", id="tf32"),
        pytest.param(TF32, {}, "no TF32", id="no-tf32"),
    ],
)
def test_rules_name_what_is_broken(case, broken, named):
    found = failures(case, {**ROW, **broken})
    assert len(found) == 1
    assert named in found[0]
