"""Several gloo processes for one test, on one thread each.

A process group's threads live on after `destroy_process_group` (torch 2.13): one that asks for the GIL
while Python finalizes ends its process with SIGABRT. A worker that has returned leaves without finalizing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


@contextlib.contextmanager
def group(rank: int, world: int, folder: Any) -> Iterator[None]:
    """Join the gloo group of `world` processes that meet in `folder`; leave it at the end."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def start(worker: Callable[..., None], world: int, folder: Any, *arguments: Any) -> None:
    """Run worker(rank, world, folder, *arguments) in `world` processes of one group.

    Raises torch.multiprocessing's ProcessRaisedException with the traceback of the first that failed.
    """
    torch.multiprocessing.spawn(_run, (worker, world, str(folder), arguments), nprocs=world)


def _run(rank: int, worker: Callable[..., None], world: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with group(rank, world, folder):
        worker(rank, world, folder, *arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
