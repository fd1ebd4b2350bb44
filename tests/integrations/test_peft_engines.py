"""A PeftModel on these kernels inside DDP, FSDP1 and FSDP2, on a dense base and on quantised ones: losses and
adapters of one process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_same
from peft import get_peft_model
from peft_beds import config, draw, load_quantised, plain_name, save_llama, tokens, with_peft
from processes import start
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lorafa_kernels.integrations import peft_quantised
from lorafa_kernels.integrations.peft import accelerate_peft
from lorafa_kernels.model.placing import quantised as placing

STEPS, ROWS = 5, 4
# What docs/engines.md says.
LARGEST = 1e-6
BASES = ["dense", "nf4"] + ["bitsandbytes nested"] * (importlib.util.find_spec("bitsandbytes") is not None)
# FSDP1 flattens no whole numbers.
ENGINES = [
    (e, base) for base in BASES for e in ("ddp", "fsdp1", "fsdp2") if (e, base != "dense") != ("fsdp1", True)
]
# What computes layers on quantised bases: by themselves, as groups, in MLPs.
SERVED = (
    (peft_quantised, "quantised_linear"),
    (placing, "quantised_linear_group"),
    (placing, "quantised_gated_mlp"),
)
pytestmark = [pytest.mark.numerics, pytest.mark.slow]


def accelerated(base: str, folder) -> nn.Module:
    if base == "dense":
        return accelerate_peft(with_peft("llama"))
    model = get_peft_model(load_quantised(folder, base), config())
    draw(model)
    return accelerate_peft(model).train()


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


def _through(engine: str, base: str, rank: int, world: int, folder: str) -> dict:
    model = accelerated(base, folder)
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
    found = {}
    for engine, base in ENGINES:
        with contextlib.ExitStack() as stack:
            served = [
                stack.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))
                for module, name in SERVED
            ]
            found[engine, base] = _through(engine, base, rank, world, f"{folder}/base")
        # Of each of two decoder layers o_proj, q/k/v and the MLP.
        expected = 0 if base == "dense" else STEPS * 2
        assert [function.call_count for function in served] == [expected] * 3
    if rank == 0:
        torch.save(found, f"{folder}/found")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("engines")
    save_llama(folder / "base")
    start(_worker, 2, folder)
    return torch.load(folder / "found") | {"folder": folder / "base"}


@functools.cache
def alone(base: str, folder) -> dict:
    model = accelerated(base, folder)
    before = adapters(model)
    return {"before": before, "losses": train(model, model, 0, 1), "adapters": adapters(model)}


@pytest.mark.parametrize(("engine", "base"), ENGINES)
def test_losses_and_adapters_are_those_of_one_process(found, engine, base):
    one = alone(base, found["folder"])
    got, want = found[engine, base]["losses"], one["losses"]
    assert want[-1] < want[0]
    faults = [f"loss {a} of {b}" for a, b in zip(got, want, strict=True) if abs(a - b) > LARGEST * abs(b)]
    for name, value in one["adapters"].items():
        mine = found[engine, base]["adapters"][name]
        if "lora_A" in name:
            assert_same(mine, one["before"][name], name=name)
            continue
        assert not torch.equal(value, one["before"][name])
        if (apart := (mine - value).norm() / value.norm()) > LARGEST:
            faults.append(f"{name} by {apart:.1e}")
    assert not faults
