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
from .layers import recorded, settle, timed_parts, timed_payload, verdict_of
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
# z and dz.
LowRank = tuple[Tensor, Tensor]


PARTS = {
    "y": (LIBRARY, TRITON, PORTABLE),
    "dx": (LIBRARY, TRITON, PORTABLE),
    "z": (LIBRARY, TRITON),
    "z, y": (LIBRARY, TRITON, SERIAL),
    "dz, dB": (LIBRARY, TRITON, TWO_PASSES),
    "dz, dB, dx": (LIBRARY, TRITON, SERIAL, TWO_PASSES),
}


def errors_of(got: Results, exact: Results, plain: Results) -> dict[str, dict]:
    """Return the verdict on results that may have twice the error of `plain`."""
    return verdict(got, exact, {name: relative_error(plain[name], exact[name]) for name in exact})


def formula(o: Operands, low: LowRank, part: str, dtype: torch.dtype, adapted: bool = True) -> Results:
    """Return the results of a part in `dtype` by the formula; adapted=False: of the bare product.

    lora_B is in the adapter's dtype, as the layer hands it over; its values fit the base's.
    """
    x, dy, weight, bias, lora_A, lora_B, z, dz = (
        t if t is None else t.to(o.x.dtype).to(dtype)
        for t in (o.x.detach(), o.dy, o.weight, o.bias, o.lora_A, o.lora_B, *low)
    )
    found: Results = {}
    if part in ("z", "z, y"):
        z = found["z"] = o.scaling * (x @ lora_A.t())
    if part.startswith("dz"):
        found["dB"] = dy.t() @ z
        dz = o.scaling * (dy @ lora_B)
    # The operators return no dz.
    if part == "dz, dB":
        found["dz"] = dz
    if part.endswith("y"):
        y = x @ weight.t() if bias is None else x @ weight.t() + bias
        found["y"] = y + z @ lora_B.t() if adapted else y
    if part.endswith("dx"):
        found["dx"] = dy @ weight + dz @ lora_A if adapted else dy @ weight
    return found


def low_rank(o: Operands) -> LowRank:
    """Return z and dz, (M, R), rounded once."""
    z = o.scaling * (o.x.detach().double() @ o.lora_A.double().t())
    dz = o.scaling * (o.dy.double() @ o.lora_B.double())
    return z.to(o.x.dtype), dz.to(o.x.dtype)


def computations(o: Operands, low: LowRank) -> dict[str, dict[str, Callable[[], Results]]]:
    """Return by part and contender what computes the part's results."""
    from lorafa_kernels.kernels.expand import expand
    from lorafa_kernels.kernels.grad import grad
    from lorafa_kernels.kernels.shrink import shrink
    from lorafa_kernels.linear import fused

    def configs(op: str, plan: KernelPlan = DEFAULT_KERNELS) -> KernelConfigs:
        """The configuration of every kernel of an operation on these operands."""
        (N, K), R = o.weight.shape, o.lora_A.shape[0]
        problem = Problem(op, o.x.dtype, o.x.shape[0], N, K, R)
        return all_configs(plan, problem, planned_device(o.x.device).limits)

    x, dy, weight, bias, s = o.x.detach(), o.dy, o.weight, o.bias, o.scaling
    lora_A, lora_B, (z, dz) = o.lora_A, o.lora_B, low
    up, down = configs("forward"), configs("backward")
    portable = {"config": PORTABLE_CONFIG}

    def scaled_product(left: Tensor, right: Tensor) -> Tensor:
        out = left.new_empty((left.shape[0], right.shape[1]))
        return out.addmm_(left, right.to(left.dtype), beta=0, alpha=s)

    def y(**how) -> Results:
        return {"y": expand(x, weight.t(), z, lora_B.t(), bias, **how)}

    def dx(**how) -> Results:
        return {"dx": expand(dy, weight, dz, lora_A, **how)}

    def one_pass() -> Results:
        found = grad(dy, z, lora_B, s, lora_B.dtype, config=down.grad)
        return dict(zip(("dz", "dB"), found, strict=True))

    def two_passes() -> Results:
        dB = grad(dy, z, None, 1.0, lora_B.dtype, config=down.grad)[1]
        return {"dz": shrink(dy, lora_B, s, config=down.shrink), "dB": dB}

    def two_products() -> Results:
        return {"dz": scaled_product(dy, lora_B), "dB": library.backward_lora_B(dy, z, lora_B.dtype)}

    def forward(module, **plan) -> Callable[[], Results]:
        compute = partial(module.forward, x, weight, lora_A, lora_B, bias, s, **plan)
        return lambda: dict(zip(("y", "z"), compute(), strict=True))

    def backward(module, **plan) -> Callable[[], Results]:
        compute = partial(module.backward, dy, z, weight, lora_A, lora_B, s, **plan)
        return lambda: dict(zip(("dx", "dB"), compute(), strict=True))

    plans = {TRITON: KernelPlan(pdl=True), SERIAL: KernelPlan(pdl=False)}
    two = {TWO_PASSES: KernelPlan(pdl=True, one_pass=False)}
    return {
        "y": {
            LIBRARY: lambda: {"y": torch.nn.functional.linear(x, weight, bias)},
            TRITON: partial(y, **fused.expand_configs(up)),
            PORTABLE: partial(y, **portable),
        },
        "dx": {
            LIBRARY: lambda: {"dx": dy @ weight},
            TRITON: partial(dx, **fused.expand_configs(down)),
            PORTABLE: partial(dx, **portable),
        },
        "z": {
            LIBRARY: lambda: {"z": scaled_product(x, lora_A.t())},
            TRITON: lambda: {"z": shrink(x, lora_A.t(), s, config=up.shrink)},
        },
        "z, y": {LIBRARY: forward(library)}
        | {key: forward(fused, plan=configs("forward", plan)) for key, plan in plans.items()},
        "dz, dB": {LIBRARY: two_products, TRITON: one_pass, TWO_PASSES: two_passes},
        "dz, dB, dx": {LIBRARY: backward(library)}
        | {key: backward(fused, plan=configs("backward", plan)) for key, plan in (plans | two).items()},
    }


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
    obstacle = None if interpreted else CONTENDERS["triton"].obstacle(device, case)
    if case.dropout:
        obstacle = "kernels by themselves are timed without dropout"
    operands = None if obstacle else draw(case, device)
    low = low_rank(operands) if operands else None
    verdicts = {part: {key: verdict_of(obstacle) for key in keys} for part, keys in PARTS.items()}
    steps: dict[str, dict[str, Step]] = {part: {} for part in PARTS}
    for part, of_part in computations(operands, low).items() if operands else ():
        for key in PARTS[part]:
            tick(0.0)
            with recorded(verdicts[part][key], key=key):
                adapted = key != LIBRARY or part not in ("y", "dx")
                dtypes = torch.float64, operands.x.dtype
                right = (formula(operands, low, part, dtype, adapted) for dtype in dtypes)
                with poisoned_memory():
                    got = of_part[key]()
                if settle(verdicts[part][key], errors_of(got, *right)):
                    steps[part][key] = of_part[key]
                # As large as everything else together.
                del got, right
    rows = timed_parts(steps, verdicts, device, "eager", rounds, tick, baseline=LIBRARY, ours=())
    return timed_payload(case, "kernel", rounds, ceilings, rows)
