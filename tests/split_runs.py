"""What two processes show of tensor parallelism besides training, and of checkpoints: each returns what it
has found, for the test to compare.
"""

from __future__ import annotations

import os
from typing import Any

import engine_runs as runs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lorafa_kernels import (
    LoRAFALinear,
    disable_adapter,
    load_adapter,
    lorafa_linear,
    lorafa_parameters,
    save_adapter,
)
from lorafa_kernels.integrations.parallel import (
    LoRAFAColwiseParallel,
    LoRAFARowwiseParallel,
    llama_plan,
)
from lorafa_kernels.philox import keep_mask

M, K, N, R, P = 24, 16, 32, 8, 0.5
SEEDS = (11, 12)


def layer(in_features: int, out_features: int, dropout: float = 0.0) -> LoRAFALinear:
    torch.manual_seed(0)
    return LoRAFALinear(in_features, out_features, r=R, lora_dropout=dropout, init_lora_weights=False)


def rows(count: int, columns: int, seed: int) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def results(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    assert type(y) is Tensor
    y.backward(dy)
    grads = [parameter.grad for parameter in lorafa_parameters(module)]
    grads = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    return {"y": y.detach(), "dx": x.grad, "dB": torch.cat([grad.flatten() for grad in grads])}


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    made = LoRAFALinear(K, N, r=R, init_lora_weights=False), LoRAFALinear(N, K, r=R, init_lora_weights=False)
    return nn.Sequential(made[0], nn.GELU(), made[1])


def layouts() -> dict[str, tuple[dict, dict]]:
    """{case: (split, alone)} of two layers, for each way to pass activations between them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    x, dy = rows(M, K, 1), rows(M, K, 2)
    alone = results(chain(), x, dy)
    here = {name: value.chunk(world)[rank] for name, value in alone.items() if name != "dB"}
    here["dB"] = alone["dB"]
    ours = {"0": LoRAFAColwiseParallel(), "2": LoRAFARowwiseParallel()}
    sequence = {
        "0": LoRAFAColwiseParallel(input_layouts=Shard(0)),
        "2": LoRAFARowwiseParallel(output_layouts=Shard(0)),
    }
    prepared = {
        "0": PrepareModuleInput(input_layouts=(Shard(0),), desired_input_layouts=(Replicate(),)),
        "2": LoRAFARowwiseParallel(output_layouts=Shard(0)),
    }
    wide = {
        "0": LoRAFAColwiseParallel(output_layouts=Replicate()),
        "2": LoRAFARowwiseParallel(input_layouts=Replicate()),
    }
    found = {}
    for name, plan, split in (
        ("replicated", ours, False),
        ("sequence", sequence, True),
        ("whole between", wide, False),
        ("prepared", prepared, True),
    ):
        model = chain()
        parallelize_module(model, mesh, plan)
        if name == "prepared":
            parallelize_module(model, mesh, {"0": LoRAFAColwiseParallel()})
        mine = [t.chunk(world)[rank] if split else t for t in (x, dy)]
        found[name] = results(model, *mine), here if split else alone
    return found


def with_torchs_own() -> dict[str, Tensor]:
    """A plan of torch's styles for plain layers gives what ours give for them."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    styles = {
        "ours": (LoRAFAColwiseParallel, LoRAFARowwiseParallel),
        "torch": (ColwiseParallel, RowwiseParallel),
    }
    for name, (column, row) in styles.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K))
        parallelize_module(model, mesh, {"0": column(), "2": row()})
        # A copy: torch's styles return a tensor that waits for its values.
        found[name] = model(rows(M, K, 1)).detach().clone()
    return found


def dropout() -> dict[str, Any]:
    """Columns: generators seeded apart, against one layer with rank 0's seed. Rows: generators seeded alike,
    against the formula with each process's mask.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    x, dy = rows(M, K, 1), rows(M, N, 2)
    whole = nn.Sequential(layer(K, N, P))
    torch.manual_seed(SEEDS[0])
    alone = results(whole, x, dy)
    split = nn.Sequential(layer(K, N, P))
    parallelize_module(split, mesh, {"0": LoRAFAColwiseParallel(output_layouts=Replicate())})
    torch.manual_seed(SEEDS[rank])
    found: dict[str, Any] = {"column": (results(split, x, dy), alone)}

    split = nn.Sequential(layer(K, N, P))
    parallelize_module(split, mesh, {"0": LoRAFARowwiseParallel(input_layouts=Replicate())})
    torch.manual_seed(SEEDS[0])
    got = results(split, x, dy)
    torch.manual_seed(SEEDS[0])
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    keeps = [keep_mask(seed + part, P, M, K // world) for part in range(world)]
    base = layer(K, N)
    keep = torch.cat(keeps, dim=1) / (1 - P)
    lora_B = base.lora_B.detach().clone().requires_grad_()
    inner = x.clone().requires_grad_()
    s = base.scaling
    y = inner @ base.weight.T + s * ((inner * keep) @ base.lora_A.T) @ lora_B.T + base.bias
    y.backward(dy)
    found["row"] = got, {"y": y.detach(), "dx": inner.grad, "dB": lora_B.grad.flatten()}
    found["masks differ"] = not torch.equal(*keeps)
    return found


def disabled() -> tuple[Tensor, Tensor]:
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), chain()
    alone = chain()
    parallelize_module(model, mesh, {"0": LoRAFAColwiseParallel(), "2": LoRAFARowwiseParallel()})
    x = rows(M, K, 1)
    with disable_adapter(model), disable_adapter(alone), torch.no_grad():
        return model(x), alone(x)


def sharded(kind: str, **options: Any) -> nn.Module:
    """The model of engine_runs as an engine leaves it; kind: "fsdp2", "tp" or "fsdp2 x tp"."""
    model, world = runs.build(**options), dist.get_world_size()
    data = {"fsdp2": world, "tp": 1, "fsdp2 x tp": world // 2}[kind]
    mesh = init_device_mesh("cpu", (data, world // data), mesh_dim_names=("data", "tensor"))
    if kind != "fsdp2":
        parallelize_module(model, mesh["tensor"], llama_plan(model, mesh["tensor"]))
    if kind != "tp":
        for block in model.layers:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in found.items()}


def files(folder: str, kind: str) -> dict[str, Any]:
    """An adapter saved from a sharded model, loaded into another, whose inverse of A Aᵀ was made before."""
    model = sharded(kind, gradient_correction=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.5)
    save_adapter(model, os.path.join(folder, kind))
    dist.barrier()
    other = sharded(kind, gradient_correction=True)
    part = tuple(t.chunk(2)[dist.get_rank() // 2] if kind == "fsdp2 x tp" else t for t in runs.batch())
    runs.loss_of(other, *part).backward()
    other.zero_grad()
    load_adapter(other, os.path.join(folder, kind))
    grads = []
    for one in (model, other):
        runs.loss_of(one, *part).backward()
        grads.append(torch.cat([g.flatten() for g in runs.gathered(list(lorafa_parameters(one)))]))
    return {"values": (values(other), values(model)), "dB": grads}


def checkpoint(folder: str, kind: str) -> dict[str, Tensor]:
    """Written by DCP; returns the whole values."""
    model = sharded(kind)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(state, checkpoint_id=os.path.join(folder, f"dcp {kind}"))
    return values(model)


class Sums(TorchDispatchMode):
    """Counts the sums over processes."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        self.count += "all_reduce" in str(function)
        return function(*args, **(kwargs or {}))


def sums() -> dict[str, int]:
    """How many sums a backward takes: of dB by rows, and of dx by columns."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    once = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    for name, part, prepared in (
        ("attention", "self_attn", {}),
        ("attention, prepared", "self_attn", {"layers.0.self_attn": once}),
        ("MLP", "mlp", {}),
    ):
        model = runs.build()
        parallelize_module(model, mesh, llama_plan(model, mesh) | prepared)
        y = model.layers[0].get_submodule(part)(runs.batch()[0].requires_grad_())
        with Sums() as counted:
            y.sum().backward()
        found[name] = counted.count
    return found


def direct_calls() -> dict[str, str]:
    """The errors of what bypasses an engine's forward."""
    model = sharded("fsdp2")
    x = torch.zeros(2, runs.WIDTH)
    errors = {"outside": error_of(model.layers[0].self_attn.q_proj, x)}
    q = model.layers[0].self_attn.q_proj
    errors["function"] = error_of(lorafa_linear, x, q.weight, q.lora_A, q.lora_B)
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    split = runs.build()
    parallelize_module(split, mesh["tensor"], llama_plan(split, mesh["tensor"]))
    for block in split.layers:
        fully_shard(block, mesh=mesh["data"])
    errors["split outside"] = error_of(split.layers[0].self_attn.q_proj, x)
    return errors


def error_of(function, *arguments) -> str:
    try:
        function(*arguments)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
