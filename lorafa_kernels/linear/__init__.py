"""One LoRA-FA linear layer.

api.py checks and calls, ops.py has the autograd node and the operators; reference.py is the formula,
library.py its best arrangement of library products, fused.py its composition of the kernels.
"""
