"""Train a model on a task's snippets, and test it; pretraining is the same loop on more text."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .models import Model
from .settings import HEAD_LEARNING_RATE, WARM_UP

TEST_BATCH = 64
# Batches are filled with items of like length out of so many batches' worth.
GROUP = 4


@dataclass(frozen=True)
class Score:
    """Means over all targets of a split. nats: cross-entropy; right: share of targets predicted."""

    nats: float
    right: float


def train(
    model: nn.Module,
    kind: Model,
    items: Sequence,
    *,
    body: Sequence[nn.Parameter],
    head: Sequence[nn.Parameter],
    rate: float,
    batch: int,
    steps: int,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[list[float], float]:
    """Train with AdamW, `rate` for the body; return the loss of every step and the CPU seconds of all.

    The rate rises over the first WARM_UP of the steps and falls to zero, linearly. Raises FloatingPointError
    when a loss is not finite.
    """
    groups = [{"params": list(body), "lr": rate}, {"params": list(head), "lr": HEAD_LEARNING_RATE}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps))
    torch.manual_seed(seed)
    losses = []
    start = time.process_time()
    model.train()
    for chosen in batches(kind, items, batch, steps, seed):
        loss = kind.losses(model, chosen)[0].mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"step {len(losses)}: the loss is {losses[-1]}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(losses[-1])
    return losses, time.process_time() - start


def factor(step: int, steps: int) -> float:
    """The part of the learning rate at a step, from 0."""
    rising = max(1, round(WARM_UP * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def batches(kind: Model, items: Sequence, batch: int, steps: int, seed: int) -> list[list]:
    """Draw the batches of all steps: epochs without replacement, an incomplete batch dropped, items of like
    length together.
    """
    drawn = random.Random(seed)
    found: list[list] = []
    while len(found) < steps:
        epoch = drawn.sample(list(items), len(items))
        epoch = epoch[: len(epoch) // batch * batch]
        group = GROUP * batch
        for start in range(0, len(epoch), group):
            alike = sorted(epoch[start : start + group], key=kind.length)
            rows = [alike[i : i + batch] for i in range(0, len(alike), batch)]
            found += drawn.sample(rows, len(rows))
    return found[:steps]


@torch.inference_mode()
def test(model: nn.Module, kind: Model, items: Sequence) -> Score:
    """Return the scores on `items`. Raises FloatingPointError when the loss is not finite."""
    model.eval()
    nats, right, count = 0.0, 0, 0
    ordered = sorted(items, key=kind.length)
    for start in range(0, len(ordered), TEST_BATCH):
        of_batch, correct = kind.losses(model, ordered[start : start + TEST_BATCH])
        nats += of_batch.double().sum().item()
        right += int(correct.sum())
        count += of_batch.numel()
    if not math.isfinite(nats):
        raise FloatingPointError(f"the test loss is {nats}")
    return Score(nats / count, right / count)
