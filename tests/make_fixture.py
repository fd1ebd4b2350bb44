"""Write what a user may hold of an earlier version of the library: python make_fixture.py FOLDER

Run in a checkout of that version; tests/test_earlier_versions.py reads it with today's.

    api.json            public names with parameters and defaults, operators with schemas, keys of state dicts
    modules.pt          pickled modules
    exported.pt2        an exported program, which holds operators by name
    calls.pt            inputs and outputs of all these
    adapter/            what save_adapter writes
    table.json          a table of measured plans
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import lorafa_kernels
from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFAGeGLU,
    LoRAFALinear,
    LoRAFALinearGroup,
    LoRAFASwiGLU,
    apply_lorafa,
    lorafa_linear,
    save_adapter,
)

try:
    from lorafa_kernels.tuning import config, lookup, recipe
except ImportError:
    from lorafa_kernels.plan import config, recipe
    from lorafa_kernels.plan import tables as lookup

ADAPTER = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {
        "linear": LoRAFALinear(6, 5, **ADAPTER),
        "group": LoRAFALinearGroup.from_linears({"q": nn.Linear(6, 6), "k": nn.Linear(6, 2)}, **ADAPTER),
        "swiglu": LoRAFASwiGLU(6, 8, **ADAPTER),
        "geglu": LoRAFAGeGLU(6, 8, **ADAPTER),
    }
    # Each draws small factors of its own: a zero lora_B would show nothing.
    for module in found.values():
        for name, parameter in module.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.1)
    return found


class Exported(nn.Module):
    """One layer without dropout and one with, both through the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LoRAFALinear(6, 5, **ADAPTER)
        nn.init.normal_(self.layer.lora_B, std=0.1)

    def forward(self, x):
        layer = self.layer
        return lorafa_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=0.5)


def adapted() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    apply_lorafa(model, LoRAFAConfig(target_modules=["0", "2"], **ADAPTER))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def write_table(path: Path) -> None:
    device = recipe.Device("NVIDIA H200", config.KNOWN_DEVICES["sm_90"], "3.7.1")
    problem = recipe.Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16, False, False)
    shrink = config.KernelConfig(64, 0, 64, 16, 1, 4, 3)
    plans = (
        lookup.Measured(recipe.Recipe("fused", config.KernelPlan(shrink=shrink)), 100.0, 20.0),
        lookup.Measured(recipe.Recipe("library"), 120.0, 15.0),
    )
    lookup.update_table(path, device, [lookup.Entry(lookup.key_of(problem), plans)], {"torch": "2.13.0"})


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = modules()
    calls = {}
    for name, module in made.items():
        x = torch.randn(4, 6, requires_grad=True)
        y = module(x)
        outputs = y if isinstance(y, tuple) else (y,)
        sum(output.square().sum() for output in outputs).backward()
        factors = {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}
        calls[name] = {"x": x.detach(), "ys": [o.detach() for o in outputs], "dx": x.grad, "dBs": factors}
        module.zero_grad(set_to_none=True)
    torch.save(made, folder / "modules.pt")

    torch.manual_seed(2)
    exported, x = Exported(), torch.randn(4, 6)
    torch.export.save(torch.export.export(exported, (x,)), folder / "exported.pt2")
    calls["exported"] = {"x": x, "ys": [exported(x).detach()]}

    model = adapted()
    save_adapter(model, folder / "adapter")
    x = torch.randn(4, 6)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    state = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
    base.load_state_dict(state)
    calls["adapter"] = {"x": x, "ys": [model(x).detach()], "base": base.state_dict()}
    torch.save(calls, folder / "calls.pt")
    write_table(folder / "table.json")

    signatures = {}
    for name in lorafa_kernels.__all__:
        value = getattr(lorafa_kernels, name)
        if callable(value):
            parameters = inspect.signature(value).parameters.values()
            signatures[name] = {p.name: None if p.default is p.empty else repr(p.default) for p in parameters}
    schemas = sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("lorafa_kernels::"))
    about = {
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "versions": {"torch": torch.__version__.split("+")[0], "python": sys.version.split()[0]},
        "signatures": signatures,
        "operators": schemas,
        "state_dict_keys": {name: sorted(module.state_dict()) for name, module in made.items()},
    }
    (folder / "api.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
