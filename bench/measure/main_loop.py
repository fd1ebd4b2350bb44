"""The rate of expand's main loop over the library's product, as `lorafa_kernels tune` measures it: the number
of the model of the cost that decides most between the plans.
"""

from __future__ import annotations

import torch

from lorafa_kernels.tune import share
from lorafa_kernels.tune.search import Sample, Step

from .kernels import TRITON
from .timing import EventTimer, digits

# Mostly compiling.
ESTIMATE = 10.0


def measure(device: str) -> dict:
    """Return one row, and the card's name and the sizes beside it. share: None where nothing was timed."""
    row: dict = {"contender": TRITON, "variant": None, "share": None, "expand_us": None, "library_us": None}
    if device != "cuda":
        reason = "the kernels are timed on a GPU"
        return {"card": None, "size": [], "rows": [{**row, "status": "not run", "reason": reason}]}
    timer = EventTimer()

    def seconds(step: Step) -> Sample:
        return Sample(1e6 * timer(step), 0.0)

    found = share.measure_main_loop(torch.device(device), seconds)
    numbers = {name: getattr(found, name) for name in ("share", "expand_us", "library_us")}
    row |= {name: None if value is None else digits(value) for name, value in numbers.items()}
    row |= {"variant": found.variant, "status": "failed" if found.refused else "ok", "reason": found.refused}
    size = [share.SIZE] * 3
    return {"card": torch.cuda.get_device_name(), "size": size, "rank": share.RANK, "rows": [row]}
