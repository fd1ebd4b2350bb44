"""The plan of a group whose kernels of dB are launched last, beside that of dx: the bits of the other order,
and what is launched after what.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from accuracy import Budget, assert_same
from conftest import GPU
from test_group import Group, draw_group, gradients, plain, results

from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.quantised import quantised_linear_group
from lorafa_kernels.plan import KernelPlan, Recipe, pin_plan
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, KernelConfig, row_chunks
from lorafa_kernels.plan.defaults import beside_config
from lorafa_kernels.plan.kernels import all_configs
from lorafa_kernels.plan.recipe import Problem, grad_chunks, kernel_configs, launches

# One for both orders: on a GPU the plans have blocks of their own.
GRAD = KernelConfig(64, 128, 0, 32, 1, 4, 1)
BESIDE = Recipe("fused", KernelPlan(grad=GRAD, one_pass=False, beside=True))
BEFORE = Recipe("fused", KernelPlan(grad=GRAD, one_pass=False))
HOPPER = KNOWN_DEVICES["sm_90"]
PROBLEM = Problem("backward", torch.bfloat16, 8192, 6144, 4096, 16, widths=(4096, 1024, 1024), makers=3)
QKV = [(64, 8), (32, 8), (32, 8)]
CASES = {
    "qkv": (QKV, {}),
    "ranks-and-widths": ([(96, 3), (40, 17), (130, 16)], {"bias": False}),
    "rank-above-block": ([(32, 140), (32, 9)], {}),
    "plain-member": ([(64, 4), (40, None), (24, 12)], {}),
    "five": ([(24 + i, 4 + i) for i in range(5)], {"scalings": (0.7, 1.5, 0.4, 1.0, 0.5)}),
    "one": ([(64, 4)], {}),
    "one-A": (QKV, {"share_A": True}),
    "dropout": (QKV, {"dropout_ps": (0.3, 0.0, 0.5)}),
    "dropout-one-A": (QKV, {"share_A": True, "dropout_ps": (0.3,) * 3}),
}


def drawn(name: str, M: int, dtype: torch.dtype, device: str, seed: int = 0) -> Group:
    shapes, options = CASES[name]
    many = {"dropout_ps": (0.0,) * len(shapes)} | options
    return draw_group(M, 40, shapes, dtype, device, factor_dtype=torch.float32, seed=seed, **many)


def by(recipe: Recipe, group: Group, needs: str = "all") -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    with pin_plan({"backward": recipe}):
        return results(group, "triton", needs)


@pytest.fixture
def launched(monkeypatch, triton_device) -> list[str]:
    """The names of the kernels that are launched, in their order."""
    launch = pytest.importorskip("lorafa_kernels.kernels.launch").Launch
    found, call = [], launch.__call__

    def noted(self, *values):
        found.append(getattr(self.kernel, "fn", self.kernel).__name__.strip("_").removesuffix("_kernel"))
        return call(self, *values)

    monkeypatch.setattr(launch, "__call__", noted)
    return found


def around_dx(names: list[str]) -> tuple[list[str], list[str]]:
    """What is launched before and behind the kernel of dx, which with one lora_A makes dz before."""
    dx = len(names) - 1 - names[::-1].index("total")
    return names[:dx], names[dx + 1 :]


def count_of_dBs(group: Group) -> int:
    return sum(member.lora_B is not None for member in group.members)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_other_order(triton_device, name, dtype):
    group = drawn(name, 34, dtype, triton_device)
    assert_same(by(BESIDE, group), by(BEFORE, group))


@pytest.mark.numerics
@pytest.mark.skipif(GPU, reason="the number of chunks depends on the members' widths there")
@pytest.mark.parametrize("name", ["qkv", "ranks-and-widths", "plain-member", "five", "one-A"])
def test_the_bits_of_the_other_order_of_many_rows(triton_device, monkeypatch, launched, name):
    """Each block of rows a chunk, whose partial sums are added in a kernel of their own."""
    grad = pytest.importorskip("lorafa_kernels.kernels.grad")
    pytest.importorskip("lorafa_kernels.kernels.launch").forget_launches()
    monkeypatch.setattr(grad, "device_limits", lambda device: replace(INTERPRETER, num_sms=500))
    group = drawn(name, 300, torch.float32, triton_device)
    dBs = count_of_dBs(group)
    want = by(BEFORE, group)
    assert launched.count("grad_sum") == dBs
    launched.clear()
    assert_same(by(BESIDE, group), want)
    assert launched[-2 * dBs :] == ["grad"] * dBs + ["grad_sum"] * dBs
    pytest.importorskip("lorafa_kernels.kernels.launch").forget_launches()


@pytest.mark.numerics
@pytest.mark.parametrize("name", ["qkv", "ranks-and-widths", "one-A"])
def test_accuracy(triton_device, name):
    """With the blocks that the plan takes, of rows in several chunks."""
    recipe = replace(BESIDE, kernels=replace(BESIDE.kernels, grad=None))
    group = drawn(name, 700, torch.float32, triton_device)
    budget = Budget()
    budget.compare(by(recipe, group), plain(group, torch.float64), plain(group))
    budget.check()


@pytest.mark.parametrize("name", [name for name in CASES if name != "one"])
def test_every_dB_comes_behind_dx(triton_device, launched, name):
    group = drawn(name, 700, torch.float32, triton_device)
    by(BESIDE, group)
    before, behind = around_dx(launched)
    dBs = count_of_dBs(group)
    assert behind[:dBs] == ["grad"] * dBs and set(behind[dBs:]) <= {"grad_sum"}
    assert not {"grad", "grad_sum"} & set(before)
    launched.clear()
    by(BEFORE, group)
    before, behind = around_dx(launched)
    assert before.count("grad") == dBs and not behind


def test_no_kernel_of_the_row_reads_what_another_writes(triton_device, monkeypatch):
    """Before it waits a kernel may read: dy and z are older than the row, and every result has memory of its
    own until the last sum is launched.
    """
    launch = pytest.importorskip("lorafa_kernels.kernels.launch").Launch
    call, found = launch.__call__, []

    def noted(self, *values):
        found.append((getattr(self.kernel, "fn", self.kernel).__name__, values))
        return call(self, *values)

    group = drawn("qkv", 700, torch.float32, triton_device)
    monkeypatch.setattr(launch, "__call__", noted)
    by(BESIDE, group)
    first = max(i for i, (name, _) in enumerate(found) if name == "_total_kernel")
    dx = found[first][1][4]
    grads = [values for name, values in found[first:] if name == "_grad_kernel"]
    sums = [values for name, values in found[first:] if name == "_grad_sum_kernel"]
    written = [dx, *(values[4] for values in grads)]
    read = [value for values in grads for value in values[:2]]
    assert len(grads) == len(sums) == 3
    ends = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in written]
    assert all(a[1] <= b[0] or b[1] <= a[0] for a, b in itertools.combinations(ends, 2))
    for one in read:
        place = one.data_ptr()
        assert not any(first <= place < last for first, last in ends)
    assert [values[1].data_ptr() for values in sums] == [values[4].data_ptr() for values in grads]


@pytest.mark.numerics
@pytest.mark.parametrize("share_A", [False, True])
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2), (1, 2)], ids=str)
def test_some_lora_B_are_frozen(triton_device, launched, frozen, share_A):
    group = drawn("one-A" if share_A else "qkv", 34, torch.float32, triton_device)

    def some(recipe: Recipe) -> dict[str, torch.Tensor]:
        x = group.x.detach().requires_grad_()
        lora_Bs = [m.lora_B.detach().requires_grad_(i not in frozen) for i, m in enumerate(group.members)]
        members = [m._replace(lora_B=B) for m, B in zip(group.members, lora_Bs, strict=True)]
        with pin_plan({"backward": recipe}):
            ys = lorafa_linear_group(x, members, share_A=share_A, impl="triton")
            return gradients(group, x, lora_Bs, ys)

    want = some(BEFORE)
    launched.clear()
    got = some(BESIDE)
    assert_same(got, want)
    assert list(got) == ["dx", *(f"dB{i}" for i in range(3) if i not in frozen)]
    assert around_dx(launched)[1] == ["grad"] * (3 - len(frozen))


@pytest.mark.numerics
@pytest.mark.parametrize("name", ["qkv", "one-A", "dropout"])
@pytest.mark.parametrize("unused", [(0,), (2,), (0, 1)], ids=str)
def test_some_outputs_are_unused(triton_device, name, unused):
    group = drawn(name, 34, torch.float32, triton_device)
    group.dys = [None if i in unused else dy for i, dy in enumerate(group.dys)]
    got, want = by(BESIDE, group), by(BEFORE, group)
    assert_same(got, want)
    assert all((f"dB{i}" in got) == (i not in unused) for i in range(3))


@pytest.mark.numerics
@pytest.mark.parametrize("needs", ["dx", "dB"])
@pytest.mark.parametrize("name", ["qkv", "one-A"])
def test_one_kind_of_gradient_is_needed(triton_device, launched, name, needs):
    """The plan is for both: of one alone the order stays."""
    group = drawn(name, 34, torch.float32, triton_device)
    want = by(BEFORE, group, needs)
    before = list(launched)
    launched.clear()
    assert_same(by(BESIDE, group, needs), want)
    assert launched == before and (launched.count("grad") == 3) == (needs == "dB")


def test_without_columns_dx_takes_no_launch_to_run_beside(triton_device, launched, monkeypatch):
    """dB's kernels are launched in the ordinary way then, and have the same bits."""
    fused = pytest.importorskip("lorafa_kernels.group.fused")
    monkeypatch.setattr(fused, "grads_beside", lambda *args, **options: pytest.fail("behind no kernel"))
    problem = replace(PROBLEM, dtype=torch.float32, M=34, K=0, N=128, R=8, widths=(64, 32, 32))
    draw = lambda *shape: torch.randn(shape, device=triton_device)  # noqa: E731
    widths = problem.widths
    dys, z = [draw(34, N) for N in widths], draw(34, 24)
    weights, lora_As = [draw(N, 0) for N in widths], [draw(8, 0)] * 3
    how = [draw(N, 8) for N in widths], [1.0] * 3, [0.0] * 3, None, False, True, [True] * 3
    found = []
    for recipe in (BESIDE, BEFORE):
        plan = all_configs(recipe.kernels, problem, INTERPRETER)
        found.append(fused.backward(dys, z, weights, lora_As, *how, plan=plan))
    (dx, dBs), want = found
    assert dx.shape == (34, 0)
    assert_same(dBs, want[1])
    assert "total" not in launched and launched.count("grad") == 6


@pytest.mark.numerics
def test_members_without_columns_and_rows(triton_device, launched):
    """A launch of nothing would fail: the row of kernels goes on without it."""
    grad = pytest.importorskip("lorafa_kernels.kernels.grad")
    draw = lambda *shape: torch.randn(shape, device=triton_device)  # noqa: E731
    dtypes = [torch.float32, torch.float32, torch.float64]
    for widths in ((0, 40, 24), (40, 24, 0), (0, 0, 0), (40, 0, 24)):
        dys, zs = [draw(30, N) for N in widths], [draw(30, 5) for _ in widths]
        launched.clear()
        found = grad.grads_beside(dys, zs, dtypes, config=GRAD)
        assert launched == ["grad"] * (3 - widths.count(0))
        assert_same(
            found,
            [
                grad.grad(*one, None, 1.0, dtype, config=GRAD)[1]
                for *one, dtype in zip(dys, zs, dtypes, strict=True)
            ],
        )
    launched.clear()
    found = grad.grads_beside([draw(0, 40), draw(0, 24)], [draw(0, 5)] * 2, dtypes[:2], config=GRAD)
    assert_same(found, [torch.zeros(N, 5, device=triton_device) for N in (40, 24)])
    assert not launched


def test_a_quantised_group_runs_each_member_so(triton_device, launched):
    """One weight is there at a time: dB of each member runs beside its own part of dx."""
    group = draw_group(34, 64, QKV, torch.float32, triton_device)
    bases = [quantised(member.weight, "int8") for member in group.members]
    x = group.x.detach().requires_grad_()
    lora_Bs = [member.lora_B.detach().requires_grad_() for member in group.members]
    members = [m._replace(weight=W, lora_B=B) for m, W, B in zip(group.members, bases, lora_Bs, strict=True)]
    found = []
    for recipe in (BESIDE, BEFORE):
        with pin_plan({"backward": recipe}):
            ys = quantised_linear_group(x, members, impl="triton")
            launched.clear()
            found.append(gradients(group, x, lora_Bs, ys))
        assert (
            launched
            == (["shrink", "expand", "grad"] if recipe is BESIDE else ["grad", "shrink", "expand"]) * 3
        )
    assert_same(*found)


def test_plans_say_the_order():
    recipe = replace(BESIDE, kernels=replace(BESIDE.kernels, grad=None))
    assert launches(recipe, PROBLEM, HOPPER) == ("shrink", "expand", "grad")
    # Of fewer columns there is more than one chunk of rows.
    few = replace(PROBLEM, N=1536, widths=(512, 512, 512))
    assert launches(recipe, few, HOPPER) == ("shrink", "expand", "grad", "grad_sum")
    assert kernel_configs(recipe, PROBLEM, HOPPER)["grad"] == beside_config(HOPPER, 2, 8192, 16)
    plan = all_configs(recipe.kernels, PROBLEM, HOPPER)
    assert plan.beside and plan.grad == beside_config(HOPPER, 2, 8192, 16)
    # Of few rows dz would be made within expand, which leaves nothing to run beside.
    assert not all_configs(recipe.kernels, replace(PROBLEM, M=16), HOPPER).beside


@pytest.mark.parametrize(
    "widths", [(4096, 1024, 1024), (2048,) * 3, (5632, 5632), (1000, 100, 100), (512,) * 4]
)
def test_blocks_of_all_members_fit_at_a_time(widths):
    """One on each multiprocessor, where a block stays until dx is there."""
    config = beside_config(HOPPER, 2, 8192, 16)
    together = replace(PROBLEM, N=sum(widths), widths=widths)
    strips = [-(-N // config.BLOCK_N) for N in widths]
    cut = grad_chunks(config, together, HOPPER, beside=True)
    assert [N for N, _ in cut] == list(widths)
    blocks = sum(count * chunks for count, (_, chunks) in zip(strips, cut, strict=True))
    assert HOPPER.num_sms / 2 < blocks <= HOPPER.num_sms or sum(strips) > HOPPER.num_sms
    # In the order in which each fills the device by itself there are more of them.
    alone = grad_chunks(config, together, HOPPER, beside=False)
    assert [chunks for _, chunks in alone] == [row_chunks(config, HOPPER, 8192, N) for N in widths]
    assert all(own >= shared for (_, own), (_, shared) in zip(alone, cut, strict=True))
