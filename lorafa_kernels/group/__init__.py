"""Linear layers that share an input, as one autograd node.

api.py checks and calls, ops.py has the autograd node and the operators, operands.py what a member is;
reference.py is the formula, library.py its best arrangement of library products, fused.py its composition of
the kernels; quantised.py is the same on quantised bases.
"""
