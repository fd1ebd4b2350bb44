"""Engines that train on several processes give the losses and gradients of one process, keep what it keeps
and hold their share of the parameters; tensor parallelism with its layouts, masks, files and checkpoints.
"""

from __future__ import annotations

import importlib.util
import os

import engine_runs as runs
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accuracy import assert_same, check_budget
from processes import start

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
]
WORLD = 2
# What another order of fp32 sums may change over STEPS steps.
LARGEST = 1e-6


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_training(found: dict[str, dict], faults: list[str]) -> None:
    """Compare each engine's losses and gradients with one process's."""
    alone = {}
    for corrected in (False, True):
        model = runs.build(gradient_correction=corrected)
        alone[corrected] = runs.train(model, model)
    assert alone[False]["losses"][-1] < 0.8 * alone[False]["losses"][0]
    for engine, got in found.items():
        want = alone["correction" in engine]
        assert len(got["losses"]) == len(got["dB"]) == runs.STEPS
        losses = max(abs(a - b) / abs(b) for a, b in zip(got["losses"], want["losses"], strict=True))
        dB = max(apart(a, b) for a, b in zip(got["dB"], want["dB"], strict=True))
        if losses > LARGEST or dB > LARGEST:
            faults.append(f"{engine}: losses differ by {losses:.1e}, dB by {dB:.1e}")


def check_low(got: torch.Tensor) -> None:
    """The gradients of one step in bf16, within the budget of the plain formula in bf16."""
    exact = runs.build(torch.bfloat16, plain=True).to(torch.float64)
    plain = runs.build(torch.bfloat16, plain=True)
    grads = []
    for model, dtype in ((exact, torch.float64), (plain, torch.bfloat16)):
        runs.loss_of(model, *(t.to(torch.bfloat16).to(dtype) for t in runs.batch())).backward()
        grads.append(torch.cat([p.grad.flatten() for p in runs.lorafa_parameters(model)]))
    check_budget({"dB": got.to(torch.bfloat16)}, {"dB": grads[0]}, {"dB": grads[1]})


def _engines(rank: int, world: int, folder: str) -> None:
    found = {engine: train() for engine, train in runs.ENGINES.items()}
    low = {"FSDP2": runs.fsdp2(low=True)["dB"][0], "TP": runs.tensor_parallel(low=True)["dB"][0]}
    if rank == 0:
        part = runs.my_part()
        alone = {
            "DDP": runs.kept_alone(part, fuse=True, norm=True),
            "FSDP2": runs.kept_alone(part, fuse=True, norm=True),
            "FSDP1": runs.kept_alone(part, fuse=False, norm=False, thaw_norms=True),
            "TP": runs.kept_alone(runs.batch(), fuse=True, norm=True, ungroup=True),
            "TP, gradient correction": runs.kept_alone(runs.batch(), fuse=False, norm=True),
            "FSDP2 x TP": runs.kept_alone(part, fuse=True, norm=True, ungroup=True),
        }
        torch.save((found, low, alone), f"{folder}/result")


def _keeps_as(got: list, want: list) -> bool:
    """Whether each tensor is kept as alone: whole, or one of WORLD parts in one dimension."""
    # The inverse of A Aᵀ of a corrected gradient is held by the layer.
    got = [entry for entry in got if entry[0] != (runs.RANK, runs.RANK)]
    return len(got) == len(want) and all(
        kind == wanted_kind
        and sum(a != b for a, b in zip(shape, whole, strict=True)) <= 1
        and all(a in (b, b / WORLD) for a, b in zip(shape, whole, strict=True))
        for (shape, kind), (whole, wanted_kind) in zip(got, want, strict=True)
    )


def _two(rank: int, world: int, folder: str) -> None:
    _engines(rank, world, folder)
    _split(rank, world, folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of what two processes have found; they start once for the tests here."""
    folder = tmp_path_factory.mktemp("two")
    start(_two, WORLD, folder)
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(two):
    found, low, alone = torch.load(two / "result")
    assert list(found) == list(runs.ENGINES)
    faults: list[str] = []
    check_training(found, faults)
    for engine, got in found.items():
        if "share" in got and got["share"] != 1 / WORLD:
            faults.append(f"{engine}: a process holds {got['share']} of the parameters")
        kept = got.get("kept")
        if kept is None:
            continue
        if not _keeps_as(kept["shapes"], alone.get(engine) or alone[engine.partition(",")[0]]):
            faults.append(f"{engine}: keeps other tensors than a model alone")
        if engine.startswith("FSDP") and (kept["held"] > 0) != (engine == "FSDP2, no reshard"):
            faults.append(f"{engine}: {kept['held']} of {kept['weights']} weights kept between the passes")
    assert not faults, "\n".join(faults)
    for got in low.values():
        check_low(got)


def _split(rank: int, world: int, folder: str) -> None:
    import split_runs

    found = {
        "layouts": split_runs.layouts(),
        "torch": split_runs.with_torchs_own(),
        "dropout": split_runs.dropout(),
        "disabled": split_runs.disabled(),
        "sums": split_runs.sums(),
        "files": {kind: split_runs.files(folder, kind) for kind in ("tp", "fsdp2")},
        "checkpoints": {kind: split_runs.checkpoint(folder, kind) for kind in ("tp", "fsdp2")},
        "errors": split_runs.direct_calls(),
    }
    torch.save(found, f"{folder}/result {rank}")


@pytest.mark.slow
def test_tensor_parallelism_and_files_of_two_processes(two):
    for rank in range(WORLD):
        found = torch.load(two / f"result {rank}")
        pairs = {**found["layouts"], "column": found["dropout"]["column"], "row": found["dropout"]["row"]}
        for case, (got, want) in pairs.items():
            assert list(got) == list(want)
            worst = {name: apart(got[name], want[name]) for name in want}
            assert max(worst.values()) <= LARGEST, f"{case}, rank {rank}: {worst}"
        assert found["dropout"]["masks differ"]
        assert_same(found["torch"]["ours"], found["torch"]["torch"])
        assert apart(*found["disabled"]) <= LARGEST
        # q, k, v and o's dB; q, k, v together; gate and up together, and down's dB.
        assert found["sums"] == {"attention": 4, "attention, prepared": 2, "MLP": 2}
        for kind, loaded in found["files"].items():
            assert_same(*loaded["values"], name=kind)
            assert_same(*loaded["dB"], name=kind)
        for case, message in found["errors"].items():
            assert message.startswith("TypeError") and "fully_shard wrapped" in message, f"{case}: {message}"
    for kind, want in found["checkpoints"].items():
        # One process reads what two have written.
        state = {name: torch.empty_like(value) for name, value in want.items()}
        dcp.load(state, checkpoint_id=os.path.join(two, f"dcp {kind}"), no_dist=True)
        assert_same(state, want, name=kind)
        alone = {name: parameter.detach() for name, parameter in runs.build().named_parameters()}
        assert_same(state, alone, name=kind)


def _grid(rank: int, world: int, folder: str) -> None:
    import split_runs

    found = {
        "FSDP2 x TP": runs.tensor_parallel(data=2),
        "FSDP2 x TP, gradient correction": runs.tensor_parallel(data=2, correction=True),
    }
    kept = split_runs.files(folder, "fsdp2 x tp"), split_runs.checkpoint(folder, "fsdp2 x tp")
    if rank == 0:
        torch.save((found, *kept), f"{folder}/result")


@pytest.mark.slow
def test_four_processes_on_a_grid(tmp_path):
    """Two by two: FSDP2 around tensor parallelism."""
    start(_grid, 4, tmp_path)
    found, files, checkpoint = torch.load(tmp_path / "result")
    faults: list[str] = []
    check_training(found, faults)
    assert not faults, "\n".join(faults)
    for got in found.values():
        assert got["share"] == 1 / 4 and got["kept"]["held"] == 0
    assert_same(*files["values"])
    assert_same(*files["dB"])
    state = {name: torch.empty_like(value) for name, value in checkpoint.items()}
    dcp.load(state, checkpoint_id=os.path.join(tmp_path, "dcp fsdp2 x tp"), no_dist=True)
    assert_same(state, checkpoint)


def _zero(rank: int, world: int, folder: str) -> None:
    # What DeepSpeed's launcher would set.
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    found = {engine: train() for engine, train in runs.DEEPSPEED.items()}
    if rank == 0:
        torch.save(found, f"{folder}/result")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)
def test_deepspeed(tmp_path):
    start(_zero, WORLD, tmp_path)
    found = torch.load(tmp_path / "result")
    low = found.pop("ZeRO-3, bf16")
    faults: list[str] = []
    check_training(found, faults)
    assert not faults, "\n".join(faults)
    assert {engine: got["share"] for engine, got in found.items()} == {"ZeRO-2": 1, "ZeRO-3": 1 / WORLD}
    check_low(low["dB"][0])
