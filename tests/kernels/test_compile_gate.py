"""Promise: every configuration that the heuristics pick compiles cleanly, without the GPU it is for."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")

from bench.gate import pipeline
from bench.gate.compile import (
    ARCHS,
    MIXED_ARCHS,
    WAITS_FIRST,
    LauncherCall,
    beside_cases,
    codes_cases,
    dequantise_cases,
    failures,
    gated_cases,
    group_cases,
    misplaced_wait,
    mixed_cases,
    serialized,
)
from lorafa_kernels.plan.config import KNOWN_DEVICES, OPS, KernelConfig, low_rank_block, makes_mask
from lorafa_kernels.plan.defaults import all_default_configs

# The first run compiles 150 kernels, which takes a busy machine more than ten minutes.
pytestmark = pytest.mark.timeout(3600)
ROOT = Path(__file__).resolve().parents[2]
# By the Triton that compiled: the one that development pins, and the oldest that is supported.
# Of Triton 3.6 the architecture of the machines that run it.
COMMITTED = {
    "3.7": (("compile-gate.json", "compile-gate-groups.json"), ARCHS),
    "3.6": (("compile-gate-triton-3.6.json",), ("sm_90",)),
}


def run_compiling(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python on the sources in `root`, in a process that does not interpret kernels: it could not compile
    them.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def run_gate(out: Path, *options: str | Path) -> dict:
    done = run_compiling(ROOT, "-m", "bench.gate", "--out", str(out), *map(str, options))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def cache(request, tmp_path_factory) -> Path:
    """Code that was compiled before, described by all that decides it (bench.gate.compile.key_of)."""
    kept = getattr(request.config, "cache", None)
    return Path(kept.mkdir("compile-gate")) if kept else tmp_path_factory.mktemp("compile-gate")


# The rest is left to make gate: it has the instructions of sm_80 or of sm_100.
OTHERS = ("sm_80", "sm_100", "gfx942")


@pytest.fixture(
    scope="module", params=["sm_90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in OTHERS)]
)
def quick(request, tmp_path_factory, cache):
    """The result of the gate's defaults for one architecture."""
    # One worker of pytest compiles, another finds what it compiled.
    with (cache / f"lock-{request.param}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        out = tmp_path_factory.mktemp("gate") / "quick.json"
        return run_gate(out, "--quick", "--arch", request.param, "--cache", cache)


@pytest.mark.gate
def test_defaults_compile(quick):
    (arch,) = {row["arch"] for row in quick["rows"]}
    rows = [row for row in quick["rows"] if row["dtype"] == "bf16"]
    assert not [row for row in rows if row["failures"]]
    rows = [row for row in rows if not row["dropout"]]
    compiled = {(row["kernel"], row["layout"], row["R"]) for row in rows}
    products = {("shrink_kernel", "z"), ("grad_kernel", "dz, dB")}
    if arch != "gfx942":
        products.add(("recompute_kernel", "y"))
    wanted = {(*product, 64) for product in products}
    if arch == "sm_90":
        few = {("shrink_kernel", "dz"), ("shrink_sum_kernel", "z"), ("grad_kernel", "dB")}
        expand = {("expand_tma_kernel", "y"), ("expand_tma_kernel", "dx")}
        wanted |= {(*product, 16) for product in few | expand} | {(*product, 64) for product in expand}
    else:
        wanted |= {("expand_kernel", "y", 64), ("expand_kernel", "dx", 64)}
    for activation in ("silu", "gelu"):
        wanted.add(("gated_kernel", f"h: {activation}", 0))
        wanted.add(("gated_backward_kernel", f"dg, du: {activation}", 0))
    assert wanted <= compiled


@pytest.mark.gate
def test_defaults_compile_with_dropout(quick):
    (arch,) = {row["arch"] for row in quick["rows"]}
    rows = [row for row in quick["rows"] if row["dropout"]]
    large = "expand_tma_kernel" if arch == "sm_90" else "expand_kernel"
    wanted = {("shrink_kernel", "z", 8192), (large, "dx", 8192)}
    if arch != "gfx942":
        wanted |= {("recompute_kernel", "y", 16), ("recompute_kernel", "dx", 16)}
    assert wanted <= {(row["kernel"], row["layout"], row["M"]) for row in rows}
    assert all(row["spills"] == 0 and not row["failures"] for row in rows)


@pytest.mark.gate
@pytest.mark.parametrize("quick", ["sm_90"], indirect=True)
def test_hopper_kernels_keep_what_makes_them_fast(quick):
    """The figures that the rules hold, once more as numbers: a kernel that is missing breaks no rule."""
    rows = [row for row in quick["rows"] if row["arch"] == "sm_90" and row["dtype"] == "bf16"]
    expands = [row for row in rows if row["kernel"] == "expand_tma_kernel" and row["M"] == 8192]
    assert {row["layout"] for row in expands} == {"y", "dx"}
    for row in expands:
        assert row["pendings"][0] == 1
        assert row["spills"] == 0 and not row["serialized"]
        assert row["shared_memory"] <= 227 * 1024
        assert row["dependent_launch"] == ["launch_dependents", "wait"][not row["beside"] :]
        assert row["launched_dependent"]
        assert row["instructions"].keys() == {"wgmma"}
        # One rank block, of numbers that need no rounding: 128 × 256 of the result do, in pairs.
        assert row["config"]["BLOCK_R"] == row["R"]
        assert row["conversions"] == 128 * 256 // (2 * row["threads"])
    beside = [row for row in rows if row["kernel"] == "grad_kernel" and row["beside"]]
    # dB of a layer, and of each member of a group, of which all but the last let the next one start.
    assert {(row["R"], row["followed"]) for row in beside} == {
        (16, False),
        (16, True),
        (64, False),
        (64, True),
    }
    for row in rows:
        if row["kernel"] == "shrink_kernel" or row in beside:
            assert row["shared_memory"] <= 45 * 1024
            assert row["registers"] * row["threads"] <= 22_000
            # Two operands a stage: one is in use, and behind the wait for the next one the rest is under way.
            if row["kernel"] == "shrink_kernel" and not row["dropout"]:
                assert row["copies_left"][0] == 2 * (row["config"]["num_stages"] - 2)
        if row["kernel"] in ("shrink_kernel", "shrink_sum_kernel", "grad_sum_kernel") and not row["pdl"]:
            assert row["dependent_launch"] == []
    triggers = {row["kernel"] for row in rows if row["dependent_launch"] == ["launch_dependents"]}
    assert triggers == {"shrink_kernel", "shrink_sum_kernel", "grad_sum_kernel", "total_tma_kernel"}
    for row in beside:
        assert row["dependent_launch"] == ["launch_dependents", "wait"][not row["followed"] :]
        assert row["launched_dependent"]
    totals = [row for row in rows if row["kernel"] == "total_tma_kernel" and row["beside"]]
    assert {(row["R"], row["dropout"]) for row in totals} == {(16, False), (16, True)}
    for row in totals:
        # What is left holds a block of dB's kernel, but for the mask.
        assert row["shared_memory"] <= (228 - 2 - 45) * 1024 and not row["launched_dependent"]
        assert row["registers"] * row["threads"] <= 192 * 256 or row["dropout"]
    without = [row for row in rows if row["kernel"] == "expand_tma_kernel" and not row["pdl"]]
    assert without and all(row["dependent_launch"] == [] for row in without)


@pytest.mark.gate
@pytest.mark.parametrize("quick", ["sm_90"], indirect=True)
def test_fp32_products_are_tf32_only_on_request(quick):
    ops = [f"{op}_kernel" for op in OPS]
    rows = [row for row in quick["rows"] if row["dtype"] == "fp32" and row["kernel"] in ops]
    assert {(row["kernel"], row["asked_tf32"], row["tf32"] > 0) for row in rows} == {
        (op, asked, asked) for op in ops for asked in (False, True)
    }


# What is undone, by which change of the sources, and what the gate says of it.
MUTATIONS = {
    "one stage for K": (
        "for start in range(0, K, BLOCK_K):\n        P = P_desc",
        "for start in tl.range(0, K, BLOCK_K, num_stages=1):\n        P = P_desc",
        "in flight",
    ),
    "a product before the loop": (
        "acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)",
        "acc = tl.dot(P_desc.load([start_m, 0]), Q_desc.load([start_n, 0]).T)",
        "in flight",
    ),
    "no wait for z": (
        "        if WAIT:\n            gdc_wait()\n        if not DROPOUT",
        "        if not DROPOUT",
        "before it waits",
    ),
    "no wait at all": ("gdc_wait()", "pass", "griddepcontrol"),
    "no wait without a tile": (
        "    if WAIT:\n        gdc_wait()\n\n\ndef",
        "\n\ndef",
        "some blocks do not enter",
    ),
    "a wait before the products": (
        "        acc = tl.zeros(",
        "        if WAIT:\n            gdc_wait()\n        acc = tl.zeros(",
        "before its first product",
    ),
    "too few registers": ('8, 8, 3, "tma", EPILOGUE', '8, 4, 3, "tma", EPILOGUE', "in flight"),
    "an fp32 lora_B": ("F = rounded(F, P.dtype)", "pass", "conversions"),
    "no launch_pdl": ('{"launch_pdl": True} if wait else {}', "{}", "launch_pdl"),
    "no room for shrink": ('8, 8, 3, "tma", EPILOGUE', '8, 8, 4, "tma", EPILOGUE', "that overlap"),
}
# What `function` returns with the sources of `folder`, in a process in which torch and Triton are imported.
APART = """
import json, os, pathlib, sys
from unittest import mock
import torch, triton

def apart(folder, function):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            sys.path.insert(0, str(folder))
            answer = function()
        except BaseException as error:
            answer = repr(error)
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        answer = json.load(answers)
    os.waitpid(child, 0)
    return answer
"""
MEASURE = """
cache, work, *folders = sys.argv[1:]

def failures():
    from bench.gate.compile import LauncherCall, measure, start_worker
    start_worker(work)
    case = LauncherCall("sm_90", "expand", "bf16", "fp32", "y", "even", 8192, 16, bias=True)
    return measure(case, 0, pathlib.Path(cache))["failures"]

print(json.dumps([str(apart(folder, failures)) for folder in folders]))
"""


@pytest.mark.gate
@pytest.mark.slow
def test_a_lost_property_fails_the_gate(tmp_path, cache):
    """The gate on copies of the sources in each of which one property of the Hopper kernel is undone."""
    folders = {}
    for mutation, (before, after, _) in MUTATIONS.items():
        folder = folders[mutation] = tmp_path / mutation.replace(" ", "-")
        for package in ("lorafa_kernels", "bench"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        names = "kernels/expand_tma.py", "kernels/tile.py", "plan/defaults.py"
        names = ("kernels/expand.py",) if "F = " in before else names
        files = [folder / "lorafa_kernels" / name for name in names]
        changed = [file for file in files if before in file.read_text()]
        assert len(changed) == 1, mutation
        changed[0].write_text(changed[0].read_text().replace(before, after))
    found = json.loads(run_apart(tmp_path / "work", MEASURE, cache, tmp_path / "work", *folders.values()))
    for (mutation, (_, _, named)), broken in zip(MUTATIONS.items(), found, strict=True):
        assert named in broken, f"{mutation}: {broken}"


def run_apart(folder: Path, code: str, *arguments: Path) -> str:
    folder.mkdir(exist_ok=True)
    done = run_compiling(folder, "-c", APART + code, *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


# How often the code was compiled, and what is known of it: first, again, with an entry of the cache that is
# cut off, with one in which a number changed, and after a change of a function that the kernel calls.
COMPILED = """
folder, cache, work = map(pathlib.Path, sys.argv[1:])

def compiled():
    from bench.gate import compile as gate
    gate.start_worker(str(work))
    case = gate.LauncherCall("sm_80", "shrink", "bf16", "fp32", "z", "even", 8192, 16)
    with mock.patch.object(gate, "compiled_code", wraps=gate.compiled_code) as compiling:
        row = gate.measure(case, 0, cache)
    del row["seconds"]
    return [compiling.call_count, row]

found = [apart(folder, compiled) for _ in range(2)]
(entry,) = cache.glob("*.json")
whole = entry.read_text()
entry.write_text(whole[: len(whole) // 2])
found.append(apart(folder, compiled))
changed = whole.replace('"registers": ', '"registers": 1')
assert changed != whole
entry.write_text(changed)
found.append(apart(folder, compiled))
tile = folder / "lorafa_kernels" / "kernels" / "tile.py"
before = "return index.to(tl.int64) * stride"
source = tile.read_text()
assert before in source
tile.write_text(source.replace(before, before + " + 0"))
found.append(apart(folder, compiled))
print(json.dumps([found, len(list(cache.glob("*.json")))]))
"""


@pytest.mark.gate
@pytest.mark.slow
def test_what_is_cached_is_compiled_again_when_it_is_damaged_or_its_source_changes(tmp_path):
    for package in ("lorafa_kernels", "bench"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    cache, work = tmp_path / "cache", tmp_path / "work"
    found, entries = json.loads(run_apart(work, COMPILED, tmp_path, cache, work))
    assert [compiled for compiled, _ in found] == [1, 0, 1, 1, 1]
    assert entries == 2
    first = found[0][1]
    assert first["failures"] == [] and first["registers"] > 0
    assert [row for _, row in found[:4]] == 4 * [first]


PIPELINED = {"kernel": "shrink_kernel", "copies_left": [12, 0]}
Z = LauncherCall("sm_90", "shrink", "bf16", "fp32", "z", "even", 8192, 16)
Y = replace(Z, op="expand", layout="y")


@pytest.mark.parametrize(
    ("case", "row", "broken"),
    [
        (Z, PIPELINED, ""),
        # Three of its eight stages; the waits of such a pipeline in the code of the default one.
        (replace(Z, given=KernelConfig(64, 0, 32, 16, 1, 4, 3)), PIPELINED, "9.7 KB under way"),
        (Z, PIPELINED | {"copies_left": [2, 0]}, "[2] copies under way behind a wait, 12 by its stages"),
        (Z, PIPELINED | {"copies_left": []}, "[] copies under way"),
        (replace(Z, M=512), PIPELINED, ""),
        (
            replace(Z, op="shrink_group", layout="all z", members=3),
            {"kernel": "shrink_group_kernel", "copies_left": [6, 0]},
            "[6] copies under way behind a wait, 8 by its stages",
        ),
        (replace(Y, R=64), {"kernel": "expand_tma_kernel", "config": {"BLOCK_R": 64}}, ""),
        (replace(Y, R=64), {"kernel": "expand_tma_kernel", "config": {"BLOCK_R": 16}}, "takes 4 rounds"),
        # By pointers it is the least rank block.
        (replace(Y, R=36), {"kernel": "expand_tma_kernel", "config": {"BLOCK_R": 16}}, ""),
    ],
)
def test_a_pipeline_with_too_little_under_way_fails_the_gate(case, row, broken):
    found = pipeline.failures(case, row, 4096)
    assert broken in " ".join(found) and bool(found) == bool(broken)


@pytest.mark.parametrize("version", COMMITTED)
def test_committed_kernels_have_enough_under_way(version):
    files, _ = COMMITTED[version]
    rows = [row for f in files for row in json.loads((ROOT / "bench" / "results" / f).read_text())["rows"]]
    names = {field.name for field in fields(LauncherCall)}
    judged = 0
    for row in rows:
        if row["arch"] == "sm_90" and row["op"] in ("shrink", "shrink_group", "expand"):
            case = LauncherCall(**{name: row[name] for name in names & row.keys()})
            assert pipeline.failures(case, row, 4096) == [], row
            judged += case.op != "expand" and case.M >= 1024 and not case.dropout
    assert judged >= 20


@pytest.mark.gate_all
@pytest.mark.timeout(7200)
def test_every_configuration_compiles(tmp_path):
    assert run_gate(tmp_path / "all.json")["failed"] == 0


@pytest.mark.parametrize("version", COMMITTED)
def test_committed_result_covers_the_heuristics(version):
    """After a change of the heuristics, run `make gate gate-3.6` and commit the results."""

    def code_of(config: KernelConfig, R: int) -> KernelConfig:
        """Into how many parts shrink cuts is a number in the launch: more than one are one code. So are the
        rank blocks of factors that TMA cannot address.
        """
        block = low_rank_block(config, R % 8 == 0) if config.variant == "tma" else config.BLOCK_R
        return replace(config, SPLIT_K=min(2, config.SPLIT_K), BLOCK_R=block)

    files, archs = COMMITTED[version]
    results = [json.loads((ROOT / "bench" / "results" / file).read_text()) for file in files]
    assert all(result["versions"]["triton"].startswith(version) for result in results)
    assert not any(result["failed"] for result in results)
    rows = [row for result in results for row in result["rows"]]
    assert not [row for row in rows if row["failures"]]
    compiled = {
        (
            row["arch"],
            row["op"],
            row["dtype"],
            row["dropout"],
            code_of(KernelConfig(**row["config"]), row["R"]),
        )
        for row in rows
        if row["dtype"] != "fp16"
    }
    wanted = {
        (arch, op, dtype, dropout, code_of(config, R))
        for arch in archs
        for op in OPS
        for dtype, operand_bytes in (("bf16", 2), ("fp32", 4))
        for dropout in (False, True)
        for config, (_, R, _, _) in all_default_configs(
            op, KNOWN_DEVICES[arch], operand_bytes, dropout
        ).items()
        if not dropout or any(makes_mask(op, forward, config) for forward in (False, True))
    }
    of_blocks = (*group_cases(archs), *gated_cases(archs), *beside_cases(archs))
    wanted |= {
        (c.arch, c.op, c.dtype, c.dropout, code_of(c.config, c.R)) for c in of_blocks if c.dtype != "fp16"
    }
    assert wanted == compiled


@pytest.mark.parametrize(("version", "suffix"), [("3.7", ""), ("3.6", "-triton-3.6")])
@pytest.mark.parametrize("kind", ["mixed", "codes"])
def test_committed_result_covers_what_is_asked_for(kind, version, suffix):
    """After a change of their kernels, run `make gate gate-3.6` and commit the results."""
    result = json.loads((ROOT / "bench" / "results" / f"compile-gate-{kind}{suffix}.json").read_text())
    assert result["versions"]["triton"].startswith(version) and not result["failed"]
    assert not [row for row in result["rows"] if row["failures"] or row["spills"]]

    def codes(rows) -> set[tuple]:
        return {
            (row["arch"], row["op"], row["dtype"], row["dropout"], tuple(row["config"].values()))
            + ((row["layout"],) if kind == "codes" else ())
            for row in rows
        }

    cases = mixed_cases(MIXED_ARCHS) if kind == "mixed" else codes_cases(ARCHS)
    wanted = [asdict(case) | {"config": asdict(case.config)} for case in cases]
    assert codes(result["rows"]) == codes(wanted)


@pytest.mark.gate
@pytest.mark.slow
def test_kernels_of_a_mixed_batch_compile(tmp_path):
    archs = ("sm_90", "gfx942")
    rows = run_gate(tmp_path / "mixed.json", "--quick", "--kernel", "mixed", "--arch", *archs)["rows"]
    kernels = {("mixed_shrink_kernel", False), ("mixed_expand_kernel", True), ("mixed_grad_kernel", False)}
    found = {(row["arch"], row["kernel"], row["dropout"]) for row in rows}
    assert found == {(arch, *kernel) for arch in archs for kernel in kernels}
    for row in rows:
        assert row["failures"] == [] and row["spills"] == 0 and row["dependent_launch"] == []
        assert row["instructions"].keys() == {"wgmma" if row["arch"] == "sm_90" else "mfma"}


@pytest.mark.gate
def test_codes_are_read_without_spills(tmp_path, cache):
    """For the fewest and the most rows, on the tensor cores that read the weight from registers."""
    options = ("--quick", "--kernel", "codes", "--arch", "sm_90", "--cache", cache)
    rows = run_gate(tmp_path / "codes.json", *options)["rows"]
    assert {(row["kernel"], row["M"]) for row in rows} == {("expand_codes_kernel", M) for M in (16, 128)}
    for row in rows:
        assert row["failures"] == [] and row["spills"] == 0 and row["dependent_launch"] == ["wait"]
        assert row["instructions"].keys() == {"wgmma" if row["M"] == 128 else "mma"}


def test_committed_result_has_the_kernel_of_quantised_weights():
    rows = json.loads((ROOT / "bench/results/compile-gate-quantised.json").read_text())["rows"]
    # Not its code, whose registers another Triton changes: what was compiled, and that it is clean.
    found = {(row["arch"], row["layout"], row["dtype"]) for row in rows}
    assert found == {(case.arch, case.layout, case.dtype) for case in dequantise_cases(ARCHS)}
    assert all(row["spills"] == 0 and not row["failures"] for row in rows)
    assert {row["kernel"] for row in rows} == {"dequantise_kernel"}


PRINT_FUSED = """
import triton
from bench.gate.compile import dequantise_cases, record, source, target_of
for case in dequantise_cases(("sm_90",), quick=True):
    for kernel, args, kwargs in record(case):
        code, options = source(case.arch, kernel, args, kwargs)
        ptx = triton.compile(code, target=target_of(case.arch), options=options).asm["ptx"]
        print(case.layout, "mul.rn.f32" in ptx, ptx.count("fma.rn"))
"""


@pytest.mark.gate
def test_quantised_weights_are_made_without_a_fused_multiply_add():
    """It rounds once where PyTorch rounds twice; the interpreter never fuses."""
    done = run_compiling(ROOT, "-c", PRINT_FUSED)
    assert done.stdout.splitlines() == ["W: nf4 True 0", "W: nested True 0"], done.stderr


CASE = LauncherCall("sm_90", "expand", "bf16", "fp32", "y", "even", 8192, 16, bias=True)
SHRINK = LauncherCall("sm_90", "shrink", "bf16", "fp32", "z", "even", 8192, 16)
AMPERE = LauncherCall("sm_80", "expand", "bf16", "fp32", "y", "even", 8192, 16, bias=True)
FP32 = LauncherCall("sm_90", "expand", "fp32", "fp32", "y", "even", 8192, 16, bias=True, pdl=False)
TF32 = LauncherCall(
    "sm_90", "expand", "fp32", "fp32", "y", "even", 8192, 16, bias=True, asked_tf32=True, pdl=False
)
ROW = {
    "kernel": "expand_tma_kernel",
    "last": True,
    "registers": 168,
    "threads": 256,
    "spills": 0,
    "shared_memory": 100_000,
    "estimate": 100_000,
    "tensor_memory": None,
    "instructions": {"wgmma": 4},
    "tf32": 0,
    "pendings": [1, 0],
    "serialized": False,
    "dependent_launch": ["wait"],
    "launched_dependent": True,
    "misplaced_wait": [],
    "conversions": None,
    "config": {"BLOCK_R": 64},
    # Behind the wait of a shrink of eight stages.
    "copies_left": [12, 0],
}
# dB of a group, and the dx that it runs beside.
MEMBERS = LauncherCall("sm_90", "grad", "bf16", "fp32", "dB of all", "even", 8192, 16, members=3, beside=True)
FOLLOWED = {
    **ROW,
    "kernel": "grad_kernel",
    "registers": 58,
    "threads": 128,
    "shared_memory": 40_000,
    "dependent_launch": ["launch_dependents", "wait"],
    "followed": True,
}
TOTAL = replace(MEMBERS, op="expand_total", layout="dx of all")
DX_OF_ALL = {
    **ROW,
    "kernel": "total_tma_kernel",
    "registers": 192,
    "dependent_launch": ["launch_dependents"],
    "launched_dependent": False,
    "pendings": [1, 0, 1, 0, 1, 0],
    "followed": False,
}
# What is left for the kernel before is not asked of it.
DROPS = replace(CASE, layout="dx", bias=False, dropout=True)
ALONE = {**ROW, "dependent_launch": [], "launched_dependent": False}
FIRST = {
    **ALONE,
    "kernel": "shrink_kernel",
    "registers": 150,
    "threads": 128,
    "shared_memory": 40_000,
    "dependent_launch": ["launch_dependents"],
}


def test_rules_accept_clean_code():
    assert failures(CASE, ROW) == []
    assert failures(CASE, {**ROW, "conversions": 64}) == []
    assert failures(SHRINK, FIRST) == []
    assert failures(MEMBERS, FOLLOWED) == []
    assert failures(MEMBERS, {**FOLLOWED, "followed": False, "dependent_launch": ["wait"]}) == []
    assert failures(TOTAL, DX_OF_ALL) == []
    assert failures(replace(TOTAL, dropout=True), {**DX_OF_ALL, "registers": 255}) == []
    assert failures(DROPS, {**ROW, "registers": 250}) == []
    assert failures(replace(SHRINK, dropout=True), {**FIRST, "serialized": True}) == []
    assert failures(DROPS, {**ROW, "misplaced_wait": [WAITS_FIRST]}) == [WAITS_FIRST]
    portable = replace(DROPS, arch="sm_120")
    assert failures(portable, {**ROW, "instructions": {"mma": 4}, "misplaced_wait": [WAITS_FIRST]}) == []
    assert failures(FP32, {**ALONE, "instructions": {}, "pendings": []}) == []
    assert failures(AMPERE, {**ALONE, "instructions": {"mma": 4}, "pendings": []}) == []


@pytest.mark.parametrize(
    ("case", "row", "broken", "named"),
    [
        pytest.param(CASE, ROW, {"spills": 8}, "spills 8", id="spills"),
        pytest.param(
            AMPERE,
            {**ALONE, "instructions": {"mma": 4}},
            {"shared_memory": 300_000, "estimate": 300_000},
            "shared memory 300000 of",
            id="shared",
        ),
        pytest.param(CASE, ROW, {"shared_memory": 100_001}, "above the estimate", id="estimate"),
        pytest.param(CASE, ROW, {"tensor_memory": 1024}, "tensor memory 1024", id="tensor-memory"),
        pytest.param(CASE, ROW, {"instructions": {"mma": 4}}, "no wgmma", id="matrix-instruction"),
        pytest.param(CASE, ROW, {"pendings": [0, 1]}, "in flight", id="waits"),
        pytest.param(CASE, ROW, {"pendings": []}, "in flight", id="no-waits"),
        pytest.param(CASE, ROW, {"serialized": True}, "in flight", id="serialized"),
        pytest.param(CASE, ROW, {"dependent_launch": []}, "griddepcontrol", id="no-griddepcontrol"),
        pytest.param(CASE, ROW, {"launched_dependent": False}, "launch_pdl", id="no-launch-pdl"),
        pytest.param(CASE, ROW, {"misplaced_wait": ["waits too early"]}, "too early", id="misplaced-wait"),
        # Of 128 × 256 numbers by 256 threads, and more.
        pytest.param(CASE, ROW, {"conversions": 65}, "65 conversions, 64 of", id="conversions"),
        pytest.param(CASE, ROW, {"registers": 200}, "that overlap", id="registers-beside-shrink"),
        pytest.param(
            CASE,
            ROW,
            {"shared_memory": 190_000, "estimate": 190_000},
            "that overlap",
            id="shared-beside-shrink",
        ),
        pytest.param(
            SHRINK, FIRST, {"shared_memory": 46_081, "estimate": 50_000}, "that overlap", id="shrink-shared"
        ),
        pytest.param(SHRINK, FIRST, {"serialized": True}, "in flight", id="shrink-serialized"),
        pytest.param(SHRINK, FIRST, {"registers": 176}, "that overlap", id="shrink-registers"),
        pytest.param(SHRINK, FIRST, {"launched_dependent": True}, "launch_pdl", id="first-with-launch-pdl"),
        pytest.param(
            replace(SHRINK, pdl=False), FIRST, {}, "griddepcontrol", id="griddepcontrol-without-pdl"
        ),
        *[
            pytest.param(MEMBERS, FOLLOWED, broken, named, id=f"dB-of-all-{id}")
            for id, broken, named in (
                ("no-trigger", {"dependent_launch": ["wait"]}, "griddepcontrol"),
                ("no-wait", {"dependent_launch": ["launch_dependents"]}, "griddepcontrol"),
                ("trigger-of-the-last", {"followed": False}, "griddepcontrol"),
                ("launched-alone", {"launched_dependent": False}, "launch_pdl"),
                ("writes-early", {"misplaced_wait": ["writes the result"]}, "writes"),
                ("registers", {"registers": 130}, "that overlap"),
                ("shared", {"shared_memory": 46_081, "estimate": 50_000}, "that overlap"),
            )
        ],
        *[
            pytest.param(TOTAL, DX_OF_ALL, broken, named, id=f"dx-of-all-{id}")
            for id, broken, named in (
                ("no-trigger", {"dependent_launch": []}, "griddepcontrol"),
                ("waits", {"dependent_launch": ["launch_dependents", "wait"]}, "griddepcontrol"),
                ("dependent", {"launched_dependent": True}, "launch_pdl"),
                ("registers", {"registers": 200}, "that overlap"),
                ("shared", {"shared_memory": 190_000, "estimate": 190_000}, "that overlap"),
            )
        ],
        pytest.param(
            replace(TOTAL, beside=False), DX_OF_ALL, {}, "griddepcontrol", id="dx-of-all-triggers-for-nobody"
        ),
        pytest.param(DROPS, ROW, {"pendings": [0, 1]}, "in flight", id="waits-with-dropout"),
        pytest.param(DROPS, ROW, {"serialized": True}, "in flight", id="serialized-with-dropout"),
        pytest.param(FP32, ALONE, {"tf32": 3}, "TF32 product", id="tf32"),
        pytest.param(TF32, ALONE, {}, "no TF32", id="no-tf32"),
    ],
)
def test_rules_name_what_is_broken(case, row, broken, named):
    found = failures(case, {**row, **broken})
    assert len(found) == 1
    assert named in found[0]


PRODUCT = "      %acc_2 = ttng.warp_group_dot %P, %Q, %acc_1"
WAIT_IN_LOOP = '      %5 = tt.elementwise_inline_asm "griddepcontrol.wait; // dummy $0" {pure = false} -> i32'
WAIT_AT_END = WAIT_IN_LOOP[2:]
EARLY, UNFED, NOT_ALL = "before it waits", "before its first product", "some blocks do not enter"


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        pytest.param(["ttng.async_tma_copy_global_to_local %L["], [], id="no-wait"),
        pytest.param([PRODUCT, WAIT_AT_END, "tt.load %L_ptrs_1,", "tt.store %C"], [], id="portable"),
        pytest.param(["tt.load %P_ptrs", "%acc = tt.dot %P, %Q", WAIT_AT_END], [], id="fp32"),
        pytest.param(["ttng.tc_gen5_mma %P, %Q, %acc", WAIT_AT_END], [], id="blackwell"),
        pytest.param(
            ["async_tma_copy_global_to_local %P_desc[", PRODUCT, WAIT_IN_LOOP, WAIT_AT_END], [], id="tma"
        ),
        pytest.param([PRODUCT, WAIT_IN_LOOP], [NOT_ALL], id="in-the-loop-only"),
        pytest.param([WAIT_AT_END, PRODUCT], [UNFED], id="before-the-products"),
        pytest.param([WAIT_AT_END], [UNFED], id="without-products"),
        *[
            pytest.param([PRODUCT, first, WAIT_AT_END], [EARLY], id=id)
            for id, first in (
                ("L-by-tma", "ttng.async_tma_copy_global_to_local %L[%start_m]"),
                ("L-copied", "%t = ttg.async_copy_global_to_local %L_ptrs_7, %tile"),
                ("L-loaded", "%tile = tt.load %L_ptrs, %in_m"),
                ("F-by-tma", "ttng.async_tma_copy_global_to_local %F[%start_n]"),
                ("F-loaded", "%tile = tt.load %F_ptrs_3, %in_n"),
                ("C-by-tma", "ttng.async_tma_copy_local_to_global %C_desc["),
                ("C-stored", "tt.store %C_ptrs, %acc"),
            )
        ],
    ],
)
def test_where_a_kernel_waits(lines, named):
    found = misplaced_wait("\n".join(lines))
    assert len(found) == len(named)
    assert all(text in fault for text, fault in zip(named, found, strict=True))


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("ptxas info    : Used 171 registers, used 1 barriers", False),
        (
            "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized "
            "due to insufficient register resources for the wgmma pipeline in the function 'f'",
            True,
        ),
        (
            "ptxas info    : (C7517) warpgroup.wait is injected in around line 259 by compiler to allow use "
            "of registers defined by GMMA in function 'f'",
            True,
        ),
    ],
    ids=["clean", "C7511", "C7517"],
)
def test_what_ptxas_says_of_products_in_flight(log, expected):
    assert serialized(log) == expected
