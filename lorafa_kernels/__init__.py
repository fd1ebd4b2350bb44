"""Triton kernels for LoRA-FA (arXiv 2308.03303): adapted linear layers that keep M × R numbers."""

# First: it decides where the others are looked for.
from . import _safe_path as _safe_path
from ._version import __version__
from .linear.api import lorafa_linear
from .model.adapt import apply_lorafa
from .model.adapters import adapter_index, add_adapter, delete_adapter, set_adapter
from .model.checkpoint import load_adapter, lorafa_state_dict, save_adapter
from .model.config import LoRAFAConfig
from .model.merge import disable_adapter, merge_adapter, unload_adapter, unmerge_adapter
from .model.names import adapter_names
from .model.quantise import quantize_base
from .model.saved import lorafa_parameters
from .nn import LoRAFAGeGLU, LoRAFALinear, LoRAFALinearGroup, LoRAFASwiGLU
from .nn.explain import explain

__all__ = [
    "LoRAFAConfig",
    "LoRAFAGeGLU",
    "LoRAFALinear",
    "LoRAFALinearGroup",
    "LoRAFASwiGLU",
    "__version__",
    "adapter_index",
    "adapter_names",
    "add_adapter",
    "apply_lorafa",
    "delete_adapter",
    "disable_adapter",
    "explain",
    "load_adapter",
    "lorafa_linear",
    "lorafa_parameters",
    "lorafa_state_dict",
    "merge_adapter",
    "quantize_base",
    "save_adapter",
    "set_adapter",
    "unload_adapter",
    "unmerge_adapter",
]
