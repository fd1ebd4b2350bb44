"""The planner's bytes are those of a step that runs: what autograd keeps within 1 %, the peak of the
allocator's events within 3 %, for every family and method. What it is compared with is in real_step.py.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from lorafa_kernels.memory import corrections
from lorafa_kernels.memory.methods import BY_KEY, adapted_names
from lorafa_kernels.memory.models import DTYPES, resolve
from lorafa_kernels.memory.plan import plan_memory
from lorafa_kernels.memory.solve import largest
from lorafa_kernels.memory.step import CannotRun, Planner, Setting
from tests.memory import families, real_step

pytest.importorskip("transformers")
# The promises of the issue, as shares.
KEPT, PEAK = 0.01, 0.03
SEED, DRAWN = 15, 8


@dataclass(frozen=True)
class Case:
    """A step of a small model; dropout: of the adapters."""

    family: str
    method: str
    dtype: str = "bf16"
    batch: int = 2
    sequence: int = 64
    rank: int = 8
    checkpointing: bool = False
    dropout: float = 0.0
    padding: bool = False

    def __str__(self) -> str:
        words = [self.family, self.method, self.dtype, f"{self.batch}x{self.sequence}", f"r{self.rank}"]
        words += ["checkpointing"] if self.checkpointing else []
        words += [f"dropout{self.dropout:g}"] if self.dropout else []
        return "-".join(words + (["padding"] if self.padding else []))


CASES = (
    Case("llama", "lorafa"),
    Case("roberta", "lora"),
    Case("mistral", "peft", dropout=0.1),
    Case("mixtral", "lorafa"),
    Case("qwen2", "lorafa", checkpointing=True),
    Case("qwen3", "lora", padding=True),
    Case("gemma", "full", "fp32"),
    Case("gemma2", "lorafa", dropout=0.1),
    Case("gemma3_text", "lorafa-plain", padding=True),
    Case("phi3", "peft", "fp32", checkpointing=True),
    Case("bert", "lorafa", padding=True),
    Case("t5", "lorafa", padding=True),
    Case("gpt2", "lorafa-plain"),
    Case("opt", "lorafa", "fp32", dropout=0.1, checkpointing=True),
    Case("vit", "lora"),
    Case("whisper", "lorafa"),
)


def draw(seed: int, count: int) -> list[Case]:
    """Cases of all families and methods."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        method = chance.choice(list(BY_KEY))
        found.append(
            Case(
                chance.choice(list(families.FAMILIES)),
                method,
                # 16-bit products of whole weights' gradients take scratch memory of oneDNN, by the CPU's kind.
                "fp32" if method == "full" else chance.choice(["bf16", "fp32"]),
                chance.choice([1, 2, 3]),
                chance.choice([48, 64, 100]),
                chance.choice([4, 8]),
                chance.random() < 0.3,
                chance.choice([0.0, 0.1]) if method != "full" else 0.0,
                chance.random() < 0.3,
            )
        )
    # Grouped products on fakes are of bf16 only.
    return [c if c.family != "mixtral" else Case("mixtral", "lorafa", padding=c.padding) for c in found]


def planner_of(case: Case, folder: Path, whole: bool = False) -> Planner:
    (folder / "config.json").write_text(json.dumps(families.config_of(case.family)))
    subject = resolve(str(folder), padding=case.padding)
    setting = Setting(case.batch, case.sequence, case.rank, DTYPES[case.dtype], device="cpu")
    return Planner(subject, setting, whole)


def real(case: Case, names: tuple[str, ...]) -> real_step.Taken:
    if case.method in ("peft", "lora"):
        pytest.importorskip("peft")
    dtype = DTYPES[case.dtype]
    model = families.build(case.family, dtype)
    real_step.adapt(model, case.method, names, case.rank, case.dropout)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = families.inputs_of(case.family, case.batch, case.sequence, dtype, case.padding)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    return real_step.take(model, lambda: model(**inputs).loss, optimizer, tensors)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(case: Case, folder: Path) -> None:
    planner = planner_of(case, folder)
    changed = {"checkpointing": case.checkpointing, "dropout": case.dropout}
    planned = planner.estimate(BY_KEY[case.method], **changed)
    taken = real(case, planner.names)
    # The hooks see nothing of what is inside of a checkpoint.
    kept = taken.kept if case.checkpointing else taken.saved
    assert abs(planned.kept / kept - 1) <= KEPT, f"kept {planned.kept}, really {kept}"
    assert abs(planned.peak / taken.peak - 1) <= PEAK, f"peak {planned.peak}, really {taken.peak}"


QUICK = 2


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if i >= QUICK else []) for i, c in enumerate(CASES)],
)
def test_a_step_takes_what_is_planned(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", draw(SEED, DRAWN), ids=str)
def test_a_drawn_step_takes_what_is_planned(case, tmp_path):
    check(case, tmp_path)
