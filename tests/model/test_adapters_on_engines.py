"""Mixed batches under DDP, FSDP1 and FSDP2: gradients of two processes, each with samples of its own, are
those of one.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from processes import start
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import (
    LoRAFAConfig,
    adapter_index,
    adapter_names,
    add_adapter,
    apply_lorafa,
    lorafa_parameters,
    lorafa_state_dict,
    save_adapter,
)
from lorafa_kernels.checks.budget import relative_error, unit_roundoff

# Of the two processes: the first has no sample of "c", the second none of "default".
INDEX = [0, 1, 2, -1]
OPTIONS = {"init_lora_weights": False, "adapter_dtype": torch.float64}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class Net(nn.Module):
    def __init__(self, checkpointed: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def build(checkpointed: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net(checkpointed).double()
    apply_lorafa(model, LoRAFAConfig(r=4, target_modules=["a", "b"], init_seed=1, **OPTIONS))
    add_adapter(model, "b", LoRAFAConfig(r=4, init_seed=2, **OPTIONS), share_lora_A=True)
    return add_adapter(model, "c", LoRAFAConfig(r=2, init_seed=3, target_modules=["b"], **OPTIONS))


def worker(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.distributed.tensor.parallel import parallelize_module

    from lorafa_kernels.integrations.parallel import LoRAFAColwiseParallel

    x = torch.randn(4, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    alone = build()
    with adapter_index(alone, INDEX):
        alone(x).square().sum().backward()
    half = slice(2 * rank, 2 * rank + 2)

    def check(model, names):
        with adapter_index(model, INDEX[half]):
            y = model(x[half])
        # After the context, where checkpoints run forward again.
        y.square().sum().backward()
        compare(model, names)

    def compare(model, names):
        for name in names:
            pairs = zip(lorafa_parameters(model, name), lorafa_parameters(alone, name), strict=True)
            for got, want in pairs:
                gradient = got.grad.full_tensor() if hasattr(got.grad, "full_tensor") else got.grad
                # Both engines take the mean over the processes.
                assert relative_error(gradient * world, want.grad) <= unit_roundoff(torch.float32)

    names = adapter_names(alone)
    with warnings.catch_warnings():
        # Of frozen parameters and of its being deprecated.
        warnings.simplefilter("ignore")
        options = {"use_orig_params": True, "auto_wrap_policy": ModuleWrapPolicy({Block})}
        model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"), **options)
        with adapter_index(model, INDEX[half]):
            y = model(x[half])
        y.square().sum().backward()
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            compare(model, names)
    check(nn.parallel.DistributedDataParallel(build()), names)
    for checkpointed in (False, True):
        model = build(checkpointed)
        for block in model.blocks:
            fully_shard(block)
        check(fully_shard(model), names)
    with pytest.raises(ValueError, match="add all adapters first"):
        add_adapter(model, "d", LoRAFAConfig(r=4))
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(ValueError, match="several adapters"):
        parallelize_module(build(), mesh, {"blocks.0.a": LoRAFAColwiseParallel()})
    one = apply_lorafa(Net(False), LoRAFAConfig(r=4, target_modules=["a"]))
    parallelize_module(one, mesh, {"blocks.0.a": LoRAFAColwiseParallel()})
    with pytest.raises(ValueError, match="tensor parallelism"):
        add_adapter(one, "b", LoRAFAConfig(r=4))
    with pytest.raises(ValueError, match="tensor parallelism"), adapter_index(one, [0, -1]):
        pass
    save_adapter(model, f"{folder}/c", adapter="c")
    state = lorafa_state_dict(alone, "c")
    for key, tensor in lorafa_state_dict(model, "c").items():
        assert torch.equal(tensor, state[key])


@pytest.mark.slow
@pytest.mark.numerics
def test_two_processes_train_as_one(tmp_path):
    start(worker, 2, tmp_path)
    assert (tmp_path / "c" / "adapter_model.safetensors").exists()
