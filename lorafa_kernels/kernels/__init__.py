"""Triton kernels and their launchers. Importing a module of this package imports Triton.

tile.py holds the device helpers, shrink.py x → z and dy → dz, expand.py C = P·Q + L·R + bias (y and dx),
grad.py the one pass over dy. linear.py composes them into the four operations that reference.py and
library.py have too. These kernels are portable: any NVIDIA GPU from sm_80 on, and AMD. Kernels for one
architecture belong in a sub-package named after it (hopper/), behind the same launchers.
"""
