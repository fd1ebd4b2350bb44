"""A PeftModel on these kernels inside DDP, FSDP1 and FSDP2: losses and adapters of one process."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_same
from peft_beds import plain_name, tokens, with_peft
from processes import start
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lorafa_kernels.integrations.peft import accelerate_peft

STEPS, ROWS = 5, 4
# What docs/engines.md says.
LARGEST = 1e-6
ENGINES = ("ddp", "fsdp1", "fsdp2")
pytestmark = [pytest.mark.numerics, pytest.mark.slow]


def accelerated() -> nn.Module:
    return accelerate_peft(with_peft("llama"))


def train(wrapped: nn.Module, model: nn.Module, rank: int, world: int) -> list[float]:
    """The losses of SGD with momentum, each the mean over the processes."""
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    ids = tokens(model, ROWS)["input_ids"].chunk(world)[rank]
    losses = []
    for _ in range(STEPS):
        loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().double()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    named = ((n.replace("_fsdp_wrapped_module.", ""), p) for n, p in model.named_parameters())
    return {plain_name(n): p.detach().clone() for n, p in named if "lora_" in n}


def _through(engine: str, rank: int, world: int) -> dict:
    model = accelerated()
    if engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        return {"losses": train(wrapped, model, rank, world), "adapters": adapters(model)}
    if engine == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
        losses = train(wrapped, model, rank, world)
        with FullyShardedDataParallel.summon_full_params(wrapped):
            return {"losses": losses, "adapters": adapters(model)}
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module)
    losses = train(fully_shard(model), model, rank, world)
    return {"losses": losses, "adapters": {n: t.full_tensor() for n, t in adapters(model).items()}}


def _worker(rank: int, world: int, folder: str) -> None:
    found = {engine: _through(engine, rank, world) for engine in ENGINES}
    if rank == 0:
        torch.save(found, f"{folder}/found")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("engines")
    start(_worker, 2, folder)
    return torch.load(folder / "found")


@pytest.fixture(scope="module")
def alone():
    model = accelerated()
    before = adapters(model)
    return {"before": before, "losses": train(model, model, 0, 1), "adapters": adapters(model)}


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_and_adapters_are_those_of_one_process(found, alone, engine):
    got, want = found[engine]["losses"], alone["losses"]
    assert want[-1] < want[0]
    faults = [f"loss {a} of {b}" for a, b in zip(got, want, strict=True) if abs(a - b) > LARGEST * abs(b)]
    for name, value in alone["adapters"].items():
        mine = found[engine]["adapters"][name]
        if "lora_A" in name:
            assert_same(mine, alone["before"][name], name=name)
            continue
        assert not torch.equal(value, alone["before"][name])
        if (apart := (mine - value).norm() / value.norm()) > LARGEST:
            faults.append(f"{name} by {apart:.1e}")
    assert not faults
