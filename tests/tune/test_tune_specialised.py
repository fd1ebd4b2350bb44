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
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, KernelPlan
from lorafa_kernels.plan.make import make_plan
from lorafa_kernels.plan.recipe import Device, Problem, Recipe, obstacle
from lorafa_kernels.plan.specialised import ws_configs
from lorafa_kernels.tune import command, search
from lorafa_kernels.tune.search import neighbours, specialised, tune

tile = pytest.importorskip("lorafa_kernels.kernels.tile")
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
# Rows for three tiles on each of so many multiprocessors, in blocks of 256 rows: more than are checked of
# kernels that are not persistent.
LONG, SMS = replace(SMALL, M=4096), 4


@pytest.fixture
def here(monkeypatch, tmp_path, triton_device):
    """A function (kernel, variant, problem) that searches `problem` as if this device ran a kernel of that
    variant, with `kernel` in its place, on SMS multiprocessors.
    """
    if triton_device != "cpu":
        pytest.skip("a GPU has the kernel itself, or none")
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path))
    limits = replace(INTERPRETER, num_sms=SMS)
    for module in (tile, launcher, recompute):
        monkeypatch.setattr(module, "device_limits", lambda device: limits)
    choice.forget_plans()
    device = torch.device("cpu")
    target = choice.planned_device(device)
    monkeypatch.setattr("lorafa_kernels.plan.recipe.missing_for_ws", lambda limits, triton: None)

    def run(kernel, variant, problem=SMALL):
        configs = ws_configs(KNOWN_DEVICES["sm_90"], 2, problem.R, variant)
        plans = [KernelPlan(expand=config, one_pass=variant == "ws") for config in configs]
        monkeypatch.setattr(search, "specialised", lambda *_: [Recipe("fused", plan) for plan in plans])
        for module in (launcher, recompute):
            monkeypatch.setattr(module, "warp_specialised", lambda name, limits: kernel)

        def cost(recipe):
            expand = recipe.kernels.expand
            return 1.0 if expand and expand.variant == variant else 5.0

        path = lookup.cache_path(target)
        timer = Scripted(problem, cost)
        (result,) = tune([problem], device, timer, path, about={}, budget_s=1e-9)
        choice.forget_plans()
        return result, make_plan(problem, target)

    yield run
    choice.forget_plans()


def product(P, Q, L, F, bias, C, config, transposed, wait, num_sms):
    assert config.variant == "ws"
    C.copy_(P.double() @ Q.double() + L.double() @ F.to(P.dtype).double() + (0 if bias is None else bias))


def both(P, Q, D, F, bias, scaling, config, transposed, num_sms):
    """The same of the kernel that makes z."""
    assert config.variant == "ws_z"
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
    refused = refused_of(result)
    assert len(refused) == 3 and all(why.startswith("y has a relative error of") for why in refused)


def test_one_without_the_rank_term_is_refused(here):
    def kernel(P, Q, L, F, bias, C, *rest):
        product(P, Q, torch.zeros_like(L), F, bias, C, *rest)

    result, _ = here(kernel, "ws")
    assert len(refused_of(result)) == 3


def test_one_that_reads_z_before_it_is_written_is_refused(here):
    """The first row of tiles has z, the second what lay in memory."""

    def kernel(P, Q, D, F, bias, scaling, *rest):
        C, L = both(P, Q, D, F, bias, scaling, *rest)
        C[128:] -= (L[128:].double() @ F.to(P.dtype).double()).to(C.dtype)
        return C, L

    result, _ = here(kernel, "ws_z")
    refused = [why for text, why in result.refused if "one launch for z and y" in text]
    assert len(refused) == 3 and all(why.startswith("y has a relative error of") for why in refused)


def refused_of(result) -> list[str]:
    """The reasons for which recipes of the planted kernel were refused."""
    return [why for text, why in result.refused if "specialised warps" in text]


STAND_INS = {"ws": product, "ws_z": both}


def planted(variant: str, spoil):
    """The stand-in of a variant, whose result `spoil` (C, config, F, bias, num_sms, transposed) damages."""

    def of_ws(P, Q, L, F, bias, C, config, transposed, wait, num_sms):
        product(P, Q, L, F, bias, C, config, transposed, wait, num_sms)
        spoil(C, config, F, bias, num_sms, transposed)

    def of_ws_z(P, Q, D, F, bias, scaling, config, transposed, num_sms):
        C, L = both(P, Q, D, F, bias, scaling, config, transposed, num_sms)
        spoil(C, config, F, bias, num_sms, transposed)
        return C, L

    return {"ws": of_ws, "ws_z": of_ws_z}[variant]


def from_tile(number: int):
    """What is right in the first tiles of each block, and 5 % too large from the given one on: y has a single
    column of tiles, so a block's tiles lie SMS blocks of rows apart.
    """
    return lambda C, config, F, bias, num_sms, transposed: C[number * num_sms * config.BLOCK_M :].mul_(1.05)


def in_the_last_tile(C, config, F, bias, num_sms, transposed):
    """What is wrong where a block of rows is not full."""
    if rest := len(C) % config.BLOCK_M:
        C[-rest:].zero_()


@pytest.mark.slow
@pytest.mark.parametrize("variant", STAND_INS)
def test_a_right_one_of_many_tiles_is_chosen(here, variant):
    result, plan = here(STAND_INS[variant], variant, LONG)
    assert refused_of(result) == [] and result.fewer == {}
    assert plan.kernels.expand.variant == variant


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(from_tile(1), id="second-tile-of-a-block"),
        pytest.param(from_tile(2), id="third-tile-of-a-block"),
        pytest.param(in_the_last_tile, id="ragged-tile"),
    ],
)
@pytest.mark.parametrize("variant", STAND_INS)
def test_one_that_is_wrong_in_a_later_tile_is_refused(here, variant, spoil):
    result, plan = here(planted(variant, spoil), variant, LONG)
    assert plan.kernels.expand.variant != variant
    assert len(refused_of(result)) == 3
    assert all(why.startswith("y has a relative error of") for why in refused_of(result))


def without_bias(C, config, F, bias, num_sms, transposed):
    if bias is not None:
        C -= bias


def of_no_bias(C, config, F, bias, num_sms, transposed):
    if bias is None:
        C *= 1.05


def of_16_bits(C, config, F, bias, num_sms, transposed):
    if F.dtype != torch.float32:
        C *= 1.05


def of_fp32(C, config, F, bias, num_sms, transposed):
    if F.dtype == torch.float32:
        C *= 1.05


def by_columns(C, config, F, bias, num_sms, transposed):
    if not transposed:
        C *= 1.05


def of_rank(wrong):
    def spoil(C, config, F, bias, num_sms, transposed):
        if wrong(F.shape[0]):
            C *= 1.05

    return spoil


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("variant", "spoil", "said"),
    [
        pytest.param("ws", without_bias, "a bias", id="ws-forgets-bias"),
        pytest.param("ws_z", without_bias, "a bias", id="ws_z-forgets-bias"),
        pytest.param("ws", of_no_bias, "no bias", id="ws-without-bias"),
        pytest.param("ws_z", of_no_bias, "no bias", id="ws_z-without-bias"),
        # ws has its factor rounded by the kernel before it, whatever its dtype.
        pytest.param("ws_z", of_16_bits, "lora_B in bfloat16", id="ws_z-16-bits"),
        pytest.param("ws_z", of_fp32, "lora_B in float32", id="ws_z-fp32"),
        pytest.param("ws", by_columns, "stored by columns", id="ws-by-columns"),
        pytest.param("ws_z", by_columns, "stored by columns", id="ws_z-by-columns"),
        *[
            pytest.param(variant, of_rank(wrong), said, id=f"{variant}-{name}")
            for variant in STAND_INS
            for wrong, said, name in (
                (lambda R: R == 16, "R = 16,", "full-rank"),
                (lambda R: R % 8 and R > 1, "R = 13,", "ragged-rank"),
                (lambda R: R == 1, "R = 1,", "rank-1"),
            )
        ],
    ],
)
def test_one_that_is_wrong_in_what_else_its_entry_serves_is_refused(here, variant, spoil, said, biased):
    result, plan = here(planted(variant, spoil), variant, replace(SMALL, bias=biased))
    assert plan.kernels.expand.variant != variant
    assert len(refused_of(result)) == 3 and all(said in why for why in refused_of(result))


def test_fewer_tiles_are_checked_where_the_entry_has_no_more_and_it_is_said(here, capsys):
    pytest.importorskip("rich")
    from rich.console import Console

    result, _ = here(product, "ws")
    assert set(result.fewer) == {"ws 128x256", "ws 256x128", "ws 128x128"}
    assert all("its entry serves no more" in why for why in result.fewer.values())
    command._print_table(Console(width=200), [result])
    assert "checked for forward 160x64x64 R=8: ws 128x256 on 181 rows instead of" in capsys.readouterr().out


# The search itself


def searched(problem: Problem, device: torch.device, timer, recipes) -> dict[Recipe, str | None]:
    """Check and time `recipes` as a search does; return why each was refused, or None."""
    target = choice.planned_device(device)
    found = search.Search(problem, device, target, timer, lambda text: None, {})
    timed = found.measure(recipes, 3)
    assert set(timed) == {recipe for recipe in recipes if found.checked[recipe] is None}
    return found.checked


def test_recipes_are_checked_and_timed(triton_device, monkeypatch, tmp_path):
    if triton_device != "cpu":
        pytest.skip("a GPU may have specialised warps")
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path))
    choice.forget_plans()
    recipes = [Recipe("library"), Recipe("fused", KernelPlan(expand=ws_configs(HOPPER.limits, 2, 8)[0]))]
    timer = Scripted(SMALL, lambda recipe: 1.0)
    library, specialised_warps = searched(SMALL, torch.device("cpu"), timer, recipes).values()
    assert library is None and "expand in its variant 'ws'" in specialised_warps
    choice.forget_plans()


@pytest.mark.gpu
def test_is_checked_and_timed_on_hopper(tmp_path, monkeypatch):
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path))
    choice.forget_plans()
    device = torch.device("cuda")
    target = choice.planned_device(device)
    problem = Problem("forward", torch.bfloat16, 4096, 4096, 512, 16)
    offered = specialised(problem, target)
    if not offered:
        pytest.skip(f"no specialised warps on {target.name} with Triton {target.triton}")
    refused = searched(problem, device, search.EventTimer(device), offered)
    assert refused == dict.fromkeys(offered)
    choice.forget_plans()
