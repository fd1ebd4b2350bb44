"""Blocks of several linear layers as one autograd node each: layers that share an input, gated MLPs, norms.

They keep less for backward, and launch fewer kernels, than the same layers one by one.
"""
