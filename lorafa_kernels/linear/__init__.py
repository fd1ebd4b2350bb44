"""One LoRA-FA linear layer.

api.py checks and calls, node.py is the autograd node, ops.py the operators; reference.py is the formula,
library.py its best arrangement of library products, fused.py its composition of the kernels.
"""
