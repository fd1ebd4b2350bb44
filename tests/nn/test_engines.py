"""The layer inside what people train with: checkpointing, threads, DDP and FSDP2 on one and two processes."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_same, check_budget, whole
from processes import group, start
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import LoRAFAConfig, LoRAFALinear, apply_lorafa, lorafa_parameters

pytestmark = pytest.mark.numerics
ROWS, WIDTH, WORLD = 8, 16, 2
ENGINES = ("ddp", "fsdp2")


def build(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH), nn.GELU(), nn.Linear(WIDTH, 4)
    )
    # The gradients have 416 elements together.
    config = LoRAFAConfig(r=8, target_modules=["0", "2", "4"], init_lora_weights=False)
    return apply_lorafa(model, config).to(dtype)


def data() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    loss = model(x).square().mean()
    loss.backward()
    return [p.grad for p in lorafa_parameters(model)]


def check_gradients(got: list[torch.Tensor]) -> None:
    """The error budget for a gradient that is summed in another order than that of one batch."""
    of_kinds = got, gradients(build(torch.float64), data().double()), gradients(build(), data())
    check_budget(*({"dB": torch.cat([dB.flatten() for dB in of_kind])} for of_kind in of_kinds))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    want = gradients(build(), data())
    model = build()
    x = data().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    assert_same([p.grad for p in lorafa_parameters(model)], want)


def test_gradient_accumulation():
    """Two half batches add up to the gradient of the whole one."""
    model = build()
    for half in data().chunk(2):
        (model(half).square().mean() / 2).backward()
    check_gradients([p.grad for p in lorafa_parameters(model)])


def test_threads_share_a_layer():
    layer = LoRAFALinear(WIDTH, 12, r=4, lora_alpha=8, init_lora_weights=False)
    inputs = [torch.randn(ROWS, WIDTH) for _ in range(4)]
    whole(*layer.parameters(), *inputs)
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


def _gradients_by(engine: str, part: torch.Tensor) -> list[torch.Tensor]:
    model = build()
    if engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if isinstance(layer, LoRAFALinear):
                fully_shard(layer)
        wrapped = fully_shard(model)
    wrapped(part).square().mean().backward()
    grads = [parameter.grad for parameter in lorafa_parameters(model)]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def _worker(rank: int, world: int, folder: str) -> None:
    found = {engine: _gradients_by(engine, data().chunk(world)[rank]) for engine in ENGINES}
    if rank == 0:
        torch.save(found, f"{folder}/result")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_give_the_gradients_of_one(tmp_path):
    start(_worker, WORLD, tmp_path)
    found = torch.load(tmp_path / "result")
    assert tuple(found) == ENGINES
    for engine in ENGINES:
        check_gradients(found[engine])


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_engines_of_one_process_give_the_gradients_without_them(tmp_path):
    with group(0, 1, tmp_path):
        _worker(0, 1, str(tmp_path))
    want = gradients(build(), data())
    for engine, got in torch.load(tmp_path / "result").items():
        assert_same(got, want, name=engine)
