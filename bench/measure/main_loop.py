"""The rate of expand's main loop over the library's product, as `lorafa_kernels tune` measures it: the number
of the model of the cost that decides most between the plans. It is kept in the user's table, so that what is
measured next is planned with it.
"""

from __future__ import annotations

import torch

from lorafa_kernels.plan.choice import planned_device
from lorafa_kernels.tune import share
from lorafa_kernels.tune.search import Sample, Step

from .kernels import TRITON
from .timing import EventTimer, digits

# Mostly compiling.
ESTIMATE = 10.0


def measure(device: str) -> dict:
    """Return one row, and the card's name and the sizes beside it.

    share: None where nothing was timed. kept: whether later plans follow it; not_kept: why not.
    """
    row: dict = {"contender": TRITON, "variant": None, "share": None, "expand_us": None, "library_us": None}
    row["kept"] = False
    if device != "cuda":
        reason = "the kernels are timed on a GPU"
        return {"card": None, "size": [], "rows": [{**row, "status": "not run", "reason": reason}]}
    timer = EventTimer()

    def seconds(step: Step) -> Sample:
        return Sample(1e6 * timer(step), 0.0)

    found = share.measure_main_loop(torch.device(device), seconds)
    not_kept = share.keep_for_user(found, planned_device(torch.device(device)))
    numbers = {name: getattr(found, name) for name in ("share", "expand_us", "library_us")}
    row |= {name: None if value is None else digits(value) for name, value in numbers.items()}
    row |= {"variant": found.variant, "status": "failed" if found.refused else "ok", "reason": found.refused}
    row |= {"kept": not_kept is None, "not_kept": not_kept}
    size = [share.SIZE] * 3
    return {"card": torch.cuda.get_device_name(), "size": size, "rank": share.RANK, "rows": [row]}
