"""Each kernel of this library by itself, beside what the library of the device does for the same data.

    y, dx     the large product with the rank-R step, beside the bare product
    z         the product with the narrow factor, beside the same product
    dz, dB    one pass over dy, beside two products

A ratio below 1 + the share of the rank-R step says that the kernel's main loop keeps up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lorafa_kernels import library
from lorafa_kernels.accuracy import Operands, relative_error

from .cases import Case
from .contenders import CONTENDERS
from .judge import broken, draw, poisoned_memory, verdict
from .layers import failure, prepare, timer_for
from .timing import Step, interleave, summary

LIBRARY, TRITON = "cublas", "triton"
TITLES = {
    LIBRARY: "library product(s) of the device",
    TRITON: "lorafa_kernels, Triton",
}
KERNELS = tuple(TITLES)
PARTS = ("y", "dx", "z", "dz, dB")


@dataclass(frozen=True)
class Subject:
    """A kernel and what it must return: `compute()` against `exact` within twice the error of `plain`."""

    compute: Callable[[], dict[str, Tensor]]
    exact: dict[str, Tensor]
    plain: dict[str, Tensor]

    def errors(self) -> dict[str, dict]:
        plain = {name: relative_error(self.plain[name], self.exact[name]) for name in self.exact}
        with poisoned_memory():
            return verdict(self.compute(), self.exact, plain)


def subjects(operands: Operands, case: Case) -> dict[str, dict[str, Callable[[], Subject]]]:
    """Return by part and contender how to make the subject; exact results are in fp64."""
    x, dy = operands.x.detach(), operands.dy
    weight, lora_A, bias, s = operands.weight, operands.lora_A, operands.bias, operands.scaling
    # In the adapter's dtype, as the layer hands it over; its values fit the base's.
    lora_B = operands.lora_B
    z = (s * (x.double() @ lora_A.double().t())).to(x.dtype)
    dz = (s * (dy.double() @ lora_B.double())).to(x.dtype)
    from lorafa_kernels.kernels.expand import expand
    from lorafa_kernels.kernels.grad import grad
    from lorafa_kernels.kernels.shrink import shrink

    def wide(*tensors: Tensor | None) -> list[Tensor | None]:
        return [tensor if tensor is None else tensor.double() for tensor in tensors]

    def y(adapted: bool) -> Subject:
        def formula(x, weight, bias, z, lora_B):
            base = F.linear(x, weight, bias)
            return {"y": base + z @ lora_B.to(z.dtype).t() if adapted else base}

        inputs = (x, weight, bias, z, lora_B)
        compute = (lambda: {"y": expand(x, weight.t(), z, lora_B.t(), bias)}) if adapted else None
        return Subject(compute or (lambda: formula(*inputs)), formula(*wide(*inputs)), formula(*inputs))

    def dx(adapted: bool) -> Subject:
        def formula(dy, weight, dz, lora_A):
            return {"dx": dy @ weight + dz @ lora_A if adapted else dy @ weight}

        inputs = (dy, weight, dz, lora_A)
        compute = (lambda: {"dx": expand(dy, weight, dz, lora_A)}) if adapted else None
        return Subject(compute or (lambda: formula(*inputs)), formula(*wide(*inputs)), formula(*inputs))

    def low_rank(kernel: bool) -> Subject:
        def formula(x, lora_A):
            return {"z": s * (x @ lora_A.t())}

        def product():
            z = x.new_empty((x.shape[0], case.R))
            return {"z": z.addmm_(x, lora_A.t(), beta=0, alpha=s)}

        inputs = (x, lora_A)
        compute = (lambda: {"z": shrink(x, lora_A.t(), s)}) if kernel else product
        return Subject(compute, formula(*wide(*inputs)), formula(*inputs))

    def both_gradients(kernel: bool) -> Subject:
        def formula(dy, z, lora_B):
            return {"dz": s * (dy @ lora_B.to(dy.dtype)), "dB": dy.t() @ z}

        def products():
            dz = dy.new_empty((dy.shape[0], case.R))
            dz.addmm_(dy, lora_B.to(dy.dtype), beta=0, alpha=s)
            return {"dz": dz, "dB": library.backward_lora_B(dy, z, lora_B.dtype)}

        def one_pass():
            dz, dB = grad(dy, z, lora_B, s, lora_B.dtype)
            return {"dz": dz, "dB": dB}

        inputs = (dy, z, lora_B)
        return Subject(one_pass if kernel else products, formula(*wide(*inputs)), formula(*inputs))

    makers = {"y": y, "dx": dx, "z": low_rank, "dz, dB": both_gradients}
    return {
        part: {LIBRARY: lambda make=make: make(False), TRITON: lambda make=make: make(True)}
        for part, make in makers.items()
    }


def estimate(case: Case, rounds: int) -> float:
    """Return roughly how many seconds time_kernels takes on a GPU, mostly compiling and checking."""
    flops = sum(case.flops().values())
    return 4 + flops * (4 * rounds / 5e14 + 4 / 3e13)


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
    rows = []
    obstacle = None if interpreted else CONTENDERS["triton"].obstacle(case, device)
    makers = {part: {} for part in PARTS} if obstacle else subjects(draw(case, device), case)
    for number, part in enumerate(PARTS):
        found: dict[str, dict] = {}
        steps: dict[str, Step] = {}
        for key in KERNELS:
            row = found[key] = {"status": "ok", "reason": None, "errors": {}}
            if obstacle:
                row.update(status="not run", reason=obstacle)
                continue
            try:
                subject = makers[part][key]()
                row["errors"] = subject.errors()
                if reason := broken(row["errors"]):
                    row.update(status="failed", reason=reason)
                else:
                    steps[key] = prepare(subject.compute, "eager")
            except Exception as error:
                row.update(failure(error, key))
        timer = timer_for(device, "eager")()
        fraction = number / len(PARTS)
        samples, raised = interleave(steps, rounds, timer, lambda fraction=fraction: tick(fraction))
        for key, error in raised.items():
            found[key].update(failure(error, key))
        for key, row in found.items():
            ratios = {}
            if key != LIBRARY and key in samples and LIBRARY in samples:
                pairs = zip(samples[key], samples[LIBRARY], strict=True)
                ratios[LIBRARY] = summary([a / b for a, b in pairs])
            times = summary(samples[key], 1e3) if key in samples else None
            rows.append({"contender": key, "part": part, **row, "ms": times, "ratios": ratios})
        tick((number + 1) / len(PARTS))
    return {
        "case": case.as_record(),
        "mode": "kernel",
        "rounds": rounds,
        "flops": case.flops(),
        "least_bytes": case.least_bytes(),
        "floor_ms": case.floor_ms(ceilings.get("product"), ceilings.get("copy")),
        "rows": rows,
    }
