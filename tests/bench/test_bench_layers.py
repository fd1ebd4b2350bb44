"""bench: wrong results get no number, nobody is dropped silently, ratios are formed within rounds."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.measure import cases, contenders, judge, kernels, layers, timing
from bench.measure.cases import Case
from bench.measure.contenders import CONTENDERS, FROZEN, Contender, Layer

TINY = Case("test", "tiny", 24, 40, 32, 4, dtype="fp32", adapter="fp32")
MIXED = Case("test", "tiny", 24, 40, 32, 4, bias=True, dtype="bf16", adapter="fp32")
DROPOUT = Case("test", "tiny", 24, 40, 32, 4, dtype="fp32", adapter="fp32", dropout=0.25)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = tuple(key for key in CONTENDERS if key != "compiled-lorafa")


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 2**10)


def measure(case=TINY, keys=QUICK, known=None, device=DEVICE, **options) -> dict[tuple[str, str], dict]:
    payload = layers.time_case(case, keys, device, rounds=2, known=known, **options)
    json.dumps(payload, allow_nan=False)
    return {(row["contender"], row["part"]): row for row in payload["rows"]}


def planted(build) -> Contender:
    return Contender("planted", "planted", build)


def with_planted(build) -> dict[str, Contender]:
    return {"planted": planted(build), **contenders.layer_contenders(QUICK)}


def scaled_wrongly(operands, case) -> Layer:
    right = contenders.build_eager(operands, case)
    right.module.scaling *= 1.05
    return right


def with_nan(operands, case) -> Layer:
    right = contenders.build_eager(operands, case)
    return Layer(lambda x: right.module(x) * float("nan"), right.lora_B)


def raising(operands, case) -> Layer:
    raise RuntimeError("does not run here\nsecond line")


@pytest.mark.parametrize("case", [TINY, replace(MIXED, K=64), DROPOUT], ids=["fp32", "bf16", "dropout"])
def test_layers_on_nf4_are_held_against_the_weight_of_their_codes(case):
    keys = ("frozen", "lorafa-nf4", "peft-nf4")
    rows = measure(case, keys)
    run = {key for key in keys if contenders.layer_contenders(keys)[key].obstacle(DEVICE, case) is None}
    assert {"frozen", "lorafa-nf4"} <= run
    assert {key for key in run if rows[key, "forward"]["status"] == "ok"} == run
    # Against the weight before it was quantised they are wrong.
    of_dense = replace(contenders.BY_NAME["lorafa-nf4"], base="", key="planted")
    row = measure(case, ("planted",), known={"planted": of_dense})["planted", "forward"]
    assert row["status"] != "ok" and "outside the error budget" in row["reason"]
    assert not set(contenders.BY_NAME) & set(contenders.layer_contenders())


def with_wrong_dA(operands, case) -> Layer:
    right = contenders.build_eager(operands, case, train_A=True)
    right.lora_A.register_hook(lambda gradient: gradient * 1.5)
    return right


@pytest.mark.numerics
@pytest.mark.parametrize("case", [TINY, MIXED, DROPOUT], ids=lambda case: case.label)
def test_everyone_is_checked_and_timed_or_says_why_not(case):
    pytest.importorskip("peft")
    rows = measure(case)
    assert {key for key, _ in rows} == set(QUICK)
    for (key, part), row in rows.items():
        assert part in layers.PARTS
        if row["status"] == "not run":
            assert row["reason"]
            assert (row["ms"], row["ratios"]) == (None, {})
            continue
        assert row["status"] == "ok", (key, row["reason"])
        trained = {"frozen": set(), "eager-lora": {"dB", "dA"}, "peft-lora": {"dB", "dA"}}.get(key, {"dB"})
        assert set(row["errors"]) == {"y", "dx"} | trained
        assert 0 < row["ms"]["min"] <= row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert (FROZEN in row["ratios"]) == (key != FROZEN)
    idle = {key for (key, _), row in rows.items() if row["status"] == "not run"}
    if DEVICE == "cpu":
        assert idle == {"triton"} | ({"addmm"} if case.dropout else set())


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (scaled_wrongly, "outside the error budget: y, dx, dB"),
        (with_nan, "outside the error budget: y, dx, dB"),
        (with_wrong_dA, "outside the error budget: dA"),
        (raising, "RuntimeError: does not run here"),
    ],
    ids=["wrong", "nan", "wrong dA", "raising"],
)
def test_planted_failure_is_red_and_out_of_the_ratios(build, reason):
    rows = measure(known=with_planted(build))
    for part in layers.PARTS:
        planted = rows["planted", part]
        assert (planted["status"], planted["reason"]) == ("failed", reason)
        assert (planted["ms"], planted["ratios"]) == (None, {})
        assert "planted" not in rows["lorafa", part]["ratios"]
        assert FROZEN in rows["lorafa", part]["ratios"]


def test_failed_baseline_gives_nobody_a_ratio():
    known = contenders.layer_contenders(("lorafa", "library"))
    known[FROZEN] = Contender(FROZEN, "planted", with_nan, adapted=False)
    rows = measure(known=known)
    assert rows[FROZEN, "both"]["status"] == "failed"
    assert rows["lorafa", "both"]["ms"] is not None
    assert set(rows["lorafa", "both"]["ratios"]) == {"library"}


class BreaksInBackward(torch.autograd.Function):
    left = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        BreaksInBackward.left -= 1
        if BreaksInBackward.left < 0:
            raise RuntimeError("breaks in the middle")
        return dy


@pytest.mark.parametrize("calls", [1, 5], ids=["warm-up", "timed"])
def test_contender_that_breaks_later_keeps_only_the_parts_before(calls):
    def build(operands, case) -> Layer:
        right = contenders.build_eager(operands, case)
        BreaksInBackward.left = calls
        return Layer(lambda x: BreaksInBackward.apply(right.module(x)), right.lora_B)

    rows = measure(known={**contenders.layer_contenders(("frozen", "lorafa")), "planted": planted(build)})
    assert rows["planted", "forward"]["status"] == "ok"
    for part in ("backward", "both"):
        row = rows["planted", part]
        assert (row["status"], row["ms"], row["ratios"]) == ("failed", None, {})
        assert "breaks in the middle" in row["reason"]
        assert rows["lorafa", part]["status"] == "ok"
        assert set(rows["lorafa", part]["ratios"]) == {FROZEN}


def test_out_of_memory_in_the_middle_costs_one_contender_alone():
    calls = itertools.count()

    def build(operands, case) -> Layer:
        right = contenders.build_eager(operands, case)

        def module(x):
            if next(calls) == 5:
                raise torch.OutOfMemoryError("out of memory")
            return right.module(x)

        return Layer(module, right.lora_B)

    rows = measure(known={**contenders.layer_contenders(("frozen", "lorafa")), "planted": planted(build)})
    assert (rows["planted", "forward"]["status"], rows["planted", "forward"]["ms"]) == ("not run", None)
    assert rows["lorafa", "forward"]["status"] == "ok"


def test_lost_device_is_not_a_failed_contender(monkeypatch):
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(layers, "synchronize", lost)
    with pytest.raises(layers.DeviceLost, match=r"planted RuntimeError: does not run here"):
        measure(known=with_planted(raising))


def test_dropout_is_checked_with_the_mask_that_was_drawn():
    def drops_too_little(operands, case) -> Layer:
        right = contenders.build_eager(operands, case)
        right.module.dropout.p = 0.2
        return right

    def draws_once_more(operands, case) -> Layer:
        right = contenders.build_lorafa(operands, case)
        return Layer(lambda x: (torch.rand(1, device=x.device), right.module(x))[1], right.lora_B)

    seeded = CONTENDERS["lorafa"].mask_dtype
    for wrong, mask_dtype in ((drops_too_little, planted(raising).mask_dtype), (draws_once_more, seeded)):
        known = with_planted(wrong)
        known["planted"] = replace(known["planted"], mask_dtype=mask_dtype)
        rows = measure(DROPOUT, known=known)
        assert {rows[key, "both"]["status"] for key in ("eager-lorafa", "lorafa", "library")} == {"ok"}
        assert rows["planted", "both"]["status"] == "failed"


def test_what_cannot_be_checked_with_dropout_says_so():
    case = judge.Judge(DROPOUT, judge.draw(DROPOUT, "cpu"))
    _, verdicts = layers.check(case, {FROZEN: CONTENDERS[FROZEN]}, "cuda", "graph", lambda fraction: None)
    assert "another mask" in verdicts[FROZEN]["reason"] and verdicts[FROZEN]["status"] == "not run"
    payload = kernels.time_kernels(DROPOUT, "cpu", rounds=1, interpreted=True)
    assert {row["reason"] for row in payload["rows"]} == {"kernels by themselves are timed without dropout"}


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = measure()
    assert (rows["peft-lora", "both"]["status"], rows["peft-lora", "both"]["reason"]) == (
        "not run",
        "peft is not installed",
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_what_needs_a_gpu_says_so():
    graphs = measure(keys=("frozen", "lorafa"), mode="graph")
    assert {row["reason"] for row in graphs.values()} == {"CUDA graphs need a GPU"}
    rows = measure(keys=("frozen", "triton"))
    assert "needs a GPU" in rows["triton", "both"]["reason"]


def test_host_time_counts_calls_of_the_python_side():
    rows = measure(keys=("frozen", "lorafa"), mode="host")
    assert {part for _, part in rows} == {"forward", "both"}
    assert rows["lorafa", "both"]["ms"]["median"] > 0


@pytest.mark.numerics
def test_compiled_contender_is_right(monkeypatch):
    (contender,) = contenders.layer_contenders(("compiled-lorafa",)).values()
    if reason := contender.obstacle(DEVICE, TINY):
        pytest.skip(reason)
    # The compiler itself is what takes long; what is compared is the same.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = measure(keys=("frozen", "compiled-lorafa"))
    assert rows["compiled-lorafa", "backward"]["status"] == "ok", rows["compiled-lorafa", "backward"]


@pytest.mark.numerics
@pytest.mark.parametrize("mode", layers.MODES)
@pytest.mark.gpu
def test_everyone_runs_on_a_gpu_in_every_mode(mode):
    rows = measure(MIXED, device="cuda", mode=mode)
    for (key, part), row in rows.items():
        assert row["status"] == "ok" or key.startswith("peft"), (key, part, row["reason"])


@pytest.mark.numerics
@pytest.mark.gpu
def test_dropout_is_checked_on_a_gpu():
    rows = measure(
        DROPOUT, device="cuda", keys=("frozen", "lorafa", "triton", "library", "eager-lorafa", "eager-lora")
    )
    assert {row["status"] for row in rows.values()} == {"ok"}, rows


@pytest.mark.numerics
def test_mask_is_scaled_exactly():
    operands = judge.draw(DROPOUT, "cpu")
    mask = judge.Judge(DROPOUT, operands)._mask(CONTENDERS["eager-lorafa"])
    assert mask.unique().tolist() == [0.0, 1 / (1 - DROPOUT.dropout)]
    assert mask.dtype == torch.float64


def test_wall_time_is_measured_until_the_last_call_is_done():
    rows = measure(keys=("frozen", "lorafa"), mode="wall")
    assert {part for _, part in rows} == set(layers.PARTS)
    assert rows["lorafa", "both"]["ratios"][FROZEN]["median"] > 0


def test_unknown_contender_lists_the_known_ones():
    with pytest.raises(ValueError, match="did you mean lorafa") as raised:
        contenders.layer_contenders(("lorfa",))
    assert all(key in str(raised.value) for key in CONTENDERS)


def test_ratios_are_formed_within_rounds_and_the_order_changes():
    # The clock runs slower from round to round; within each, "slow" takes twice the time of the baseline.
    steps = {"frozen": lambda: 1.0, "slow": lambda: 2.0, "third": lambda: 3.0}
    calls = itertools.count()
    order = []

    def seconds(step) -> float:
        order.append(step())
        return step() * 2 ** (next(calls) // len(steps))

    samples, raised = timing.interleave(steps, 30, seconds, lambda: None)
    assert not raised
    slower = [2.0**number for number in range(30)]
    assert samples == {name: [step() * times for times in slower] for name, step in steps.items()}
    neighbours = {tuple(order[number : number + 2]) for number in range(0, 90, 3)}
    assert len(neighbours) == 6, "everyone follows everyone else at some time"
    row = layers.row_of("slow", "both", {"status": "ok"}, samples)
    assert row["ms"]["p20"] < row["ms"]["p80"]
    ratio = row["ratios"][FROZEN]
    assert ratio["median"] == ratio["p20"] == ratio["p80"] == 2.0


def test_memory_is_poisoned_only_inside():
    before = torch.are_deterministic_algorithms_enabled()
    with judge.poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_wrong_shape_is_a_failure():
    right = {"y": torch.ones(4, 4)}
    with pytest.raises(ValueError, match=r"y has shape \(4, 3\), expected \(4, 4\)"):
        judge.verdict({"y": torch.ones(4, 3)}, right, {"y": 0.0})


def test_out_of_memory_is_not_a_wrong_result():
    assert layers.failure(torch.OutOfMemoryError("CUDA out of memory"))["status"] == "not run"
    assert layers.failure(RuntimeError("wrong"))["status"] == "failed"


@pytest.mark.slow
@pytest.mark.numerics
def test_kernels_are_checked_and_compared_with_library_products(monkeypatch):
    pytest.importorskip("triton")
    payload = kernels.time_kernels(MIXED, DEVICE, rounds=2, interpreted=True)
    json.dumps(payload, allow_nan=False)
    expected = [(part, key) for part, keys in kernels.PARTS.items() for key in keys]
    assert [(row["part"], row["contender"]) for row in payload["rows"]] == expected
    assert {row["status"] for row in payload["rows"]} == {"ok"}, payload["rows"]
    for row in payload["rows"]:
        assert set(row["ratios"]) == ({kernels.LIBRARY} - {row["contender"]})


@pytest.mark.numerics
def test_wrong_kernel_is_red(monkeypatch):
    pytest.importorskip("triton")
    from lorafa_kernels.kernels import shrink

    right = shrink.shrink
    monkeypatch.setattr(shrink, "shrink", lambda rows, factor, scaling: right(rows, factor, 1.1 * scaling))
    payload = kernels.time_kernels(MIXED, DEVICE, rounds=1, interpreted=True)
    failed = [row for row in payload["rows"] if row["status"] == "failed"]
    assert [(row["contender"], row["part"], row["ms"]) for row in failed] == [
        (kernels.TRITON, "z", None),
        (kernels.TWO_PASSES, "dz, dB", None),
    ]


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_kernels_without_a_gpu_are_named_as_not_run():
    rows = kernels.time_kernels(MIXED, "cpu", rounds=1)["rows"]
    assert {(row["contender"], row["status"]) for row in rows} == {
        (key, "not run") for key in kernels.KERNELS
    }


def test_peft_absent_from_the_interpreter(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = measure(keys=("frozen", "peft-lora"))
    assert rows["peft-lora", "both"]["status"] == "not run"


def test_host_cases_are_small():
    assert all(case.M * case.K * case.N < 2**16 for case in cases.HOST_CASES)
