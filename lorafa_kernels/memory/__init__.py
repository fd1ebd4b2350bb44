"""The memory of a training step, planned: plan.py is the entry from Python, command.py the command `memory`."""
