"""Training: all contenders train alike on the same batches, and what it refuses to publish."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from test_bench_memory import adapt_raising, adapt_with_scaling

from bench.measure import contenders, models, training
from bench.measure.training import NUMBERS, TrainingCase
from lorafa_kernels.checks.budget import allowed_error, relative_error

pytest.importorskip("transformers")

CASE = TrainingCase("tiny Llama", 2, 24, rank=4, steps=5, lr=1e-2, needs_gpu=False)


def train(keys, case=CASE, device="cpu", tick=lambda fraction: None) -> dict:
    payload = training.train(case, keys, device, tick)
    json.dumps(payload, allow_nan=False)
    return {(row["contender"], row["checkpointing"]): row for row in payload["rows"]}


def has_no_number(row: dict) -> bool:
    return all(row[name] is None for name in NUMBERS)


def plain_losses(dtype: torch.dtype) -> torch.Tensor:
    """The losses of the plain formula, trained in `dtype`."""
    model = models.build_causal_lm(CASE.model, CASE.dtype, "cpu")
    models.adapt_eager(model, models.LLAMA_LINEARS, CASE.rank)
    models.fill_adapters(model, CASE.dtype, zero_B=True)
    model = models.in_fp64(model) if dtype == torch.float64 else model
    tokens = training.batches(CASE, "cpu")
    return torch.tensor(
        training._steps(CASE, model, contenders.adamw(model, CASE.rank, CASE.lr), tokens, lambda done: None)[
            "losses"
        ]
    )


@pytest.mark.numerics
def test_contenders_train_alike():
    """All losses of a run as one vector, within the budget of everything else in this project."""
    pytest.importorskip("peft")
    done = []
    keys = ("frozen", "lorafa", "peft-lorafa-16bit", "peft-lorafa-optimizer")
    rows = train(keys, tick=done.append)
    assert list(rows) == [(key, checkpointing) for key in keys for checkpointing in (False, True)]
    assert done == sorted(done) and done[-1] == 1.0
    exact = plain_losses(torch.float64)
    allowed = allowed_error(relative_error(plain_losses(torch.bfloat16), exact), torch.bfloat16)
    for (key, checkpointing), row in rows.items():
        assert (row["status"], row["reason"]) == ("ok", None), key
        losses = torch.tensor(row["losses"])
        assert len(losses) == CASE.steps
        if key in ("lorafa", "peft-lorafa-16bit"):
            assert relative_error(losses, exact) <= allowed
            assert losses[-1] < losses[0] - 0.1
        assert 0 < row["step_ms"]["min"] <= row["step_ms"]["p20"] <= row["step_ms"]["median"]
        assert row["tokens_per_s"] == pytest.approx(2 * 24 / row["step_ms"]["median"] * 1e3, rel=1e-3)
        assert row["peak_allocated_bytes"] is None and row["peak_reserved_bytes"] is None
        if checkpointing:
            assert row["saved_bytes"] < rows[key, False]["saved_bytes"] / 2
            assert row["losses"] == rows[key, False]["losses"]
    # 4 · (N of the seven linear layers) of two layers.
    assert rows["lorafa", False]["trained_parameters"] == 4 * 2 * (5 * 128 + 2 * 344)
    assert rows["frozen", False]["trained_parameters"] == 0
    # Of each MLP one of three products less; of all norms but the first, whose input needs no gradient, 16
    # bits instead of 32.
    less = 2 * 24 * (2 * 344 * 2 + 4 * 128 * 2)
    assert rows["lorafa", False]["saved_bytes"] == rows["peft-lorafa-16bit", False]["saved_bytes"] - less


@pytest.mark.parametrize(
    ("adapt", "reason"),
    [
        (adapt_with_scaling(1.05), "outside the error budget: y, dx, dB"),
        (adapt_with_scaling(math.nan), "outside the error budget: y, dx, dB"),
        (adapt_raising, "RuntimeError: does not run here"),
    ],
    ids=["wrong", "nan", "raising"],
)
def test_planted_failures_have_no_number(adapt, reason, monkeypatch):
    monkeypatch.setitem(models.CONTENDERS, "planted", models.Contender("planted", "planted", adapt))
    rows = train(("planted",), replace(CASE, steps=3))
    for row in rows.values():
        assert (row["status"], row["reason"]) == ("failed", reason)
        assert has_no_number(row)


def test_losses_that_stop_being_finite_fail(monkeypatch):
    def explode(adapted, rank, lr):
        return contenders.adamw(adapted, rank, math.inf)

    planted = models.Contender("planted", "planted", models.adapt_eager, optimizer=explode)
    monkeypatch.setitem(models.CONTENDERS, "planted", planted)
    for row in train(("planted",), replace(CASE, steps=3)).values():
        assert (row["status"], row["reason"]) == ("failed", "the loss of step 1 is not finite")
        assert has_no_number(row)


def test_first_loss_must_be_the_base_models():
    # bf16: two unit roundoffs are 2⁻⁷.
    assert training._wrong_losses(CASE, [6.0, 5.0], 6.0) is None
    assert training._wrong_losses(CASE, [6.0 * (1 + 2**-8), 5.0], 6.0) is None
    assert "off the base model's" in training._wrong_losses(CASE, [6.0 * (1 + 2**-6), 5.0], 6.0)
    assert "off the base model's" in training._wrong_losses(replace(CASE, dtype="fp32"), [6.001, 5.0], 6.0)


def test_what_cannot_run_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = train(("peft-lora", "lorafa"), replace(CASE, steps=3))
    for checkpointing in (False, True):
        row = rows["peft-lora", checkpointing]
        assert (row["status"], row["reason"]) == ("not run", "peft is not installed")
        assert has_no_number(row)
        assert rows["lorafa", checkpointing]["status"] == "ok"
    for row in train(("lorafa", "frozen"), training.LLAMA_8B).values():
        assert (row["status"], row["reason"]) == ("not run", "a model of this size needs a GPU")
        assert has_no_number(row)


def test_too_little_memory_is_not_a_failure(monkeypatch):
    def adapt(model, linears, rank):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setitem(models.CONTENDERS, "planted", models.Contender("planted", "planted", adapt))
    for row in train(("planted",), replace(CASE, steps=3)).values():
        assert row["status"] == "not run" and row["reason"].startswith("out of memory")
        assert has_no_number(row)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4, 5, 7, 8, 255, 256, 1000])
@pytest.mark.parametrize("first", [1, 3])
def test_largest_batch_is_found(most, first):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= most

    found = training.largest_batch(fits, first)
    assert found == (0 if most < first else min(most, training.MOST_BATCH))
    assert len(set(tried)) == len(tried) <= 20
    assert max(tried) <= max(training.MOST_BATCH, first)


def test_training_at_the_largest_batch(monkeypatch):
    """With a memory that holds three sequences in the search, and two in training."""
    right, tried = training._steps, []

    def fits(model, tokens):
        return len(tokens) <= 3

    def steps(case, model, optimizer, tokens, tick):
        tried.append(case.batch)
        assert tokens.shape[:2] == (case.steps, case.batch)
        if case.batch > 2:
            raise torch.OutOfMemoryError("in pieces")
        return right(case, model, optimizer, tokens, tick)

    monkeypatch.setattr(training, "_fits", fits)
    monkeypatch.setattr(training, "_steps", steps)
    case = replace(CASE, batch=1, largest=True, checkpointing=(False,))
    rows = train(("lorafa", "frozen"), case)
    assert list(rows) == [("lorafa", False), ("frozen", False)]
    for row in rows.values():
        assert (row["status"], row["reason"], row["batch"]) == ("ok", None, 2)
        assert row["tokens_per_s"] == pytest.approx(2 * 24 / row["step_ms"]["median"] * 1e3, rel=1e-3)
    assert tried == [3, 2, 3, 2]
    assert "largest batch" in case.label


def test_largest_batch_that_is_none(monkeypatch):
    monkeypatch.setattr(training, "_fits", lambda model, tokens: False)
    case = replace(CASE, largest=True, checkpointing=(False,))
    (row,) = train(("lorafa",), case).values()
    assert row["status"] == "not run" and row["reason"].startswith("out of memory") and has_no_number(row)
    (row,) = train(("lorafa",), training.LLAMA_8B_LARGEST).values()
    assert (row["status"], row["reason"]) == ("not run", "a model of this size needs a GPU")


def test_fits_says_whether_a_step_ran_out_of_memory(monkeypatch):
    model = models.build_causal_lm(CASE.model, CASE.dtype, "cpu")
    models.adapt_eager(model, models.LLAMA_LINEARS, CASE.rank)
    tokens = training.batches(CASE, "cpu")[0]
    assert training._fits(model, tokens)
    assert all(parameter.grad is None for parameter in model.parameters())

    def raising(model, tokens):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(training, "_loss", raising)
    assert not training._fits(model, tokens)


def test_tokens_are_the_same_everywhere_and_can_be_learned():
    tokens = training.batches(CASE, "cpu")
    assert tokens.shape == (CASE.steps, CASE.batch, CASE.sequence)
    assert torch.equal(tokens, training.batches(CASE, "cpu"))
    assert tokens.unique().numel() <= training.ALPHABET
    successors: dict[int, list[int]] = {}
    for now, after in zip(
        tokens[..., :-1].flatten().tolist(), tokens[..., 1:].flatten().tolist(), strict=True
    ):
        successors.setdefault(now, []).append(after)
    usual = sum(max(map(found.count, found)) for found in successors.values())
    assert usual / tokens[..., 1:].numel() > 1 - 2 * training.NOISE


def test_names_and_sizes_are_checked():
    with pytest.raises(ValueError, match=r"unknown contender of a training 'compiled-lora'.*peft-lora"):
        train(("compiled-lora",))
    with pytest.raises(ValueError, match="steps must be more than 2"):
        replace(CASE, steps=2)
    with pytest.raises(ValueError, match=r"unknown model 'tiny'.*tiny Llama"):
        replace(CASE, model="tiny")
