"""Tensor parallelism: styles for torch's parallelize_module that split a LoRA-FA layer over a device mesh.

    column    W (N, K) and B (N, R) by rows, A (R, K) whole      each process computes its columns of y
    row       W (N, K) and A (R, K) by columns, B (N, R) whole   each process computes a summand of y

Column: z = s · x Aᵀ is the same everywhere, and dx = Σ dx_p is summed over the processes. Row:
z_p = s · x_p A_pᵀ, y = Σ (x_p W_pᵀ + z_p Bᵀ) + bias is summed, and so is dB = Σ dyᵀ z_p. Each process
computes its part by the kernels of a whole layer, and keeps z or its z_p (M, R) for backward, as a layer
alone does.

Dropout. Column: one mask for x, whose seed is rank 0's. Row: each process's columns of x have a mask of
their own, from the process's seed plus its rank in the mesh: as good as the mask of a layer alone, not the
same one.

A gated MLP that apply_lorafa has fused, split by columns, columns and rows, is computed as one: it keeps this
process's part of what gate and up return and three z, and dx is summed once. Not so with dropout or corrected
gradients, where each layer computes by itself, as layers of other blocks do.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from ..correction import gram_inverse_of_part
from ..group.operands import LinearOperands
from ..linear.api import lorafa_linear_in_parts
from ..mlp.api import lorafa_gated_mlp
from ..model.placing.guards import SPLIT_MLPS, AdaptedLinear, is_quiet
from ..model.placing.members import ungroup_layer
from ..nn.group import LoRAFALinearGroup
from ..nn.linear import LoRAFALinear
from ..nn.mlp import LoRAFAGeGLU, LoRAFASwiGLU
from ..nn.quantised import Quantised
from ..operands import autocast_enabled, check_frozen, draw_seed

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
# Two of the above in one matrix, whose halves an even split would mix.
_JOINED = ("qkv_proj", "gate_up_proj")
_PLACES = "_lorafa_places"


class _Places(NamedTuple):
    """Where a layer's input is and its output goes, on which mesh."""

    mesh: DeviceMesh
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    local_output: bool


class LoRAFAColwiseParallel(ColwiseParallel):
    """Splits out_features over a 1-D mesh: torch's ColwiseParallel for LoRAFALinear. For an nn.Linear or
    nn.Embedding it does what that does, so one plan serves adapted and other layers.

    input_layouts, output_layouts (a Placement) and use_local_output as there: by default the input is whole
    in every process (Replicate()), the output split in its last dimension (Shard(-1)), a plain tensor.

    parallelize_module(model, mesh, {name: LoRAFAColwiseParallel()}) raises ValueError for a mesh that is not
    1-D, of another device type than the layer, or that out_features cannot be divided by, and for parameters
    that are sharded already; RuntimeError without a process group, and for a merged layer; TypeError for what
    computes several layers as one (LoRAFALinearGroup, LoRAFASwiGLU), a layer of PEFT, and a Conv1D.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not _is_ours(module):
            return super()._apply(module, device_mesh)
        _check(module, device_mesh, "out_features")
        split = {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
        return _split(module, device_mesh, ColumnParallelLoRAFALinear, split, self)


class LoRAFARowwiseParallel(RowwiseParallel):
    """Splits in_features over a 1-D mesh: torch's RowwiseParallel for LoRAFALinear, and that itself for an
    nn.Linear or nn.Embedding. By default the input is split in its last dimension (Shard(-1)) and the output
    whole in every process (Replicate()). Errors as LoRAFAColwiseParallel, for in_features.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not _is_ours(module):
            return super()._apply(module, device_mesh)
        _check(module, device_mesh, "in_features")
        split = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}
        return _split(module, device_mesh, RowParallelLoRAFALinear, split, self)


def llama_plan(model: nn.Module, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """Return {module name: style} for a Llama-shaped model (Llama, Mistral, Qwen, Gemma), for
    parallelize_module(model, mesh, llama_plan(model, mesh)).

    q_proj, k_proj, v_proj, gate_proj and up_proj are split by columns, o_proj and down_proj by rows, adapted
    or not; embeddings, norms and the output layer stay whole in every process.

    Raises ValueError if no module has such a name, if projections are joined in one matrix (Phi-3), and if
    the mesh is not 1-D or heads or features cannot be divided by its size.
    """
    _check_mesh(mesh)
    size = mesh.size()
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in _JOINED:
            raise ValueError(f"{name} joins several projections in one matrix, which no plan here can split")
        if last in COLUMN and _features(module):
            _check_divides(name, module, "out_features", size)
            plan[name] = LoRAFAColwiseParallel()
        elif last in ROW and _features(module):
            _check_divides(name, module, "in_features", size)
            plan[name] = LoRAFARowwiseParallel()
    if not plan:
        raise ValueError(
            f"no module is called {', '.join((*COLUMN, *ROW))}: give parallelize_module a plan by names, "
            "with LoRAFAColwiseParallel and LoRAFARowwiseParallel"
        )
    config = getattr(model, "config", None)
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, what, None)
        if isinstance(heads, int) and heads % size:
            raise ValueError(f"the model has {what}={heads}, which {size} processes cannot divide")
    return plan


def _features(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, LoRAFALinear))


def _is_ours(module: nn.Module) -> bool:
    """Whether `module` is a LoRA-FA layer. Raises TypeError for one that cannot be split."""
    if isinstance(module, (LoRAFALinearGroup, LoRAFASwiGLU, LoRAFAGeGLU)):
        raise TypeError(
            f"{type(module).__name__} computes its layers as one and cannot be split: use LoRAFALinear layers"
        )
    if isinstance(module, AdaptedLinear):
        raise TypeError(
            f"{type(module).__name__}, a layer of PEFT, cannot be split: adapt the model with "
            "lorafa_kernels.apply_lorafa"
        )
    if isinstance(module, Quantised):
        raise TypeError(
            f"{type(module).__name__} has a quantised base, which no style here splits: shard it with "
            "fully_shard, or split a dense model"
        )
    return isinstance(module, LoRAFALinear)


def _check_mesh(mesh: DeviceMesh) -> None:
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: start the processes with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        part = f"mesh[{names[-1]!r}]" if names else "the 1-D part of it, by a name in mesh_dim_names"
        raise ValueError(f"tensor parallelism takes a 1-D mesh, got {mesh.ndim}-D: pass {part}")


def _check_divides(name: str, module: nn.Module, what: str, size: int) -> None:
    if (features := getattr(module, what)) % size:
        raise ValueError(f"{name} has {what}={features}, which {size} processes cannot divide")


def _check(layer: LoRAFALinear, mesh: DeviceMesh, what: str) -> None:
    _check_mesh(mesh)
    kind = type(layer).__name__
    if layer.weight_shape() != (layer.out_features, layer.in_features):
        raise TypeError(f"{kind} stores its weight transposed, and cannot be split")
    if layer.merged:
        raise RuntimeError("the adapter is merged into the weight: call unmerge() before parallelize_module")
    if layer.further_adapters():
        raise ValueError(
            f"{kind} has several adapters, and only a layer with one can be split: see delete_adapter"
        )
    for name, parameter in layer.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} is sharded already: call parallelize_module once, and before fully_shard"
            )
        if parameter.device.type not in (mesh.device_type, "meta"):
            raise ValueError(
                f"{name} is on {parameter.device}, the mesh is one of {mesh.device_type}: make it with "
                f"init_device_mesh({parameter.device.type!r}, …), or move the model first"
            )
    _check_divides(kind, layer, what, mesh.size())


def _split(
    layer: LoRAFALinear,
    mesh: DeviceMesh,
    kind: type[LoRAFALinear],
    split: dict[str, Placement],
    style: ColwiseParallel | RowwiseParallel,
) -> LoRAFALinear:
    ungroup_layer(layer)
    for name, placement in split.items():
        parameter = getattr(layer, name)
        if parameter is not None:
            part = distribute_tensor(parameter, mesh, [placement], src_data_rank=style.src_data_rank)
            setattr(layer, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    layer.__class__ = kind
    places = _Places(mesh, style.input_layouts, style.output_layouts, style.use_local_output)
    layer.__dict__[_PLACES] = places
    return layer


class _SplitLinear(LoRAFALinear):
    """A layer whose parameters are DTensors on a mesh. Its input and output are DTensors, or this process's
    parts, placed as the style says.
    """

    adapters_obstacle = "is split by tensor parallelism"

    def _enter(self, x: Tensor, wanted: Placement, gradient: tuple[Placement] | None = None) -> Tensor:
        """This process's part of x in the placement that is wanted; its gradient may come in another."""
        places: _Places = self.__dict__[_PLACES]
        for name in ("weight", "lora_A", "lora_B"):
            parameter = getattr(self, name)
            if not isinstance(parameter, DTensor) or parameter.device_mesh != places.mesh:
                raise TypeError(
                    f"{name} is not what parallelize_module left here: call the layer through the module "
                    "that fully_shard wrapped, which gathers it"
                )
        check_frozen(self.weight, self.lora_A, self.bias)
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, places.mesh, places.inputs, run_check=False)
        if isinstance(wanted, Shard):
            wanted = Shard(wanted.dim % x.dim())
        # Where it is in place already, layers that share x have their gradients added before they are summed
        # over the processes.
        if x.placements != (wanted,):
            x = x.redistribute(placements=[wanted])
        return x.to_local(grad_placements=gradient)

    def _leave(self, y: Tensor, placement: Placement, bias: Tensor | None) -> Tensor:
        places: _Places = self.__dict__[_PLACES]
        whole = DTensor.from_local(y, places.mesh, [placement], run_check=False)
        whole = whole.redistribute(placements=places.outputs)
        if bias is not None:
            whole = whole + bias.to(whole.dtype)
        return whole.to_local() if places.local_output else whole

    def _part(self) -> LinearOperands:
        """This process's part of the parameters."""
        bias = None if self.bias is None else self.bias.to_local()
        lora_A, lora_B = self.lora_A.to_local(), self._local_lora_B()
        return LinearOperands(self.weight.to_local(), bias, lora_A, lora_B, self.scaling)

    def _local_lora_B(self) -> Tensor:
        return self.lora_B.to_local()


class ColumnParallelLoRAFALinear(_SplitLinear):
    """A LoRAFALinear of which each process computes some columns of y."""

    def forward(self, input: Tensor) -> Tensor:
        """As LoRAFALinear, with input and output as LoRAFAColwiseParallel was told."""
        x = self._enter(input, Replicate(), (Partial(),))
        mesh = self.__dict__[_PLACES].mesh
        bias = None if self.bias is None else self.bias.to_local()
        if not self.adapter_enabled:
            y = nn.functional.linear(x, self.weight.to_local(), bias)
        else:
            y = lorafa_linear_in_parts(
                x,
                self.weight.to_local(),
                self.lora_A.to_local(),
                self.lora_B.to_local(),
                bias,
                scaling=self.scaling,
                dropout_p=self.lora_dropout if self.training else 0.0,
                gradient_correction=self.gradient_correction,
                impl=self.impl,
                draw=functools.partial(_draw_common, mesh),
                inverse_of=lambda _: _inverse_of(self.lora_A, None),
            )
        return self._leave(y, Shard(-1), None)


class RowParallelLoRAFALinear(_SplitLinear):
    """A LoRAFALinear of which each process computes a summand of y, from some columns of x."""

    def forward(self, input: Tensor) -> Tensor:
        """As LoRAFALinear, with input and output as LoRAFARowwiseParallel was told."""
        x = self._enter(input, Shard(-1))
        mesh = self.__dict__[_PLACES].mesh
        if not self.adapter_enabled:
            y = nn.functional.linear(x, self.weight.to_local())
        else:
            y = lorafa_linear_in_parts(
                x,
                self.weight.to_local(),
                self.lora_A.to_local(),
                self._local_lora_B(),
                scaling=self.scaling,
                dropout_p=self.lora_dropout if self.training else 0.0,
                gradient_correction=self.gradient_correction,
                impl=self.impl,
                draw=functools.partial(_draw_own, mesh),
                inverse_of=lambda _: _inverse_of(self.lora_A, functools.partial(_sum, mesh)),
            )
        return self._leave(y, Partial(), self.bias)

    def _local_lora_B(self) -> Tensor:
        # Each process's dB is a summand; redistribute's backward adds them.
        return self.lora_B.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _split_mlp(
    x: Tensor, gate: LoRAFALinear, up: LoRAFALinear, down: LoRAFALinear, activation: str, impl: str
) -> Tensor | None:
    """y of a gated MLP, of whose inner features this process has a part; None where each layer must compute
    by itself.
    """
    layers = gate, up, down
    before, aside, after = (layer.__dict__[_PLACES] for layer in layers)
    inner = (Shard(-1),)
    if not (before == aside and before.mesh == after.mesh and before.outputs == after.inputs == inner):
        return None
    if not (before.local_output and torch.is_grad_enabled() and all(_fits(layer, x) for layer in layers)):
        return None
    part = gate._enter(x, Replicate(), (Partial(),))
    y = lorafa_gated_mlp(
        part, gate._part(), up._part(), down._part()._replace(bias=None), activation=activation, impl=impl
    )
    return down._leave(y, Partial(), down.bias)


def _fits(layer: LoRAFALinear, x: Tensor) -> bool:
    """Whether the layer may be computed in a block: nothing hooked, drawn, corrected, thawed or elsewhere."""
    if not is_quiet(layer) or not layer.adapter_enabled or layer.gradient_correction:
        return False
    if layer.training and layer.lora_dropout:
        return False
    if layer.weight.dtype != x.dtype and not autocast_enabled(x.device.type):
        return False
    mesh = layer.__dict__[_PLACES].mesh
    return all(
        isinstance(parameter, DTensor)
        and parameter.device_mesh == mesh
        and parameter.device == x.device
        and not (parameter.requires_grad and name != "lora_B")
        for name, parameter in layer.named_parameters(recurse=False)
    )


SPLIT_MLPS[ColumnParallelLoRAFALinear, ColumnParallelLoRAFALinear, RowParallelLoRAFALinear] = _split_mlp


def _draw_common(mesh: DeviceMesh, device: torch.device) -> Tensor:
    """Rank 0's seed, in every process."""
    seed = draw_seed(device)
    return _sum(mesh, seed if mesh.get_local_rank() == 0 else torch.zeros_like(seed))


def _draw_own(mesh: DeviceMesh, device: torch.device) -> Tensor:
    """Another seed in each process, also where all generators are seeded alike."""
    return draw_seed(device) + mesh.get_local_rank()


def _sum(mesh: DeviceMesh, tensor: Tensor) -> Tensor:
    whole = DTensor.from_local(tensor, mesh, [Partial()], run_check=False)
    return whole.redistribute(placements=[Replicate()]).to_local()


@torch.compiler.disable
def _inverse_of(lora_A: DTensor, total) -> Tensor:
    # Not to_local(), which is another object at each call.
    return gram_inverse_of_part(lora_A._local_tensor, lora_A, total)
