"""Other libraries' models on these kernels, and their checkpoints of adapted models. Each module imports its
library where it is used.
"""
