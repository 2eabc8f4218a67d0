"""Run build_horovod.sh with this Python: ``python -m hvd_adam.build_horovod --install``. See ``--help``."""

import os
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("build_horovod.sh")


def main() -> None:
    """Replaces this process by the script, so that signals and the exit code are the script's."""
    os.environ["PYTHON"] = sys.executable
    os.execvp("bash", ["bash", str(SCRIPT), *sys.argv[1:]])


if __name__ == "__main__":
    main()
