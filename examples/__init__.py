"""Programs that use lorafa_kernels for a whole job, on real models and real data."""


class DemoError(Exception):
    """An example cannot go on; the message says what the reader can do about it."""
