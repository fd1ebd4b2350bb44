"""The run: jobs in their order, runs that can be cut, result files and what they say of their origin."""
