"""What is wrong in a call of LoRAFALinearGroup, LoRAFASwiGLU and LoRAFAGeGLU is told by an error of this
library that names the argument, whatever was given.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import lorafa_kernels
from lorafa_kernels import LoRAFAGeGLU, LoRAFALinear, LoRAFALinearGroup, LoRAFASwiGLU

PACKAGE = str(Path(lorafa_kernels.__file__).parent)
# Of which Python makes no text.
HUGE = 10**5000


def linear(K=4, N=6):
    return nn.Linear(K, N)


ODD = {
    "None": None,
    "str": "x",
    "bytes": b"x",
    "int": 3,
    "negative": -1,
    "float": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "bool": True,
    "list": [1],
    "list of None": [None],
    "empty": [],
    "dict": {"a": 1},
    "dict of int": {1: linear()},
    "object": object(),
    "tensor": torch.ones(2),
    "sparse": torch.eye(2).to_sparse(),
    "dtype": torch.float32,
    "huge": HUGE,
    "module": nn.ReLU(),
    "generator": (1 for _ in range(2)),
    "type": nn.Linear,
}
MODULES = {"swiglu": LoRAFASwiGLU, "geglu": LoRAFAGeGLU}


def group():
    return LoRAFALinearGroup.from_linears({"q": linear(), "k": linear()}, r=2)


def with_child(kind, name, value):
    mlp = kind(4, 6, r=2)
    # As a loader might, past what nn.Module allows.
    mlp._modules[name] = value
    return mlp(torch.ones(2, 4))


CALLS = {
    "members": (lambda v: LoRAFALinearGroup(v), "member", {"empty": ValueError}),
    "one of members": (lambda v: LoRAFALinearGroup([linear(), v]), "member", {}),
    "a member's name": (
        lambda v: LoRAFALinearGroup({v: linear()}),
        "member",
        {"str": None, "list": None, "dict": None, "list of None": None, "empty": None, "dict of int": None},
    ),
    "share_A": (lambda v: LoRAFALinearGroup([LoRAFALinear(4, 6)], share_A=v), "share_A", {"bool": None}),
    "linears": (lambda v: LoRAFALinearGroup.from_linears(v), "linears|member", {"empty": ValueError}),
    "adapt": (
        lambda v: LoRAFALinearGroup.from_linears([linear()], adapt=v),
        "adapt",
        {"None": None, "empty": None, "dict": ValueError},
    ),
    **{f"{name} hidden": (lambda v, C=C: C(v, 6), "hidden", {"int": None}) for name, C in MODULES.items()},
    **{
        f"{name} intermediate": (lambda v, C=C: C(4, v), "intermediate", {"int": None})
        for name, C in MODULES.items()
    },
    **{
        f"{name} {role}": (
            lambda v, C=C, role=role: C.from_linears(
                **{"gate": linear(), "up": linear(), "down": linear(6, 4)} | {role: v}
            ),
            f"{role}_proj",
            {},
        )
        for name, C in MODULES.items()
        for role in ("gate", "up", "down")
    },
    **{
        f"{name} adapt": (
            lambda v, C=C: C.from_linears(linear(), linear(), linear(6, 4), adapt=v),
            "adapt",
            {"None": None, "empty": None, "dict": ValueError},
        )
        for name, C in MODULES.items()
    },
    "approximate": (lambda v: LoRAFAGeGLU(4, 6, approximate=v), "approximate", {}),
    "approximate of from_linears": (
        lambda v: LoRAFAGeGLU.from_linears(linear(), linear(), linear(6, 4), approximate=v),
        "approximate",
        {},
    ),
    "approximate, later": (
        lambda v: (setattr(mlp := LoRAFAGeGLU(4, 6), "approximate", v), mlp(torch.ones(2, 4))),
        "approximate",
        {},
    ),
    "a child, later": (lambda v: with_child(LoRAFASwiGLU, "up_proj", v), "LoRAFALinear", {}),
}


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_named(call, value):
    """exceptions: {value: another error than TypeError or ValueError, None for one that is right}."""
    function, name, exceptions = CALLS[call]
    if exceptions.get(value, ()) is None:
        return
    with pytest.raises((TypeError, ValueError), match=name) as raised:
        function(ODD[value])
    if value in exceptions:
        assert raised.type is exceptions[value]
    # Raised here, and not by what it happened to be given to.
    assert traceback.extract_tb(raised.tb)[-1].filename.startswith(PACKAGE)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["", "a.b", "impl", "forward", "training"])
def test_a_name_that_no_child_may_have_is_refused(name):
    with pytest.raises(ValueError, match=f"cannot be called {name!r}"):
        LoRAFALinearGroup({name: linear()})


def test_what_is_right_is_taken():
    numpy = pytest.importorskip("numpy")
    assert LoRAFASwiGLU(numpy.int64(4), numpy.int32(6)).gate_proj.in_features == 4
    assert "1.lora_B" in LoRAFALinearGroup(nn.ModuleList([linear(), LoRAFALinear(4, 6)])).state_dict()
    assert len(LoRAFALinearGroup(nn.ModuleDict({"q": linear()})).members) == 1
    assert len(LoRAFALinearGroup(linear() for _ in range(3)).members) == 3
    adapted = LoRAFALinearGroup.from_linears({"q": linear(), "k": linear()}, adapt={"q"})
    assert [type(member) for member in adapted.members] == [LoRAFALinear, nn.Linear]
