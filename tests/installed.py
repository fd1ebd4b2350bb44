"""Run by the Python of an environment into which the package was installed, away from the checkout:

    PYTHON -I installed.py FOLDER        FOLDER: the environment's own

It imports every module, adapts, trains, saves and loads a model, and raises what is wrong. Without -I Python
would look for modules beside this file.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# How names of modules begin that only Triton, or PEFT, makes importable; test_architecture.py holds these.
OF_TRITON = (
    "lorafa_kernels.kernels.",
    *(f"lorafa_kernels.{unit}.fused" for unit in ("linear", "group", "mixed")),
)
OF_PEFT = "lorafa_kernels.integrations.peft_"


def main(folder: str) -> None:
    import lorafa_kernels

    place = Path(lorafa_kernels.__file__).resolve()
    assert place.is_relative_to(Path(folder).resolve()), f"{place} was imported, which is not in {folder}"
    assert version("lorafa-kernels") == lorafa_kernels.__version__
    assert (place.parent / "py.typed").is_file()
    modules = import_all(lorafa_kernels)
    train(lorafa_kernels)
    print(f"{modules} modules, one training step, a file written and read: {lorafa_kernels.__version__}")


def import_all(package) -> int:
    """Import every module, those of the kernels only where Triton is, and what is built on PEFT only where
    that is; return how many.
    """
    try:
        import triton  # noqa: F401

        kernels = True
    except ImportError:
        kernels = False
    names = [found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    names = [name for name in names if kernels or not name.startswith(OF_TRITON)]
    if importlib.util.find_spec("peft") is None:
        names = [name for name in names if not name.startswith(OF_PEFT)]
    assert len(names) > 20, names
    for name in names:
        # Importing this one runs the command.
        if not name.endswith(".__main__"):
            importlib.import_module(name)
    return len(names)


def train(package) -> None:
    """One step of a model with a gated MLP and three projections; its adapter through a file."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self, name, nn.Linear(16, 16))

        def forward(self, x):
            return self.o_proj(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        return package.apply_lorafa(Model(), config)

    config = package.LoRAFAConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = adapted()
    x = torch.randn(8, 16)
    before = model(x)
    optimizer = torch.optim.AdamW(package.lorafa_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    after = model(x)
    assert after.square().mean() < before.square().mean()
    with tempfile.TemporaryDirectory() as folder:
        package.save_adapter(model, folder)
        torch.manual_seed(0)
        again = package.load_adapter(Model(), folder)
        assert torch.equal(again(x), after)


if __name__ == "__main__":
    main(*sys.argv[1:])
