"""Five steps of training of a small Llama-shaped model, alone and inside engines: losses and gradients of
every step, what is kept, and bytes per process.

Workers of tests/processes.py; no pytest here, so that they start quickly.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import LoRAFAConfig, apply_lorafa, lorafa_parameters
from lorafa_kernels.model.placing.members import ungroup_layer

STEPS, ROWS, TOKENS, WIDTH, INNER, HEAD, LAYERS, RANK = 5, 4, 3, 16, 32, 4, 2, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        rows, tokens, _ = x.shape
        q = self.q_proj(x).view(rows, tokens, -1, HEAD).transpose(1, 2)
        k = self.k_proj(x).view(rows, tokens, -1, HEAD).transpose(1, 2)
        v = self.v_proj(x).view(rows, tokens, -1, HEAD).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(rows, tokens, -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER)
        self.up_proj = nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """checkpointing: None, "reentrant" or "early stop"."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.checkpointing: str | None = None

    def forward(self, x):
        for layer in self.layers:
            if self.checkpointing is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
        return x


def build(dtype: torch.dtype = torch.float32, *, plain: bool = False, **options: Any) -> Model:
    """The adapted model, the same in every process. plain: by the plain formula, without fused blocks."""
    torch.manual_seed(0)
    config = LoRAFAConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False, **options)
    model = apply_lorafa(Model(), config, fuse=not plain, norm=not plain).to(dtype)
    if plain:
        for module in model.modules():
            if hasattr(module, "lora_B"):
                module.impl = "reference"
    return model


def kept_alone(
    part: tuple[Tensor, Tensor], fuse: bool, norm: bool, thaw_norms: bool = False, ungroup: bool = False
) -> list:
    """The shapes and dtypes that autograd keeps without an engine. thaw_norms: with norms that train;
    ungroup: with layers that share an input computed each by itself.
    """
    torch.manual_seed(0)
    config = LoRAFAConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
    model = apply_lorafa(Model(), config, fuse=fuse, norm=norm)
    for module in model.modules() if thaw_norms else ():
        if isinstance(module, Norm):
            module.requires_grad_(True)
    for module in model.modules() if ungroup else ():
        ungroup_layer(module)
    return kept_between(model, loss_of, part)["shapes"]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(ROWS, TOKENS, WIDTH, generator=generator).to(dtype) for _ in range(2))


def loss_of(model: nn.Module, x: Tensor, wanted: Tensor) -> Tensor:
    return (model(x) - wanted).float().square().mean()


def gathered(parameters: list[Tensor]) -> list[Tensor]:
    grads = [parameter.grad.detach() for parameter in parameters]
    return [(g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for g in grads]


def train(
    step_model: nn.Module,
    model: nn.Module,
    *,
    part: tuple[Tensor, Tensor] | None = None,
    micro: int = 1,
    unsynced: Callable[[bool], contextlib.AbstractContextManager] | None = None,
    scaler: Any = None,
    grads_of: Callable[[], list[Tensor]] | None = None,
) -> dict[str, list]:
    """{"losses": of STEPS steps, "dB": one tensor of all gradients for each}.

    micro: batches that a step adds up; unsynced(last): the context of each.
    """
    x, wanted = batch() if part is None else part
    parameters = list(lorafa_parameters(model))
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    found: dict[str, list] = {"losses": [], "dB": []}
    for _ in range(STEPS):
        total = 0.0
        for index, (rows, goal) in enumerate(zip(x.chunk(micro), wanted.chunk(micro), strict=True)):
            with unsynced(index == micro - 1) if unsynced else contextlib.nullcontext():
                loss = loss_of(step_model, rows.clone().requires_grad_(), goal) / micro
                (loss if scaler is None else scaler.scale(loss)).backward()
            total += loss.item()
        if scaler is not None:
            scaler.unscale_(optimizer)
        grads = gathered(parameters) if grads_of is None else grads_of()
        found["dB"].append(torch.cat([grad.flatten() for grad in grads]))
        found["losses"].append(total)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
    return found


def averaged(found: dict[str, list]) -> dict[str, list]:
    """With losses that are the means over the processes."""
    losses = torch.tensor(found["losses"], dtype=torch.float64)
    dist.all_reduce(losses)
    return {**found, "losses": (losses / dist.get_world_size()).tolist()}


def my_part(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    world, rank = dist.get_world_size(), dist.get_rank()
    return tuple(tensor.chunk(world)[rank].contiguous() for tensor in batch(dtype))


def ddp(**options: Any) -> dict[str, Any]:
    model = build()
    micro, scaled = options.pop("micro", 1), options.pop("scaled", False)
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    kept = kept_between(wrapped, loss_of, my_part())
    found = train(
        wrapped,
        model,
        part=my_part(),
        micro=micro,
        unsynced=lambda last: contextlib.nullcontext() if last else wrapped.no_sync(),
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None,
    )
    return {**averaged(found), "kept": kept}


def fsdp2(
    *,
    reshard: bool = True,
    offload: bool = False,
    checkpointing: str | None = None,
    micro: int = 1,
    low: bool = False,
    compiled: bool = False,
) -> dict[str, Any]:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    model = build()
    model.checkpointing = checkpointing
    options = {
        "reshard_after_forward": reshard,
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy(),
    }
    for layer in model.layers:
        if compiled:
            layer.compile(backend="aot_eager")
        fully_shard(layer, **options)
    fully_shard(model, **options)
    kept = None if checkpointing or compiled else kept_between(model, loss_of, my_part())

    @contextlib.contextmanager
    def unsynced(last: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(last)
        yield

    found = averaged(train(model, model, part=my_part(), micro=micro, unsynced=unsynced))
    local = sum(p.to_local().numel() for p in model.parameters())
    return {**found, "kept": kept, "share": local / sum(p.numel() for p in model.parameters())}


def kept_between(model: nn.Module, loss: Callable, part: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What autograd keeps of one forward: shapes and dtypes in order, and whether any matrix of a weight's
    size has memory before backward begins.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(model, part[0].clone().requires_grad_(), part[1])
    shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in kept]
    sizes = {(WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)}
    weights = [tensor for tensor in kept if tuple(tensor.shape) in sizes]
    held = sum(tensor.untyped_storage().nbytes() > 0 for tensor in weights)
    kept.clear()
    value.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return {"shapes": shapes, "weights": len(weights), "held": held}


def fsdp1(*, checkpointing: str | None = None, micro: int = 1) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = build()
    model.checkpointing = checkpointing
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({Layer}), device_id=torch.device("cpu")
    )

    kept = None if checkpointing else kept_between(wrapped, loss_of, my_part())

    def grads() -> list[Tensor]:
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            return [parameter.grad.detach().clone() for parameter in lorafa_parameters(model)]

    found = train(
        wrapped,
        model,
        part=my_part(),
        micro=micro,
        unsynced=lambda last: contextlib.nullcontext() if last else wrapped.no_sync(),
        grads_of=grads,
    )
    local = sum(p.numel() for p in wrapped.parameters())
    return {**averaged(found), "kept": kept, "share": local / sum(p.numel() for p in build().parameters())}


def tensor_parallel(
    *, data: int = 1, checkpointing: str | None = None, low: bool = False, correction: bool = False
) -> dict[str, Any]:
    """data: processes of FSDP2, around the tensor parallelism of the others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    from lorafa_kernels.integrations.parallel import llama_plan

    world, dtype = dist.get_world_size(), torch.bfloat16 if low else torch.float32
    mesh = init_device_mesh("cpu", (data, world // data), mesh_dim_names=("data", "tensor"))
    model = build(dtype, gradient_correction=correction)
    model.checkpointing = checkpointing
    parallelize_module(model, mesh["tensor"], llama_plan(model, mesh["tensor"]))
    if data > 1:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    part = tuple(tensor.chunk(data)[mesh["data"].get_local_rank()] for tensor in batch(dtype))
    kept = None if checkpointing else kept_between(model, loss_of, part)
    found = averaged(train(model, model, part=part))
    weights = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    share = sum(p.to_local().numel() for p in weights) / sum(p.numel() for p in weights)
    return {**found, "kept": kept, "share": share}


def deepspeed(stage: int, low: bool = False) -> dict[str, Any]:
    """ZeRO-2 or ZeRO-3 with this process group."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = build()
    parameters = list(lorafa_parameters(model))
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": low},
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        config=config,
        model_parameters=parameters,
        optimizer=torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        dist_init_required=False,
    )
    x, wanted = my_part(torch.bfloat16 if low else torch.float32)
    found: dict[str, list] = {"losses": [], "dB": []}
    for _ in range(STEPS):
        loss = loss_of(engine, x.clone().requires_grad_(), wanted)
        engine.backward(loss)
        grads = [safe_get_full_grad(parameter).detach().flatten() for parameter in parameters]
        found["dB"].append(torch.cat(grads).clone())
        found["losses"].append(loss.item())
        engine.step()
    local = sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return {**averaged(found), "share": local / total}


ENGINES: dict[str, Callable[[], dict[str, Any]]] = {
    "DDP": ddp,
    "DDP, static graph": functools.partial(ddp, static_graph=True, gradient_as_bucket_view=True),
    "DDP, find unused": functools.partial(ddp, find_unused_parameters=True),
    "DDP, no_sync": functools.partial(ddp, micro=2),
    "DDP, GradScaler": functools.partial(ddp, scaled=True),
    "FSDP2": fsdp2,
    "FSDP2, no reshard": functools.partial(fsdp2, reshard=False),
    "FSDP2, CPU offload": functools.partial(fsdp2, offload=True),
    "FSDP2, accumulation": functools.partial(fsdp2, micro=2),
    "FSDP2, checkpoint": functools.partial(fsdp2, checkpointing="early stop"),
    "FSDP2, checkpoint reentrant": functools.partial(fsdp2, checkpointing="reentrant"),
    "FSDP2, compiled layers": functools.partial(fsdp2, compiled=True),
    "FSDP1": fsdp1,
    "FSDP1, no_sync": functools.partial(fsdp1, micro=2),
    "FSDP1, checkpoint": functools.partial(fsdp1, checkpointing="early stop"),
    "FSDP1, checkpoint reentrant": functools.partial(fsdp1, checkpointing="reentrant"),
    "TP": tensor_parallel,
    "TP, checkpoint": functools.partial(tensor_parallel, checkpointing="early stop"),
    "TP, checkpoint reentrant": functools.partial(tensor_parallel, checkpointing="reentrant"),
    "TP, gradient correction": functools.partial(tensor_parallel, correction=True),
    "FSDP2 x TP, 2 x 1": functools.partial(tensor_parallel, data=2),
}

DEEPSPEED: dict[str, Callable[[], dict[str, Any]]] = {
    "ZeRO-2": functools.partial(deepspeed, 2),
    "ZeRO-3": functools.partial(deepspeed, 3),
    "ZeRO-3, bf16": functools.partial(deepspeed, 3, low=True),
}
