"""Write what bitsandbytes' CPU build makes of some weights: python tests/base/make_nf4_fixture.py

tests/base/test_nf4.py holds the library to it where bitsandbytes is missing. Codes and scales, and the weight
that they stand for, by case; fp32 values are stored as they are.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

FILE = Path(__file__).resolve().parents[1] / "fixtures" / "nf4" / "bitsandbytes.safetensors"
SHAPES = ((5, 192), (5, 13), (1, 1), (3, 131), (300, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for shape in SHAPES:
        for dtype in DTYPES if shape != (300, 64) else DTYPES[1:2]:
            weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
            for nested in (False, True):
                codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
                how = f"{str(dtype).removeprefix('torch.')}-{'nested' if nested else 'flat'}"
                case = f"{shape[0]}x{shape[1]}-{how}"
                named = {"given": weight, "weight": codes, "absmax": state.absmax}
                if nested:
                    named["nested_absmax"] = state.state2.absmax
                    named["nested_code"] = state.state2.code
                    named["nested_offset"] = state.offset.view(1)
                named["dense"] = dequantize_4bit(codes, state)
                tensors |= {f"{case}.{name}": tensor.clone() for name, tensor in named.items()}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, FILE, {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
