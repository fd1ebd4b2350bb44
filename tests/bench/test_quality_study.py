"""The accuracy study: its order, the choice of learning rates, what a killed call leaves, equal starts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest
import torch
from accuracy import check_budget

pytest.importorskip("transformers", reason="the study needs transformers")
pytest.importorskip("peft", reason="the study needs peft")
pytest.importorskip("scipy", reason="the study needs scipy")

from bench.quality import methods, models, plan, records, settings, study, texts, training
from bench.quality.plan import Run, chosen_rate, grid, runs, whole
from bench.quality.settings import METHODS, SEEDS, TASKS
from bench.run.environment import environment
from bench.run.store import Store

TASK = "llama-manual"


def record(nats: float | None) -> dict:
    return {"validation": None if nats is None else {"nats": nats}, "test": None}


def done_with(task: str, method: str, losses: dict[float, float | None]) -> dict[str, dict]:
    return {Run(task, method, rate, settings.CHOOSING_SEED).key: record(n) for rate, n in losses.items()}


def simulated(cut: int | None = None) -> list[Run]:
    """The runs of a whole study in order, each once, the middle rate of every grid the best."""
    done: dict[str, dict] = {}
    found = []
    for run in runs(done, tuple(METHODS)):
        if run.key not in done:
            middle = METHODS[run.method].rates[1]
            done[run.key] = record(1.0 if run.rate == middle else 2.0)
            found.append(run)
            if len(found) == cut:
                break
    return found


def test_every_cell_has_all_its_seeds_and_no_run_comes_twice():
    found = simulated()
    assert len({run.key for run in found}) == len(found) == whole({})
    for task in TASKS:
        for method in METHODS:
            rate = METHODS[method].rates[1]
            own = {Run(task, method, rate, seed).key for seed in SEEDS}
            assert own <= {run.key for run in found}


def test_cut_anywhere_no_cell_is_more_than_a_seed_ahead():
    """Of the cells that were begun: the corrected ones begin when the others have three seeds."""
    order = simulated()
    start = next(n for n, run in enumerate(order) if run.seed == 1)
    late = next(n for n, run in enumerate(order) if run.method in plan.LAST)
    again = next(n for n, run in enumerate(order) if run.seed == 3)

    def counts(cut: int, some: list[str]) -> list[int]:
        plain = [r for r in order[:cut] if (r.rank, r.scaling, r.targets) == (8, 2.0, settings.TARGETS)]
        return [
            sum(r.task == t and r.method == m and r.rate == METHODS[m].rates[1] for r in plain)
            for t in TASKS
            for m in some
        ]

    first = [method for method in METHODS if method not in plan.LAST]
    for cut in range(start, late):
        assert max(counts(cut, first)) - min(counts(cut, first)) <= 1
    for cut in range(late, again):
        assert set(counts(cut, first)) == {3}
    for cut in range(again, len(order)):
        assert max(counts(cut, list(METHODS))) - min(counts(cut, list(METHODS))) <= 1


def test_the_lowest_validation_loss_chooses_and_a_broken_run_loses():
    low, middle, high = METHODS["lora"].rates
    assert chosen_rate(TASK, "lora", done_with(TASK, "lora", {low: 1.0, middle: 0.5})) is None
    assert chosen_rate(TASK, "lora", done_with(TASK, "lora", {low: 1.0, middle: 0.5, high: None})) == middle


def test_a_grid_grows_while_its_edge_is_best():
    low, middle, high = METHODS["lora"].rates
    losses: dict[float, float | None] = {low: 3.0, middle: 2.0, high: 1.0}
    for rate, nats in ((0.064, 0.5), (0.26, 0.1)):
        done = done_with(TASK, "lora", losses)
        assert [run.rate for run in grid(TASK, "lora", done)][-1] == rate
        assert chosen_rate(TASK, "lora", done) is None
        losses[rate] = nats
    done = done_with(TASK, "lora", losses)
    # Twice and no more.
    assert [run.rate for run in grid(TASK, "lora", done)] == [low, middle, high, 0.064, 0.26]
    assert chosen_rate(TASK, "lora", done) == 0.26
    falling = done_with(TASK, "lora", {low: 1.0, middle: 2.0, high: 3.0})
    assert grid(TASK, "lora", falling)[0].rate == 0.00025


def test_high_ranks_are_trained_at_a_lower_rate_as_well():
    rates = {r.rate for r in simulated() if r.method == "lorafa" and r.rank == 64 and r.seed == 2}
    assert rates == {METHODS["lorafa"].rates[1], METHODS["lorafa"].rates[1] / settings.SLOWER}


def test_a_model_has_the_rates_of_its_first_task():
    done = done_with("minilm-movies", "lora", dict.fromkeys(METHODS["lora"].rates, 1.0))
    middle = METHODS["lora"].rates[1]
    done |= done_with("minilm-movies", "lora", {middle: 0.5})
    assert chosen_rate("minilm-tweets", "lora", done) == middle


def test_another_size_is_another_run(monkeypatch):
    before = Run(TASK, "lora", 1e-3, 0).key, Run("t5-tweets", "lora", 1e-3, 0).key
    monkeypatch.setitem(settings.SIZES, "llama", dataclasses.replace(settings.OWN, steps=65))
    after = Run(TASK, "lora", 1e-3, 0).key, Run("t5-tweets", "lora", 1e-3, 0).key
    assert before[0] != after[0] and before[1] == after[1]


def test_splits_share_nothing_and_only_training_depends_on_the_seed():
    items = list(range(2000))
    one, other = (texts.split(items, seed, test=400) for seed in (0, 1))
    assert [len(part) for part in one] == [settings.TRAIN, settings.VALIDATION, 400]
    assert len(set(one.train) | set(one.validation) | set(one.test)) == sum(map(len, one))
    assert one[1:] == other[1:] and set(one.train) != set(other.train)
    with pytest.raises(ValueError, match="items are needed, 1000 there are"):
        texts.split(items[:1000], 0, test=400)


def test_what_is_left_out_of_a_piece_is_the_target():
    piece = bytes(range(128))
    source, target = models.corrupted(piece, random.Random(5))
    assert target.pop() == settings.T5_END
    spans: dict[int, list[int]] = {}
    for token in target:
        if token >= settings.T5_FIRST_SENTINEL:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    whole_again = [byte for token in source for byte in spans.get(token, [token])]
    assert bytes(whole_again) == piece
    assert [len(span) for span in spans.values()] == [settings.T5_SPAN] * settings.T5_SPANS


def test_the_rate_rises_and_falls_to_zero():
    factors = [training.factor(step, 20) for step in range(21)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[20] == 0
    assert all(a > b for a, b in itertools.pairwise(factors[2:]))


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """One task, a tiny LLaMA, two steps, Python's manual as every text; a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tasks = dict(TASKS)
    TASKS.clear()
    TASKS[TASK] = tasks[TASK]
    for name, value in TINY.items():
        monkeypatch.setitem(settings.LLAMA, name, value)
    sizes = dataclasses.replace(settings.OWN, length=16, steps=2, test=20, pretraining_steps=2)
    monkeypatch.setitem(settings.SIZES, "llama", sizes)
    of_manual = texts.pieces
    monkeypatch.setattr(texts, "pieces", lambda text, length: of_manual("manual", length)[:1000])
    monkeypatch.setattr(study.memory, "cases", list)
    study.ready.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "quality.jsonl"
    torch.set_num_threads(threads)
    study.ready.cache_clear()
    # In their order: a model's first task is the one that rates are chosen on.
    TASKS.clear()
    TASKS.update(tasks)


class Silent:
    """Stands for rich's progress."""

    def add_task(self, *_, **__) -> int:
        return 0

    def update(self, *_, **__) -> None:
        pass

    remove_task = advance = update


def finished_lines(path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith('{"kind":"fine')]
    return [line for line in lines if line["kind"] == records.RUN]


def test_a_killed_study_goes_on_where_it_stopped(small):
    said: list[str] = []
    assert study.run_study(small, said.append, Silent(), limit=3) == 3
    text = small.read_text()
    first = [line["key"] for line in finished_lines(small)]
    assert len(first) == 3
    # Killed while it wrote the third.
    small.write_text(text[:-40])
    assert study.run_study(small, said.append, Silent(), limit=2) == 2
    again = [key for key in records.finished(small)]
    assert again[:2] == first[:2] and again[2] == first[2] and len(again) == 4
    lines = small.read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "run" for line in lines if line.endswith("}")) == 2
    assert sum(records.TASK in line for line in lines) == 1
    header = json.loads(lines[0])
    assert header["learning_rates"]["lora"] == list(METHODS["lora"].rates)
    assert {"commit", "versions", "machine"} <= header["environment"].keys()


def test_the_same_run_gives_the_same_numbers(small):
    run = Run(TASK, "lorafa-dropout", 4e-3, 1)
    found = [study.one_run(run, Store(small), lambda loss: None) for _ in range(2)]
    assert found[0]["losses"] == found[1]["losses"] and found[0]["test"] == found[1]["test"]
    assert found[0]["validation"] is None


def test_a_run_that_breaks_is_kept_and_counts_as_broken(small, monkeypatch):
    of_model = models.ByteLlama.losses
    store = Store(small)
    records.describe(store, environment())
    study.ready(TASKS[TASK], store)

    def infinite(self, model, items):
        nats, right = of_model(self, model, items)
        return nats * float("inf"), right

    monkeypatch.setattr(models.ByteLlama, "losses", infinite)
    broken = study.one_run(Run(TASK, "lora", 1e-3, 0), store, lambda loss: None)
    assert broken["test"] is None and broken["validation"] is None
    assert list(records.finished(small)) == [broken["key"]]
    kind = models.ByteLlama()
    with pytest.raises(FloatingPointError, match="test loss is inf"):
        training.test(kind.fresh(0), kind, kind.items("manual")[:4])


def prepared(method: str, seed: int = 3, **how):
    model = models.ByteLlama().fresh(0)
    setting = {"rank": 4, "scaling": 2.0, "targets": settings.TARGETS, "seed": seed, **how}
    return model, methods.prepare(model, method, "llama", **setting)


def by_layer(model, part: str) -> dict[str, torch.Tensor]:
    """lora_A or lora_B by the layer's name, in PEFT's modules and ours."""
    found = [(name.partition(f".{part}")[0], p) for name, p in model.named_parameters() if part in name]
    return dict(found)


@pytest.mark.numerics
def test_all_ways_start_from_the_same_weights_and_train_what_they_should(small):
    adapters = {name: by_layer(prepared(name)[0], "lora_A") for name in METHODS if name != "full"}
    reference = adapters["lora"]
    assert len(reference) == 7
    for name, found in adapters.items():
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[layer], reference[layer]) for layer in reference), name
    other = by_layer(prepared("lora", seed=4)[0], "lora_A")
    assert not any(torch.equal(other[layer], reference[layer]) for layer in reference)

    trained = {name: len(prepared(name)[1][0]) for name in METHODS}
    model, (body, head) = prepared("full")
    assert len(body) == len(list(model.parameters())) and not head
    assert trained["lora"] == 14 and trained["lorafa"] == 7
    few = prepared("lorafa", targets=settings.ATTENTION_ONLY)[1][0]
    assert len(few) == 2


@pytest.mark.numerics
def test_the_corrected_gradient_is_of_the_A_that_was_drawn(small):
    """prepare draws A after apply_lorafa has put the correction in."""
    kind = models.ByteLlama()
    items = kind.items("manual")[:4]

    def gradients(method: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = prepared(method)[0].to(dtype)
        kind.losses(model, items)[0].mean().backward()
        found = {layer: p.grad for layer, p in by_layer(model, "lora_B").items()}
        if method == "lorafa-corrected":
            return found
        drawn = by_layer(model, "lora_A")
        return {
            layer: dB @ torch.linalg.inv(drawn[layer] @ drawn[layer].T) / 4 for layer, dB in found.items()
        }

    def joined(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"dB": torch.cat([found[layer].detach().flatten() for layer in sorted(found)])}

    check_budget(
        got=joined(gradients("lorafa-corrected", torch.float32)),
        plain=joined(gradients("lorafa", torch.float32)),
        exact=joined(gradients("lorafa", torch.float64)),
    )
