"""The layer inside what people train with: checkpointing, threads, DDP and FSDP2 on two processes."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import LoRAFAConfig, LoRAFALinear, apply_lorafa, lorafa_parameters

ROWS, WIDTH, WORLD = 8, 16, 2


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH), nn.GELU(), nn.Linear(WIDTH, 4)
    )
    config = LoRAFAConfig(r=4, target_modules=["0", "2", "4"], init_lora_weights=False)
    return apply_lorafa(model, config)


def data() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    loss = model(x).square().mean()
    loss.backward()
    return [p.grad for p in lorafa_parameters(model)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    want = gradients(build(), data())
    model = build()
    x = data().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    for got, expected in zip([p.grad for p in lorafa_parameters(model)], want, strict=True):
        assert torch.equal(got, expected)


def test_gradient_accumulation():
    """Two half batches add up to the gradient of the whole one."""
    want, model = gradients(build(), data()), build()
    for half in data().chunk(2):
        (model(half).square().mean() / 2).backward()
    for got, expected in zip([p.grad for p in lorafa_parameters(model)], want, strict=True):
        torch.testing.assert_close(got, expected)


def test_threads_share_a_layer():
    layer = LoRAFALinear(WIDTH, 12, r=3, init_lora_weights=False)
    inputs = [torch.randn(ROWS, WIDTH) for _ in range(4)]
    alone = [torch.autograd.grad(layer(x).square().sum(), layer.lora_B)[0] for x in inputs]
    found: dict[int, list[torch.Tensor]] = {}

    def work(index):
        results = []
        for _ in range(30):
            (gradient,) = torch.autograd.grad(layer(inputs[index]).square().sum(), layer.lora_B)
            results.append(gradient)
        found[index] = results

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, want in enumerate(alone):
        assert all(torch.equal(got, want) for got in found[index])


def _worker(rank: int, engine: str, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    try:
        model = build()
        part = data().chunk(WORLD)[rank]
        if engine == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            for layer in model:
                if isinstance(layer, LoRAFALinear):
                    fully_shard(layer)
            wrapped = fully_shard(model)
        wrapped(part).square().mean().backward()
        found = []
        for parameter in lorafa_parameters(model):
            gradient = parameter.grad
            found.append(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
        if rank == 0:
            torch.save(found, results)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one(engine, tmp_path):
    results = tmp_path / "gradients.pt"
    mp.spawn(_worker, (engine, str(tmp_path / "rendezvous"), str(results)), nprocs=WORLD)
    for got, want in zip(torch.load(results), gradients(build(), data()), strict=True):
        torch.testing.assert_close(got, want)
