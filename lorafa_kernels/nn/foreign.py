"""Quantised layers of other libraries that no adapter of this one goes on, and what to do instead.

Rows of data: the start of a class's module, its name ("" for every class there), what is missing. A library
is recognised by names alone, and none is imported.
"""

from __future__ import annotations

from torch import Tensor, nn

_DENSE = "load the model dense and call lorafa_kernels.quantize_base(model, {!r})"
_CODES = "its codes are no base of this library"
_ROWS = (
    (
        "bitsandbytes.",
        "Linear8bitLt",
        "its product is of int8 rows of x, which has no weight to multiply dx by: load with "
        "load_in_4bit=True and bnb_4bit_quant_type='nf4', or " + _DENSE.format("int8"),
    ),
    ("gptqmodel.", "", f"{_CODES}: " + _DENSE.format("nf4")),
    ("auto_gptq.", "", f"{_CODES}: " + _DENSE.format("nf4")),
    ("awq.", "", f"{_CODES}: " + _DENSE.format("nf4")),
    ("aqlm.", "", f"{_CODES}: " + _DENSE.format("nf4")),
    ("hqq.", "", f"{_CODES}: " + _DENSE.format("nf4")),
    ("eetq.", "", f"{_CODES}: " + _DENSE.format("int8")),
    ("optimum.quanto.", "", f"{_CODES}: " + _DENSE.format("int8")),
    ("compressed_tensors.", "", f"{_CODES}: " + _DENSE.format("fp8")),
    ("transformers.integrations.", "", f"{_CODES}: " + _DENSE.format("fp8")),
)
_TENSORS = (
    ("torchao.", "its tensors keep a dense fp32 weight for backward: " + _DENSE.format("int8")),
    ("optimum.quanto.", f"{_CODES}: " + _DENSE.format("int8")),
)


def what_is_missing(module: nn.Module) -> str | None:
    """Why no adapter goes on a quantised layer of another library, and what to do; None for other modules."""
    for kind in type(module).__mro__:
        for start, name, text in _ROWS:
            if kind.__module__.startswith(start) and name in ("", kind.__name__):
                return f"{kind.__module__.partition('.')[0]}'s {kind.__name__} cannot be adapted, {text}"
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        held = type(weight.data)
        for start, text in _TENSORS:
            if held.__module__.startswith(start):
                return f"a weight of {start.rstrip('.')}'s {held.__name__} cannot be adapted, {text}"
    return None
