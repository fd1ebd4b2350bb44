"""The launch gate: every kernel of every plan, launched without a GPU.

    python -m bench.launch_gate --out bench/results/launch-gate.json

The library's own public functions run beside a stub driver (tests/stub_gpu) as beside a GPU: Triton compiles,
builds its launchers, encodes tensor maps and launches, and the driver judges each call by CUDA's rules. A
case fails that raises, launches something faulty, launches nothing where its plan has kernels, or launches a
kernel as a dependent of another where its plan does not say so, or not where it does. So does the gate if a
kernel of the library was not launched at all.

Cases are chosen pairwise: any two values of two options meet in one case at least. --core takes those few
that launch each kernel of Hopper, without most masks. --ws takes the cases of an expand with specialised
warps instead, which runs on sm_90 where a plan names it; --mixed those of a batch of several adapters, whose
kernels run where they are asked for; --codes those of few rows on a quantised base.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import pkgutil
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lorafa_kernels import kernels as library
from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.linear.api import lorafa_linear
from lorafa_kernels.linear.quantised import frozen_linear, quantised_linear
from lorafa_kernels.mixed.api import lorafa_linear_mixed
from lorafa_kernels.mixed.rows import Rows
from lorafa_kernels.mlp.activation import ACTIVATIONS
from lorafa_kernels.mlp.api import lorafa_gated_mlp
from lorafa_kernels.plan.config import KernelConfig, KernelPlan
from lorafa_kernels.plan.defaults import SPLIT_ROWS
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import OPERATIONS, Recipe

from ..measure.cases import DTYPES
from ..run.environment import ROOT, origin
from ..run.shell import write_rows

ARCHS = ("sm_80", "sm_90", "sm_100")
# Cases that are asked for by name.
KINDS = ("ws", "mixed", "codes")
PLANS = {
    "fused, one pass, PDL": Recipe("fused", KernelPlan(one_pass=True, pdl=True)),
    "fused, two passes, PDL": Recipe("fused", KernelPlan(one_pass=False, pdl=True)),
    "fused, one pass": Recipe("fused", KernelPlan(one_pass=True, pdl=False)),
    "fused, two passes": Recipe("fused", KernelPlan(one_pass=False, pdl=False)),
    "fused, dB beside dx": Recipe("fused", KernelPlan(one_pass=False, pdl=True, beside=True)),
    "library, one pass": Recipe("library", KernelPlan(one_pass=True)),
    "library": Recipe("library", KernelPlan(one_pass=False)),
}
# A rank block for every rank that it serves, and several tiles of so few rows.
WS = KernelConfig(128, 128, 64, 128, 8, 8, 3, "ws", EPILOGUE_SUBTILE=2)
WS_Z = KernelConfig(128, 128, 64, 128, 8, 8, 2, "ws_z", EPILOGUE_SUBTILE=2)
WS_PLANS = {
    "ws, one pass, PDL": Recipe("fused", KernelPlan(expand=WS, one_pass=True, pdl=True)),
    "ws, two passes": Recipe("fused", KernelPlan(expand=WS, one_pass=False, pdl=False)),
    "ws_z": Recipe("fused", KernelPlan(expand=WS_Z, one_pass=False, pdl=False)),
}
# Of few rows: the blocks that heuristics pick for 16.
CODES = KernelConfig(16, 32, 128, 64, 1, 4, 4, "codes")
CODES_PLANS = {
    "codes, PDL": Recipe("fused", KernelPlan(expand=CODES, pdl=True)),
    "codes": Recipe("fused", KernelPlan(expand=CODES, pdl=False)),
}
# K and N of a layer, and how its operands lie: rows at multiples of 16 bytes that fill whole blocks, that do
# not, rows at no multiple of 16 bytes, memory that begins at none, and nothing.
SIZES = {
    "even": (512, 768),
    "ragged": (520, 776),
    "odd": (509, 771),
    "offset": (512, 768),
    "no K": (0, 768),
    "no N": (512, 0),
}
EVERY_PLAN = PLANS | WS_PLANS | CODES_PLANS
MANY_ROWS = 1100
# A kernel that writes z or dz alone, behind which expand may start early.
LOW_RANK = ("shrink_kernel", "shrink_sum_kernel", "grad_sum_kernel")
# How the names begin of the kernels that write dx, behind which those of dB may.
WRITES_DX = ("expand", "total")


@dataclass(frozen=True)
class Scenario:
    """One forward and backward of a public function."""

    what: str = "layer"
    dtype: str = "bf16"
    factor_dtype: str = "fp32"
    R: int = 16
    M: int = MANY_ROWS
    sizes: str = "even"
    bias: bool = True
    dropout: bool = False
    needs: str = "dx, dB"
    plan: str = "fused, one pass, PDL"
    members: int = 1
    adapted: str = "all"  # which members have an adapter: "all", or "but the last"
    share_A: bool = False
    unused: bool = False  # the output of the first member is not used
    activation: str = "silu"

    @property
    def name(self) -> str:
        changed = {key: value for key, value in asdict(self).items() if value != getattr(Scenario, key)}
        return self.what + "".join(f" {key}={value}" for key, value in changed.items() if key != "what")


LAYERS = {
    "dtype": ("bf16", "fp16", "fp32"),
    "factor_dtype": ("fp32", "own"),
    "R": (1, 3, 4, 8, 16, 24, 64, 100, 128, 256),
    "M": (MANY_ROWS, SPLIT_ROWS, 16, 1),
    "sizes": tuple(SIZES),
    "bias": (True, False),
    "dropout": (False, True),
    "needs": ("dx, dB", "dx", "dB"),
    "plan": tuple(PLANS),
}
GROUPS = {
    **LAYERS,
    "what": ("group",),
    "R": (1, 4, 8, 16, 64, 256),
    "sizes": ("even", "ragged", "odd", "offset"),
    "members": (1, 2, 3, 4, 5),
    "adapted": ("all", "but the last"),
    "share_A": (False, True),
    "unused": (False, True),
}
MLPS = {
    "what": ("mlp",),
    "dtype": ("bf16", "fp16", "fp32"),
    "R": (4, 16),
    "M": (MANY_ROWS, 16),
    "sizes": ("even", "odd"),
    "dropout": (False, True),
    "needs": ("dx, dB", "dx", "dB"),
    "adapted": ("all", "but the last"),
    "activation": tuple(ACTIVATIONS),
}
# Of operands that TMA can address the kernels are launched, of others those that they give way to.
WS_LAYERS = {
    "dtype": ("bf16", "fp16"),
    "factor_dtype": ("fp32", "own"),
    "R": (1, 4, 16, 24, 128),
    "M": (MANY_ROWS, 16),
    "sizes": ("even", "ragged", "odd", "offset"),
    "bias": (True, False),
    "needs": ("dx, dB", "dx", "dB"),
    "plan": tuple(WS_PLANS),
}
WS_CORE = (
    Scenario(plan="ws, one pass, PDL"),
    Scenario(plan="ws, two passes", R=100, sizes="ragged", factor_dtype="own", bias=False, dtype="fp16"),
    Scenario(plan="ws, one pass, PDL", R=3, M=16, needs="dx"),
    Scenario(plan="ws, two passes", sizes="offset"),
    Scenario("group", plan="ws, one pass, PDL", members=3),
    Scenario(plan="ws_z"),
    Scenario(plan="ws_z", R=100, sizes="ragged", factor_dtype="own", bias=False, dtype="fp16", needs="dx"),
    Scenario(plan="ws_z", sizes="offset"),
    Scenario("group", plan="ws_z", members=2),
    # Dropout on x alone: of dx it has none to make.
    Scenario(plan="ws, one pass, PDL", dropout=True, needs="dB"),
)
# Three adapters, one of which has no rows, samples without one, and rows of an adapter that lie apart.
MIXED_PLACES = (1, 0, -1, 0, 1, 1, -1, 0, 0, 1)
MIXED_CASES = (
    Scenario("mixed"),
    Scenario("mixed", R=100, sizes="ragged", factor_dtype="own", bias=False, dtype="fp16"),
    Scenario("mixed", R=24, sizes="odd", dropout=True),
    Scenario("mixed", R=64, dropout=True, share_A=True),
    Scenario("mixed", dtype="fp32", share_A=True, needs="dx"),
    Scenario("mixed", sizes="offset", needs="dB"),
    Scenario("mixed", sizes="no K"),
    Scenario("mixed", sizes="no N"),
)
# On a quantised base whose codes are read in forward; activation is the kind of base, and K of NF4 a multiple
# of 64. needs "": a layer without an adapter.
CODES_KINDS = ("nf4", "nf4-nested", "int8", "fp8")
CODES_PLAN = "codes, PDL"
CODES_CASES = (
    Scenario("quantised", M=16, plan=CODES_PLAN, activation="nf4"),
    Scenario("quantised", M=128, R=100, plan="codes", activation="nf4-nested", bias=False, dtype="fp16"),
    Scenario("quantised", M=33, R=4, plan=CODES_PLAN, activation="nf4", dropout=True, sizes="offset"),
    Scenario("quantised", M=1, R=64, plan=CODES_PLAN, activation="int8", factor_dtype="own", sizes="odd"),
    Scenario("quantised", M=16, R=24, plan=CODES_PLAN, activation="fp8", needs="dx", sizes="ragged"),
    *(Scenario("quantised", M=16, plan="codes", activation=kind, needs="") for kind in CODES_KINDS),
)
# Beside Hopper, which has kernels of its own.
FEWER = {"R": (1, 8, 64, 256), "M": (MANY_ROWS, 16), "sizes": ("even", "odd"), "members": (2, 5)}
CORE = (
    Scenario("llama"),
    Scenario(sizes="odd", R=4),
    Scenario(M=16, plan="fused, two passes"),
    Scenario(M=SPLIT_ROWS, sizes="offset", dropout=True, plan="fused, two passes, PDL", factor_dtype="own"),
    Scenario(sizes="no K"),
    Scenario(sizes="no N"),
    Scenario("group", M=16, members=5, plan="library, one pass"),
    Scenario("group", members=5, needs="dx"),
    Scenario("group", M=SPLIT_ROWS, members=2, share_A=True, needs="dx", dtype="fp32"),
    Scenario(M=SPLIT_ROWS, plan="fused, dB beside dx", dropout=True),
    Scenario("group", plan="fused, dB beside dx", members=3),
)


def pairwise(options: dict[str, tuple], seed: int = 0) -> Iterator[Scenario]:
    """Yield few cases in which any two values of two options meet, the same ones in every run."""
    drawn = random.Random(seed)
    names = list(options)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]
    }
    while missing:
        # Of some cases with one missing pair in them, the one with the most.
        best: tuple[int, dict, set] = (0, {}, set())
        for (a, x), (b, y) in drawn.sample(sorted(missing, key=repr), min(24, len(missing))):
            values = {name: drawn.choice(options[name]) for name in names} | {a: x, b: y}
            pairs = {((c, values[c]), (d, values[d])) for c, d in itertools.combinations(names, 2)}
            if len(covered := pairs & missing) > best[0]:
                best = (len(covered), values, covered)
        missing -= best[2]
        yield Scenario(**best[1])


def all_cases(arch: str) -> list[Scenario]:
    """The cases of the whole gate for an architecture, each once."""
    grids = LAYERS, GROUPS, MLPS
    if arch != "sm_90":
        grids = tuple({key: FEWER.get(key, values) for key, values in grid.items()} for grid in grids)
    return list(dict.fromkeys((*CORE, *itertools.chain(*map(pairwise, grids)))))


def ws_cases() -> list[Scenario]:
    """The cases of --ws, each once."""
    return list(dict.fromkeys((*WS_CORE, *pairwise(WS_LAYERS))))


def operands(case: Scenario, N: int, K: int, adapted: bool, lora_A=None) -> LinearOperands:
    """One layer; its values are zeros, which nothing reads."""
    dtype = DTYPES[case.dtype]
    weight, bias = tensor(case, N, K), torch.zeros(N, dtype=dtype) if case.bias else None
    if not adapted:
        return LinearOperands(weight, bias)
    factor = {"dtype": DTYPES.get(case.factor_dtype, dtype), "requires_grad": "dB" in case.needs}
    lora_A = tensor(case, case.R, K) if lora_A is None else lora_A
    lora_B = torch.zeros((N, case.R), **factor)
    return LinearOperands(weight, bias, lora_A, lora_B, 2.0, 0.1 if case.dropout else 0.0)


def mixed_member(case: Scenario, N: int, K: int, number: int) -> LinearOperands:
    """One adapter; the second has another rank where lora_A is not shared."""
    R = case.R if case.share_A or number != 1 else max(1, case.R // 2 + 1)
    return operands(replace(case, R=R), N, K, True)


def quantised_ys(case: Scenario, x: torch.Tensor, N: int, K: int) -> list[torch.Tensor]:
    """y of a layer on a quantised base."""
    kind, dtype = case.activation, DTYPES[case.dtype]
    base = quantised(torch.zeros((N, K), dtype=dtype), kind)
    if not case.needs:
        return [frozen_linear(x, base, torch.zeros(N, dtype=dtype) if case.bias else None)]
    layer = operands(case, N, K, True)
    how = {"scaling": layer.scaling, "dropout_p": layer.dropout_p}
    return [quantised_linear(x, base, layer.lora_A, layer.lora_B, layer.bias, **how)]


def tensor(case: Scenario, rows: int, columns: int) -> torch.Tensor:
    """A matrix as case.sizes says; one at an offset begins 8 bytes behind a multiple of 16."""
    dtype = DTYPES[case.dtype]
    skipped = 8 // dtype.itemsize if case.sizes == "offset" else 0
    return torch.zeros(rows * columns + skipped, dtype=dtype)[skipped:].view(rows, columns)


def step(case: Scenario) -> None:
    """Run the forward and backward of a case."""
    K, N = SIZES[case.sizes]
    last = case.members - (case.adapted != "all")
    recipe = EVERY_PLAN[case.plan]
    # Only forward reads codes.
    pinned = {"forward": recipe} if case.plan in CODES_PLANS else dict.fromkeys(OPERATIONS, recipe)
    with pin_plan(pinned):
        if case.what == "llama":
            return llama_step()
        x = tensor(case, case.M, K).requires_grad_("dx" in case.needs)
        if case.what == "layer":
            layer = operands(case, N, K, True)
            more = {"scaling": layer.scaling, "dropout_p": layer.dropout_p}
            ys = [lorafa_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, **more)]
        elif case.what == "quantised":
            K = K // 64 * 64 if case.activation.startswith("nf4") else K
            x = tensor(case, case.M, K).requires_grad_("dx" in case.needs)
            ys = quantised_ys(case, x, N, K)
        elif case.what == "mixed":
            adapters = {number: mixed_member(case, N, K, number) for number in range(3)}
            for number, member in adapters.items():
                shared = adapters[0].lora_A if case.share_A else member.lora_A
                kept = {"weight": adapters[0].weight, "bias": adapters[0].bias, "lora_A": shared}
                adapters[number] = member._replace(**kept)
            x = x.view(len(MIXED_PLACES), -1, K) if K else x.view(len(MIXED_PLACES), MANY_ROWS // 10, 0)
            ys = [lorafa_linear_mixed(x, adapters, Rows.of(MIXED_PLACES, len(adapters)))]
        elif case.what == "group":
            members = []
            for index in range(case.members):
                shared = members[0].lora_A if case.share_A and members else None
                # Of several widths, as with grouped queries.
                members.append(operands(case, N if index == 0 else N // 2, K, index < last, shared))
            ys = list(lorafa_linear_group(x, members, share_A=case.share_A))
        else:
            gate, up = operands(case, N, K, True), operands(case, N, K, True)
            down = operands(case, K, N, case.adapted == "all")
            ys = [lorafa_gated_mlp(x, gate, up, down, activation=case.activation)]
        if case.unused and len(ys) > 1:
            del ys[0]
        ys = [y for y in ys if y.requires_grad]
        if ys:
            torch.autograd.backward(ys, [torch.zeros_like(y) for y in ys])


def llama_step() -> None:
    """A training step of one Llama layer, all of whose linear layers are adapted, in blocks."""
    import transformers

    from lorafa_kernels import LoRAFAConfig, apply_lorafa

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model = apply_lorafa(model, LoRAFAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    model.train()
    tokens = torch.zeros((MANY_ROWS // 275, 275), dtype=torch.int64)
    # Hidden states that need a gradient, as behind another layer.
    hidden = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=hidden).logits.sum().backward()


def judge(case: Scenario, arch: str) -> dict:
    """Run a case beside the stub driver of this process and return its row."""
    stub = importlib.import_module("tests.stub_gpu")
    begin = time.perf_counter()
    found, raised = [], []
    with stub.recording() as launched:
        try:
            step(case)
        except ImportError as error:
            return {"arch": arch, "case": case.name, "not_run": str(error), "launches": [], "faults": []}
        except Exception as error:
            raised = [f"raises {type(error).__name__}: {error}".splitlines()[0]]
    found += stub.faults(launched)
    # Once more, by the kernels that were kept.
    with stub.recording() as again:
        if not raised:
            step(case)
    found += [f"{fault}, the second time" for fault in stub.faults(again)]
    if not raised and list(map(_asked, again)) != list(map(_asked, launched)):
        found.append(f"launches {', '.join(launch.kernel for launch in again)} the second time")
    recipe = EVERY_PLAN[case.plan]
    # z of a layer without columns is filled with zeros: there is nothing to overlap.
    overlaps = recipe.kernels.pdl and arch != "sm_80" and 0 not in SIZES[case.sizes]
    for index, launch in enumerate(launched):
        before = launched[index - 1].kernel if index else None
        planned = overlaps and launch.kernel.startswith("expand") and before in LOW_RANK
        # dB's, which nothing waits for; of a group one behind another.
        in_row = before == "grad_kernel" and launched[index - 1].dependent
        behind_dx = launch.kernel == "grad_kernel" and (in_row or (before or "").startswith(WRITES_DX))
        runs_beside = recipe.kernels.beside and case.needs == "dx, dB"
        planned |= overlaps and runs_beside and behind_dx
        if launch.dependent != planned:
            a_or_no = "a" if launch.dependent else "no"
            found.append(f"{launch.kernel} is {a_or_no} dependent launch, and its plan says otherwise")
    adapters = case.members - (case.adapted != "all") if case.what == "group" else 1
    if not launched and not raised and recipe.name == "fused" and adapters:
        found.append("launches nothing")
    return {
        "arch": arch,
        "case": case.name,
        "launches": [launch.kernel for launch in launched],
        "grids": [list(launch.grid) for launch in launched],
        "dependent": [index for index, launch in enumerate(launched) if launch.dependent],
        "maps": [len(launch.maps) for launch in launched],
        "arguments": [launch.arguments for launch in launched],
        "shared_memory": [launch.shared_memory for launch in launched],
        "repeated": sum(launch.repeated for launch in again),
        "faults": raised + found,
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _asked(launch) -> tuple:
    """What a call asks for, whatever the tensors' addresses."""
    return launch.kernel, launch.grid, launch.dependent, launch.constants


def kernels() -> set[str]:
    """The names of the library's kernels, as launches have them."""
    modules = [
        importlib.import_module(f"{library.__name__}.{one.name}")
        for one in pkgutil.iter_modules(library.__path__)
    ]
    return {key.strip("_") for module in modules for key in vars(module) if key.endswith("_kernel")}


def kind_of(kernel: str) -> str:
    """Which cases launch a kernel: those of --ws, of --mixed, of --codes, or the others ("")."""
    kinds = {"_ws_": "ws", "mixed_": "mixed", "dequantise_": "codes", "_codes_": "codes"}
    return next((kind for part, kind in kinds.items() if part in kernel), "")


def not_launched(rows: list[dict], archs: tuple[str, ...], kind: str = "") -> list[str]:
    """Name the kernels that no case launched, by architecture; TMA is asked for on sm_90 alone. kind: as in
    kind_of.
    """
    missing = []
    for arch in archs:
        launched = {kernel for row in rows if row["arch"] == arch for kernel in row["launches"]}
        wanted = {kernel for kernel in kernels() if arch == "sm_90" or "tma" not in kernel}
        wanted = {kernel for kernel in wanted if kind_of(kernel) == kind}
        missing += [f"{arch}: {kernel} was not launched" for kernel in sorted(wanted - launched)]
    return missing


def run_worker(arch: str, options: argparse.Namespace, part: int, parts: int, folder: Path) -> list[dict]:
    """Run every parts-th case for an architecture in a process of its own, and return the rows."""
    out = folder / f"{arch}-{part}.jsonl"
    stub = (sys.executable, "-m", "tests.stub_gpu", "--arch", arch, "-m", "bench.launch_gate")
    command = [*stub, "--out", str(out), "--part", str(part), str(parts)]
    command += ["--core"] * options.core + [f"--{kind}" for kind in KINDS if getattr(options, kind)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    unset = ("TRITON_INTERPRET", "LORAFA_KERNELS_PLAN")
    kept = {key: value for key, value in os.environ.items() if key not in unset} | {"PYTHONPATH": path}
    # Nor a plan that was measured on this machine.
    kept["LORAFA_KERNELS_CACHE"] = str(folder / "no-cache")
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if len(rows) < len(part_of(arch, options, part, parts)):
        raise RuntimeError(f"the process for {arch} ended early:\n{done.stdout}{done.stderr}")
    return rows


def part_of(arch: str, options: argparse.Namespace, part: int, parts: int) -> list[Scenario]:
    for kind, cases in (("mixed", MIXED_CASES), ("codes", CODES_CASES)):
        if getattr(options, kind):
            return list(cases[:1] if options.core else cases)[part::parts]
    core, whole = (WS_CORE, ws_cases) if options.ws else (CORE, lambda: all_cases(arch))
    return list(core if options.core else whole())[part::parts]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launch_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--core", action="store_true", help="only a few cases, which launch most kernels")
    parser.add_argument("--ws", action="store_true", help="the cases of specialised warps alone, on sm_90")
    several = "the cases of a batch of several adapters alone"
    parser.add_argument("--mixed", action="store_true", help=several)
    few = "the cases of few rows on a quantised base alone"
    parser.add_argument("--codes", action="store_true", help=few)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--part", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        # In a process beside a stub driver.
        arch = os.environ["LORAFA_STUB_GPU"]
        torch.set_num_threads(1)
        with options.out.open("w") as file:
            for case in part_of(arch, options, *options.part):
                print(json.dumps(judge(case, arch)), file=file, flush=True)
        return 0
    if lacks := importlib.import_module("tests.stub_gpu").missing():
        parser.error(lacks)
    begin = time.perf_counter()
    now = origin("triton", "torch", "transformers")
    archs, workers = ("sm_90",) if options.ws else tuple(options.arch), options.workers
    parts = 1 if options.core else workers
    with tempfile.TemporaryDirectory(prefix="launch-gate-") as folder, ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(run_worker, arch, options, part, parts, Path(folder))
            for arch in archs
            for part in range(parts)
        ]
        rows = [row for job in jobs for row in job.result()]
    failed = [row for row in rows if row["faults"]]
    kind = next((kind for kind in KINDS if getattr(options, kind)), "")
    missing = not_launched(rows, archs, kind) if not options.core or archs == ("sm_90",) else []
    result = {
        "what": "kernels launched into a stub driver for GPUs that were not present: nothing was computed",
        "command": f"python -m bench.launch_gate{f' --{kind}' if kind else ''}",
        "core": options.core,
        **now,
        "archs": list(archs),
        "seconds": round(time.perf_counter() - begin),
        "launched": sum(len(row["launches"]) for row in rows),
        "not_run": sum("not_run" in row for row in rows),
        "failed": len(failed) + len(missing),
        "not_launched": missing,
        "rows": rows,
    }
    write_rows(options.out, result)
    print("".join(f"{row['arch']} {row['case']}: {'; '.join(row['faults'])}\n" for row in failed), end="")
    print("".join(f"{line}\n" for line in missing), end="")
    done = f"{len(rows)} cases, {result['launched']} launches in {result['seconds']} s"
    print(f"{done}, {result['failed']} failed: {options.out}")
    return 1 if result["failed"] else 0
