"""tune: measures what is right, keeps what is fastest, and leaves no half-written file behind."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import fields

import pytest
import torch

from lorafa_kernels.__main__ import main
from lorafa_kernels.plan import choice
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import KNOWN_DEVICES, KernelPlan
from lorafa_kernels.plan.cost import ceilings, predict
from lorafa_kernels.plan.defaults import beside_config
from lorafa_kernels.plan.make import candidates, make_plan
from lorafa_kernels.plan.pin import pinned
from lorafa_kernels.plan.recipe import Device, Problem, Recipe, heuristic_config, kernel_configs
from lorafa_kernels.plan.tables import key_of, read_table
from lorafa_kernels.tune import check, command, search, share
from lorafa_kernels.tune.models import MODELS, distinct_shapes
from lorafa_kernels.tune.search import EventTimer, Sample, neighbours, tune
from lorafa_kernels.tune.share import measure_main_loop

ABOUT = {"torch": torch.__version__}
HOPPER = Device("NVIDIA H200", KNOWN_DEVICES["sm_90"], "3.6.0")
FORWARD, BACKWARD = (Problem(op, torch.float32, 160, 32, 32, 8) for op in ("forward", "backward"))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path))
    # Of the real size, the check in Triton's interpreter takes minutes.
    monkeypatch.setattr(share, "SIZE", 64)
    choice.forget_plans()
    yield
    choice.forget_plans()


class Scripted:
    """A timer that runs nothing: `cost` gives microseconds for the recipe that is pinned."""

    def __init__(self, problem: Problem, cost) -> None:
        self.problem, self.cost = problem, cost

    def __call__(self, step) -> Sample:
        pin = pinned()
        if pin is None:
            return Sample(1.0, 1.0)
        return Sample(self.cost(pin.recipe(self.problem.op)), 0.5)


def tuned(problem: Problem, device: str, path, cost, **options):
    (result,) = tune([problem], torch.device(device), Scripted(problem, cost), path, about=ABOUT, **options)
    return result


def cost_by_blocks(problem, limits):
    """Fused is fastest with the widest expand tile and the deepest pipeline; with fewer stages the library
    is.
    """

    def cost(recipe: Recipe) -> float:
        if recipe.name == "library":
            return 60.0
        config = kernel_configs(recipe, problem, limits)["expand"]
        return 100.0 - config.BLOCK_N / 4 - 2 * config.num_stages

    return cost


def test_the_search_climbs_to_the_fastest_blocks_and_they_are_used(triton_device, tmp_path):
    device = torch.device(triton_device)
    target = choice.planned_device(device)
    path = lookup.cache_path(target)
    result = tuned(FORWARD, triton_device, path, cost_by_blocks(FORWARD, target.limits))
    expand = result.winner.recipe.kernels.expand
    assert result.winner.recipe.name == "fused" and expand.num_stages == 5
    assert heuristic_config("expand", FORWARD, target.limits).num_stages < 4
    assert result.finished and result.tried > 10 and set(result.best) == {"fused", "library"}
    assert result.best["library"].device_us == 60.0
    entry = read_table(path).by_key[key_of(FORWARD)]
    assert {one.recipe for one in entry.plans} == {one.recipe for one in result.best.values()}
    plan = make_plan(FORWARD, target)
    assert (plan.source, plan.recipe) == ("user cache", result.winner.recipe)
    ran = choice.choose_plan("triton", "forward", device, torch.float32, 160, 32, 32, 8, False)
    assert ran.recipe == result.winner.recipe


def test_a_result_that_is_wrong_is_refused_before_it_is_timed(triton_device, monkeypatch, tmp_path):
    linear = importlib.import_module("lorafa_kernels.linear.fused")
    right = linear.forward
    timed = []

    def wrong(*args, plan, **options):
        y, z = right(*args, plan=plan, **options)
        return y * 1.02, z

    monkeypatch.setattr(linear, "forward", wrong)

    def cost(recipe):
        timed.append(recipe.name)
        return 1.0 if recipe.name == "fused" else 9.0

    result = tuned(FORWARD, triton_device, tmp_path / "t.json", cost)
    assert result.winner.recipe.name == "library" and set(timed) == {"library"}
    assert all("y has a relative error of" in why for _, why in result.refused) and result.refused


def test_backward_checks_both_gradients(triton_device, monkeypatch, tmp_path):
    linear = importlib.import_module("lorafa_kernels.linear.fused")
    right = linear.backward

    def wrong(*args, **options):
        dx, dB = right(*args, **options)
        return dx, dB * 1.02

    monkeypatch.setattr(linear, "backward", wrong)
    result = tuned(BACKWARD, triton_device, tmp_path / "t.json", lambda recipe: 1.0, budget_s=1e-9)
    assert set(result.best) == {"library"}
    assert {why.split()[0] for _, why in result.refused} == {"dB"}


def test_what_raises_is_refused_with_the_reason(triton_device, monkeypatch, tmp_path):
    linear = importlib.import_module("lorafa_kernels.linear.fused")

    def broken(*args, **options):
        raise MemoryError("out of resource: shared memory\nsecond line")

    monkeypatch.setattr(linear, "forward", broken)
    result = tuned(FORWARD, triton_device, tmp_path / "t.json", lambda recipe: 1.0)
    assert result.refused[0][1] == "MemoryError: out of resource: shared memory"


def test_a_broken_device_ends_the_search(triton_device, monkeypatch, tmp_path):
    linear = importlib.import_module("lorafa_kernels.linear.fused")

    def broken(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(linear, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuned(FORWARD, triton_device, tmp_path / "t.json", lambda recipe: 1.0)


def test_nothing_that_runs_is_an_error(triton_device, monkeypatch, tmp_path):
    monkeypatch.setattr(search.Check, "__call__", lambda self, recipe: "it is Monday")
    with pytest.raises(RuntimeError, match=r"no plan can run.*it is Monday"):
        tuned(FORWARD, triton_device, tmp_path / "t.json", lambda recipe: 1.0)
    assert not list(tmp_path.iterdir())


def test_a_spent_budget_still_measures_every_plan(triton_device, tmp_path):
    path = tmp_path / "t.json"
    result = tuned(BACKWARD, triton_device, path, lambda recipe: 1.0, budget_s=1e-9)
    target = choice.planned_device(torch.device(triton_device))
    assert not result.finished and result.tried == len(candidates(BACKWARD, target))
    assert set(result.best) == {"fused", "library"}
    assert len(read_table(path).by_key[key_of(BACKWARD)].plans) == 2


def test_an_interrupt_keeps_what_was_found(triton_device, tmp_path, capsys):
    path = tmp_path / "t.json"

    class Interrupted(Scripted):
        def __call__(self, step) -> Sample:
            pin = pinned()
            if pin is not None and pin.recipe("backward"):
                raise KeyboardInterrupt
            return Sample(1.0, 1.0)

    pytest.importorskip("rich")
    timer = Interrupted(FORWARD, None)
    with pytest.raises(KeyboardInterrupt):
        command.search([FORWARD, BACKWARD], torch.device(triton_device), timer, path, 1e-9)
    assert list(read_table(path).by_key) == [key_of(FORWARD)]
    assert pinned() is None
    out = capsys.readouterr().out
    assert "interrupted after 1 of 2" in out and f"written to {path}" in out.replace("\n", "")


def test_the_command_prints_what_it_found(triton_device, tmp_path, capsys):
    pytest.importorskip("rich")
    path = tmp_path / "t.json"
    timer = Scripted(FORWARD, lambda recipe: 3.0 if recipe.name == "library" else 4.0)
    assert command.search([FORWARD], torch.device(triton_device), timer, path, 1e-9) == 0
    out = capsys.readouterr().out
    assert "library" in out and "3.0" in out and "4.0" in out and "+200.0 %" in out
    assert "--budget ended the search early for 1 of 1" in out.replace("\n", " ")


# The rate of expand


class Alternating:
    """A timer that runs nothing: expand and the library's product take turns, expand first."""

    def __init__(self, expand_us: list[float], library_us: list[float]) -> None:
        self.times = {"expand": expand_us, "library": library_us}
        self.calls = 0

    def __call__(self, step) -> Sample:
        which, number = ("expand", "library")[self.calls % 2], self.calls // 2
        self.calls += 1
        found = self.times[which]
        return Sample(found[number % len(found)], 0.0)


def test_the_share_is_of_rates_by_medians_of_rounds_in_turns(triton_device):
    # Odd samples out, in both, which no median sees; and the rank-R step is work that expand does besides.
    timer = Alternating([200.0, 200.0, 9000.0], [180.0, 1.0, 180.0])
    found = measure_main_loop(torch.device(triton_device), timer)
    assert (found.expand_us, found.library_us, found.refused) == (200.0, 180.0, None)
    assert round(found.share, 6) == round(0.9 * (64 + 16) / 64, 6)
    variant = "tma" if triton_device == "cuda" and torch.cuda.get_device_capability()[0] == 9 else "portable"
    assert found.shares == {variant: found.share}
    assert timer.calls == 2 * (search.WARM_UPS + search.FINAL_ROUNDS)


def test_what_is_timed_is_expand_and_the_library_s_product(triton_device, monkeypatch):
    linear = importlib.import_module("lorafa_kernels.linear.fused")
    right, ran = linear.expand, []
    monkeypatch.setattr(linear, "expand", lambda P, *rest, **o: ran.append(P.shape) or right(P, *rest, **o))
    results = []

    def timer(step) -> Sample:
        results.append(step())
        return Sample(1.0, 1.0)

    measure_main_loop(torch.device(triton_device), timer)
    rounds = search.WARM_UPS + search.FINAL_ROUNDS
    # And once in the check.
    assert ran == [(64, 64)] * (1 + rounds)
    assert {tuple(result.shape) for result in results} == {(64, 64)} and len(results) == 2 * rounds


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (1.0, 9.0), (math.nan, 1.0)], ids=str)
def test_times_that_cannot_be_right_give_no_share(triton_device, times):
    found = measure_main_loop(torch.device(triton_device), Alternating([times[0]], [times[1]]))
    assert found.share is None and found.shares == {} and "cannot be right" in str(found)


def test_tune_measures_the_rate_first_and_keeps_it_when_it_is_interrupted(triton_device, tmp_path, capsys):
    pytest.importorskip("rich")
    path, seen = tmp_path / "t.json", []

    def timer(step) -> Sample:
        if pinned() is not None:
            seen.append(read_table(path))
            raise KeyboardInterrupt
        return alternating(step)

    alternating = Alternating([100.0], [75.0])
    with pytest.raises(KeyboardInterrupt):
        command.search([FORWARD], torch.device(triton_device), timer, path, 1e-9)
    share_now = round(0.75 * 80 / 64, 4)
    (before_any_plan,) = seen
    for table in (before_any_plan, read_table(path)):
        assert [round(found, 4) for _, found in table.main_loop] == [share_now] and not table.entries
    out = capsys.readouterr().out
    assert "expand runs at 0.94 of the library's product at 64^3" in out
    assert "interrupted after 0 of 1" in out and f"written to {path}" in out.replace("\n", "")


def test_plans_follow_the_rate_as_soon_as_it_is_measured(triton_device, monkeypatch):
    """Of other sizes than those that are tuned, in the same process."""
    pytest.importorskip("rich")
    other, seen = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16), []

    def observing(*args, main_loop, **options):
        plan = make_plan(other, HOPPER)
        seen.append((plan.name, plan.main_loop, main_loop))
        return iter(())

    monkeypatch.setattr(command, "measure_main_loop", lambda *_: share.MainLoop("tma", 0.7))
    monkeypatch.setattr(command, "planned_device", lambda device: HOPPER)
    monkeypatch.setattr(command, "tune", observing)
    assert make_plan(other, HOPPER).name == "fused"
    assert command.search([FORWARD], torch.device(triton_device), None, lookup.cache_path(HOPPER)) == 0
    assert seen == [("library", (0.7, "measured on this device"), {"tma": 0.7})]


def test_the_search_predicts_with_the_rate_that_was_measured(triton_device, monkeypatch, tmp_path):
    shares, right = [], search.predict

    def recording(recipe, problem, limits, reached, main_loop):
        shares.append(dict(main_loop))
        return right(recipe, problem, limits, reached, main_loop)

    monkeypatch.setattr(search, "predict", recording)
    monkeypatch.setattr(search, "ceilings", lambda name, limits: ceilings(HOPPER.name, HOPPER.limits))
    tuned(FORWARD, triton_device, tmp_path / "t.json", lambda recipe: 1.0, main_loop={"portable": 0.7})
    # Of the winner, and of the neighbours in the climb.
    assert len(shares) > 10 and all(found == {"portable": 0.7} for found in shares)


def test_an_expand_that_is_wrong_has_no_rate_and_the_search_goes_on(
    triton_device, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("rich")
    linear = importlib.import_module("lorafa_kernels.linear.fused")
    right = linear.forward

    def wrong(*args, plan, **options):
        y, z = right(*args, plan=plan, **options)
        return y * 1.02, z

    monkeypatch.setattr(linear, "forward", wrong)
    path = tmp_path / "t.json"
    timer = Scripted(FORWARD, lambda recipe: 1.0)
    assert command.search([FORWARD], torch.device(triton_device), timer, path, 1e-9) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "expand's rate over the library's product is not known: y has a relative error of" in out
    table = read_table(path)
    assert table.main_loop == () and list(table.by_key) == [key_of(FORWARD)]


def test_a_broken_device_ends_the_measuring_of_the_rate(triton_device, monkeypatch):
    linear = importlib.import_module("lorafa_kernels.linear.fused")

    def broken(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(linear, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure_main_loop(torch.device(triton_device), Alternating([1.0], [1.0]))


@pytest.mark.gpu
def test_the_rate_on_the_gpu(monkeypatch):
    monkeypatch.undo()
    device = torch.device("cuda")
    found = measure_main_loop(device, EventTimer(device))
    assert found.refused is None and 0 < found.share <= lookup.MOST_SHARE


@pytest.mark.gpu
def test_tunes_on_the_gpu(tmp_path):
    device = torch.device("cuda")
    problems = [Problem(op, torch.bfloat16, 512, 512, 512, 16) for op in ("forward", "backward")]
    path = lookup.cache_path(choice.planned_device(device))
    results = list(tune(problems, device, EventTimer(device), path, about=ABOUT, budget_s=40))
    assert all(result.winner.device_us > 0 and result.frozen_us > 0 for result in results)
    assert all(set(result.best) == {"fused", "library"} for result in results)
    assert make_plan(problems[0], choice.planned_device(device)).source == "user cache"


# Candidates


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_neighbours_differ_in_one_size_fit_and_are_not_predicted_slow(op, arch):
    problem = Problem(op, torch.bfloat16, 8192, 4096, 4096, 64)
    device = Device("?", KNOWN_DEVICES[arch], "3.6.0")
    reached = ceilings("?", device.limits)
    for kernel in kernel_configs(Recipe("fused", KernelPlan(one_pass=False)), problem, device.limits):
        base = Recipe("fused", KernelPlan(one_pass=False))
        before = heuristic_config(kernel, problem, device.limits)
        found = neighbours(base, kernel, problem, device)
        assert found and len(set(found)) == len(found) <= 20
        for other in found:
            config = getattr(other.kernels, kernel)
            changed = {f.name for f in fields(config) if getattr(config, f.name) != getattr(before, f.name)}
            # What the portable kernel knows nothing of goes with TMA.
            without_tma = {"variant", "EPILOGUE_SUBTILE", "ctas_per_sm"}
            assert len(changed) == 1 or ("variant" in changed and changed <= without_tma)
            assert search.obstacle(other, problem, device.limits) is None
            assert search._accumulators(kernel, config) <= search.MOST_ACCUMULATORS
            slowest = search.PRUNE * predict(base, problem, device.limits, reached).device_us
            assert predict(other, problem, device.limits, reached).device_us <= slowest


@pytest.mark.parametrize("widths", [(), (2048, 1024, 1024)], ids=["layer", "group"])
def test_blocks_beside_dx_are_where_a_search_for_them_begins(widths):
    problem = Problem("backward", torch.bfloat16, 8192, 4096, 4096, 64, widths=widths)
    (beside,) = (one for one in candidates(problem, HOPPER) if one.kernels.beside)
    first = beside_config(HOPPER.limits, 2, 8192, 64)
    found = [one.kernels.grad for one in neighbours(beside, "grad", problem, HOPPER)]
    assert found and first not in found
    for config in found:
        changed = {f.name for f in fields(config) if getattr(config, f.name) != getattr(first, f.name)}
        assert len(changed) == 1 or changed == {"variant"}


def test_every_size_of_a_search_can_be_reached():
    problem = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16)
    seen, todo = set(), [Recipe("fused")]
    while todo:
        recipe = todo.pop()
        for other in neighbours(recipe, "expand", problem, HOPPER):
            if other not in seen:
                seen.add(other)
                todo.append(other)
    assert {one.kernels.expand.num_stages for one in seen} >= {2, 3, 4}
    assert {one.kernels.expand.EPILOGUE_SUBTILE for one in seen} >= {1, 2}
    assert {one.kernels.expand.variant for one in seen} == {"tma", "portable"}


# Command line


@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_a_model(name):
    shapes = distinct_shapes(name)
    assert len({(one.K, one.N, one.bias) for one in shapes}) == len(shapes) <= len(MODELS[name])
    assert {(one.K, one.N, one.bias) for one in shapes} == {(o.K, o.N, o.bias) for o in MODELS[name]}


# Layers of the model, parameters of a layer beside the listed ones, those outside of the layers, and the
# published total. T5's decoder layers have the attention a second time.
PARAMETERS = {
    "Llama-3.2-1B": (16, 2 * 2048, 128256 * 2048 + 2048, 1_235_814_400),
    "Llama-3-8B": (32, 2 * 4096, 2 * 128256 * 4096 + 4096, 8_030_261_248),
    "Llama-3-70B": (80, 2 * 8192, 2 * 128256 * 8192 + 8192, 70_553_706_496),
    "Qwen3-8B": (36, 2 * 4096 + 2 * 128, 2 * 151936 * 4096 + 4096, 8_190_735_360),
    "Mistral-7B": (32, 2 * 4096, 2 * 32000 * 4096 + 4096, 7_241_732_096),
    "RoBERTa-large": (24, 4 * 1024, (50265 + 514 + 1 + 2) * 1024 + 1024 * 1025, 355_359_744),
    "T5-base": (24, 2 * 768, 12 * (4 * 768 + 1) * 768 + 32128 * 768 + 768 + 2 * 768, 222_903_552),
    "MiniLM": (6, 4 * 384, (30522 + 512 + 2 + 2) * 384 + 384 * 385, 22_713_216),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_add_up_to_the_published_number_of_parameters(name):
    layers, beside, outside, total = PARAMETERS[name]
    listed = sum(one.K * one.N + one.bias * one.N for one in MODELS[name])
    assert layers * (listed + beside) + outside == total


def options(*arguments: str):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers())
    return parser.parse_args(["tune", *arguments])


def test_problems_are_those_asked_for_once():
    found = command.problems_of(options("--model", "Llama-3-8B", "--model", "Mistral-7B", "--rank", "16"))
    assert len(found) == 4 * len(command.ROWS) * 2
    assert {(p.K, p.N) for p in found} == {(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)}
    found = command.problems_of(options("--shapes", "8x16x32x4", "8x16x32x4", "--dtype", "fp16"))
    assert found == [Problem(op, torch.float16, 8, 32, 16, 4) for op in ("forward", "backward")]
    biased = command.problems_of(options("--model", "MiniLM", "--rows", "64", "--rank", "8"))
    assert {p.bias for p in biased if p.op == "forward"} == {True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "nothing to tune", id="nothing"),
        pytest.param(["--shapes", "8x16x32"], "'8x16x32' is not MxKxNxR", id="three-sizes"),
        pytest.param(["--shapes", "8x16x0x4"], "is not MxKxNxR", id="zero"),
        pytest.param(["--model", "GPT-9"], "invalid choice: 'GPT-9'", id="model"),
        pytest.param(["--model", "MiniLM", "--rank", "0"], "'0' is not a whole number from 1 to", id="rank"),
        pytest.param(["--model", "MiniLM", "--budget", "-1"], "is not a number of seconds", id="budget"),
        pytest.param(["--model", "MiniLM", "--budget", "soon"], "is not a number of seconds", id="word"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["tune", "--model", "MiniLM"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert main(["tune", "--model", "MiniLM", "--device", "cpu"]) == 2
    assert "--device is cpu" in capsys.readouterr().err


def test_an_old_gpu_and_a_missing_one_are_named(fake_gpu, capsys):
    fake_gpu(KNOWN_DEVICES["sm_80"], "Old 2000", (7, 5))
    assert main(["tune", "--model", "MiniLM"]) == 2
    assert "Old 2000 has compute capability 7.5" in capsys.readouterr().err
    assert main(["tune", "--model", "MiniLM", "--device", "cuda:3"]) == 2
    assert "cuda:3 is not there" in capsys.readouterr().err


def test_a_missing_rich_is_named(fake_gpu, monkeypatch, capsys):
    fake_gpu(KNOWN_DEVICES["sm_90"], "NVIDIA H200", (9, 0))
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["tune", "--model", "MiniLM"]) == 2
    assert "pip install 'lorafa-kernels[tune]'" in capsys.readouterr().err


def test_the_budget_is_in_seconds():
    assert options("--model", "MiniLM", "--budget", "1.5").budget == 1.5
    assert options("--model", "MiniLM").budget == math.inf


def test_the_check_runs_the_blocks_that_are_timed(triton_device, monkeypatch, tmp_path):
    """It takes fewer rows, for which the heuristics could choose others."""
    linear = importlib.import_module("lorafa_kernels.linear.fused")
    right, rows, checked = linear.forward, [], []

    def recording(x, *args, plan, **options):
        rows.append(x.shape[0])
        checked.append(plan.expand)
        return right(x, *args, plan=plan, **options)

    monkeypatch.setattr(linear, "forward", recording)
    monkeypatch.setattr(check, "CHECKED_ROWS", 48)
    tuned(FORWARD, triton_device, tmp_path / "t.json", lambda recipe: 1.0, budget_s=1e-9)
    limits = choice.planned_device(torch.device(triton_device)).limits
    assert set(rows) == {48}
    assert checked == [heuristic_config("expand", FORWARD, limits)]
