"""Triton kernels and their launchers. Importing a module of this package imports Triton.

tile.py holds the device helpers, shrink.py x → z and dy → dz, expand.py C = P·Q + L·R + bias (y and dx),
grad.py the one pass over dy. They run on any NVIDIA GPU from sm_80 on, and AMD. expand_tma.py is expand for
Hopper, behind the launcher of expand.py; recompute.py is shrink and expand in one launch, for few rows.
expand_ws.py and expand_ws_z.py are the two for Hopper with specialised warps, in Gluon, imported when a plan
names them.
The folders of operations (linear/, group/, mlp/) compose them, by a plan.
"""
