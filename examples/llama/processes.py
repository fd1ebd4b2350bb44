"""The processes that train together: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from examples import DemoError


@dataclass(frozen=True)
class Processes:
    """This process among `count`; `together` if torchrun started them, even one. Each `split` of them hold
    the parts of one model, by tensor parallelism, and take the same rows.
    """

    rank: int
    count: int
    together: bool
    device: torch.device
    split: int = 1

    @property
    def share(self) -> int:
        """Which share of the rows this process takes, of `shares`."""
        return self.rank // self.split

    @property
    def shares(self) -> int:
        return self.count // self.split

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait for the others."""
        if self.together:
            dist.barrier()

    def told(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if not self.together:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def total(self, *values: float | torch.Tensor) -> list[float]:
        """Sums over the shares, in fp64."""
        sums = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        )
        if self.together:
            dist.all_reduce(sums)
            sums /= self.split
        return sums.tolist()


def rank_and_count() -> tuple[int, int]:
    """What torchrun says in the environment; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def processes(device_name: str, split: int = 1) -> Iterator[Processes]:
    """Join the others: NCCL between GPUs, gloo between CPUs. `device_name`: auto, cpu or cuda.

    Raises DemoError if there is no GPU for this process.
    """
    rank, count = rank_and_count()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device_name if device_name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise DemoError(f"process {local} of this machine finds {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    together = "RANK" in os.environ
    if kind == "cuda":
        torch.cuda.set_device(device)
    if together:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        yield Processes(rank, count, together, device, split)
    finally:
        if together:
            dist.destroy_process_group()
