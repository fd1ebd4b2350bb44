"""One layer on the CPU: forward, dx and dB, against PEFT with A frozen.

    python -m bench.layer

All contenders of a case run in one process and take turns; a ratio is formed within each round, of two times
taken moments apart, and its median and spread over the rounds are given. A contender is timed only after its
y, dx and dB were within the error budget: at most twice the plain formula's error against fp64, plus the unit
roundoff of the output's dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from lorafa_kernels import LoRAFALinear
from lorafa_kernels.accuracy import Operands, allowed_error, draw_operands, plain_formula, relative_error

from .environment import ROOT, environment, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# M, K, N, R.
SHAPES = ((2048, 1024, 1024, 16), (1024, 1024, 4096, 16), (256, 384, 384, 16))
HOST_SHAPE = (8, 64, 64, 8)
QUICK_SHAPES = ((24, 40, 32, 4),)
SAMPLE_SECONDS = 0.02
WARM_UP = 3
PEFT, PEFT_WIDE, FROZEN = "PEFT, A frozen", "PEFT, A frozen, fp32 adapters", "frozen nn.Linear"
BASELINES = (PEFT, PEFT_WIDE, FROZEN)


@dataclass(frozen=True)
class Case:
    """One shape and dtype. "host": so small that a call's time is Python's and the dispatcher's."""

    M: int
    K: int
    N: int
    R: int
    dtype: str
    threads: int = 1
    host: bool = False

    def __str__(self) -> str:
        host = " host time" if self.host else ""
        return f"{self.M}x{self.K}x{self.N} R={self.R} {self.dtype}{host}"


@dataclass
class Layer:
    """What is timed: y = module(x), then the gradients of x and, where there is one, of lora_B."""

    module: Callable[[Tensor], Tensor]
    lora_B: Tensor | None = None


@dataclass(frozen=True)
class Contender:
    name: str
    build: Callable[[Operands], Layer]
    adapted: bool = True
    missing: str | None = None  # why it cannot run here


@dataclass
class Row:
    """What became of one contender in one case and part. Times in ms; ratio = its time / the baseline's."""

    case: dict
    part: str
    contender: str
    status: str = "ok"  # or "failed", "not run"
    reason: str | None = None
    errors: dict = field(default_factory=dict)
    ms: dict | None = None
    ratios: dict = field(default_factory=dict)


Step = Callable[[], object]


def make_operands(case: Case, device: str = "cpu", bias: bool = True) -> Operands:
    # lora_B in the base's dtype: contenders with a wider one then compute with the same values.
    operands = draw_operands(
        case.M, case.K, case.N, case.R, DTYPES[case.dtype], device, bias=bias, scaling=2.0
    )
    operands.x.requires_grad_()
    return operands


def frozen_linear(operands: Operands) -> nn.Linear:
    N, K = operands.weight.shape
    linear = nn.Linear(K, N, bias=operands.bias is not None, device="meta")
    linear.weight = nn.Parameter(operands.weight, requires_grad=False)
    if operands.bias is not None:
        linear.bias = nn.Parameter(operands.bias, requires_grad=False)
    return linear


def build_frozen(operands: Operands) -> Layer:
    return Layer(frozen_linear(operands))


def build_lorafa(operands: Operands, impl: str = "auto", adapter_dtype: torch.dtype | None = None) -> Layer:
    R = operands.lora_A.shape[0]
    adapter_dtype = adapter_dtype or operands.x.dtype
    layer = LoRAFALinear.from_linear(
        frozen_linear(operands), r=R, lora_alpha=R * operands.scaling, adapter_dtype=adapter_dtype
    )
    layer.impl = impl
    with torch.no_grad():
        layer.lora_A.copy_(operands.lora_A)
        layer.lora_B.copy_(operands.lora_B)
    return Layer(layer, layer.lora_B)


def build_peft(operands: Operands, autocast_adapter_dtype: bool = False) -> Layer:
    from peft import LoraConfig, get_peft_model

    R = operands.lora_A.shape[0]
    config = LoraConfig(r=R, lora_alpha=R * operands.scaling, target_modules=["proj"])
    base = nn.Sequential()
    base.add_module("proj", frozen_linear(operands))
    get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = base.proj
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    lora_A.requires_grad_(False)
    with torch.no_grad():
        lora_A.copy_(operands.lora_A)
        lora_B.copy_(operands.lora_B)
    return Layer(layer, lora_B)


class Eager(nn.Module):
    """The formula as people write it; autograd keeps x Aᵀ and not x, since A is frozen."""

    def __init__(self, operands: Operands, adapter_dtype: torch.dtype | None = None):
        super().__init__()
        self.base = frozen_linear(operands)
        self.lora_A = nn.Parameter(operands.lora_A, requires_grad=False)
        self.lora_B = nn.Parameter(operands.lora_B.to(adapter_dtype or operands.x.dtype, copy=True))
        self.scaling = operands.scaling

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B.to(x.dtype))
        return self.base(x) + self.scaling * low_rank


def build_eager(operands: Operands, adapter_dtype: torch.dtype | None = None) -> Layer:
    module = Eager(operands, adapter_dtype)
    return Layer(module, module.lora_B)


def layer_contenders(dtype: str) -> list[Contender]:
    """The contenders of a CPU case. With an fp32 base, adapters in fp32 are no case of their own."""
    missing = None if importlib.util.find_spec("peft") else "peft is not installed"
    found = [
        Contender("lorafa_kernels", build_lorafa),
        Contender(PEFT, build_peft, missing=missing),
        Contender("eager LoRA-FA", build_eager),
        Contender(FROZEN, build_frozen, adapted=False),
    ]
    if dtype != "fp32":
        wide = partial(build_lorafa, adapter_dtype=torch.float32)
        default = partial(build_peft, autocast_adapter_dtype=True)
        found.insert(1, Contender("lorafa_kernels, fp32 lora_B", wide))
        found.insert(3, Contender(PEFT_WIDE, default, missing=missing))
    return found


def gradients(layer: Layer, y: Tensor, operands: Operands, keep_graph: bool = False) -> tuple[Tensor, ...]:
    inputs = (operands.x,) if layer.lora_B is None else (operands.x, layer.lora_B)
    return torch.autograd.grad(y, inputs, operands.dy, retain_graph=keep_graph)


def compute(layer: Layer, operands: Operands) -> dict[str, Tensor]:
    y = layer.module(operands.x)
    return dict(zip(("y", "dx", "dB"), (y.detach(), *gradients(layer, y, operands)), strict=False))


def whole_step(layer: Layer, operands: Operands) -> dict[str, Step]:
    """The part that is timed on the CPU: forward and both gradients as one."""
    return {"forward + dx + dB": lambda: gradients(layer, layer.module(operands.x), operands)}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN, so that what nobody writes cannot hold an earlier contender's answer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Judge:
    """Compares contenders with fp64 on the same operands; the plain formula's error sets what is allowed."""

    def __init__(self, operands: Operands):
        self.operands = operands
        # By whether there is an adapter. Without one lora_B is zero, and no dB is asked for.
        self._exact: dict[bool, dict[str, Tensor]] = {}
        self._plain: dict[bool, dict[str, float]] = {}
        without = replace(operands, lora_B=torch.zeros_like(operands.lora_B))
        for adapted, inputs in ((True, operands), (False, without)):
            exact, plain = plain_formula(inputs, torch.float64), plain_formula(inputs)
            if not adapted:
                del exact["dB"]
            self._exact[adapted] = exact
            self._plain[adapted] = {name: relative_error(plain[name], exact[name]) for name in exact}

    def errors(self, layer: Layer, adapted: bool) -> dict[str, dict]:
        """Return error, what is allowed and whether it is kept, for y, dx and (adapted) dB."""
        with poisoned_memory():
            got = compute(layer, self.operands)
        found = {}
        for name, exact in self._exact[adapted].items():
            if got[name].shape != exact.shape:
                raise ValueError(f"{name} has shape {tuple(got[name].shape)}, expected {tuple(exact.shape)}")
            error = relative_error(got[name], exact)
            allowed = allowed_error(self._plain[adapted][name], got[name].dtype)
            # JSON has no NaN.
            finite = math.isfinite(error)
            found[name] = {
                "error": error if finite else None,
                "allowed": allowed,
                "kept": finite and error <= allowed,
            }
        return found


def summary(samples: list[float], scale: float = 1.0) -> dict[str, float]:
    p20, median, p80 = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    numbers = {"median": median.item(), "p20": p20.item(), "p80": p80.item(), "min": min(samples)}
    return {name: float(f"{number * scale:.5g}") for name, number in numbers.items()}


def cpu_seconds(step: Step, calls: int) -> float:
    """Return the seconds of one call, as the mean of `calls`."""
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def calls_per_sample(steps: list[Step]) -> int:
    """Choose so many calls, for all contenders, that a sample is long against the clock's resolution."""
    return max(1, math.ceil(SAMPLE_SECONDS / min(cpu_seconds(step, 1) for step in steps)))


def interleave(
    steps: dict[str, Step], rounds: int, seconds: Callable[[Step], float], advance: Callable[[], object]
) -> dict[str, list[float]]:
    """Time every step once a round, each round starting with the next one; return the samples in seconds."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                samples[name].append(seconds(steps[name]))
            order.append(order.pop(0))
            advance()
    finally:
        if collecting:
            gc.enable()
    return samples


def measure(
    case: dict,
    operands: Operands,
    contenders: list[Contender],
    parts: Callable[[Layer, Operands], dict[str, Step]],
    choose_timer: Callable[[list[Step]], Callable[[Step], float]],
    *,
    rounds: int,
    baselines: tuple[str, ...],
    advance: Callable[[], object],
) -> list[Row]:
    """Check the contenders, time the ones that passed, part by part, and return a row for each and part.

    A contender that raises, or whose results are outside the budget, gets status "failed" and no time.
    """
    judge = Judge(operands)
    steps: dict[str, dict[str, Step]] = {}
    verdicts: dict[str, dict] = {}
    for contender in contenders:
        verdict = verdicts[contender.name] = {}
        if contender.missing:
            verdict.update(status="not run", reason=contender.missing)
            continue
        try:
            layer = contender.build(operands)
            verdict["errors"] = judge.errors(layer, contender.adapted)
            wrong = [name for name, error in verdict["errors"].items() if not error["kept"]]
            if wrong:
                verdict.update(status="failed", reason=f"outside the error budget: {', '.join(wrong)}")
            else:
                steps[contender.name] = parts(layer, operands)
        except Exception as error:
            verdict.update(status="failed", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    # The fp64 tensors are as large as everything else together.
    del judge

    rows = []
    for part in next(iter(steps.values()), {"all": None}):
        now = {name: of_layer[part] for name, of_layer in steps.items()}
        for step in now.values():
            for _ in range(WARM_UP):
                step()
        samples = interleave(now, rounds, choose_timer(list(now.values())), advance) if now else {}
        for contender in contenders:
            row = Row(case, part, contender.name, **verdicts[contender.name])
            if own := samples.get(contender.name):
                row.ms = summary(own, 1e3)
                for baseline in baselines:
                    if baseline in samples and baseline != contender.name:
                        pairs = zip(own, samples[baseline], strict=True)
                        row.ratios[baseline] = summary([a / b for a, b in pairs])
            rows.append(row)
    return rows


def show(rows: list[Row], title: str, baselines: tuple[str, ...], console: Console) -> None:
    """Print the table: a line per row, red where a check failed."""
    table = Table("case", "contender", "ms (p20–p80)", title=title)
    for baseline in baselines:
        table.add_column(f"time / {baseline}")
    parts = len({row.part for row in rows}) > 1
    previous = None
    for row in rows:
        case = f"{row.case['label']}, {row.part}" if parts else row.case["label"]
        cells = ["" if case == previous else case, row.contender]
        if row.ms is None:
            cells.append(f"{row.status}: {row.reason}")
        else:
            cells.append("{median:.4g} ({p20:.4g}–{p80:.4g})".format(**row.ms))
            for baseline in baselines:
                ratio = row.ratios.get(baseline)
                cells.append("{median:.3f} ({p20:.3f}–{p80:.3f})".format(**ratio) if ratio else "")
        if previous not in (None, case):
            table.add_section()
        table.add_row(*cells, style={"failed": "red", "not run": "yellow"}.get(row.status))
        previous = case
    console.print(table)


def make_console() -> Console:
    # Into a file or a log rich would assume 80 columns and break the lines.
    return Console(width=None if sys.stdout.isatty() else 170)


def make_progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Refreshed between samples only: a thread of its own would take time from them.
    return Progress(*columns, console=console, transient=True, auto_refresh=False)


def advance(progress: Progress, task) -> None:
    progress.advance(task)
    progress.refresh()


def cases(shapes, threads: int) -> list[Case]:
    layers = [Case(*shape, dtype, threads) for shape in shapes for dtype in DTYPES]
    return layers + [Case(*HOST_SHAPE, dtype, threads=1, host=True) for dtype in DTYPES]


def run(wanted: list[Case], rounds: int, console: Console, find_contenders=layer_contenders) -> list[Row]:
    """Measure the cases with a progress bar."""
    rows: list[Row] = []
    threads = torch.get_num_threads()
    try:
        with make_progress(console) as progress:
            task = progress.add_task("", total=len(wanted) * rounds)
            for case in wanted:
                progress.update(task, description=str(case))
                torch.set_num_threads(case.threads)
                rows += measure(
                    {"label": str(case), **asdict(case)},
                    make_operands(case),
                    find_contenders(case.dtype),
                    whole_step,
                    lambda steps: partial(cpu_seconds, calls=calls_per_sample(steps)),
                    rounds=rounds,
                    baselines=BASELINES,
                    advance=partial(advance, progress, task),
                )
    finally:
        torch.set_num_threads(threads)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.layer", description="One layer on the CPU against PEFT."
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (host time: 1)"
    )
    parser.add_argument("--rounds", type=int, help="rounds per case (31; with --quick 3)")
    parser.add_argument(
        "--out", type=Path, help="result file (bench/results/cpu/layer.json; with --quick none)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(argv)
    rounds = options.rounds or (3 if options.quick else 31)
    if options.threads < 1 or rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    out = options.out or (None if options.quick else ROOT / "bench" / "results" / "cpu" / "layer.json")
    try:
        return report(options.threads, rounds, out, options.quick)
    except KeyboardInterrupt:
        print("interrupted; no result was written", file=sys.stderr)
        return 130


def report(threads: int, rounds: int, out: Path | None, quick: bool) -> int:
    """Measure, write the result file, print the table; return 1 if a check failed."""
    console = make_console()
    about = environment(threads)
    rows = run(cases(QUICK_SHAPES if quick else SHAPES, threads), rounds, console)
    if out:
        result = {
            "what": "CPU times of one layer, forward + dx + dB; ratio = time / that of the named baseline",
            "command": "python -m bench.layer",
            "quick": quick,
            "rounds": rounds,
            "environment": about,
            "rows": [asdict(row) for row in rows],
        }
        write_json(out, result)
    show(rows, "CPU: one layer, forward + dx + dB", BASELINES, console)
    return 1 if any(row.status == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
