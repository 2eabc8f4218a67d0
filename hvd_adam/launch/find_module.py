"""Check that `python -m MODULE` would find its module, before ranks start and each of them fails.

    python hvd_adam/launch/find_module.py horovodrun.sh hvd_adam.train

Only the standard library is imported, because the launch scripts run this file by its path, maybe with a Python
that has no hvd_adam.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec


def can_run(module: str) -> bool:
    """Returns whether Python finds the module, or the `__main__` of a package.

    The packages that it is in are imported, as `python -m` does. What they print is dropped here, and an error of
    theirs is left to the ranks, for which the answer is True.
    """
    parts = module.split(".")
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            for i in range(1, len(parts) + 1):
                if (spec := find_spec(".".join(parts[:i]))) is None:
                    return False
                if spec.submodule_search_locations is None:  # no package
                    return i == len(parts)
            return find_spec(f"{module}.__main__") is not None
    except (Exception, SystemExit):  # whatever a package raises
        return True


def main(script: str, module: str) -> None:
    """Exits with one line and code 2 if the module cannot be run."""
    if os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
        sys.path[0] = os.getcwd()  # as `python -m` has it
    if can_run(module):
        return
    remedy = "is its folder the current one, or on PYTHONPATH?"
    if module.partition(".")[0] == "hvd_adam" and not can_run("hvd_adam"):
        remedy = "run 'bash launch/setup.sh', or set HVD_ADAM_PYTHON to a Python that has it"
    print(f"{script}: error: {sys.executable} finds no module {module} to run: {remedy}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
