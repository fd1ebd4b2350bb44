"""A first call on a machine with a GPU that is there for minutes: python3 -m bench.gpu (make gpu).

    __main__   the command
    driver     the stages in their order, each a process of its own with a time limit
    stages     what each of them does, in its process
    recorder   a plugin of pytest: what each test came to, as it happens
    cache      Triton's cache in parts that can be carried from call to call

Nothing here needs to be installed; the command itself imports no PyTorch, so that a broken one is a verdict.
"""
