"""What a layer or a Transformer block keeps between forward and backward, and needs besides.

    saved       bytes of what autograd keeps for backward, seen by saved_tensors_hooks: every storage once and
                whole, without parameters and buffers. Parts: the input itself, where something keeps it;
                shared, what all layers of a model are given (the cosine and sine of positions, a mask); the
                rest. By node: the same bytes but the shared ones, by the autograd node that keeps them.
    temporary   of forward or backward: how far the peak of allocated bytes during the call lies above what
                was there before it plus what it leaves or returns (for backward the gradients)
    peak        of one forward and backward on a GPU: everything that is allocated, weights included, and
                what the allocator holds (reserved). There is none on a CPU.

Temporaries are counted in bytes asked of PyTorch's allocator; what a library takes elsewhere is not seen. On
a CPU one thread computes, since some temporaries grow with the number of threads.
A contender is measured only after its results were within the error budget.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import contenders as layer_level
from . import models
from .cases import Case
from .contenders import Contender
from .judge import Judge, draw
from .layers import checked, recorded, settle, verdict_of
from .models import BlockCase
from .timing import one_thread

Forward = Callable[[], Tensor]
# From y to the gradients.
Backward = Callable[[Tensor], tuple[Tensor, ...]]
NUMBERS = (
    "saved_bytes",
    "parts",
    "forward_temporary_bytes",
    "backward_temporary_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
)


# Measured by device; as many tokens as fit, on a CPU in a second.
BLOCKS = {
    "cpu": (
        BlockCase("Llama block, MHA 512", 2, 128, rank=8, compiled=False),
        BlockCase("Llama block, GQA 512", 2, 128, rank=8, compiled=False),
    ),
    "cuda": (BlockCase("Llama-3-8B", 2, 2048), BlockCase("Llama-3.2-1B", 4, 2048)),
}


def _family(model: str, padding: bool = False) -> BlockCase:
    """A case of the table of docs/memory.md, in the proportions of a real model: sequence/hidden 1/2, as of
    2048 tokens in a model of 4096, and R/hidden 1/64.
    """
    hidden = models.size_of(model).hidden
    few = {"scope": "family", "padding": padding, "checkpointing": (False,)}
    return BlockCase(model, 2, sequence=hidden // 2, rank=hidden // 64, **few)


_LLAMAS = ("Llama block, MHA 512", "Llama block, GQA 8:2 512")
_OTHERS = tuple(name for name in models.SIZES if name.endswith(" block"))
FAMILIES = {
    name + (", padding" if padding else ""): _family(name, padding)
    for name, padding in (*itertools.product(_LLAMAS, (False, True)), *((name, False) for name in _OTHERS))
}


@one_thread()
def layer_memory(
    case: Case, keys: Iterable[str], device: str, *, known: dict[str, Contender] | None = None
) -> dict:
    """Measure the memory of one adapted layer and return the record's payload.

    known: the contenders, those of `keys` by default.
    """
    found = known or layer_level.layer_contenders(keys)
    operands = draw(case, device)
    judge = Judge(case, operands)

    def check(contender: Contender) -> tuple[dict, Callable]:
        return judge.errors(contender, contender.build(operands, case)), lambda: None

    _, verdicts = checked(found.values(), lambda contender: contender.obstacle(device, case), check)
    # Its fp64 tensors would be in every peak.
    judge = None
    models.free()
    rows = []
    own = (operands.weight, operands.lora_A, operands.lora_B, operands.bias)
    for key, contender in found.items():
        row = _row(key, verdicts[key])
        rows.append(row)
        if row["status"] != "ok":
            continue
        with recorded(row, key=key):
            layer = contender.build(operands, case)
            tensors = _tensors_of(layer.module) if isinstance(layer.module, nn.Module) else []
            numbers = measure(
                lambda layer=layer: layer.module(operands.x),
                lambda y, layer=layer: layer_level.gradients(layer, y, operands),
                device,
                {"input": [operands.x]},
                own=[*own, layer.lora_A, layer.lora_B, *tensors],
            )
            row.update(numbers)
        layer = tensors = None
        models.free()
    return {"scope": "layer", "case": case.as_record(), "rows": rows}


@one_thread()
def block_memory(case: BlockCase, keys: Iterable[str], device: str) -> dict:
    """Measure the memory of one Transformer block, without and with gradient checkpointing, and return the
    record's payload.
    """
    chosen = models.select(keys, case.scope)
    rows = []
    reference = None
    for contender in chosen:
        obstacle = contender.obstacle(device)
        if contender.compiled and not case.compiled:
            obstacle = obstacle or "torch.compile is left out of this case, it takes a minute on a CPU"
        own_rows = [
            {**_row(contender.key, verdict_of(obstacle)), "checkpointing": checkpointing, "units": None}
            for checkpointing in case.checkpointing
        ]
        rows += own_rows
        if obstacle:
            continue
        with recorded(*own_rows, key=contender.key):
            # Here, and not before the loop: without transformers there is nothing to build.
            reference = reference or models.reference(case, device)
            _measure_block(own_rows, case, contender, reference)
        models.free()
    return {"scope": case.scope, "case": case.as_record(), "unit_bytes": case.unit_bytes(), "rows": rows}


def _measure_block(
    rows: list[dict], case: BlockCase, contender: Contender, reference: models.Reference
) -> None:
    device = reference.device
    block = models.build(case, device)
    contender.build(block, case.linears, case.rank)
    called = models.ready(block, contender, case.dtype)
    x, dy = reference.x.to(device).requires_grad_(), reference.dy.to(device)
    wanted = (x, *(parameter for parameter in block.parameters() if parameter.requires_grad))
    for row in rows:

        def call(x: Tensor, checkpointing: bool = row["checkpointing"]) -> Tensor:
            return checkpoint(called, x, use_reentrant=False) if checkpointing else called(x)

        with recorded(row, key=contender.key):
            if not settle(row, reference.errors(contender, block, lambda block, x, call=call: call(x))):
                continue
            numbers = measure(
                lambda call=call: call(x),
                lambda y: torch.autograd.grad(y, wanted, dy),
                device,
                {"input": [x], "shared": block.shared},
                own=_tensors_of(block),
            )
            row.update(numbers, units=round(numbers["saved_bytes"] / case.unit_bytes(), 4))
            if case.scope == "family":
                row["by_node"] = saved_by_node(call(x), [*block.shared, *_tensors_of(block)])


def _row(key: str, verdict: dict) -> dict:
    return {"contender": key, **verdict, **dict.fromkeys(NUMBERS)}


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def measure(
    forward: Forward,
    backward: Backward,
    device: str,
    parts: dict[str, Iterable[Tensor]],
    own: Iterable[Tensor | None],
) -> dict:
    """Return the numbers of a row (NUMBERS) for y = forward() and backward(y).

    parts: tensors whose share of the saved bytes is told apart, by name. own: parameters and the like, which
    do not count.
    """
    # Compiles, and lets libraries allocate the workspaces that they keep.
    backward(forward())
    y, saved = saved_bytes(forward, parts, own)
    backward(y)
    del y
    _, forward_temporary, backward_temporary = allocations(forward, backward, device)
    allocated, reserved = peaks(forward, backward, device)
    return {
        "saved_bytes": sum(saved.values()),
        "parts": saved,
        "forward_temporary_bytes": forward_temporary,
        "backward_temporary_bytes": backward_temporary,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
    }


def saved_bytes(
    forward: Forward, parts: dict[str, Iterable[Tensor]], own: Iterable[Tensor | None]
) -> tuple[Tensor, dict[str, int]]:
    """Run forward; return its result and the bytes that it saved for backward, by part and as "rest".

    Inside a checkpointed function nothing is seen but its arguments, as nothing else is kept.
    """
    elsewhere = {_address(tensor) for tensor in own if tensor is not None}
    part_of = {_address(tensor): name for name, tensors in parts.items() for tensor in tensors}
    # Held until the count is over: a freed address could be given to a second tensor.
    kept: dict[tuple, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and _address(tensor) not in elsewhere:
            kept[_address(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    found = dict.fromkeys((*parts, "rest"), 0)
    for address, storage in kept.items():
        found[part_of.get(address, "rest")] += storage.nbytes()
    return y, found


def saved_by_node(y: Tensor, own: Iterable[Tensor]) -> dict[str, int]:
    """Return the bytes that each kind of autograd node below y keeps, without those of `own`. A storage that
    several keep counts once, for the one that comes first on the way back.
    """
    seen = {_address(tensor) for tensor in own}
    found: dict[str, int] = {}
    nodes, waiting = {y.grad_fn}, [y.grad_fn]
    # Held, so that no address is given to a second tensor.
    kept = []
    while waiting:
        node = waiting.pop(0)
        for tensor in _saved_by(node):
            if not isinstance(tensor, nn.Parameter) and _address(tensor) not in seen:
                seen.add(_address(tensor))
                kept.append(tensor)
                found[node.name()] = found.get(node.name(), 0) + tensor.untyped_storage().nbytes()
        below = [next_node for next_node, _ in node.next_functions if next_node not in {None, *nodes}]
        nodes.update(below)
        waiting += below
    return found


def _saved_by(node: torch.autograd.graph.Node) -> list[Tensor]:
    if hasattr(node, "saved_tensors"):
        return [tensor for tensor in node.saved_tensors if tensor is not None]
    values = (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
    found = itertools.chain(*(value if isinstance(value, (tuple, list)) else (value,) for value in values))
    # Without dimensions: numbers of the program.
    return [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.dim()]


def _address(tensor: Tensor) -> tuple:
    return tensor.device, tensor.untyped_storage().data_ptr()


def allocations(forward: Forward, backward: Backward, device: str) -> tuple[int, int, int]:
    """Return what y = forward() leaves allocated, y included, and the temporary bytes of it and of
    backward(y), as the module's docstring defines them.
    """
    return (_cuda_allocations if device == "cuda" else _cpu_allocations)(forward, backward)


def _cuda_allocations(forward: Forward, backward: Backward) -> tuple[int, int, int]:
    # Requested bytes: allocated ones are rounded up by as much as a block of the cache is larger.
    def requested(what: str) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()[f"requested_bytes.all.{what}"]

    before = requested("current")
    torch.cuda.reset_peak_memory_stats()
    y = forward()
    after, peak = requested("current"), requested("peak")
    torch.cuda.reset_peak_memory_stats()
    gradients = backward(y)
    of_backward = requested("peak") - after - _bytes(gradients)
    return after - before, peak - after, max(0, of_backward)


def _cpu_allocations(forward: Forward, backward: Backward) -> tuple[int, int, int]:
    # Else the profiler notes its start and end on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        with torch.profiler.record_function("bench.forward"):
            y = forward()
        with torch.profiler.record_function("bench.backward"):
            gradients = backward(y)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns())

    def levels(name: str) -> list[int]:
        """Bytes above those at the span's start, after each allocation and release inside of it."""
        (span,) = (event for event in events if event.name() == name)
        begin = span.start_ns()
        end = begin + span.duration_ns()
        inside = [event.nbytes() for event in changes if begin <= event.start_ns() <= end]
        return list(itertools.accumulate(inside, initial=0))

    during_forward, during_backward = levels("bench.forward"), levels("bench.backward")
    kept = during_forward[-1]
    return kept, max(during_forward) - kept, max(0, max(during_backward) - _bytes(gradients))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def peaks(forward: Forward, backward: Backward, device: str) -> tuple[int | None, int | None]:
    """Return the peak of allocated and of reserved bytes during one forward and backward; None on a CPU."""
    if device != "cuda":
        return None, None
    models.free()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    gradients = backward(forward())
    torch.cuda.synchronize()
    del gradients
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
