"""The launch gate: what is launched on a GPU, tried without one.

A few cases of bench/gate/launch.py run here on the Triton that is installed, in processes of their own:
kernels are interpreted in this one. `make gate` runs all of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stub_gpu

ROOT = Path(__file__).resolve().parents[2]
needs_stub = pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing()))
pytestmark = [pytest.mark.gate, needs_stub]

# 1,100 rows do not fill the device: their contraction is cut.
Z_OF_ALL = ["shrink_group_kernel", "shrink_group_sum_kernel"]
Z, EXPAND = ["shrink_kernel", "shrink_sum_kernel"], "expand_tma_kernel"
GRAD, DX_OF_ALL = ["grad_kernel", "grad_sum_kernel"], "total_tma_kernel"
DEPENDENT = "expand_tma_kernel, dependent"


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize("version, archs", [("3.7", ["sm_80", "sm_90", "sm_100"]), ("3.6", ["sm_90"])])
def test_committed_result_has_every_case(version, archs):
    """After a change of a kernel, a plan or a case, run `make gate gate-3.6` and commit the results."""
    from bench.gate.launch import all_cases

    file = (
        ROOT
        / "bench"
        / "results"
        / {"3.7": "launch-gate.json"}.get(version, f"launch-gate-triton-{version}.json")
    )
    if not file.exists():
        pytest.skip(f"{file.name} was not made yet: make gate gate-3.6")
    result = json.loads(file.read_text())
    assert result["versions"]["triton"].startswith(version) and result["archs"] == archs
    assert result["failed"] == 0 and not result["not_launched"] and not result["core"]
    assert not [row for row in result["rows"] if row["faults"] or "not_run" in row]
    wanted = {(arch, case.name) for arch in archs for case in all_cases(arch)}
    assert {(row["arch"], row["case"]) for row in result["rows"]} == wanted


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("launch") / "core.json"
    done = run_python("-m", "bench.launch_gate", "--core", "--arch", "sm_90", "--out", str(out))
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())


def test_core_is_launched_without_fault(core):
    assert not [f"{row['case']}: {fault}" for row in core["rows"] for fault in row["faults"]]
    assert not core["not_launched"]


def test_launches_of_a_llama_layer(core):
    """q, k and v in a group, o alone, gate and up in a group, down alone; forward, then backward."""
    row = next(row for row in core["rows"] if row["case"] == "llama")
    if "not_run" in row:
        pytest.skip(row["not_run"])
    dependent = [
        f"{kernel}, dependent" if index in row["dependent"] else kernel
        for index, kernel in enumerate(row["launches"])
    ]
    forward = [*Z_OF_ALL, EXPAND, EXPAND, EXPAND, *Z, DEPENDENT, *Z_OF_ALL, EXPAND, EXPAND, "gated_kernel"]
    forward += [*Z, DEPENDENT]
    down = [*GRAD, DEPENDENT, "gated_backward_kernel"]
    gate_and_up = [*GRAD, *GRAD, DX_OF_ALL]
    o = [*GRAD, DEPENDENT]
    q_k_v = [*GRAD, *GRAD, *GRAD, DX_OF_ALL]
    assert dependent == forward + down + gate_and_up + o + q_k_v


@pytest.mark.parametrize(("version", "suffix"), [("3.7", ""), ("3.6", "-triton-3.6")])
@pytest.mark.parametrize("kind", ["mixed", "codes"])
def test_committed_result_has_every_case_that_is_asked_for(kind, version, suffix):
    """After a change of their kernels or cases, run `make gate gate-3.6` and commit the results."""
    from bench.gate.launch import CODES_CASES, MIXED_CASES

    result = json.loads((ROOT / "bench" / "results" / f"launch-gate-{kind}{suffix}.json").read_text())
    assert result["versions"]["triton"].startswith(version) and not result["core"]
    assert result["failed"] == 0 and not result["not_launched"]
    cases = {"mixed": MIXED_CASES, "codes": CODES_CASES}[kind]
    wanted = {(arch, case.name) for arch in ("sm_80", "sm_90", "sm_100") for case in cases}
    assert {(row["arch"], row["case"]) for row in result["rows"]} == wanted


@pytest.mark.slow
def test_launches_of_a_mixed_batch(tmp_path):
    """Of three adapters with two ranks: as many launches as of one, forward and then backward."""
    out = tmp_path / "mixed.json"
    options = ("--mixed", "--core", "--arch", "sm_90", "--out", str(out))
    done = run_python("-m", "bench.launch_gate", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert row["faults"] == [] and not result["not_launched"] and row["repeated"] == 5
    low_rank = ["mixed_shrink_kernel", "mixed_expand_kernel"]
    assert row["launches"] == [*low_rank, "mixed_grad_kernel", *low_rank]


def test_nothing_is_launched_on_an_empty_grid(core):
    rows = [row for row in core["rows"] if "no K" in row["case"] or "no N" in row["case"]]
    assert len(rows) == 2
    assert all(all(blocks > 0 for blocks in grid) for row in rows for grid in row["grids"])


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("launch") / "faults.json"
    done = run_python("-m", "tests.stub_gpu", "tests/launch_faults.py", str(out))
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, said",
    {
        "misaligned_tensor": "base must be 16-byte aligned",
        "misaligned_map": r"address \d+ is no multiple of 16",
        "map_of_other_memory": r"parameter 0 of \d+ is 53545542544d4150",
        "box_over_256": r"box\[1\] is 512, not 1 to 256",
        "no_dependent_launch": "expand_tma_kernel is no dependent launch, and its plan says otherwise",
        "dependent_launch_unplanned": "shrink_kernel is a dependent launch, and its plan says otherwise",
        "argument_missing_in_call": "TypeError: .*missing 1 required positional argument",
        "argument_missing_in_launcher": r"shrink_kernel: parameter \d+ of \d+ is \w+, not ",
        "grid_of_0": r"shrink_kernel: asked for on a grid of \(0, 1\) and launched 0 times",
        "tuples_of_descriptors": "total_tma_kernel: AssertionError",
    }.items(),
)
def test_planted_fault_is_found(planted, name, said):
    assert re.search(said, "\n".join(planted[name])), planted[name]


@pytest.mark.slow
def test_what_is_planted_in_has_no_fault(planted):
    assert [found for name, found in planted.items() if name.startswith(("layer", "group"))] == [[]] * 3


@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_100"))]
)
def test_stub_is_called_a_stub(arch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        "x = torch.zeros(4, device='cuda')\n"
        "print(torch.cuda.get_device_name(x.device), os.environ['LORAFA_STUB_GPU'], sys.argv[1])\n"
        "sys.exit(3)\n"
    )
    done = run_python("-m", "tests.stub_gpu", "--arch", arch, str(script), "an argument")
    assert done.stdout.split("\n")[0] == f"STUB {arch} {arch} an argument", done.stderr
    assert done.returncode == 3
    assert "nothing was computed" in done.stderr


@pytest.mark.parametrize(
    "lacks, said",
    [
        ("compiler", "no C compiler"),
        ("headers", "no headers of Python"),
        ("cuda.h", "it has no cuda.h"),
        ("Linux", "the stub driver is for Linux"),
    ],
)
def test_what_a_machine_lacks_is_said(monkeypatch, tmp_path, lacks, said):
    """By it these tests are skipped there."""
    assert stub_gpu.missing() is None
    if lacks == "compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
    elif lacks == "headers":
        monkeypatch.setattr(stub_gpu.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    elif lacks == "cuda.h":
        monkeypatch.setattr(stub_gpu, "_headers", lambda: tmp_path)
    else:
        monkeypatch.setattr(stub_gpu.sys, "platform", "win32")
    assert said in stub_gpu.missing()


def test_limits_are_those_that_configurations_are_made_for():
    config = pytest.importorskip("lorafa_kernels.plan.config")
    for arch, device in stub_gpu.DEVICES.items():
        known = config.KNOWN_DEVICES[arch]
        assert (known.shared_memory, known.num_sms) == (device.shared_memory_optin, device.multiprocessors)
        assert known.dependent_launch == (device.major >= 9)


# The rules of the driver, one by one.


@pytest.fixture(scope="module")
def driver() -> stub_gpu.Stub:
    folder = stub_gpu.build(stub_gpu.cache_folder())
    stub = stub_gpu.Stub("sm_90", folder / "libcuda.so.1", mode=ctypes.RTLD_LOCAL)
    stub.library.stub_devices(2)
    return stub


@pytest.fixture(autouse=True)
def first_device(request):
    """It is current wherever a test calls the driver."""
    if "driver" in request.fixturenames:
        make_current(request.getfixturevalue("driver"), 0)


def make_current(driver: stub_gpu.Stub, device: int | None) -> None:
    context = ctypes.c_void_p()
    if device is not None:
        assert driver.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    assert driver.library.cuCtxSetCurrent(context) == 0


def encode(driver: stub_gpu.Stub, **changed) -> list[str]:
    """The faults of a map of a bf16 matrix (128, 512) by boxes of (128, 64), with some arguments changed."""
    use = {"type": 9, "address": 1 << 20, "dims": (512, 128), "strides": (1024,), "box": (64, 128)}
    use |= {"steps": (1, 1), "interleave": 0, "swizzle": 3, "fill": 0} | changed
    room = ctypes.create_string_buffer(256)
    aligned = (ctypes.addressof(room) + 127) // 128 * 128 + use.get("skewed", 0)
    many = lambda kind, values: (kind * len(values))(*values)  # noqa: E731
    status = driver.library.cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        use["type"],
        len(use["dims"]),
        ctypes.c_void_p(use["address"]),
        many(ctypes.c_uint64, use["dims"]),
        many(ctypes.c_uint64, use["strides"]),
        many(ctypes.c_uint32, use["box"]),
        many(ctypes.c_uint32, use["steps"]),
        use["interleave"],
        use["swizzle"],
        2,
        use["fill"],
    )
    (record,) = driver.take()
    assert bool(status) == bool(record["faults"])
    return record["faults"]


@pytest.mark.parametrize(
    "changed",
    [
        {"address": (1 << 20) + 8},
        {"dims": (0, 128)},
        {"dims": (512, (1 << 32) + 1)},
        {"strides": (1032,)},
        {"strides": (1 << 40,)},
        {"strides": (512,)},
        {"box": (64, 257)},
        {"box": (64, 0)},
        {"box": (4, 128)},
        {"box": (128, 128)},
        {"box": (32, 128), "swizzle": 1},
        {"box": (64, 128), "swizzle": 2},
        {"steps": (1, 9)},
        {"steps": (0, 1)},
        {"interleave": 1},
        {"type": 99},
        {"type": 1, "fill": 1},
        {"dims": (), "strides": (), "box": (), "steps": ()},
        {"skewed": 32},
    ],
    ids=str,
)
def test_rule_of_maps(driver, changed):
    assert len(encode(on("sm_90", driver), **changed)) >= 1


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"box": (256, 256), "swizzle": 0},
        {"dims": (1 << 32, 1 << 32), "strides": ((1 << 40) - 16,), "type": 0},
        {"type": 7, "box": (32, 8), "strides": (2048,)},
        {"fill": 1},
    ],
    ids=str,
)
def test_map_within_the_rules(driver, changed):
    assert encode(on("sm_90", driver), **changed) == []


class Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


CLUSTER, DEPENDENT_ATTRIBUTE, UNKNOWN = 4, 6, 60


def loaded(driver: stub_gpu.Stub) -> ctypes.c_void_p:
    """A function of the device that is current."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.library.cuModuleLoadData(ctypes.byref(module), b"") == 0
    assert driver.library.cuModuleGetFunction(ctypes.byref(function), module, b"kernel") == 0
    return function


def launch(
    driver,
    grid=(1, 1, 1),
    block=(128, 1, 1),
    shared_memory=0,
    asked=49152,
    attribute=None,
    function=None,
    stream=None,
):
    """The faults of a launch of a kernel that asked for so much shared memory."""
    function = function or loaded(driver)
    most_shared = 8
    assert driver.library.cuFuncSetAttribute(function, most_shared, asked) == 0
    attributes = (Attribute * 1)()
    if attribute:
        attributes[0].id, values = attribute
        attributes[0].value[: len(values)] = values
    config = Config(grid, block, shared_memory, stream, attributes, int(attribute is not None))
    status = driver.library.cuLaunchKernelEx(ctypes.byref(config), function, None, None)
    (record,) = driver.take()
    assert bool(status) == bool(record["faults"])
    return record["faults"]


def on(arch: str, driver: stub_gpu.Stub):
    driver.become(arch)
    return driver


@pytest.mark.parametrize(
    "arch, launched",
    [
        ("sm_90", {"grid": (0, 1, 1)}),
        ("sm_90", {"grid": (1 << 31, 1, 1)}),
        ("sm_90", {"grid": (1, 65536, 1)}),
        ("sm_90", {"grid": (1, 1, 65536)}),
        ("sm_90", {"block": (1056, 1, 1)}),
        ("sm_90", {"block": (32, 33, 1)}),
        ("sm_90", {"block": (1, 1, 65)}),
        ("sm_90", {"shared_memory": 50000}),
        ("sm_90", {"shared_memory": 232449, "asked": 232448}),
        ("sm_80", {"shared_memory": 170000, "asked": 166912}),
        ("sm_90", {"grid": (3, 1, 1), "attribute": (CLUSTER, (2, 1, 1))}),
        ("sm_90", {"grid": (16, 1, 1), "attribute": (CLUSTER, (16, 1, 1))}),
        ("sm_80", {"grid": (2, 1, 1), "attribute": (CLUSTER, (2, 1, 1))}),
        ("sm_80", {"attribute": (DEPENDENT_ATTRIBUTE, (1,))}),
        ("sm_90", {"attribute": (UNKNOWN, (1,))}),
    ],
    ids=str,
)
def test_rule_of_launches(driver, arch, launched):
    assert len(launch(on(arch, driver), **launched)) >= 1


@pytest.mark.parametrize(
    "arch, launched",
    [
        ("sm_90", {}),
        ("sm_80", {"grid": ((1 << 31) - 1, 65535, 65535), "block": (1024, 1, 1)}),
        ("sm_90", {"shared_memory": 232448, "asked": 232448}),
        ("sm_100", {"grid": (8, 1, 1), "attribute": (CLUSTER, (8, 1, 1))}),
        ("sm_90", {"attribute": (DEPENDENT_ATTRIBUTE, (1,))}),
    ],
    ids=str,
)
def test_launch_within_the_rules(driver, arch, launched):
    assert launch(on(arch, driver), **launched) == []


def test_a_function_serves_the_device_that_it_was_loaded_on(driver):
    function = loaded(driver)
    assert launch(driver, function=function) == []
    make_current(driver, 1)
    said = ["a function of device 0, launched while device 1 is current"]
    assert launch(driver, function=function) == said
    assert launch(driver) == []


def test_a_stream_serves_its_device(driver):
    stream, no_stream = ctypes.c_void_p(), 1 << 20
    assert driver.library.cuStreamCreate(ctypes.byref(stream), 0) == 0
    assert launch(driver, stream=stream) == []
    assert launch(driver, stream=no_stream) == [f"stream {no_stream} is none"]
    make_current(driver, 1)
    assert launch(driver, stream=stream) == ["on a stream of device 0, while device 1 is current"]


def test_nothing_is_launched_or_loaded_without_a_context(driver):
    function = loaded(driver)
    make_current(driver, None)
    assert "no context is current" in launch(driver, function=function)
    module = ctypes.c_void_p()
    assert driver.library.cuModuleLoadData(ctypes.byref(module), b"") != 0


def test_there_are_as_many_devices_as_were_asked_for(driver):
    device, context = ctypes.c_int(), ctypes.c_void_p()
    get, retain = driver.library.cuDeviceGet, driver.library.cuDevicePrimaryCtxRetain
    assert [get(ctypes.byref(device), ordinal) == 0 for ordinal in (-1, 0, 1, 2)] == [
        False,
        True,
        True,
        False,
    ]
    assert retain(ctypes.byref(context), 2) != 0


def test_an_event_is_recorded_on_its_device_and_waited_for_on_any(driver):
    event, stream = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.library.cuEventCreate(ctypes.byref(event), 0) == 0
    assert driver.library.cuStreamWaitEvent(None, event, 0) == 0
    assert driver.library.cuEventRecord(event, None) == 0
    make_current(driver, 1)
    assert driver.library.cuStreamCreate(ctypes.byref(stream), 0) == 0
    assert driver.library.cuStreamWaitEvent(stream, event, 0) == 0
    assert driver.library.cuEventRecord(event, stream) != 0
    early, record, wait, wrong = driver.take()
    assert early["of"] == -1 and wait["of"] == record["order"] < wait["order"]
    assert (record["device"], record["stream"], wait["device"], wait["stream"]) == (0, 0, 1, stream.value)
    assert wrong["faults"] == ["an event of device 0 on a stream of device 1"]


def test_ptx_says_how_large_parameters_are():
    ptx = """
.visible .entry _kernel(
	.param .align 64 .b8 _kernel_param_0[128],
	.param .u64 .ptr .global .align 1 _kernel_param_1,
	.param .u32 _kernel_param_2,
	.param .f32 _kernel_param_3,
	.param .u8 _kernel_param_4
)
.reqntid 128
{
	ld.param.u32 %r1, [_kernel_param_2];
"""
    assert stub_gpu.parameter_sizes(ptx) == [128, 8, 4, 4, 1]


def test_launches_of_few_rows_on_a_quantised_base(tmp_path):
    """Forward reads the codes, and starts while z is made; backward makes the weight for the library."""
    out = tmp_path / "codes.json"
    done = run_python("-m", "bench.launch_gate", "--codes", "--core", "--arch", "sm_90", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["launches"] == [*Z, "expand_codes_kernel", "dequantise_kernel"]
    assert row["faults"] == [] and row["dependent"] == [2] and row["repeated"] == 4


QUANTISED_STEP = """
import importlib
import torch
from lorafa_kernels.nn import LoRAFAQuantisedLinear, QuantisedLinear
stub = importlib.import_module("tests.stub_gpu")
for kind in ("nf4", "nf4-nested"):
    frozen = QuantisedLinear.from_linear(torch.nn.Linear(256, 512).bfloat16(), kind)
    layer = LoRAFAQuantisedLinear.from_linear(frozen, r=16)
    for _ in range(2):
        x = torch.zeros(300, 256, dtype=torch.bfloat16, requires_grad=True)
        with stub.recording() as launched:
            layer(x).sum().backward()
        names = [launch.kernel for launch in launched if launch.kernel == "dequantise_kernel"]
        print(kind, names, stub.faults(launched))
"""


def test_a_weight_of_codes_is_made_by_one_launch_forward_and_one_backward(tmp_path):
    """In the first step and, by the launches that are kept, in the second."""
    (tmp_path / "step.py").write_text(QUANTISED_STEP)
    done = run_python("-m", "tests.stub_gpu", "--arch", "sm_90", str(tmp_path / "step.py"))
    rows = [line for line in done.stdout.splitlines() if line.startswith("nf4")]
    made = ["dequantise_kernel"] * 2
    assert rows == [f"{kind} {made} []" for kind in ("nf4", "nf4", "nf4-nested", "nf4-nested")], done.stderr
