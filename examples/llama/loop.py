"""The training loop: accumulation, clipping, warm-up and cosine, evaluation, checkpoints, a progress line."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from examples import DemoError
from examples.llama.checkpoints import State
from examples.llama.processes import Processes
from examples.llama.text import PackedText, rows_at
from lorafa_kernels import lorafa_parameters

# Share of the newest step in the mean of tokens/s that the progress line shows.
_NEWEST = 0.2
_LEAST_RATE = 0.1


@dataclass(frozen=True)
class Plan:
    """How to train. batch: rows of a step over all processes; accumulate: parts that a process takes its own
    in; evaluate, save: every so many steps, and after the last; clip: the gradient's largest norm.
    """

    steps: int
    batch: int
    accumulate: int
    learning_rate: float
    warmup: int
    clip: float
    evaluate: int
    save: int
    seed: int


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Rises over `warmup` steps to 1, then falls along a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return _LEAST_RATE + (1 - _LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizer_of(
    model: nn.Module, plan: Plan
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.AdamW(lorafa_parameters(model), lr=plan.learning_rate, weight_decay=0.0)
    factor = partial(learning_rate_factor, steps=plan.steps, warmup=plan.warmup)
    return optimizer, LambdaLR(optimizer, factor)


def train(state: State, text: PackedText, plan: Plan, processes: Processes, save: Callable[[], None]) -> None:
    """Train from state.progress to the last step; `save` writes a checkpoint of `state`.

    Raises DemoError if a loss is not finite, before it reaches the adapter.
    """
    progress = state.progress
    speed = None
    with tqdm(
        total=plan.steps,
        initial=progress.step,
        unit="step",
        disable=not processes.first,
        miniters=1,
        dynamic_ncols=True,
    ) as line:
        while progress.step < plan.steps:
            start = time.perf_counter()
            loss = _step(state, text, plan, processes)
            progress.step += 1
            progress.position += plan.batch
            progress.losses.append(loss)
            now = plan.batch * text.train.shape[1] / (time.perf_counter() - start)
            speed = now if speed is None else speed + _NEWEST * (now - speed)
            ended = progress.step == plan.steps
            if ended or progress.step % plan.evaluate == 0:
                held_out = evaluate(state.model, text.held_out, plan.batch, processes)
                progress.evaluations.append([progress.step, held_out])
            if ended or progress.step % plan.save == 0:
                save()
            shown = {"loss": f"{loss:.4f}", "tokens/s": f"{speed:,.0f}"}
            if progress.evaluations:
                shown["held out"] = f"{progress.evaluations[-1][1]:.4f}"
            line.set_postfix(
                {**shown, "memory": f"{peak_bytes(processes.device) / 2**30:.2f} GiB"}, refresh=False
            )
            line.update()


def _step(state: State, text: PackedText, plan: Plan, processes: Processes) -> float:
    """One step of the optimizer; the mean loss of its batch over all processes."""
    model, device = state.model, processes.device
    rows = rows_at(state.progress.position, plan.batch, len(text.train), plan.seed)
    parts = text.train[rows[processes.share :: processes.shares]].chunk(plan.accumulate)
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, part in enumerate(parts):
        if hasattr(model, "set_requires_gradient_sync"):
            # FSDP2 sums over the processes once a step.
            model.set_requires_gradient_sync(index == len(parts) - 1)
        loss = row_losses(model, part.to(device)).mean() / len(parts)
        loss.backward()
        total += loss.detach()
    mean = processes.total(total)[0] / processes.shares
    if not math.isfinite(mean):
        raise DemoError(
            f"the loss of step {state.progress.step + 1} is {mean}: start again with a smaller --lr and "
            "another --out"
        )
    nn.utils.clip_grad_norm_(lorafa_parameters(model), plan.clip)
    state.optimizer.step()
    state.schedule.step()
    state.optimizer.zero_grad()
    return mean


def row_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean loss of predicting each row's tokens from those before: (rows, sequence) to (rows,), fp32."""
    tokens = tokens.long()
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor, batch: int, processes: Processes) -> float:
    """The mean loss of `rows`, each process taking a share, as many as every other: under FSDP2 all must
    call forward equally often. A row that fills up a share does not count.
    """
    model.eval()
    count = -(-len(rows) // processes.shares)
    mine = torch.arange(count) * processes.shares + processes.share
    counts = mine < len(rows)
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    size = max(1, batch // processes.shares)
    for indices, valid in zip(mine.split(size), counts.split(size), strict=True):
        part = rows[indices.clamp(max=len(rows) - 1)].to(processes.device)
        total += (row_losses(model, part) * valid.to(processes.device)).double().sum()
    return processes.total(total)[0] / len(rows)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: what torch had allocated on a GPU, this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
