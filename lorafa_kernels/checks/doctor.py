"""doctor: what is installed, what would run here, and whether it computes the right values.

Prints plain ASCII: the verdict, what failed, and a line for each section. With --verbose it prints every
value as it is checked, to paste into an issue, and the verdict last. The self-check runs every implementation
that is available on small layers and blocks (linear layers that share an input, a gated MLP, an RMS norm) and
compares y, dx and dB with the formula in fp64:

    error   = |got - exact| / |exact|   (Frobenius norms; exact: in fp64 from the same rounded inputs)
    allowed = 2 * error of plain PyTorch in the same dtype + unit roundoff of the output's dtype

Without a GPU the Triton kernels run in Triton's interpreter. A process either interprets or compiles them,
so that happens in a process of its own. Neither process imports anything from the current folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import __version__
from ..base.frozen import quantised
from ..command_line import one_line
from ..linear.quantised import quantised_linear
from ..nn.explain import DEFAULT_M, describe_limits, describe_plan, explain
from ..norm import FORMS
from ..plan.choice import choose, planned_device, triton_obstacle
from ..plan.pin import PLAN_VARIABLE
from ..plan.tables import CACHE_VARIABLE, cache_path, measured_main_loop, shipped_table, user_table
from .blocks import BLOCKS, block_results, draw_block, norm_results, plain_block, plain_norm
from .budget import allowed_error, draw_operands, lorafa_results, plain_formula, relative_error

CHECKED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {**CHECKED_DTYPES, "fp64": torch.float64}
# (M, N, K, R). The first leaves a rest in every block, the second fills its blocks; on a GPU it has rows
# enough for the large tiles, which would be slow in the interpreter. Every output has at least 256 elements,
# so that one draw measures its error well.
CPU_SHAPES = ((50, 258, 70, 7), (128, 256, 256, 16))
GPU_SHAPES = ((50, 258, 70, 7), (640, 512, 512, 16))
INTERPRETER_LIMIT_S = 300
Shape = tuple[int, int, int, int]
# What prints a line of the long report.
Say = Callable[[str], None]
# Variables of the environment that change what runs.
VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", PLAN_VARIABLE, CACHE_VARIABLE)


@dataclass(frozen=True)
class Check:
    """The error of one output at the shape where it came closest to what is allowed: "y", "dx" or "dB" of a
    layer, "group.y" and so on of a block.

    dtype is a key of CHECKED_DTYPES; shape is (M, N, K, R). `problem` says what was raised instead of a
    result; the errors are then NaN.
    """

    impl: str
    dtype: str
    output: str
    shape: Shape
    error: float = float("nan")
    plain: float = float("nan")
    allowed: float = float("nan")
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error as a share of what is allowed; inf where it is no number."""
        return math.inf if math.isnan(self.error) else self.error / self.allowed


def add_command(subparsers) -> None:
    """Add the command `doctor` to argparse's `subparsers`."""
    parser = subparsers.add_parser(
        "doctor",
        help="print versions, devices and the chosen implementation, and check the results",
        description="Check every available implementation against fp64, which takes up to a minute, and say "
        "whether all are right, what is installed, and which implementation impl='auto' picks. Exit code: 0 "
        "if every check passed, 1 if one failed.",
    )
    parser.add_argument(
        "--device",
        action="append",
        type=_device_argument,
        metavar="DEVICE",
        help="check this device only, such as cpu or cuda:0; may be repeated (default: the CPU, every GPU)",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="print every value as it is checked, plans and block sizes: what to paste into an issue",
    )
    parser.set_defaults(run=lambda options: run(options.device, options.verbose))


class Section(NamedTuple):
    """A part of the report. lines: (word in front, text) of what the short report says, texts with one word
    in one line; problems: what failed; compared: how many results were checked.
    """

    lines: list[tuple[str, str]]
    problems: Sequence[str] = ()
    compared: int = 0


def run(devices: list[torch.device] | None = None, verbose: bool = False) -> int:
    """Print the report for `devices` (default: the CPU and every GPU); return 0, or 1 if a check failed."""
    if devices is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(gpus))]
    if not verbose and sys.stderr.isatty():
        print("checking every implementation, which takes up to a minute ...", file=sys.stderr, flush=True)
    say = _print if verbose else _in_short
    sections = [
        _print_versions(say),
        _print_devices(devices, say),
        _print_numerics(devices, say),
        _print_checks(devices, say),
    ]
    problems = [problem for section in sections for problem in section.problems]
    if verbose:
        _print("")
        _print(f"FAILED: {len(problems)} of the above" if problems else "everything passed")
        for problem in problems:
            _print(f"  {problem}")
    else:
        _print_in_short(sections, problems)
    return 1 if problems else 0


def _print_in_short(sections: list[Section], problems: list[str]) -> None:
    """Print the verdict, what failed, and a line for each section."""
    if problems:
        _print(f"FAILED: {len(problems)} of the checks; do not trust results of this installation")
        for problem in problems:
            _print(f"  {problem}")
    else:
        compared = sum(section.compared for section in sections)
        _print(f"PASSED: all {compared} results are right")
    _print("")
    for section in sections:
        for word in dict.fromkeys(word for word, _ in section.lines):
            texts = [text for one, text in section.lines if one == word]
            _print(f"{word:9s} {'; '.join(texts)}")
    if problems:
        _print(
            "\nTo report it, paste the output of `python -m lorafa_kernels doctor --verbose` into an issue."
        )


def _in_short(text: str) -> None:
    """Where a line of the long report is not printed."""


def check(impl: str, device: torch.device, dtype: str) -> list[Check]:
    """Measure y, dx and dB of `impl` in `dtype`, a key of CHECKED_DTYPES, on small layers.

    Raises nothing that the implementation raises: that is a Check which did not pass.
    """

    def compare(shape: Shape) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        M, N, K, R = shape
        # As LoRAFALinear holds them: lora_B in fp32.
        operands = draw_operands(M, K, N, R, CHECKED_DTYPES[dtype], device, factor_dtype=torch.float32)
        got = lorafa_results(operands, impl)
        yield from _side_by_side(got, plain_formula(operands), plain_formula(operands, torch.float64))

    return _worst(impl, dtype, "y, dx, dB", _shapes(device), compare)


def check_quantised(impl: str, device: torch.device, dtype: str) -> list[Check]:
    """Measure y, dx and dB of a layer on an NF4 base, as check does, beside the formula with the weight that
    the base stands for.
    """

    def compare(shape: Shape) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        M, N, K, R = shape
        drawn = draw_operands(M, K, N, R, CHECKED_DTYPES[dtype], device, factor_dtype=torch.float32)
        base = quantised(drawn.weight, "nf4")
        operands = dataclasses.replace(drawn, weight=base.dense())
        x, lora_B = (tensor.detach().requires_grad_() for tensor in (operands.x, operands.lora_B))
        factors = operands.lora_A, lora_B, operands.bias
        y = quantised_linear(x, base, *factors, scaling=operands.scaling, impl=impl)
        dx, dB = torch.autograd.grad(y, (x, lora_B), operands.dy)
        got = {"y": y.detach(), "dx": dx, "dB": dB}
        exact = plain_formula(operands, torch.float64)
        yield from _side_by_side(got, plain_formula(operands), exact, "nf4.")

    shapes = _shapes(device)
    if impl == "triton" and device.type == "cpu":
        # In the interpreter a layer takes a second.
        shapes = shapes[:1]
    return _worst(impl, dtype, "nf4", shapes, compare)


def check_blocks(impl: str, device: torch.device, dtype: str) -> list[Check]:
    """Measure y, dx and dB of the blocks, as check does; the norm, which has no implementations, with
    "torch".
    """
    found = []
    for name in BLOCKS:

        def compare(shape: Shape, name: str = name) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
            operands = draw_block(name, *shape, CHECKED_DTYPES[dtype], device)
            got = block_results(name, operands, impl)
            exact = plain_block(name, operands, torch.float64)
            yield from _side_by_side(got, plain_block(name, operands), exact, f"{name}.")

        shapes = _shapes(device)
        if impl == "triton" and device.type == "cpu":
            # In the interpreter a block takes seconds.
            shapes = shapes[:1]
        found += _worst(impl, dtype, name, shapes, compare)
    if impl == "torch":
        found += _worst(
            impl, dtype, "norm", _shapes(device), lambda shape: _compare_norms(shape, device, dtype)
        )
    return found


def _compare_norms(
    shape: Shape, device: torch.device, dtype: str
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    M, N, *_ = shape
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2 * M + 1, N, generator=generator, dtype=torch.float64)
    x, dy, weight = wide.to(device, CHECKED_DTYPES[dtype]).split([M, M, 1])
    for form in FORMS:
        operands = x, weight[0], dy, form
        exact = plain_norm(*operands, torch.float64)
        yield from _side_by_side(norm_results(*operands), plain_norm(*operands), exact, "norm.")


def _side_by_side(
    got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], prefix: str = ""
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    for output, tensor in got.items():
        yield prefix + output, tensor, plain[output], exact[output]


def _shapes(device: torch.device) -> tuple[Shape, ...]:
    return CPU_SHAPES if device.type == "cpu" else GPU_SHAPES


def _worst(
    impl: str,
    dtype: str,
    what: str,
    shapes: Iterable[Shape],
    compare: Callable[[Shape], Iterable[tuple[str, Tensor, Tensor, Tensor]]],
) -> list[Check]:
    """Return for each output the Check that came closest to what is allowed, or a single one that names
    `what` if something was raised. compare(shape) -> (output, got, plain, exact).
    """
    worst: dict[str, Check] = {}
    for shape in shapes:
        try:
            for output, got, plain, exact in compare(shape):
                error, plain_error = relative_error(got, exact), relative_error(plain, exact)
                allowed = allowed_error(plain_error, got.dtype)
                one = Check(impl, dtype, output, shape, error, plain_error, allowed)
                if output not in worst or one.share > worst[output].share:
                    worst[output] = one
        except Exception as error:
            return [Check(impl, dtype, what, shape, problem=_describe(error))]
    return list(worst.values())


def print_interpreted_checks() -> None:
    """Check the Triton kernels on the CPU and print the results as one line of JSON, for interpreted_checks.

    For a process that was started with TRITON_INTERPRET=1.
    """
    checks = [found for some in _all_checks("triton", torch.device("cpu")) for found in some]
    print(json.dumps([dataclasses.asdict(found) for found in checks]))


_INTERPRETED = """
import sys
sys.path[:] = {paths!r}
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location({name!r}, {init!r}, submodule_search_locations=[{folder!r}])
sys.modules[{name!r}] = package = module_from_spec(spec)
spec.loader.exec_module(package)
from {name}.checks.doctor import print_interpreted_checks
print_interpreted_checks()
"""


def interpreted_checks() -> list[Check]:
    """Check the Triton kernels in Triton's interpreter, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONIOENCODING": "utf-8"}
    package = Path(__file__).resolve().parents[1]
    # The packages that this process has, and this one by its own path: `python -c` looks into the current
    # folder first, where a torch.py or triton.py can lie.
    command = _INTERPRETED.format(
        name=__package__.partition(".")[0],
        paths=[path for path in sys.path if path],
        init=str(package / "__init__.py"),
        folder=str(package),
    )

    def failed(problem: str) -> list[Check]:
        return [Check("triton", "all", "y, dx, dB", CPU_SHAPES[0], problem=problem)]

    try:
        child = subprocess.run(
            [sys.executable, "-c", command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=INTERPRETER_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return failed(f"the interpreter took more than {INTERPRETER_LIMIT_S} s")
    except OSError as error:
        return failed(f"the interpreter's process could not be started: {error}")
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return failed(f"the interpreter's process ended with code {child.returncode}: {last}")
    return [Check(**{**found, "shape": tuple(found["shape"])}) for found in json.loads(lines[-1])]


def _print_versions(say: Say) -> Section:
    cuda, hip = torch.version.cuda, torch.version.hip
    runtime = f"HIP {hip}" if hip else f"CUDA {cuda}" if cuda else "none in this torch"
    triton = _triton_version()
    where = f"{platform.platform()}, {os.cpu_count()} cores"
    say(f"lorafa_kernels {__version__}")
    say(f"Python         {platform.python_version()} ({platform.python_implementation()})")
    say(f"torch          {torch.__version__}")
    say(f"GPU runtime    {runtime}")
    say(f"Triton         {triton}")
    say(f"platform       {where}")
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    for variable in variables:
        say(f"environment    {variable}")
    text = (
        f"lorafa_kernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"Triton {triton}, GPU runtime: {runtime}"
    )
    lines = [("versions", text), ("machine", where)]
    return Section(lines + ([("variables", ", ".join(variables))] if variables else []))


def _print_devices(devices: list[torch.device], say: Say) -> Section:
    lines, problems = [], []
    say("\ndevices, and what impl='auto' picks there")
    if (torch.version.cuda or torch.version.hip) and not torch.cuda.is_available():
        unseen = "torch is built for GPUs but sees none: is the driver there, and new enough?"
        say(f"  {unseen}")
        lines.append(("GPU", unseen))
    for device in devices:
        try:
            long, short = _describe_device(device)
        except Exception as error:
            problems.append(f"{device}: cannot say what runs there: {_describe(error)}")
            short = f"FAILED: {_describe(error)}"
            long = [f"{device}: {short}"]
        say("\n".join(f"  {line}" for line in long))
        lines.append((str(device), short))
    return Section(lines, problems)


def _describe_device(device: torch.device) -> tuple[list[str], str]:
    """Say what runs on a device, in lines and in one."""
    lines, title = [str(device)], ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        obstacle = triton_obstacle(device, torch.float32)
        lines = [
            f"{device}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB",
            f"  Triton kernels: {f'not supported: {obstacle}' if obstacle else 'supported'}",
        ]
        title = f"{properties.name}: "
    picked: dict[tuple[str, str], list[str]] = {}
    for name, dtype in DTYPES.items():
        choice = choose("auto", device, dtype)
        picked.setdefault((choice.impl, choice.reason), []).append(name)
    lines += [f"  {', '.join(names)}: {impl} ({reason})" for (impl, reason), names in picked.items()]
    short = [f"{impl} for {', '.join(names)} ({reason})" for (impl, reason), names in picked.items()]
    explanation = explain((DEFAULT_M, 4096, 4096, 16), device=device, dtype=torch.bfloat16)
    if explanation.limits is not None:
        lines.append(f"  kernels: {describe_limits(explanation.limits)}")
        lines += [f"  {line}" for line in _describe_tables(device)]
        lines.append(f"  plans for {str(explanation).splitlines()[0]}")
        for op, planned in explanation.plans.items():
            lines.append(f"    {op}")
            lines += [f"      {line}" for line in describe_plan(op, planned)]
    return lines, title + "; ".join(short)


def _describe_tables(device: torch.device) -> list[str]:
    """Say which tables of measured plans there are for a device."""
    planned = planned_device(device)
    lines = []
    for name, table in (("user cache", user_table(planned)), ("shipped table", shipped_table(planned))):
        entries = "none" if table is None else f"{len(table.entries)} entries, Triton {table.triton}"
        lines.append(f"{name}: {entries}")
    shares = [
        f"{share:.2f} of the library's rate ({variant}, {words})"
        for variant, (share, words) in measured_main_loop(planned).items()
    ]
    lines.append(f"expand's main loop: {', '.join(shares) or 'assumed, tune measures it'}")
    path = cache_path(planned)
    lines[0] += f" ({path if path else f'no home folder, and no {CACHE_VARIABLE}'})"
    return lines


def _print_numerics(devices: list[torch.device], say: Say) -> Section:
    matmul = torch.backends.cuda.matmul
    products = "TF32" if matmul.fp32_precision == "tf32" else "IEEE fp32"
    say("\nnumerics")
    say(f"  fp32 products on a GPU: {products}")
    reduced = []
    for name in ("bf16", "fp16"):
        allowed = getattr(matmul, f"allow_{name}_reduced_precision_reduction")
        reduced += [name] if allowed else []
        answer = "yes" if allowed else "no"
        say(f"  library GEMMs on a GPU may reduce {name} products in {name}: {answer}")
    if all(device.type == "cpu" for device in devices):
        return Section([])
    text = f"fp32 products in {products}; library GEMMs may reduce in 16 bits: {', '.join(reduced) or 'no'}"
    return Section([("numerics", text)])


def _print_checks(devices: list[torch.device], say: Say) -> Section:
    found = Section([])
    compiled = False
    say("\nself-check: error against fp64, plain PyTorch's, what is allowed (2 x plain + unit roundoff)")
    for device in devices:
        say(f"  {device}")
        for impl in ("reference", "torch"):
            found = _joined(found, _print_results(device, _all_checks(impl, device), say))
        if device.type == "cpu":
            continue
        obstacle = triton_obstacle(device, torch.float32)
        if obstacle:
            say(f"    triton: not available: {obstacle}")
            found.lines.append(("checks", f"triton on {device} not available: {obstacle}"))
            continue
        compiled = True
        say("    triton: the first run compiles the kernels, which can take a minute")
        found = _joined(found, _print_results(device, _all_checks("triton", device), say))
    if not compiled:
        found = _joined(found, _print_interpreted(say))
    return found


def _joined(one: Section, other: Section) -> Section:
    return Section(one.lines + other.lines, [*one.problems, *other.problems], one.compared + other.compared)


def _all_checks(impl: str, device: torch.device) -> Iterator[list[Check]]:
    """Yield the lists of checks one by one, each as it is done."""
    for checked in (check, check_quantised, check_blocks):
        for dtype in CHECKED_DTYPES:
            yield checked(impl, device, dtype)


def _print_interpreted(say: Say) -> Section:
    try:
        import triton  # noqa: F401
    except ImportError:
        missing = f"triton: not available: {triton_obstacle(torch.device('cpu'), torch.float32)}"
        say(f"  {missing}")
        return Section([("checks", missing)])
    try:
        import numpy  # noqa: F401
    except ImportError:
        missing = (
            "triton: not checked: its interpreter needs numpy: pip install 'lorafa-kernels[interpreter]'"
        )
        say(f"  {missing}")
        return Section([("checks", missing)])
    device = "cpu, Triton's interpreter"
    say(f"  {device} (proves the kernels' values, says nothing about speed or about compiling them)")
    return _print_results(device, [interpreted_checks()], say)


def _print_results(device: object, results: Iterable[list[Check]], say: Say) -> Section:
    """Print a line for each Check of each list in `results` as they come; in short, what each implementation
    comes to.
    """
    failed: list[str] = []
    all_found: list[Check] = []
    for found in (found for checks in results for found in checks):
        all_found.append(found)
        what = f"{found.impl:9s} {found.dtype:4s} {found.output:8s}"
        if found.problem:
            text = found.problem
        else:
            text = f"error {found.error:.2e}  plain {found.plain:.2e}  allowed {found.allowed:.2e}"
        sizes = "M={} N={} K={} R={}".format(*found.shape)
        say(f"    {what}  {text}  {'ok' if found.passed else f'FAILED at {sizes}'}")
        if not found.passed:
            failed.append(f"{found.impl} on {device}, {found.dtype}, {found.output} at {sizes}: {text}")
    if not all_found:
        return Section([])
    right = sum(one.passed for one in all_found)
    text = f"{all_found[0].impl} on {device} {right} of {len(all_found)} right"
    return Section([("checks", text)], failed, len(all_found))


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError as error:
        return "not installed" if error.name == "triton" else f"cannot be imported: {_describe(error)}"
    except Exception as error:
        return f"cannot be imported: {_describe(error)}"
    return triton.__version__


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _device_argument(text: str) -> torch.device:
    try:
        device = explain((1, 1, 1, 1), device=text).device
    except ValueError as error:
        raise argparse.ArgumentTypeError(one_line(error)) from error
    if device.type == "meta":
        raise argparse.ArgumentTypeError("device is 'meta', which holds no data: there is nothing to check")
    if device.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=device).item()
        except Exception as error:
            raise argparse.ArgumentTypeError(f"device is {text!r}, which this torch cannot use") from error
    return device


def _print(text: str) -> None:
    # ASCII whatever the terminal's encoding: a driver's or an error's text must not end the report.
    print(text.encode("ascii", "backslashreplace").decode("ascii"), flush=True)
