"""The memory of a training step, planned: plan.py is the entry from Python, command.py the command `memory`.

trace         follows storages through a step                layers      few layers of each kind stand for all
step          one step of a model with a method              methods     the ways to fine-tune, and optimizers
models        which model, its inputs; named: sizes          corrections, cpu    what kernels do unseen
plan          every method; solve: what fits                 report, plot        a plan as text, as a picture
"""
