"""Each kernel of this library by itself, and the ways to put them together, beside what the library of the
device does for the same data.

    y, dx       the large product with the rank-R step, by the default kernel and by the portable one, beside
                the bare product
    z           the product with the narrow factor, beside the same product
    z, y        both in a row, with the second started while the first runs and without
    dz, dB      one pass over dy, and two, beside two products
    dz, dB, dx  the whole backward

A ratio of y or dx below 1 + R/K (R/N) says that the kernel's main loop keeps up with the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lorafa_kernels.checks.budget import Operands, relative_error
from lorafa_kernels.linear import library
from lorafa_kernels.plan.choice import planned_device
from lorafa_kernels.plan.config import KernelConfig, KernelPlan
from lorafa_kernels.plan.kernels import KernelConfigs, all_configs
from lorafa_kernels.plan.recipe import DEFAULT_KERNELS, Problem

from .cases import Case
from .contenders import CONTENDERS
from .judge import draw, poisoned_memory, verdict
from .layers import recorded, settle, timed_parts, verdict_of
from .timing import Step

LIBRARY, TRITON = "cublas", "triton"
PORTABLE, SERIAL, TWO_PASSES = "triton-portable", "triton-serial", "triton-two-passes"
TITLES = {
    LIBRARY: "library product(s) of the device",
    TRITON: "lorafa_kernels, Triton",
    PORTABLE: "lorafa_kernels, portable kernel",
    SERIAL: "lorafa_kernels, no dependent launch",
    TWO_PASSES: "lorafa_kernels, two passes over dy",
}
KERNELS = tuple(TITLES)
# Without TMA; the tile that the default has for many rows.
PORTABLE_CONFIG = KernelConfig(128, 256, 64, 64, 8, 8, 3)
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A kernel, or several in a row, and what it must return: `compute()` against `exact` within twice the
    error of `plain`.
    """

    compute: Callable[[], Results]
    exact: Results
    plain: Results

    def errors(self) -> dict[str, dict]:
        with poisoned_memory():
            got = self.compute()
        return self.errors_of(got)

    def errors_of(self, got: Results) -> dict[str, dict]:
        plain = {name: relative_error(self.plain[name], self.exact[name]) for name in self.exact}
        return verdict(got, self.exact, plain)


class Formulas:
    """The results of the parts by the formula, and by each contender, for one case.

    lora_B is in the adapter's dtype, as the layer hands it over; its values fit the base's.
    """

    def __init__(self, operands: Operands):
        self.x, self.dy = operands.x.detach(), operands.dy
        self.weight, self.bias = operands.weight, operands.bias
        self.lora_A, self.lora_B, self.s = operands.lora_A, operands.lora_B, operands.scaling
        dtype = self.x.dtype
        self.z = (self.s * (self.x.double() @ self.lora_A.double().t())).to(dtype)
        self.dz = (self.s * (self.dy.double() @ self.lora_B.double())).to(dtype)

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        names = ("x", "dy", "weight", "bias", "lora_A", "lora_B", "z", "dz")
        own = self.x.dtype
        found = {name: getattr(self, name) for name in names}
        return {name: t if t is None else t.to(own).to(dtype) for name, t in found.items()}

    def results(self, part: str, dtype: torch.dtype, adapted: bool = True) -> Results:
        """Return the results of a part in `dtype`; adapted=False: of the bare product."""
        at = self.inputs(dtype)
        found: Results = {}
        z, dz = at["z"], at["dz"]
        if part in ("z", "z, y"):
            z = found["z"] = self.s * (at["x"] @ at["lora_A"].t())
        if part.startswith("dz"):
            dz = found["dz"] = self.s * (at["dy"] @ at["lora_B"])
            found["dB"] = at["dy"].t() @ at["z"]
        if part.endswith("y"):
            y = at["x"] @ at["weight"].t()
            y = y if at["bias"] is None else y + at["bias"]
            found["y"] = y + z @ at["lora_B"].t() if adapted else y
        if part.endswith("dx"):
            dx = at["dy"] @ at["weight"]
            found["dx"] = dx + dz @ at["lora_A"] if adapted else dx
        if part == "dz, dB, dx":
            # The operators return no dz.
            del found["dz"]
        return found


def _configs(op: str, operands: Operands, plan: KernelPlan = DEFAULT_KERNELS) -> KernelConfigs:
    """The configuration of every kernel of an operation on these operands."""
    x, (N, K), R = operands.x, operands.weight.shape, operands.lora_A.shape[0]
    problem = Problem(op, x.dtype, x.shape[0], N, K, R)
    return all_configs(plan, problem, planned_device(x.device).limits)


def subjects(operands: Operands) -> dict[str, dict[str, Callable[[], Subject]]]:
    """Return by part and contender how to make the subject."""
    from lorafa_kernels.kernels.expand import expand
    from lorafa_kernels.kernels.grad import grad
    from lorafa_kernels.kernels.shrink import shrink
    from lorafa_kernels.linear import fused as linear

    f = Formulas(operands)
    forward_with, backward_with = (partial(_configs, op, operands) for op in ("forward", "backward"))
    y_configs, dx_configs = forward_with(), backward_with()
    x, dy, weight, bias, z, dz, s = f.x, f.dy, f.weight, f.bias, f.z, f.dz, f.s
    lora_A, lora_B = f.lora_A, f.lora_B

    def scaled_product(left: Tensor, right: Tensor) -> Tensor:
        out = left.new_empty((left.shape[0], right.shape[1]))
        return out.addmm_(left, right.to(left.dtype), beta=0, alpha=s)

    def one_pass() -> Results:
        return dict(
            zip(("dz", "dB"), grad(dy, z, lora_B, s, lora_B.dtype, config=dx_configs.grad), strict=True)
        )

    def two_passes() -> Results:
        dB = grad(dy, z, None, 1.0, lora_B.dtype, config=dx_configs.grad)[1]
        return {"dz": shrink(dy, lora_B, s, config=dx_configs.shrink), "dB": dB}

    def two_products() -> Results:
        return {"dz": scaled_product(dy, lora_B), "dB": library.backward_lora_B(dy, z, lora_B.dtype)}

    def forward(module, **plan) -> Results:
        return dict(zip(("y", "z"), module.forward(x, weight, lora_A, lora_B, bias, s, **plan), strict=True))

    def backward(module, **plan) -> Results:
        found = module.backward(dy, z, weight, lora_A, lora_B, s, **plan)
        return dict(zip(("dx", "dB"), found, strict=True))

    overlapped, serial = KernelPlan(pdl=True), KernelPlan(pdl=False)
    two_launches = KernelPlan(pdl=True, one_pass=False)
    computed: dict[str, dict[str, Callable[[], Results]]] = {
        "y": {
            LIBRARY: lambda: {"y": torch.nn.functional.linear(x, weight, bias)},
            TRITON: lambda: {
                "y": expand(x, weight.t(), z, lora_B.t(), bias, **linear.expand_configs(y_configs))
            },
            PORTABLE: lambda: {"y": expand(x, weight.t(), z, lora_B.t(), bias, config=PORTABLE_CONFIG)},
        },
        "dx": {
            LIBRARY: lambda: {"dx": dy @ weight},
            TRITON: lambda: {"dx": expand(dy, weight, dz, lora_A, **linear.expand_configs(dx_configs))},
            PORTABLE: lambda: {"dx": expand(dy, weight, dz, lora_A, config=PORTABLE_CONFIG)},
        },
        "z": {
            LIBRARY: lambda: {"z": scaled_product(x, lora_A.t())},
            TRITON: lambda: {"z": shrink(x, lora_A.t(), s, config=y_configs.shrink)},
        },
        "z, y": {
            LIBRARY: partial(forward, library),
            TRITON: partial(forward, linear, plan=forward_with(overlapped)),
            SERIAL: partial(forward, linear, plan=forward_with(serial)),
        },
        "dz, dB": {LIBRARY: two_products, TRITON: one_pass, TWO_PASSES: two_passes},
        "dz, dB, dx": {
            LIBRARY: partial(backward, library),
            TRITON: partial(backward, linear, plan=backward_with(overlapped)),
            SERIAL: partial(backward, linear, plan=backward_with(serial)),
            TWO_PASSES: partial(backward, linear, plan=backward_with(two_launches)),
        },
    }

    def make(part: str, key: str, compute: Callable[[], Results]) -> Subject:
        adapted = key != LIBRARY or part not in ("y", "dx")
        exact = f.results(part, torch.float64, adapted)
        return Subject(compute, exact, f.results(part, x.dtype, adapted))

    return {
        part: {key: partial(make, part, key, compute) for key, compute in of_part.items()}
        for part, of_part in computed.items()
    }


PARTS = {
    "y": (LIBRARY, TRITON, PORTABLE),
    "dx": (LIBRARY, TRITON, PORTABLE),
    "z": (LIBRARY, TRITON),
    "z, y": (LIBRARY, TRITON, SERIAL),
    "dz, dB": (LIBRARY, TRITON, TWO_PASSES),
    "dz, dB, dx": (LIBRARY, TRITON, SERIAL, TWO_PASSES),
}


def estimate(case: Case, rounds: int) -> float:
    """Return roughly how many seconds time_kernels takes on a GPU, mostly compiling and checking."""
    flops = sum(case.flops().values())
    return 6 + flops * (6 * rounds / 5e14 + 12 / 3e13)


def time_kernels(
    case: Case,
    device: str,
    *,
    rounds: int = 15,
    ceilings: dict[str, float | None] | None = None,
    tick: Callable[[float], object] = lambda fraction: None,
    interpreted: bool = False,
) -> dict:
    """Check and time the kernels of one case; return the record's payload, of kind "time", mode "kernel".

    interpreted: run them on the CPU in Triton's interpreter, to see that they run; the times mean nothing.
    """
    ceilings = ceilings or {}
    obstacle = None if interpreted else CONTENDERS["triton"].obstacle(device, case)
    if case.dropout:
        obstacle = "kernels by themselves are timed without dropout"
    makers = {} if obstacle else subjects(draw(case, device))
    verdicts = {part: {key: verdict_of(obstacle) for key in keys} for part, keys in PARTS.items()}
    steps: dict[str, dict[str, Step]] = {part: {} for part in PARTS}
    for part, of_part in makers.items():
        for key in PARTS[part]:
            tick(0.0)
            with recorded(verdicts[part][key], key=key):
                subject = of_part[key]()
                if settle(verdicts[part][key], subject.errors()):
                    steps[part][key] = subject.compute
                # Its fp64 results are as large as everything else together.
                del subject
    rows = timed_parts(steps, verdicts, device, "eager", rounds, tick, baseline=LIBRARY, ours=())
    return {
        "case": case.as_record(),
        "mode": "kernel",
        "rounds": rounds,
        "flops": case.flops(),
        "least_bytes": case.least_bytes(),
        "floor_ms": case.floor_ms(ceilings.get("product"), ceilings.get("copy")),
        "rows": rows,
    }
