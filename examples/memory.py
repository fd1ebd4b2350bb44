"""Count what one training step keeps for backward, and the most memory that it takes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.training import Batch, batch_loss


def saved_activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Count the bytes that one training step of `model` keeps between forward and backward.

    Every storage counts once and whole, however many views of it autograd keeps. Parameters, buffers and the
    batch are in memory anyway and do not count. Runs the backward pass too, and leaves no gradients behind.
    """
    elsewhere = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *batch)
    }
    # Held until the count is over: a freed address could be given to a second tensor.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in elsewhere:
            kept[storage.data_ptr()] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = batch_loss(model, batch)
    saved = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    model.zero_grad()
    return saved


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that are alive during step(), above what was alive before it.

    The bytes that PyTorch's allocator hands out and takes back: on a CPU from the profiler's record of each.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    changes, _ = _changes(step)
    return max(itertools.accumulate(changes, initial=0))


def alive_after(forward: Callable[[], object]) -> int:
    """Return the bytes on the CPU that are alive after forward() while its result is held: what the step
    keeps for backward and the result. Counts what checkpointing keeps, too, which no hook on saved tensors
    sees.
    """
    changes, _ = _changes(forward)
    return sum(changes)


def _changes(run: Callable[[], object]) -> tuple[list[int], object]:
    """Return what PyTorch's allocator hands out (+) and takes back (-) on the CPU during run(), in bytes and
    in order, and the result of run(), alive until then.
    """
    # Else the profiler notes its start and end on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns())
    return [event.nbytes() for event in changes], result
