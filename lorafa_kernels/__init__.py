"""Triton kernels for LoRA-FA (arXiv 2308.03303): adapted linear layers that keep M × R numbers for
backward.
"""

from ._version import __version__
from .functional import lorafa_linear
from .nn import LoRAFALinear

__all__ = ["LoRAFALinear", "__version__", "lorafa_linear"]
