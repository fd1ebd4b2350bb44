"""tune offers an expand with specialised warps where one runs, and refuses one that computes something wrong
before it is timed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_tune import Scripted

from lorafa_kernels.plan import choice
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import KNOWN_DEVICES, KernelPlan
from lorafa_kernels.plan.make import make_plan
from lorafa_kernels.plan.recipe import Device, Problem, Recipe, obstacle
from lorafa_kernels.plan.specialised import ws_configs
from lorafa_kernels.tune import search
from lorafa_kernels.tune.search import neighbours, specialised, tune

launcher = pytest.importorskip("lorafa_kernels.kernels.expand")
recompute = pytest.importorskip("lorafa_kernels.kernels.recompute")
HOPPER = Device("NVIDIA H200", KNOWN_DEVICES["sm_90"], "3.7.1")
FORWARD, BACKWARD = (Problem(op, torch.bfloat16, 8192, 4096, 4096, 16) for op in ("forward", "backward"))


@pytest.mark.parametrize("R", [1, 64, 128])
@pytest.mark.parametrize("problem, count", [(FORWARD, 3), (BACKWARD, 6)], ids=["forward", "backward"])
def test_offers_a_few_blocks_on_hopper(problem, count, R):
    problem = replace(problem, R=R)
    found = specialised(problem, HOPPER)
    assert len(set(found)) == len(found)
    variants = [recipe.kernels.expand.variant for recipe in found]
    assert variants.count("ws") == count and variants.count("ws_z") == (3 if R <= 16 else 1)
    for recipe in found:
        assert recipe.kernels.pdl == (recipe.kernels.expand.variant == "ws")
        assert obstacle(recipe, problem, HOPPER.limits, HOPPER.triton) is None


@pytest.mark.parametrize(
    ("problem", "device"),
    [
        pytest.param(replace(FORWARD, dtype=torch.float32), HOPPER, id="fp32"),
        pytest.param(replace(FORWARD, R=129), HOPPER, id="rank"),
        pytest.param(replace(FORWARD, N=4097), HOPPER, id="unaligned"),
        pytest.param(replace(FORWARD, op="backward_lora_B", K=0), HOPPER, id="no-expand"),
        pytest.param(FORWARD, replace(HOPPER, triton="3.8.0"), id="triton"),
        pytest.param(FORWARD, replace(HOPPER, limits=KNOWN_DEVICES["sm_100"]), id="sm_100"),
    ],
)
def test_offers_none_where_it_does_not_run(problem, device):
    assert specialised(problem, device) == []


def test_dropout_leaves_what_makes_no_mask():
    """z of forward is shrink's, and so is its mask; that of dx would be expand's."""
    assert specialised(replace(BACKWARD, dropout=True), HOPPER) == []
    found = specialised(replace(FORWARD, dropout=True), HOPPER)
    assert len(found) == 3 and {recipe.kernels.expand.variant for recipe in found} == {"ws"}


def test_few_rows_have_it_beside_one_launch():
    found = specialised(replace(FORWARD, M=64), HOPPER)
    assert len(found) == 6
    assert {recipe.kernels.expand.variant for recipe in found} == {"ws", "ws_z"}


@pytest.mark.parametrize("variant", ["ws", "ws_z"])
def test_its_neighbours_can_be_launched(variant):
    base = Recipe("fused", KernelPlan(expand=ws_configs(HOPPER.limits, 2, 16, variant)[0], one_pass=False))
    found = neighbours(base, "expand", FORWARD, HOPPER)
    assert len(found) >= 4
    for recipe in found:
        assert search.wrong_field("expand", recipe.kernels.expand) is None
        assert recipe.kernels.expand.variant == variant


# A search on this machine, with a stand-in for the kernel


SMALL = Problem("forward", torch.bfloat16, 160, 64, 64, 8)


@pytest.fixture
def here(monkeypatch, tmp_path, triton_device):
    """A function (kernel, variant) that searches SMALL as if this device ran a kernel of that variant:
    `kernel` in its place.
    """
    if triton_device != "cpu":
        pytest.skip("a GPU has the kernel itself, or none")
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path))
    choice.forget_plans()
    device = torch.device("cpu")
    target = choice.planned_device(device)
    monkeypatch.setattr("lorafa_kernels.plan.recipe.missing_for_ws", lambda limits, triton: None)

    def run(kernel, variant):
        configs = ws_configs(KNOWN_DEVICES["sm_90"], 2, SMALL.R, variant)
        plans = [KernelPlan(expand=config, one_pass=variant == "ws") for config in configs]
        monkeypatch.setattr(search, "specialised", lambda *_: [Recipe("fused", plan) for plan in plans])
        for module in (launcher, recompute):
            monkeypatch.setattr(module, "warp_specialised", lambda name, limits: kernel)

        def cost(recipe):
            expand = recipe.kernels.expand
            return 1.0 if expand and expand.variant == variant else 5.0

        path = lookup.cache_path(target)
        (result,) = tune([SMALL], device, Scripted(SMALL, cost), path, about={}, budget_s=1e-9)
        choice.forget_plans()
        return result, make_plan(SMALL, target)

    yield run
    choice.forget_plans()


def product(P, Q, L, F, bias, C, config, transposed, wait, num_sms):
    assert config.variant == "ws" and transposed
    C.copy_(P.double() @ Q.double() + L.double() @ F.to(P.dtype).double() + (0 if bias is None else bias))


def both(P, Q, D, F, bias, scaling, config, transposed, num_sms):
    """The same of the kernel that makes z."""
    assert config.variant == "ws_z" and transposed
    L = (scaling * (P.double() @ D.to(P.dtype).double())).to(P.dtype)
    C = torch.empty(P.shape[0], Q.shape[1], dtype=P.dtype)
    C.copy_(P.double() @ Q.double() + L.double() @ F.to(P.dtype).double() + (0 if bias is None else bias))
    return C, L


@pytest.mark.parametrize("kernel, variant", [(product, "ws"), (both, "ws_z")], ids=["ws", "ws_z"])
def test_a_right_one_is_timed_and_chosen(here, kernel, variant):
    result, plan = here(kernel, variant)
    assert result.winner.recipe.kernels.expand.variant == variant
    assert (plan.source, plan.kernels.expand.variant) == ("user cache", variant)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda C, L: C.zero_(), id="nothing"),
        pytest.param(lambda C, L: C[:, 3].neg_(), id="a-column"),
        pytest.param(lambda C, L: C[128:].mul_(1.05), id="the-second-tile"),
        pytest.param(lambda C, L: C[0, 0].fill_(float("nan")), id="one-nan"),
    ],
)
def test_a_wrong_one_is_refused_before_it_is_timed(here, wrong):
    def kernel(P, Q, L, F, bias, C, *rest):
        product(P, Q, L, F, bias, C, *rest)
        wrong(C, L)

    result, plan = here(kernel, "ws")
    assert plan.kernels.expand.variant != "ws"
    refused = [why for text, why in result.refused if "specialised warps" in text]
    assert len(refused) == 3 and all(why.startswith("y has a relative error of") for why in refused)


def test_one_without_the_rank_term_is_refused(here):
    def kernel(P, Q, L, F, bias, C, *rest):
        product(P, Q, torch.zeros_like(L), F, bias, C, *rest)

    result, _ = here(kernel, "ws")
    assert len([why for text, why in result.refused if "specialised warps" in text]) == 3


def test_one_that_reads_z_before_it_is_written_is_refused(here):
    """The first row of tiles has z, the second what lay in memory."""

    def kernel(P, Q, D, F, bias, scaling, *rest):
        C, L = both(P, Q, D, F, bias, scaling, *rest)
        C[128:] -= (L[128:].double() @ F.to(P.dtype).double()).to(C.dtype)
        return C, L

    result, _ = here(kernel, "ws_z")
    refused = [why for text, why in result.refused if "one launch for z and y" in text]
    assert len(refused) == 3 and all(why.startswith("y has a relative error of") for why in refused)


@pytest.mark.gpu
def test_is_checked_and_timed_on_hopper(tmp_path, monkeypatch):
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path))
    choice.forget_plans()
    device = torch.device("cuda")
    target = choice.planned_device(device)
    problem = Problem("forward", torch.bfloat16, 512, 512, 512, 16)
    offered = specialised(problem, target)
    if not offered:
        pytest.skip(f"no specialised warps on {target.name} with Triton {target.triton}")
    found = search.Search(problem, device, target, search.EventTimer(device), lambda text: None)
    assert [found.refusal(recipe) for recipe in offered] == [None] * len(offered)
    assert set(found.measure(offered, 3)) == set(offered)
    choice.forget_plans()
