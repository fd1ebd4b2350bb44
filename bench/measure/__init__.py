"""What is measured, who takes part, what is right, and the clocks.

A function that measures returns the payload of a record, with a row for each contender. One that raises, or
whose results are outside the error budget, has status "failed" and no number; one that cannot run here "not
run" and the reason. Its other arguments: tick is called with the fraction that is done; sitting is its
number, so that the turns are others in each. A GPU that no longer answers raises layers.DeviceLost.
"""
