"""python -m lorafa_kernels doctor: tells what is here, passes what is right and fails what is wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accuracy import Budget
from conftest import TRITON

import lorafa_kernels
from lorafa_kernels.__main__ import main
from lorafa_kernels.checks import doctor
from lorafa_kernels.checks.blocks import BLOCKS, BlockOperands, draw_block, plain_block
from lorafa_kernels.checks.budget import draw_operands, lorafa_results, plain_formula, relative_error
from lorafa_kernels.linear import library
from lorafa_kernels.plan.choice import choose, planned_device
from lorafa_kernels.plan.config import KNOWN_DEVICES, KernelConfig, KernelPlan
from lorafa_kernels.plan.pin import PLAN_VARIABLE, pin_plan
from lorafa_kernels.plan.recipe import Problem, Recipe
from lorafa_kernels.plan.tables import CACHE_VARIABLE, Entry, Measured, cache_path, key_of, update_table

CPU = torch.device("cpu")
BLOCK_TRITON = "import sys; sys.modules['triton'] = None\n"
# The shapes of the report take half a minute; these, too, have outputs of 256 elements and more.
SMALL_SHAPES = ((20, 18, 17, 16), (17, 32, 24, 16))
SMALL = f"from lorafa_kernels.checks import doctor\ndoctor.CPU_SHAPES = {SMALL_SHAPES}\n"
CALL = "main(['doctor', '--device', 'cpu', '--verbose'])"
# A line that torch's CUDA build adds on a machine without a GPU.
UNSEEN_GPU = ["GPU"] if (torch.version.cuda or torch.version.hip) and not torch.cuda.is_available() else []
RUN = f"from lorafa_kernels.__main__ import main\nraise SystemExit({CALL})\n"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    # conftest may have set it, and a user has not.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def results(out: str, impl: str) -> list[str]:
    """The lines that give an error of `impl`."""
    return [line for line in out.splitlines() if line.split()[:1] == [impl] and "allowed" in line]


def assert_all_passed(out: str, impl: str) -> None:
    found = [(dtype, output) for _, dtype, output, *_ in map(str.split, results(out, impl))]
    blocks = [f"{block}.{output}" for block in ("group", "mlp") for output in ("y", "dx", "dB")]
    blocks += ["norm.y", "norm.dx"] if impl == "torch" else []
    assert found == [
        (dtype, output)
        for outputs in (("y", "dx", "dB"), ("nf4.y", "nf4.dx", "nf4.dB"), blocks)
        for dtype in ("fp32", "bf16", "fp16")
        for output in outputs
    ]
    assert all(line.endswith("  ok") for line in results(out, impl))


@pytest.mark.numerics
@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_report_with_triton():
    done = run("-m", "lorafa_kernels", "doctor", "--device", "cpu", "--verbose")
    assert done.returncode == 0, done.stdout + done.stderr
    import triton

    for fact in (
        f"lorafa_kernels {lorafa_kernels.__version__}",
        f"{'.'.join(map(str, sys.version_info[:3]))} (CPython)",
        torch.__version__,
        f"Triton         {triton.__version__}",
        "fp32, bf16, fp16, fp64: torch (x is on the CPU",
        "fp32 products on a GPU",
        "interpreter (proves the kernels' values, says nothing about speed",
        "everything passed",
    ):
        assert fact in done.stdout, fact
    for impl in ("reference", "torch", "triton"):
        assert_all_passed(done.stdout, impl)
    assert done.stdout.isascii() and not done.stderr


@pytest.mark.numerics
def test_report_without_triton():
    done = run("-c", BLOCK_TRITON + SMALL + RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton         not installed" in done.stdout
    assert "triton: not available: triton is not installed" in done.stdout
    assert not results(done.stdout, "triton")
    for impl in ("reference", "torch"):
        assert_all_passed(done.stdout, impl)


def test_the_verdict_comes_first_and_each_section_has_a_line(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CPU_SHAPES", SMALL_SHAPES)
    monkeypatch.setattr(doctor, "interpreted_checks", lambda: doctor.check("reference", CPU, "fp32"))
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(PLAN_VARIABLE, "library")
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    verdict, empty, *sections = said.out.splitlines()
    compared = 81 if TRITON else 78
    assert verdict == f"PASSED: all {compared} results are right" and empty == "" and said.err == ""
    heads = ["versions", "machine", "variables", *UNSEEN_GPU, "cpu", "checks"]
    assert [line.split()[0] for line in sections] == heads
    assert f"torch {torch.__version__}, " in sections[0] and f"{PLAN_VARIABLE}=library" in sections[2]
    assert "reference on cpu 36 of 36 right; torch on cpu 42 of 42 right; " in sections[-1]
    assert said.out.isascii()


def test_on_a_screen_it_says_that_it_takes_a_while(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_print_checks", lambda devices, say: doctor.Section([]))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for options, words in ([], "takes up to a minute"), (["--verbose"], ""):
        assert main(["doctor", "--device", "cpu", *options]) == 0
        said = capsys.readouterr().err
        assert words in said and bool(words) == bool(said)


def test_triton_that_cannot_be_imported_is_told_from_none(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: wrong ELF class')")
    done = run(
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lorafa_kernels.checks import doctor\n"
        "doctor._print_versions(print); print(doctor._print_interpreted(print).problems)",
    )
    assert done.returncode == 0, done.stderr
    assert "Triton         cannot be imported: ImportError: libtriton.so: wrong ELF class" in done.stdout
    assert "triton: not available" in done.stdout and done.stdout.endswith("()\n")


@pytest.mark.numerics
def test_wrong_implementation_fails_and_is_named(monkeypatch, capsys):
    right = library.forward

    def wrong(*args):
        y, z = right(*args)
        return y * 1.05, z

    monkeypatch.setattr(library, "forward", wrong)
    monkeypatch.setattr(doctor, "CPU_SHAPES", SMALL_SHAPES)
    monkeypatch.setattr(doctor, "interpreted_checks", list)
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "--device", "cpu", "--verbose"]) == 1
    out = capsys.readouterr().out
    summary = out[out.index("\nFAILED") :]
    assert "torch on cpu, fp32, y at M=" in summary
    assert "dB" not in summary and "reference" not in summary
    assert_all_passed(out, "reference")

    # In short: the verdict, what failed, a line for each section, what to do. An MLP's last layer goes the
    # same way.
    assert main(["doctor", "--device", "cpu"]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] not in ([], ["GPU"])]
    verdict, *wrong, versions, machine, cpu, checks, advice = said
    assert verdict == "FAILED: 9 of the checks; do not trust results of this installation"
    assert [line.partition(" at M=")[0].strip() for line in wrong] == [
        f"torch on cpu, {dtype}, {y}" for y in ("y", "nf4.y", "mlp.y") for dtype in doctor.CHECKED_DTYPES
    ]
    assert versions.startswith("versions  lorafa_kernels ") and machine.startswith("machine ")
    assert cpu.startswith("cpu       torch for fp32, bf16, fp16, fp64 (x is on the CPU")
    assert checks == "checks    reference on cpu 36 of 36 right; torch on cpu 33 of 42 right"
    assert "doctor --verbose" in advice


def test_raising_implementation_is_reported_in_any_locale():
    plant = (
        "from lorafa_kernels.linear import reference\n"
        "def wrong(*args):\n"
        "    raise ValueError('no x \\u00d7 A today\\nsecond line')\n"
        "reference.backward = wrong\n"
    )
    done = run(
        "-c", BLOCK_TRITON + SMALL + plant + RUN, LC_ALL="C", PYTHONIOENCODING="ascii:strict", PYTHONUTF8="0"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    summary = done.stdout[done.stdout.index("\nFAILED: 9") :]
    assert r"reference on cpu, bf16, y, dx, dB" in summary and r"ValueError: no x \xd7 A today" in summary
    assert_all_passed(done.stdout, "torch")


@pytest.mark.gpu
def test_report_on_a_gpu():
    pytest.importorskip("triton")
    done = run("-m", "lorafa_kernels", "doctor", "--device", "cuda", "--verbose")
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.cuda.get_device_name() in done.stdout and "Triton kernels: supported" in done.stdout
    assert "interpreter" not in done.stdout
    for impl in ("reference", "torch", "triton"):
        assert_all_passed(done.stdout, impl)


@pytest.mark.numerics
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_errors_and_budget_are_those_of_the_contract(impl, dtype):
    for found in doctor.check(impl, CPU, dtype):
        M, N, K, R = found.shape
        operands = draw_operands(M, K, N, R, doctor.CHECKED_DTYPES[dtype], CPU, factor_dtype=torch.float32)
        budget = Budget()
        got = lorafa_results(operands, impl)
        budget.add(operands, got)
        budget.check()
        exact, plain = plain_formula(operands, torch.float64), plain_formula(operands)
        assert found.error == relative_error(got[found.output], exact[found.output])
        assert found.plain == relative_error(plain[found.output], exact[found.output])
        roundoff = torch.finfo(torch.float32 if found.output == "dB" else operands.x.dtype).eps / 2
        assert found.allowed == 2 * found.plain + roundoff


def test_every_output_is_large_enough_to_measure():
    for M, N, K, R in (*doctor.CPU_SHAPES, *doctor.GPU_SHAPES, *SMALL_SHAPES):
        assert min(M * N, M * K, N * R) >= 256


@pytest.mark.numerics
@pytest.mark.parametrize("shape", [0, 1])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_not_finite_at_one_shape_fails(monkeypatch, wrong, shape):
    right = library.forward

    def forward(x, *args):
        y, z = right(x, *args)
        if x.shape[0] == doctor.CPU_SHAPES[shape][0]:
            y[0, 0] = wrong
        return y, z

    monkeypatch.setattr(library, "forward", forward)
    assert [(one.output, one.passed) for one in doctor.check("torch", CPU, "fp32")] == [
        ("y", False),
        ("dx", True),
        ("dB", True),
    ]


def failed(found):
    return [one.output for one in found if not one.passed]


@pytest.mark.numerics
def test_wrong_blocks_fail_by_name(monkeypatch):
    """Each by itself: a group, then a gated MLP, then a norm whose gradient is off."""
    from lorafa_kernels import norm
    from lorafa_kernels.group import ops as group
    from lorafa_kernels.mlp import ops as mlp

    right = group.group_backward

    def off(*args):
        dx, dBs = right(*args)
        return dx if dx is None else dx * 1.05, dBs

    with monkeypatch.context() as patch:
        patch.setattr(group, "group_backward", off)
        # The MLP is made of groups.
        assert failed(doctor.check_blocks("torch", CPU, "bf16"))[0] == "group.dx"
    with monkeypatch.context() as patch:
        right_gated = mlp.gated
        patch.setattr(mlp, "gated", lambda *args: right_gated(*args) * 1.05)
        assert failed(doctor.check_blocks("reference", CPU, "bf16")) == ["mlp.y", "mlp.dB"]
    with monkeypatch.context() as patch:
        right_norm = norm._backward
        patch.setattr(norm, "_backward", lambda *args: right_norm(*args) * 1.05)
        assert failed(doctor.check_blocks("torch", CPU, "fp16")) == ["norm.dx"]
        assert failed(doctor.check_blocks("reference", CPU, "fp16")) == []
    assert failed(doctor.check_blocks("torch", CPU, "fp16")) == []


def test_raising_block_is_a_failed_check_and_the_others_are_measured(monkeypatch):
    from lorafa_kernels.mlp import ops as mlp

    def raising(*args):
        raise RuntimeError("does not run here")

    monkeypatch.setattr(mlp, "gated_backward", raising)
    found = doctor.check_blocks("torch", CPU, "fp32")
    assert failed(found) == ["mlp"]
    assert next(one.problem for one in found if not one.passed) == "RuntimeError: does not run here"
    assert {"group.y", "group.dx", "group.dB", "norm.y", "norm.dx"} < {one.output for one in found}


@pytest.mark.numerics
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_drawn_large_enough_and_every_term_matters(name):
    M, N, K, R = doctor.CPU_SHAPES[0]
    operands = draw_block(name, M, N, K, R, torch.float64, CPU)
    exact = plain_block(name, operands)
    assert min(tensor.numel() for tensor in exact.values()) >= 256
    assert plain_block(name, operands, torch.float32)["y"].dtype == torch.float32
    for index, layer in enumerate(operands.layers):
        for term in ("weight", "bias", "lora_A", "lora_B"):
            changed = [*operands.layers]
            changed[index] = layer._replace(**{term: 1.1 * getattr(layer, term)})
            y = plain_block(name, BlockOperands(operands.x, changed, operands.dys))["y"]
            assert relative_error(y, exact["y"]) > 1e-2, (index, term)


@pytest.mark.numerics
def test_wrong_kernels_fail(triton_device, monkeypatch):
    from lorafa_kernels.linear import fused as linear

    right = linear.backward

    def backward(*args, **options):
        dx, dB = right(*args, **options)
        return dx, dB * 1.02

    monkeypatch.setattr(linear, "backward", backward)
    found = doctor.check("triton", torch.device(triton_device), "bf16")
    assert [one.output for one in found if not one.passed] == ["dB"]


@pytest.mark.parametrize(
    ("child", "problem"),
    [
        pytest.param(
            "import sys; print('[]'); print('a\\nboom', file=sys.stderr); sys.exit(3)",
            "ended with code 3: boom",
            id="exit",
        ),
        pytest.param("import os; os.abort()", "ended with code -6: no message", id="signal"),
        pytest.param("pass", "ended with code 0: no message", id="silent"),
        pytest.param("import time; time.sleep(60)", "took more than", id="hangs"),
    ],
)
def test_interpreter_that_dies_is_a_failed_check(monkeypatch, child, problem):
    real = subprocess.run
    monkeypatch.setattr(doctor, "INTERPRETER_LIMIT_S", 1 if "sleep" in child else 60)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: real([sys.executable, "-c", child], **options)
    )
    (found,) = doctor.interpreted_checks()
    assert not found.passed and problem in found.problem


def test_old_gpu_is_listed_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old 2000")
    properties = SimpleNamespace(name="Old 2000", major=7, minor=5, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    choose.cache_clear()
    assert not doctor._print_devices([torch.device("cuda:0")], print).problems
    choose.cache_clear()
    out = capsys.readouterr().out
    assert "cuda:0: Old 2000, compute capability 7.5, 16 GiB" in out
    why = "Old 2000 has compute capability 7.5" if TRITON else "triton is not installed"
    assert f"Triton kernels: not supported: {why}" in out
    assert "torch (" in out


@pytest.fixture
def h200(fake_gpu, monkeypatch, tmp_path):
    """A GPU that is not there, and an empty cache."""
    fake_gpu(KNOWN_DEVICES["sm_90"], "NVIDIA H200", (9, 0))
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return torch.device("cuda:0")


def test_plans_and_tables_are_listed(h200, capsys):
    assert not doctor._print_devices([h200], print).problems
    out = capsys.readouterr().out
    assert out.isascii()
    for fact in (
        f"user cache: none ({cache_path(planned_device(h200))})",
        "shipped table: none",
        "plans for M=2048 N=4096 K=4096 R=16, bfloat16",
        "source: heuristic (least predicted time, published figures of H200)",
        "predicted: ",
    ):
        assert fact in out, fact
    ((word, text),) = doctor._print_devices([h200], lambda line: None).lines
    assert (word, text.partition(" (")[0]) == ("cuda:0", "NVIDIA H200: triton for fp32, bf16, fp16")
    assert [line.strip() for line in out.splitlines() if line.strip() in ("forward", "backward")] == [
        "forward",
        "backward",
    ]


def test_measured_plan_is_named_as_such(h200, capsys):
    device = planned_device(h200)
    problem = Problem("forward", torch.bfloat16, 2048, 4096, 4096, 16)
    entry = Entry(key_of(problem), (Measured(Recipe("library"), 101.5, 20.0),))
    update_table(cache_path(device), device, [entry], {})
    assert not doctor._print_devices([h200], print).problems
    out = capsys.readouterr().out
    assert f"user cache: 1 entries, Triton {device.triton}" in out
    assert "source: user cache (measured library 101.5 us at M=2048 N=4096 K=4096 R=16 bfloat16" in out


def test_damaged_cache_does_not_end_the_report(h200, capsys):
    cache_path(planned_device(h200)).write_text("{")
    with pytest.warns(UserWarning, match="is ignored"):
        assert not doctor._print_devices([h200], print).problems
    assert "user cache: none" in capsys.readouterr().out


def test_pinned_plan_is_listed_and_one_that_cannot_run_is_a_problem(h200, capsys):
    with pin_plan("library"):
        assert not doctor._print_devices([h200], print).problems
    assert "source: pinned ('library' by pin_plan" in capsys.readouterr().out
    huge = KernelConfig(256, 256, 128, 16, 8, 8, 5)
    with pin_plan({"forward": Recipe("fused", KernelPlan(expand=huge))}):
        (problem,) = doctor._print_devices([h200], print).problems
    assert "the plan pinned by pin_plan cannot run on NVIDIA H200: expand needs" in problem


def test_device_that_breaks_is_a_problem_and_not_the_end(monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("the driver is on fire")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    problems = doctor._print_devices([torch.device("cuda:0"), CPU], print).problems
    assert len(problems) == 1 and "the driver is on fire" in problems[0]
    assert "x is on the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "the following arguments are required: COMMAND", id="none"),
        pytest.param(["doctr"], "invalid choice: 'doctr'", id="unknown"),
        pytest.param(["doctor", "--device", "gpu"], "device is 'gpu'", id="device"),
        pytest.param(["doctor", "--device", "cuda:99"], "cuda:99 is not there", id="no-gpu"),
        pytest.param(["doctor", "--fast"], "unrecognized arguments: --fast", id="option"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "doctor" in capsys.readouterr().out


def test_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "check", interrupted)
    assert main(["doctor", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
