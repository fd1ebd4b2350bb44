"""`python -m lorafa_kernels` imports nothing from the folder that it is called in.

Python puts that folder first in sys.path, where a torch.py or numpy.py of the user's would be taken for the
package. It has found this package by now, in a checkout perhaps there, and needs the folder no more. The
script `lorafa-kernels` and every other program are left as they are.
"""

import itertools
import os
import sys


def _called_by_name() -> bool:
    # While Python looks for the module of -m, argv[0] is "-m".
    if sys.argv[:1] != ["-m"]:
        return False
    package = __name__.partition(".")[0]
    given = sys.orig_argv
    return f"-m{package}" in given or ("-m", package) in itertools.pairwise(given)


# With -P, or PYTHONSAFEPATH, a folder that is first was put there by the user.
if _called_by_name() and not getattr(sys.flags, "safe_path", False) and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]
