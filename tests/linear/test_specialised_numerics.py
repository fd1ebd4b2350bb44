"""expand with specialised warps, without z and with it, computes y and dx within the error budget, and the
same bits each time.

On sm_90 alone, with Triton 3.6 or 3.7: nothing interprets Gluon.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from accuracy import SMALL_OUTPUT, Budget, assert_same
from conftest import on_device
from kernel_plans import pin
from memory_beds import Beds

from lorafa_kernels import lorafa_linear
from lorafa_kernels.checks.budget import Operands, draw_operands, lorafa_results
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.linear import ops
from lorafa_kernels.plan.choice import planned_device
from lorafa_kernels.plan.config import KNOWN_DEVICES, KernelConfig, KernelPlan
from lorafa_kernels.plan.specialised import missing_for_ws, ws_configs

launcher = pytest.importorskip("lorafa_kernels.kernels.expand")
recompute = pytest.importorskip("lorafa_kernels.kernels.recompute")
pytestmark = pytest.mark.numerics
HOPPER = KNOWN_DEVICES["sm_90"]
VARIANTS = ("ws", "ws_z")
variants = pytest.mark.parametrize("variant", VARIANTS)
# Small blocks with two stages, so that the ring comes round often; and the least tile.
SMALL = {name: KernelConfig(128, 64, 32, 128, 2, 8, 2, name, EPILOGUE_SUBTILE=4) for name in VARIANTS}
CONFIGS = [pytest.param(config, id=f"{name}-small") for name, config in SMALL.items()] + [
    pytest.param(config, id="-".join(map(str, (name, config.BLOCK_M, config.BLOCK_N, R))))
    for name in VARIANTS
    for R in (16, 64, 128)
    for config in ws_configs(HOPPER, 2, R, name)
]


@pytest.fixture(params=[on_device("cuda")])
def hopper(request) -> str:
    """A device that runs the kernel."""
    target = planned_device(torch.device(request.param))
    if lacks := missing_for_ws(target.limits, target.triton):
        pytest.skip(f"the kernel {lacks}")
    return request.param


@pytest.fixture
def runs(monkeypatch) -> list[tuple[int, int]]:
    """The shape of each result that one of the two kernels made."""
    found, find = [], launcher.warp_specialised

    def watched(name, limits):
        kernel = find(name, limits)

        def run(P, Q, *rest):
            found.append((P.shape[0], Q.shape[1]))
            return kernel(P, Q, *rest)

        return run

    for module in (launcher, recompute):
        monkeypatch.setattr(module, "warp_specialised", watched)
    return found


def pin_blocks(monkeypatch, config: KernelConfig, one_pass: bool = True, pdl: bool = True) -> None:
    pin(monkeypatch, KernelPlan(expand=config, one_pass=one_pass, pdl=pdl))


@variants
@pytest.mark.parametrize("R", range(1, 129))
def test_accuracy_at_every_rank(monkeypatch, hopper, runs, R, variant):
    """A ragged last tile in every direction; lora_B in fp32 and in 16 bits; two ranks bf16, two fp16."""
    dtype = torch.float16 if R & 2 else torch.bfloat16
    configs = ws_configs(HOPPER, 2, R, variant)
    config = configs[R % len(configs)]
    for factor_dtype in (dtype, torch.float32):
        pin_blocks(monkeypatch, config, one_pass=R % 2 == 0)
        budget = Budget()
        # Of rank 1 two draws, which have elements enough.
        for seed in range(-(-SMALL_OUTPUT // (200 * R))):
            inputs = draw_operands(150, 72, 200, R, dtype, hopper, factor_dtype=factor_dtype, seed=seed)
            runs.clear()
            budget.add(inputs, lorafa_results(inputs, "triton"))
            assert runs == [(150, 200), (150, 72)]
        budget.check()


SHAPES = [
    pytest.param(dict(M=1, K=8, N=8, R=64), id="one-row"),
    pytest.param(dict(M=128, K=64, N=256, R=16), id="one-tile"),
    pytest.param(dict(M=129, K=72, N=264, R=16), id="a-row-and-a-column-more"),
    pytest.param(dict(M=127, K=56, N=248, R=15), id="a-row-and-a-column-less"),
    pytest.param(dict(M=2048, K=576, N=1536, R=16), id="more-tiles-than-programs"),
    pytest.param(dict(M=2300, K=520, N=1544, R=100), id="more-ragged-tiles-than-programs"),
    pytest.param(dict(M=300, K=4096, N=136, R=24), id="long-contraction"),
]


@pytest.mark.parametrize(
    "dtype, bias", [(torch.bfloat16, True), (torch.float16, False)], ids=["bf16-bias", "fp16"]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_accuracy_of_every_shape(monkeypatch, hopper, runs, config, shape, dtype, bias):
    if shape["R"] > config.BLOCK_R:
        config = ws_configs(HOPPER, 2, shape["R"], config.variant)[-1]
    pin_blocks(monkeypatch, config)
    budget = Budget()
    for seed in range(-(-SMALL_OUTPUT // (min(shape["K"], shape["N"]) * min(shape["M"], shape["R"])))):
        inputs = draw_operands(
            **shape, dtype=dtype, device=hopper, bias=bias, factor_dtype=torch.float32, seed=seed
        )
        runs.clear()
        budget.add(inputs, lorafa_results(inputs, "triton"))
        assert runs == [(shape["M"], shape["N"]), (shape["M"], shape["K"])]
    budget.check()


@pytest.mark.parametrize("one_pass, pdl", list(itertools.product((True, False), repeat=2)))
def test_every_arrangement_gives_the_same_y(monkeypatch, hopper, one_pass, pdl):
    inputs = draw_operands(700, 264, 392, 24, torch.bfloat16, hopper, factor_dtype=torch.float32)
    found = []
    for arrangement in ((True, True), (one_pass, pdl)):
        pin_blocks(monkeypatch, replace(SMALL["ws"], BLOCK_R=32), *arrangement)
        found.append(lorafa_results(inputs, "triton"))
    assert_same(found[1]["y"], found[0]["y"])
    budget = Budget()
    budget.add(inputs, found[1])
    budget.check()


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def stepped(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1] + 3), float("nan"))
    wide[:, 3::2] = tensor
    return wide[:, 3::2]


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """Rows within longer ones, at multiples of 16 bytes."""
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 24), float("nan"))
    wide[:, 8 : 8 + tensor.shape[1]] = tensor
    return wide[:, 8 : 8 + tensor.shape[1]]


@variants
@pytest.mark.parametrize("factors", [transposed, stepped, padded])
def test_strides_change_no_bit(monkeypatch, hopper, runs, factors, variant):
    """lora_A, lora_B and bias may lie in any way; x, dy and the weight where TMA can address them."""
    pin_blocks(monkeypatch, ws_configs(HOPPER, 2, 24, variant)[0])
    inputs = draw_operands(300, 136, 264, 24, torch.bfloat16, hopper)
    want = lorafa_results(inputs, "triton")
    wide = ("x", "weight", "dy")
    changed = Operands(
        **{name: padded(getattr(inputs, name)) for name in wide},
        **{name: factors(getattr(inputs, name)) for name in ("lora_A", "lora_B")},
        bias=stepped(inputs.bias[None])[0],
        scaling=inputs.scaling,
    )
    assert not changed.lora_A.is_contiguous() and not changed.x.is_contiguous()
    runs.clear()
    got = lorafa_results(changed, "triton")
    assert len(runs) == 2
    for name in ("y", "dx"):
        assert_same(got[name], want[name])


@variants
@pytest.mark.parametrize("operand", ["x", "weight"])
def test_operands_that_tma_cannot_address_take_other_kernels(monkeypatch, hopper, runs, operand, variant):
    pin_blocks(monkeypatch, ws_configs(HOPPER, 2, 16, variant)[0])
    inputs = draw_operands(150, 72, 200, 16, torch.bfloat16, hopper)
    setattr(inputs, operand, stepped(getattr(inputs, operand)))
    budget = Budget()
    budget.add(inputs, lorafa_results(inputs, "triton"))
    budget.check()
    assert runs == ([] if operand == "weight" else [(150, 72)])


@pytest.mark.parametrize("config", [case for case in CONFIGS if case.values[0].BLOCK_R in (16, 128)])
def test_the_same_bits_two_hundred_times(monkeypatch, hopper, config):
    """While other kernels run, and with z of the call before still in memory."""
    R = min(24, config.BLOCK_R)
    pin_blocks(monkeypatch, config)
    inputs = draw_operands(2048, 320, 1288, R, torch.bfloat16, hopper, factor_dtype=torch.float32)
    other = draw_operands(2048, 320, 1288, R, torch.bfloat16, hopper, factor_dtype=torch.float32, seed=1)
    first = lorafa_results(inputs, "triton")
    for _ in range(200):
        lorafa_results(other, "triton")
        assert_same(lorafa_results(inputs, "triton"), first)


@variants
def test_streams_do_not_disturb_each_other(monkeypatch, hopper, variant):
    """Nor wait for each other for ever: several launches that wait for flags share the multiprocessors."""
    pin_blocks(monkeypatch, ws_configs(HOPPER, 2, 16, variant)[0])
    drawn = [draw_operands(1024, 264, 776, 16, torch.bfloat16, hopper, seed=seed) for seed in range(3)]
    want = [lorafa_results(inputs, "triton") for inputs in drawn]
    streams = [torch.cuda.Stream() for _ in drawn]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, inputs in zip(streams, drawn, strict=True):
            with torch.cuda.stream(stream):
                got.append(lorafa_results(inputs, "triton"))
        torch.cuda.synchronize()
        assert_same(got, want)


@variants
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_propagate(monkeypatch, hopper, bad, variant):
    """To the row that they are in, and to no other."""
    pin_blocks(monkeypatch, ws_configs(HOPPER, 2, 16, variant)[0])
    inputs = draw_operands(200, 72, 264, 12, torch.bfloat16, hopper)
    inputs.x[4, 3] = inputs.dy[9, 5] = bad
    got = lorafa_results(inputs, "triton")
    for name, row in (("y", 4), ("dx", 9)):
        finite = torch.isfinite(got[name])
        assert not finite[row].any() and finite.sum() == (200 - 1) * finite.shape[1], name


@variants
def test_reads_and_writes_nothing_beside_its_operands(monkeypatch, hopper, runs, variant):
    beds = Beds()
    monkeypatch.setattr(torch, "empty", beds.make)
    for R in (3, 8, 100):
        pin_blocks(monkeypatch, ws_configs(HOPPER, 2, R, variant)[0])
        i = draw_operands(133, 72, 264, R, torch.bfloat16, hopper, factor_dtype=torch.float32)
        x, weight, A, B, bias, dy = map(beds.lay, (i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.dy))
        _, z = ops.forward(x, weight, A, B, bias, 0.7, "triton", 0.0, None)
        ops.backward(dy, beds.lay(z), weight, A, B, 0.7, "triton", 0.0, None)
    assert len(runs) == 6
    beds.check()


def test_dropout_of_x_in_forward(monkeypatch, hopper, runs):
    """The mask is shrink's there: the same y as with the heuristics' kernels, within the budget."""
    pin(monkeypatch, KernelPlan())
    inputs = draw_operands(300, 136, 264, 16, torch.bfloat16, hopper, dropout_p=0.25)
    options = {"scaling": inputs.scaling, "dropout_p": 0.25, "impl": "triton"}

    def forward() -> torch.Tensor:
        factors = inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias
        with inputs.seeded(), torch.no_grad():
            return lorafa_linear(inputs.x, *factors, **options)

    want = forward()
    pin_blocks(monkeypatch, ws_configs(HOPPER, 2, 16)[0])
    assert runs == []
    got = forward()
    assert runs == [(300, 264)]
    budget = Budget()
    budget.compare({"y": got}, {"y": want.double()}, {"y": want})
    budget.check()


@variants
def test_members_of_a_group(monkeypatch, hopper, runs, variant):
    """Each y by the kernel, as by itself."""
    pin_blocks(monkeypatch, ws_configs(HOPPER, 2, 16, variant)[0])
    drawn = [draw_operands(300, 136, N, 16, torch.bfloat16, hopper, seed=N) for N in (264, 128, 128)]
    x = drawn[0].x
    members = [LinearOperands(i.weight, i.bias, i.lora_A, i.lora_B, i.scaling, 0.0) for i in drawn]
    with torch.no_grad():
        ys = lorafa_linear_group(x, members)
        assert runs == [(300, 264), (300, 128), (300, 128)]
        for y, i in zip(ys, drawn, strict=True):
            alone = lorafa_linear(x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=i.scaling, impl="triton")
            budget = Budget()
            budget.compare({"y": y}, {"y": alone.double()}, {"y": alone})
            budget.check()
