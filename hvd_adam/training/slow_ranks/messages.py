"""The lines that the log has of slow ranks."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_adam.training.slow_ranks.detector import CHECKPOINT, COMPUTE, DATA, NETWORK, Slow

_REMEDIES = {
    DATA: "raise --workers, or look at its disk",
    COMPUTE: "look for other processes on its host, and for a throttled processor",
    NETWORK: "`python -m hvd_adam.doctor` measures the links between hosts",
    CHECKPOINT: "use a faster disk for the run folder, or a longer --checkpoint-every",
}
_WHAT = {
    DATA: "its batches take {} ms an update longer than those of other ranks",
    COMPUTE: "its computation takes {} ms an update longer than that of other ranks",
    NETWORK: "reductions take {} ms an update longer than before",
    CHECKPOINT: "training waits {} ms for each checkpoint",
}


def slow_line(slow: Slow, hosts: Sequence[str], device: str) -> str:
    """Returns who is slow, by how much, why, and what to do.

    Args:
        slow: what was found.
        hosts: host names by rank.
        device: type of the ranks' devices. The host of a GPU does not see the device's own times: the ranks wait
            for a slow GPU as they do for the network.
    """
    what = _WHAT[slow.cause].format(f"{1e3 * slow.seconds:.3g}")
    hint = " (or a GPU is slow, which times of the hosts cannot tell)" if _may_be_gpu(slow, device) else ""
    remedy = _REMEDIES[slow.cause]
    return f"{_who(slow, hosts)} slows training down by {100 * slow.slowdown:.0f} %: {what}{hint}; {remedy}"


def ended_line(slow: Slow, hosts: Sequence[str]) -> str:
    """Returns that something no longer holds training up."""
    return f"{_who(slow, hosts)} no longer slows training down (cause: {slow.cause})"


def _may_be_gpu(slow: Slow, device: str) -> bool:
    return slow.cause == NETWORK and device != "cpu"


def _who(slow: Slow, hosts: Sequence[str]) -> str:
    return "the network" if slow.rank is None else f"rank {slow.rank} on {hosts[slow.rank]}"
