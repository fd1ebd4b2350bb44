"""Training of a Llama-shaped model with random weights on synthetic tokens: step time, memory and losses, one
contender after the other on the same batches, without and with gradient checkpointing.

The tokens follow a chain: each decides the next one, but for one in ten that is drawn at random. So the loss
can fall, from ln(vocabulary) towards the entropy of the chain.

Before it trains, a contender's logits, their gradient with respect to the embedded tokens and every dB of the
first layers are compared with fp64 (models.Reference), with random lora_B. Training starts at lora_B = 0,
where all are the base model: the first loss must be the base model's, up to a unit roundoff of the dtype for
each of the two, and all losses must be finite. Who fails any of this gets no number.

With `largest` everybody trains at the largest batch that fits into the GPU's memory with it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorafa_kernels.checks.budget import unit_roundoff

from . import models
from .cases import DTYPES
from .contenders import Contender
from .judge import broken
from .layers import failure
from .memory import saved_bytes
from .models import ModelCase
from .timing import digits, one_thread, summary

WARM_UP_STEPS = 2
CHECKED_LAYERS = 2
CHECKED_TOKENS = 128
ALPHABET = 64
NOISE = 0.1
MOST_BATCH = 256
NUMBERS = (
    "step_ms",
    "samples_ms",
    "tokens_per_s",
    "saved_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "trained_parameters",
    "losses",
)


@dataclass(frozen=True)
class TrainingCase(ModelCase):
    """`steps` steps of AdamW on batches (batch, sequence); the first WARM_UP_STEPS are not timed. needs_gpu:
    too large for a CPU. What fits one computes there on a single thread. largest: `batch` is where the search
    for the largest one begins. checkpointing: without, with.
    """

    steps: int = 8
    lr: float = 1e-3
    needs_gpu: bool = True
    largest: bool = False
    checkpointing: tuple[bool, ...] = (False, True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps <= WARM_UP_STEPS:
            raise ValueError(f"steps must be more than {WARM_UP_STEPS}, which are not timed: {self.steps}")

    @property
    def tokens(self) -> str:
        if not self.largest:
            return super().tokens
        return f"largest batchx{self.sequence} tokens R={self.rank} {self.dtype}"

    def flops(self) -> float:
        """Return roughly the FLOPs of a contender's training, forward and dx; with checkpointing the forward
        again; one step more to count what is kept. The search for a batch of eight or so tries twenty.
        """
        a_token = sum(6 if again else 4 for again in self.checkpointing) * self.size.parameters()
        sequences = (self.steps + 1) * 8 + 20 if self.largest else (self.steps + 1) * self.batch
        return sequences * self.sequence * a_token

    def as_record(self) -> dict:
        own = {name: getattr(self, name) for name in ("steps", "lr", "largest")}
        return {**super().as_record(), **own, "cpu_threads": 1}


TINY = TrainingCase("tiny Llama", 4, 64, steps=24, lr=1e-2, needs_gpu=False)
LLAMA_1B = TrainingCase("Llama-3.2-1B", 2, 2048)
LLAMA_8B = TrainingCase("Llama-3-8B", 1, 2048)
LLAMA_8B_LARGEST = TrainingCase("Llama-3-8B", 1, 1024, steps=6, largest=True, checkpointing=(False,))
# By device, in the order in which they tell most.
TRAININGS = {"cpu": (TINY, LLAMA_8B_LARGEST), "cuda": (LLAMA_1B, LLAMA_8B_LARGEST, LLAMA_8B)}
# With whom the largest batch is searched: it takes a while.
LARGEST_KEYS = ("lorafa", "peft-lora", "peft-lora-16bit", "peft-lorafa-16bit")


def batches(case: TrainingCase, device: str) -> Tensor:
    """Draw the tokens of all steps, (steps, batch, sequence), the same on every device."""
    generator = torch.Generator().manual_seed(models.SEED)
    vocab = case.size.vocab
    alphabet = torch.randperm(vocab, generator=generator)[:ALPHABET]
    successor = torch.randperm(len(alphabet), generator=generator)
    shape = (case.steps, case.batch, case.sequence)
    tokens = torch.randint(len(alphabet), shape, generator=generator)
    drawn = torch.rand(shape, generator=generator) < NOISE
    for t in range(1, case.sequence):
        tokens[..., t] = torch.where(drawn[..., t], tokens[..., t], successor[tokens[..., t - 1]])
    return alphabet[tokens].to(device)


@one_thread()
def train(
    case: TrainingCase,
    keys: Iterable[str],
    device: str,
    tick: Callable[[float], object] = lambda fraction: None,
) -> dict:
    """Train every contender, without and with gradient checkpointing, and return the record's payload. Who
    runs out of memory is "not run".
    """
    chosen = models.select(keys, "training")
    rows = [
        {"contender": contender.key, "checkpointing": checkpointing, "status": "ok", "reason": None}
        | dict.fromkeys(NUMBERS)
        for contender in chosen
        for checkpointing in case.checkpointing
    ]
    obstacles = {contender.key: contender.obstacle(device) for contender in chosen}
    if case.needs_gpu and device != "cuda":
        obstacles = dict.fromkeys(obstacles, "a model of this size needs a GPU")
    base = None
    for number, contender in enumerate(chosen):

        def part_done(fraction: float, number=number) -> None:
            tick((number + fraction) / len(chosen))

        own_rows = [row for row in rows if row["contender"] == contender.key]
        found = {"status": "not run", "reason": obstacles[contender.key]}
        try:
            if not found["reason"]:
                base = base or _Base(case, device)
                _train_contender(case, contender, base, own_rows, part_done)
        except Exception as error:
            found = _failure(error)
        if found["reason"]:
            for row in own_rows:
                if row["losses"] is None and row["status"] == "ok":
                    row.update(found)
        models.free()
        part_done(1.0)
    return {"case": case.as_record(), "rows": rows}


def _failure(error: Exception) -> dict:
    found = failure(error)
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["reason"] = f"out of memory: {total - free} of {total} bytes were in use"
    return found


class _Base:
    """What all contenders are compared with: fp64 results of the first layers, and the base model's loss on
    the first batch.
    """

    def __init__(self, case: TrainingCase, device: str):
        self.tokens = batches(case, device)
        dtype = DTYPES[case.dtype]
        model = models.build_causal_lm(case.model, case.dtype, device)
        models.adapt_frozen(model, (), 0)
        with torch.no_grad():
            self.loss = _loss(model, self.tokens[0]).item()
        with models.first_layers(model, CHECKED_LAYERS) as short:
            models.adapt_eager(short, case.size.linears, case.rank)
            x = short.get_input_embeddings()(self.tokens[0, :1, :CHECKED_TOKENS])
            generator = torch.Generator(device).manual_seed(models.SEED)
            shape = (*x.shape[:-1], case.size.vocab)
            dy = torch.randn(shape, generator=generator, device=device, dtype=dtype)

            def logits(model: nn.Module, embedded: Tensor) -> Tensor:
                return model(inputs_embeds=embedded, use_cache=False).logits

            self.reference = models.Reference(short, case.dtype, logits, x.detach(), dy)
        del model, short
        models.free()


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _train_contender(
    case: TrainingCase,
    contender: Contender,
    base: _Base,
    rows: list[dict],
    tick: Callable[[float], object],
) -> None:
    """Fill in the rows, which are without gradient checkpointing before those with it."""
    device = base.tokens.device.type
    model = models.build_causal_lm(case.model, case.dtype, device)
    adapted = contender.build(model, case.size.linears, case.rank)
    if not contender.adapted:
        # Else there would be no backward at all.
        model.enable_input_require_grads()
    model.train()
    for number, row in enumerate(rows):
        try:
            if row["checkpointing"]:
                models.checkpoint_layers(model)
            models.fill_adapters(model, case.dtype, zero_B=False)
            with models.first_layers(model, CHECKED_LAYERS):
                errors = base.reference.errors(contender, model)
            if reason := broken(errors):
                row.update(status="failed", reason=reason)
                continue

            def start() -> torch.optim.Optimizer | None:
                models.fill_adapters(model, case.dtype, zero_B=True)
                return contender.optimizer(adapted, case.rank, case.lr)

            def done(fraction: float, number=number) -> None:
                tick((number + fraction) / len(rows))

            if case.largest:
                numbers, first = _at_the_largest_batch(case, model, start, base, done)
                checked = [first, *numbers["losses"]]
            else:
                numbers = _steps(case, model, start(), base.tokens, done)
                checked = numbers["losses"]
            if reason := _wrong_losses(case, checked, base.loss):
                row.update(status="failed", reason=reason)
            else:
                row.update(numbers)
        except Exception as error:
            row.update(_failure(error))
        finally:
            model.zero_grad()
            models.free()


def _at_the_largest_batch(
    case: TrainingCase,
    model: nn.Module,
    start: Callable[[], torch.optim.Optimizer | None],
    base: _Base,
    tick: Callable[[float], object],
) -> tuple[dict, float]:
    """Return the numbers of a row at the largest batch that fits, with it as "batch", and the first loss on
    the base model's own batch. start() resets the adapters and makes the optimizer.
    """
    device = base.tokens.device.type
    start()
    with torch.no_grad():
        first = _loss(model, base.tokens[0]).item()

    def fits(batch: int) -> bool:
        tick(0.0)
        return _fits(model, batches(replace(case, batch=batch, steps=WARM_UP_STEPS + 1), device)[0])

    # Several steps leave the memory in more pieces than the one that was tried.
    for batch in range(largest_batch(fits, case.batch), 0, -1):
        own = replace(case, batch=batch)
        with contextlib.suppress(torch.OutOfMemoryError):
            return {**_steps(own, model, start(), batches(own, device), tick), "batch": batch}, first
        model.zero_grad()
        models.free()
    raise torch.OutOfMemoryError(f"a batch of {case.batch} does not fit")


def largest_batch(fits: Callable[[int], bool], first: int = 1) -> int:
    """Return the largest batch up to MOST_BATCH that fits, from `first` on, or 0; fits(batch) says of one
    whether it does.
    """
    if not fits(first):
        return 0
    low, high = first, 2 * first
    while high <= MOST_BATCH and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST_BATCH + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(model: nn.Module, tokens: Tensor) -> bool:
    """Whether the memory suffices for the forward and backward of one step."""
    fitted = False
    with contextlib.suppress(torch.OutOfMemoryError):
        _loss(model, tokens).backward()
        fitted = True
    model.zero_grad()
    models.free()
    return fitted


def _wrong_losses(case: TrainingCase, losses: list[float], base_loss: float) -> str | None:
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            return f"the loss of step {step} is not finite"
    allowed = 2 * unit_roundoff(DTYPES[case.dtype])
    error = abs(losses[0] - base_loss) / abs(base_loss)
    if not error <= allowed:
        return f"the first loss is off the base model's by {error:.3g}, allowed {allowed:.3g}"
    return None


def _steps(
    case: TrainingCase,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    tokens: Tensor,
    tick: Callable[[float], object],
) -> dict:
    """Count what one step keeps, train, and return the numbers of a row."""
    on_gpu = tokens.is_cuda
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = (*model.parameters(), *model.buffers(), tokens)
    loss, saved = saved_bytes(lambda: _loss(model, tokens[0]), {}, own)
    loss.backward()
    model.zero_grad()
    del loss
    models.free()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def now() -> float | torch.cuda.Event:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    losses, clocks = [], [now()]
    for step in range(case.steps):
        loss = _loss(model, tokens[step])
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        clocks.append(now())
        losses.append(loss.detach())
        tick((step + 1) / case.steps)
    if on_gpu:
        torch.cuda.synchronize()
    pairs = list(itertools.pairwise(clocks))[WARM_UP_STEPS:]
    seconds = [begin.elapsed_time(end) * 1e-3 if on_gpu else end - begin for begin, end in pairs]
    step_ms = summary(seconds, 1e3)
    return {
        "step_ms": step_ms,
        "samples_ms": [digits(value * 1e3) for value in seconds],
        "tokens_per_s": round(case.batch * case.sequence / step_ms["median"] * 1e3, 1),
        "saved_bytes": sum(saved.values()),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "losses": [round(loss.item(), 6) for loss in losses],
    }
