"""Fused blocks in a model that somebody else wrote: what is recognised, and how it is put in and taken out.

shield.py, symbolic.py and recognise.py find MLPs and norms, projections.py layers that share an input;
fused.py and members.py make them compute as blocks, guards.py says when not; place.py goes through a
model. bypass.py and first_steps.py tell of layers that are not called.
"""
