"""Which of its two exchanges the sharded strategy uses."""

from contextlib import contextmanager

from hvd_adam.distributed.zero import ShardedAdam


@contextmanager
def scattering():
    """Exchanges by reduce-scatter and all-gather, as on GPUs."""
    chosen = ShardedAdam.scatters
    ShardedAdam.scatters = True
    try:
        yield
    finally:
        ShardedAdam.scatters = chosen
