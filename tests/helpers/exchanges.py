"""Selects one of the two exchanges of the sharded strategy."""

from contextlib import contextmanager

from hvd_adam.distributed.strategies.zero import ZeroStrategy


@contextmanager
def scattering():
    """Makes the sharded strategy use reduce-scatter and all-gather, as it does on GPUs."""
    chosen = ZeroStrategy.scatters
    ZeroStrategy.scatters = True
    try:
        yield
    finally:
        ZeroStrategy.scatters = chosen
