"""The one number of the model of the cost that decides most between the plans, measured: the rate of expand's
main loop over that of the library's product.

Measured in seconds, at one size that is bound by arithmetic, it makes the plans of a device follow the device
before any of its problems was searched.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import __version__
from ..plan.choice import forget_plans, planned_device
from ..plan.config import KernelPlan
from ..plan.kernels import all_configs
from ..plan.recipe import Device, Problem, Recipe
from ..plan.tables import CACHE_VARIABLE, MOST_SHARE, STUB, cache_path, update_table
from .check import Check, refusal
from .search import FINAL_ROUNDS, WARM_UPS, Step, Timer

# Rows, in_features and out_features, and the rank.
SIZE = 4096
RANK = 16


@dataclass(frozen=True)
class MainLoop:
    """What was measured of expand in its default configuration for SIZE.

    share: its rate over that of the library's product, or None where it was refused, with the reason.
    expand_us, library_us: the medians, None where nothing was timed.
    """

    variant: str
    share: float | None = None
    expand_us: float | None = None
    library_us: float | None = None
    refused: str | None = None

    def __str__(self) -> str:
        if self.share is None:
            return f"expand's rate over the library's product is not known: {self.refused}"
        return f"expand runs at {self.share:.2f} of the library's product at {SIZE}^3"

    @property
    def shares(self) -> dict[str, float]:
        """What a table holds."""
        return {} if self.share is None else {self.variant: self.share}


def measure_main_loop(
    device: torch.device, timer: Timer, progress: Callable[[str], None] = lambda text: None
) -> MainLoop:
    """Check expand against fp64, then time it and the library's product in turns. Raises RuntimeError for a
    broken CUDA context.
    """
    target = planned_device(device)
    problem = Problem("forward", torch.bfloat16, SIZE, SIZE, SIZE, RANK)
    kernels = all_configs(KernelPlan(), problem, target.limits)
    variant = kernels.expand.variant
    progress("expand beside the library's product")
    if why := refusal(lambda: Check(problem, device, target)(Recipe("fused"))):
        return MainLoop(variant, refused=why)
    from ..linear.fused import expand, expand_configs

    x, weight = (torch.randn(SIZE, SIZE, device=device, dtype=problem.dtype) for _ in range(2))
    z = torch.randn(SIZE, RANK, device=device, dtype=problem.dtype)
    lora_B = torch.randn(SIZE, RANK, device=device)
    configs = expand_configs(kernels)
    steps: tuple[Step, Step] = (
        lambda: expand(x, weight.t(), z, lora_B.t(), None, **configs),
        lambda: F.linear(x, weight),
    )
    samples: tuple[list[float], list[float]] = ([], [])
    for index in range(WARM_UPS + FINAL_ROUNDS):
        for step, found in zip(steps, samples, strict=True):
            device_us = timer(step).device_us
            if index >= WARM_UPS:
                found.append(device_us)
    expand_us, library_us = map(statistics.median, samples)
    # Rates, not times: expand does the rank-R step as well.
    share = library_us * (SIZE + RANK) / (expand_us * SIZE) if expand_us > 0 else 0.0
    if not 0 < share <= MOST_SHARE:
        why = f"{expand_us:.1f} us beside {library_us:.1f} us cannot be right"
        return MainLoop(variant, None, expand_us, library_us, why)
    return MainLoop(variant, share, expand_us, library_us)


def versions() -> dict[str, str | None]:
    """What a table says of what its numbers were measured with."""
    return {"torch": torch.__version__, "lorafa_kernels": __version__, "commit": None}


def keep(found: MainLoop, path: Path, target: Device) -> None:
    """Write what was measured on `target` into the table at `path`, if anything; later plans follow it.
    Raises OSError where the table cannot be written.
    """
    if found.shares:
        update_table(path, target, (), versions(), found.shares)
        forget_plans()


def keep_for_user(found: MainLoop, target: Device) -> str | None:
    """Keep what was measured on `target` in the user's own table; say why it was not kept, or None."""
    path = cache_path(target)
    if target.name.startswith(STUB):
        return "a stub driver computes nothing"
    if target.limits.family == "interpreter":
        return "it is of no GPU"
    if not found.shares:
        return f"not known: {found.refused}"
    if path is None:
        return f"no home folder to keep a table in: set {CACHE_VARIABLE}"
    try:
        keep(found, path, target)
    except OSError as error:
        return f"the table cannot be written: {error.strerror or type(error).__name__}"
    return None
