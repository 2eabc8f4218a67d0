"""Adam from scratch, data-parallel through Horovod: `from hvd_adam import Adam, distribute, init`.

The public names are imported on first use, so that `python -m hvd_adam.train --help` is answered before PyTorch is
loaded, and `Adam` works in a single process without Horovod.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hvd_adam._version import __version__ as __version__

if TYPE_CHECKING:
    from hvd_adam.checkpoint.manager import CheckpointManager
    from hvd_adam.distributed.api import distribute
    from hvd_adam.distributed.cluster import Cluster
    from hvd_adam.inference.load import load_model
    from hvd_adam.optim.adam import Adam
    from hvd_adam.recovery.collective_timeout import init
    from hvd_adam.recovery.guard import guard
    from hvd_adam.recovery.preemption import Preemption
    from hvd_adam.recovery.watchdog import Watchdog

__all__ = [
    "Adam",
    "CheckpointManager",
    "Cluster",
    "Preemption",
    "Watchdog",
    "distribute",
    "guard",
    "init",
    "load_model",
]

_MODULES = {
    "Adam": "optim.adam",
    "CheckpointManager": "checkpoint.manager",
    "Cluster": "distributed.cluster",
    "Preemption": "recovery.preemption",
    "Watchdog": "recovery.watchdog",
    "distribute": "distributed.api",
    "guard": "recovery.guard",
    "init": "recovery.collective_timeout",
    "load_model": "inference.load",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
