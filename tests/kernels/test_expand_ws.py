"""expand with specialised warps: what can be said of it without a GPU. It compiles as the gate asks, is
launched without fault, and where it cannot run it says so or gives way. Nothing here computes with it:
tests/linear/test_specialised_numerics.py does, on a GPU.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stub_gpu
import torch

pytest.importorskip("triton")
pytest.importorskip("rich")

import triton
from accuracy import Budget

from bench.gate import specialised
from bench.gate.compile import LauncherCall, failures, ws_cases
from lorafa_kernels.checks.budget import draw_operands
from lorafa_kernels.kernels import expand as launcher
from lorafa_kernels.kernels.expand import expand
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, KernelConfig
from lorafa_kernels.plan.specialised import GLUON_VERSIONS, missing_for_ws, ws_configs

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).resolve().parents[2]
HOPPER = KNOWN_DEVICES["sm_90"]
WS = ws_configs(HOPPER, 2, 16)[0]
CASE = LauncherCall("sm_90", "expand", "bf16", "fp32", "y", "even", 8192, 16, bias=True, given=WS)
here = ".".join(triton.__version__.split(".")[:2])
needs_gluon = pytest.mark.skipif(here not in GLUON_VERSIONS, reason=f"Triton {triton.__version__}")
needs_stub = pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing()))


def run_python(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run Python on the sources in `root`, in a process that compiles kernels."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=root, env=kept | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )


# The compile gate


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory) -> list[dict]:
    """Rows of the gate for the first blocks, at ranks 16, 64 and 128."""
    kept = getattr(request.config, "cache", None)
    cache = kept.mkdir("compile-gate") if kept else tmp_path_factory.mktemp("cache")
    out = tmp_path_factory.mktemp("gate") / "ws.json"
    options = ("--kernel", "ws", "--quick", "--arch", "sm_90", "--cache", cache, "--out", out)
    done = run_python(ROOT, "-m", "bench.gate", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["rows"]


@pytest.mark.gate
@needs_gluon
def test_compiles_as_it_is_meant_to(compiled):
    """The figures that the rules hold, once more as numbers."""
    names = ("kernel", "layout", "factor_dtype", "R")
    axes = ("y", "dx"), ("fp32", "bf16"), (16, 64, 128)
    expected = {("expand_ws_z_kernel", *rest) for rest in itertools.product(*axes)}
    # F is rounded before, so that an fp32 one makes no code of its own.
    expected |= {("expand_ws_kernel", *rest) for rest in itertools.product(("y", "dx"), ("fp32",), axes[2])}
    assert {tuple(row[name] for name in names) for row in compiled} == expected
    for row in compiled:
        assert row["failures"] == []
        assert row["spills"] == row["local_memory"] == 0 and not row["serialized"]
        assert row["threads"] == 384 and row["registers"] == 168
        assert row["dealt"] == {"consumers": 200, "others": 104}
        assert row["shared_memory"] <= row["estimate"] <= 227 * 1024
        makes_z = row["kernel"] == "expand_ws_z_kernel"
        assert row["waits"] == ([1, 2, 0, 1, 0] if makes_z else [1, 1, 1, 0])
        assert row["flags"] == ([1, 1] if makes_z else [0, 0])
        assert row["dependent_launch"] == ([] if makes_z else ["wait"])
        assert row["launched_dependent"] == (not makes_z)
        assert row["instructions"].keys() == {"wgmma"}


# What is undone in the kernel, by which change of its source, and what the gate says of it.
MUTATIONS = {
    "no registers dealt out": ("        [LOADER_REGISTERS, LOADER_REGISTERS],\n", "", "no setmaxnreg"),
    "too few registers for the loader": ("constexpr(104)", "constexpr(24)", "local memory"),
    "too few for the consumers": ("constexpr(104)", "constexpr(168)", "no more than"),
    "a wait for each product": (
        "            acc = warpgroup_mma_wait(1, deps=(acc,))\n            mbarrier",
        "            acc = warpgroup_mma_wait(0, deps=(acc,))\n            mbarrier",
        "products are waited for as [1, 0, 1, 0]",
    ),
    "no fence": ("fence_async_shared()\n        mbarrier.arrive(ready)", "mbarrier.arrive(ready)", "fence"),
    "no wait for z": ("    if WAIT:\n        gdc_wait()\n", "", "griddepcontrol"),
    "a wait in the loop": (
        "    if WAIT:\n        gdc_wait()\n    phase = 0\n",
        "    phase = 0\n",
        "within its loop",
    ),
    "no launch_pdl": ('{"launch_pdl": True} if wait else {}', "{}", "launch_pdl"),
    "a stage more": ("STAGES=config.num_stages", "STAGES=config.num_stages + 1", "shared memory"),
}
# The same of the kernel that makes z.
MUTATIONS_Z = {
    "no registers dealt out": ("        [LOADER_REGISTERS, LOADER_REGISTERS],\n", "", "no setmaxnreg"),
    "a wait for each product": (
        "acc, low_rank = warpgroup_mma_wait(2, deps=(acc, low_rank))",
        "acc, low_rank = warpgroup_mma_wait(0, deps=(acc, low_rank))",
        "products are waited for as [1, 0, 0, 1, 0]",
    ),
    "a flag before the rows": ("            thread_barrier()\n", "", "a flag is raised after st.global"),
    "a flag that orders nothing": (
        '1, sem="release")',
        '1, sem="relaxed")',
        "flags are raised and read at [0, 1]",
    ),
    "no look at the flag": (
        '        while gl.atomic_add(flag, 0, sem="acquire") == 0:\n            pass\n',
        "",
        "flags are raised and read at [1, 0]",
    ),
    "no fence": ("fence_async_shared()\n        mbarrier.arrive(ready)", "mbarrier.arrive(ready)", "fence"),
}
MUTATED = """
import json, pathlib, sys, tempfile
from bench.gate.compile import measure, start_worker, ws_cases
start_worker(tempfile.mkdtemp())
case = next(case for case in ws_cases(("sm_90",), quick=True) if case.given.variant == sys.argv[1])
print(json.dumps(measure(case, 0)["failures"]))
"""


@pytest.mark.gate
@pytest.mark.slow
@needs_gluon
@pytest.mark.parametrize(
    ("variant", "mutation"),
    [*(("ws", name) for name in MUTATIONS), *(("ws_z", name) for name in MUTATIONS_Z)],
)
def test_a_lost_property_fails_the_gate(tmp_path, variant, mutation):
    before, after, named = (MUTATIONS if variant == "ws" else MUTATIONS_Z)[mutation]
    for package in ("lorafa_kernels", "bench"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    file = tmp_path / "lorafa_kernels" / "kernels" / f"expand_{variant}.py"
    source = file.read_text()
    assert source.count(before) == 1, mutation
    source = source.replace(before, after)
    if mutation == "a wait in the loop":
        tile = "        mbarrier.wait(empty, phase ^ 1)\n"
        assert source.count(tile) == 1
        source = source.replace(tile, tile + "        gdc_wait()\n")
    file.write_text(source)
    done = run_python(tmp_path, "-c", MUTATED, variant)
    assert done.returncode == 0, done.stderr
    assert named in done.stdout.splitlines()[-1], done.stdout


ROW = {
    "kernel": "expand_ws_kernel",
    "last": True,
    "registers": 168,
    "threads": 384,
    "spills": 0,
    "shared_memory": 190_000,
    "estimate": 194_000,
    "tensor_memory": None,
    "instructions": {"wgmma": 9},
    "tf32": 0,
    "conversions": 64,
    "pendings": [1, 1, 1, 0],
    "serialized": False,
    "dependent_launch": ["wait"],
    "launched_dependent": True,
    "misplaced_wait": [],
    "dealt": {"consumers": 200, "others": 104},
    "waits": [1, 1, 1, 0],
    "local_memory": 0,
    "unguarded": [],
    "flags": [0, 0],
}
MAKES_Z = replace(CASE, given=ws_configs(HOPPER, 2, 16, "ws_z")[0])
ROW_Z = {
    **ROW,
    "kernel": "expand_ws_z_kernel",
    "waits": [1, 2, 0, 1, 0],
    "flags": [1, 1],
    "dependent_launch": [],
    "launched_dependent": False,
}


def test_rules_accept_clean_code():
    assert failures(CASE, ROW) == []
    assert failures(MAKES_Z, ROW_Z) == []


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        pytest.param({"dealt": {}}, "no setmaxnreg", id="not-dealt"),
        pytest.param({"dealt": {"consumers": 168, "others": 40}}, "no more than the 168", id="nothing-won"),
        pytest.param({"dealt": {"consumers": 232, "others": 104}}, "are dealt out, of 168", id="too-many"),
        pytest.param({"waits": [1, 0, 1, 0]}, "waited for as [1, 0, 1, 0]", id="waits"),
        pytest.param({"waits": []}, "waited for as []", id="no-waits"),
        pytest.param({"local_memory": 4}, "4 instructions on local memory", id="local-memory"),
        pytest.param({"registers": 176}, "67584 registers", id="registers"),
        pytest.param({"unguarded": ["a warp arrives after st"]}, "arrives after st", id="unguarded"),
        pytest.param({"flags": [1, 0]}, "raised and read at [1, 0]", id="flags"),
        pytest.param({"spills": 8}, "spills 8", id="spills"),
        pytest.param({"shared_memory": 233_000, "estimate": 233_000}, "of 232448", id="shared-memory"),
        pytest.param({"misplaced_wait": ["waits too late"]}, "too late", id="misplaced-wait"),
        pytest.param({"launched_dependent": False}, "launch_pdl", id="no-launch-pdl"),
    ],
)
def test_rules_name_what_is_broken(broken, named):
    found = failures(CASE, {**ROW, **broken})
    assert len(found) == 1 and named in found[0], found


ARRIVE = "\t@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];"
STORE = "\tst.shared.v4.b16 [ %r122 + 0 ], { %rs1, %rs2, %rs3, %rs4 };"
RAISE = "\t@%p83 atom.global.gpu.release.exch.b32 %r386, [ %rd105 + 0 ], %r387;"
ROWS = "\t@%p82 st.global.b32 [ %rd101 + 0 ], { %r382 };"
FENCE, BARRIER = "\tfence.proxy.async.shared::cta;", "\tbar.sync \t3, 64;"
PRODUCT = "\twgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%r131},"


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        pytest.param([STORE, FENCE, BARRIER, ARRIVE], [], id="loader"),
        pytest.param(["\tst.shared.b32 \t[global_smem+193832], 1;", BARRIER, ARRIVE], [], id="dispatch"),
        pytest.param([PRODUCT, "\twgmma.wait_group.sync.aligned 1;", BARRIER, ARRIVE], [], id="consumer"),
        pytest.param([STORE, BARRIER, ARRIVE], ["without a fence"], id="no-fence"),
        pytest.param([BARRIER, STORE, FENCE, ARRIVE], ["arrives after fence"], id="no-barrier"),
        pytest.param([BARRIER, PRODUCT, ARRIVE], ["arrives after wgmma"], id="product-in-between"),
        pytest.param(["\t@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 9;"], [], id="producer"),
        pytest.param([STORE, "\tbar.warp.sync \t-1;", ARRIVE], [], id="hands-out-a-tile"),
        pytest.param([ROWS, BARRIER, RAISE], [], id="flag"),
        pytest.param([BARRIER, ROWS, RAISE], ["flag is raised after st.global"], id="flag-too-early"),
    ],
)
def test_what_may_come_before_an_arrival(lines, named):
    found = specialised.unguarded("\n".join(lines))
    assert len(found) == len(named)
    assert all(text in fault for text, fault in zip(named, found, strict=True)), found


CONSUMERS = (
    "    ttg.warp_specialize(%P) attributes {}\n    default {\n{consumers}\n      ttg.warp_yield\n    }\n"
)
WAIT = '      %5 = tt.elementwise_inline_asm "griddepcontrol.wait; // dummy $0" {pure = false} -> i32\n'
LOOP, LOAD = "      %c = scf.for %tile = %0 to %7 {\n", "        %v = tt.load %places, %inside\n"
COPY = "        ttng.async_tma_copy_global_to_local %P[%m, %k] %1, %bar\n"


@pytest.mark.parametrize(
    ("consumers", "producer", "loader", "named"),
    [
        pytest.param("", COPY, LOOP + LOAD, [], id="without"),
        pytest.param("", COPY, WAIT + LOOP + LOAD, [], id="right"),
        pytest.param("", COPY, LOOP + WAIT + LOAD, ["within its loop"], id="in-the-loop"),
        pytest.param("", COPY, LOAD + WAIT, ["reads before it waits"], id="too-late"),
        pytest.param(WAIT, COPY, WAIT + LOOP + LOAD, ["consumers wait"], id="consumers"),
        pytest.param("", WAIT + COPY, WAIT + LOOP + LOAD, ["producer waits"], id="producer"),
        pytest.param(WAIT, COPY, LOOP + LOAD, ["consumers", "no kind", "do not wait"], id="wrong-warps"),
    ],
)
def test_where_it_waits(consumers, producer, loader, named):
    ttgir = CONSUMERS.replace("{consumers}", consumers)
    ttgir += f"    partition0(%a: i32) num_warps(1) {{\n{producer}    }}\n"
    ttgir += f"    partition1(%a: i32) num_warps(2) {{\n{loader}    }}\n"
    found = specialised.misplaced_wait(ttgir)
    assert len(found) == len(named)
    assert all(text in fault for text, fault in zip(named, found, strict=True)), found


@pytest.mark.parametrize("version", GLUON_VERSIONS)
def test_committed_results_have_every_case(version):
    """After a change of the kernel or of its cases, run `make gate gate-3.6` and commit the results."""
    from bench.gate.launch import ws_cases as launched_cases

    suffix = "" if version == "3.7" else f"-triton-{version}"
    results = ROOT / "bench" / "results"
    found = json.loads((results / f"compile-gate-ws{suffix}.json").read_text())
    assert found["versions"]["triton"].startswith(version) and found["failed"] == 0
    assert not found["quick"] and not [row for row in found["rows"] if row["failures"]]
    names = ("dtype", "layout", "config")
    compiled = {(*(row[name] for name in names[:2]), KernelConfig(**row["config"])) for row in found["rows"]}
    assert compiled == {(case.dtype, case.layout, case.config) for case in ws_cases(("sm_90",))}
    found = json.loads((results / f"launch-gate-ws{suffix}.json").read_text())
    assert found["versions"]["triton"].startswith(version) and not found["core"]
    assert found["failed"] == 0 and not found["not_launched"]
    assert {row["case"] for row in found["rows"]} == {case.name for case in launched_cases()}


# The launch gate


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("launch") / "ws.json"
    done = run_python(ROOT, "-m", "bench.launch_gate", "--ws", "--core", "--out", out)
    assert out.exists(), done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert not found["not_launched"]
    return found["rows"]


@pytest.mark.gate
@needs_stub
@needs_gluon
def test_is_launched_without_fault(launched):
    assert not [f"{row['case']}: {fault}" for row in launched for fault in row["faults"]]
    rows = {row["case"]: row for row in launched}
    first = rows["layer plan=ws, one pass, PDL"]
    grad = ["grad_kernel", "grad_sum_kernel"]
    z = ["shrink_kernel", "shrink_sum_kernel"]
    assert first["launches"] == [*z, "expand_ws_kernel", *grad, "expand_ws_kernel"]
    assert first["dependent"] == [2, 5]
    makes_z = rows["layer plan=ws_z"]
    assert makes_z["launches"] == ["expand_ws_z_kernel", *grad, "expand_ws_z_kernel"]
    assert makes_z["dependent"] == []


@pytest.mark.gate
@needs_stub
@needs_gluon
def test_gives_way_where_tma_cannot_address_the_operands(launched):
    rows = [row for row in launched if "sizes=offset" in row["case"]]
    assert len(rows) == 2
    for row in rows:
        assert "expand_kernel" in row["launches"] and "shrink_kernel" in row["launches"]
        assert not [kernel for kernel in row["launches"] if "_ws_" in kernel]


# The launcher


def operands(M=70, K=40, N=72, R=8, dtype=torch.bfloat16, device="cpu"):
    """P, Q, L and F of y, in an order that TMA can address."""
    x, weight, z, lora_B = (
        torch.empty(shape, dtype=dtype, device=device) for shape in ((M, K), (N, K), (M, R), (N, R))
    )
    return x, weight.t(), z, lora_B.t()


PORTABLE = KernelConfig(64, 64, 32, 16, 4, 4, 2)


@pytest.mark.parametrize(
    ("limits", "version", "said"),
    [
        pytest.param(INTERPRETER, "3.7.1", "Triton's interpreter does not run Gluon", id="interpreter"),
        pytest.param(KNOWN_DEVICES["sm_100"], "3.7.1", "tensor cores of sm_90, not of sm_100", id="sm_100"),
        pytest.param(KNOWN_DEVICES["gfx942"], "3.7.1", "not of gfx942", id="amd"),
        pytest.param(HOPPER, "3.9.0", "as Triton 3.6 and 3.7 have it, not 3.9.0", id="version"),
        pytest.param(HOPPER, "3.60.0", "not 3.60.0", id="longer-version"),
    ],
)
def test_says_what_it_lacks(monkeypatch, limits, version, said):
    assert said in missing_for_ws(limits, version)
    launcher.warp_specialised.cache_clear()
    monkeypatch.setattr(launcher, "device_limits", lambda device: limits)
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(RuntimeError, match=f"expand_ws .*{said}"):
        expand(*operands(), config=WS, unaligned=PORTABLE)


def test_says_which_name_gluon_lacks(monkeypatch):
    name = "lorafa_kernels.kernels.expand_ws"
    monkeypatch.setattr(launcher, "device_limits", lambda device: HOPPER)
    monkeypatch.setattr(triton, "__version__", "3.7.99")
    monkeypatch.setitem(sys.modules, name, None)
    launcher.warp_specialised.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"names in Gluon of Triton 3\.7\.99: .*expand_ws"):
            expand(*operands(), config=WS, unaligned=PORTABLE)
    finally:
        launcher.warp_specialised.cache_clear()


@needs_gluon
def test_refuses_a_mask_and_a_rank_above_its_block(monkeypatch):
    monkeypatch.setattr(launcher, "device_limits", lambda device: HOPPER)
    seed = torch.tensor([1])
    with pytest.raises(ValueError, match="makes no mask"):
        expand(*operands(), config=WS, unaligned=PORTABLE, dropout_p=0.5, seed=seed)
    with pytest.raises(ValueError, match="got R = 24 and BLOCK_R = 16"):
        expand(*operands(R=24), config=WS, unaligned=PORTABLE)


@needs_gluon
@pytest.mark.parametrize("R", [16, 64, 128])
@pytest.mark.parametrize("layout, grid", [("y", (132,)), ("dx", (32,))])
def test_launches_the_blocks_of_its_configuration(monkeypatch, R, layout, grid):
    """About one block a multiprocessor, and none without a tile."""
    module = importlib.import_module("lorafa_kernels.kernels.expand_ws")
    given = {}
    monkeypatch.setattr(module, "_expand_ws_kernel", {grid: given.update})
    monkeypatch.setattr(launcher, "device_limits", lambda device: HOPPER)
    P, Q, L, F = operands(M=8192 if layout == "y" else 1024, K=512, N=1024, R=R, device="meta")
    if layout == "dx":
        Q, F = (torch.empty_strided(t.shape, (t.shape[1], 1), dtype=t.dtype, device="meta") for t in (Q, F))
    for config in ws_configs(HOPPER, 2, R)[:1]:
        expand(P, Q, L, F, config=config)
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R", "GROUP_M", "num_warps"):
            assert given[name] == getattr(config, name)
        assert given["STAGES"] == config.num_stages and given["TRANSPOSED"] == (layout == "y")
        columns = config.BLOCK_N // config.EPILOGUE_SUBTILE
        assert given["C_desc"].block_shape == [config.BLOCK_M, columns]


def test_gives_way_to_the_other_configuration(triton_device):
    """x at an address that TMA cannot take: the portable kernel computes, on any device."""
    inputs = draw_operands(33, 40, 72, 8, torch.float16, triton_device, bias=False)
    room = torch.zeros(inputs.x.numel() + 4, dtype=torch.float16, device=triton_device)
    x = room[4:].view_as(inputs.x).copy_(inputs.x)
    z = (inputs.scaling * (x.float() @ inputs.lora_A.float().t())).half()
    y = expand(x, inputs.weight.t(), z, inputs.lora_B.t(), config=WS, unaligned=PORTABLE)
    exact = x.double() @ inputs.weight.double().t() + z.double() @ inputs.lora_B.double().t()
    plain = x @ inputs.weight.t() + z @ inputs.lora_B.t()
    budget = Budget()
    budget.compare({"y": y}, {"y": exact}, {"y": plain})
    budget.check()
    with pytest.raises(ValueError, match="no configuration is given"):
        expand(x, inputs.weight.t(), z, inputs.lora_B.t(), config=WS)


# Shared memory


@needs_gluon
@pytest.mark.skipif(here == "3.6", reason="Triton 3.6 cannot tell the places of a layout of shared memory")
@pytest.mark.parametrize("rows", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("columns", [16, 32, 64, 128, 256])
def test_parts_lie_where_the_tensor_cores_look_for_them(rows, columns):
    """The loader fills a block part by part, each in one piece; the product reads the block as a whole."""
    from lorafa_kernels.kernels.expand_ws import part_shape

    number, part_rows, part_columns = part_shape([rows, columns])
    assert number * part_rows * part_columns == rows * columns
    whole, part = places(rows, columns), places(part_rows, part_columns)
    filled = []
    for index in range(number):
        first_row = index % (rows // part_rows) * part_rows
        first_column = index // (rows // part_rows) * part_columns
        filled += [(first_row + row, first_column + column) for row, column in part]
    assert filled == whole


def places(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row and column of each element of a 16-bit block in shared memory, in the order of addresses."""
    from triton._C.libtriton import gluon_ir, ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.experimental.gluon import language as gl

    context = ir.context()
    ir.load_dialects(context)
    make_backend(GPUTarget("cuda", 90, 32)).load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    found = [(0, 0)]
    for row, column in builder.to_linear_layout(layout._to_ir(builder), [rows, columns]).offset_bases:
        found += [(r ^ row, c ^ column) for r, c in found]
    return found


@needs_gluon
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("R, K", [(1, 40), (3, 40), (8, 36), (24, 44)])
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_the_factor_of_z_gets_rows_for_tma(stored, R, K, dtype):
    """Any strides and any K: rows at multiples of 16 bytes, a copy where they are not."""
    from lorafa_kernels.kernels.expand_ws_z import rows_for_tma
    from lorafa_kernels.kernels.tile import addressable

    factor = torch.randn(R, K).to(dtype) if stored == "rows" else torch.randn(K, R).to(dtype).t()
    rows = rows_for_tma(factor.t(), torch.bfloat16)
    assert addressable(rows) and torch.equal(rows, factor.bfloat16())
    assert (rows.data_ptr() == factor.data_ptr()) == (
        dtype == torch.bfloat16 and stored == "rows" and K % 8 == 0
    )


def test_a_case_names_its_own_blocks():
    assert CASE.config == WS and replace(CASE, given=None).config.variant == "tma"
