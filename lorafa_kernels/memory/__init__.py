"""What a training step keeps for backward: planner.py is the command `memory`."""
