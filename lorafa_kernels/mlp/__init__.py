"""The gated MLP, down(act(gate(x)) ⊙ up(x)), as one autograd node of a group and a linear layer.

api.py checks and calls, ops.py has the autograd node and the operators of the gated activation, activation.py
their formulas; quantised.py is the same on quantised bases.
"""
