"""One linear layer with several adapters, of which each row of a batch takes one, or none.

api.py checks and calls, ops.py has the autograd node and the operators; rows.py says which rows are whose;
reference.py is the formula, library.py its arrangement of library products, fused.py its composition of the
kernels.
"""
