"""Errors of collectives that other ranks do not take part in, in terms of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hvd_adam.distributed.collectives.waiting import working_meanwhile
from hvd_adam.distributed.gradients.compression import AllReduce, Reduction

# Ranks that are in calls of different kinds must not meet. Those of one kind have the same collectives.
_KINDS = (
    *("broadcast()", "state_dict", "change of parameters", "step()"),
    *("use_compression()", "clip_grad_norm_()", "synchronize()"),
)


def start_meeting(name: str, device: torch.device, call: str) -> Callable[[], None]:
    """Makes ranks that wait for another reduction of this name fail, and this one too.

    It reduces a few elements, as many for each kind of call: Horovod refuses tensors of different shapes.

    Args:
        name: of a reduction that the others may wait for, of more elements.
        device: of the gradients.
        call: what this rank does, and every rank must, for the error.

    Returns:
        Waits until all ranks have called this.
    """
    elements = next((n for n, kind in enumerate(_KINDS, start=1) if kind in call), len(_KINDS) + 1)
    meeting = AllReduce(torch.zeros(elements, dtype=torch.float32, device=device), name, "none")

    def wait() -> None:
        with explained(call):
            meeting.wait()

    return wait


def arrivals(reduction: Reduction, elements: int, meanwhile: Callable[[], bool]) -> Iterator[int]:
    """Waits for a reduction of gradients, in place of its `wait`; part after part where that is possible.

    Args:
        reduction: a started one.
        elements: of its bucket.
        meanwhile: as in `working_meanwhile`.

    Yields:
        How many of the elements, from the first on, have their sums.
    """
    parts = reduction.arrive() if isinstance(reduction, AllReduce) and reduction.in_place else None
    arrived = 0
    while arrived < elements:
        with explained(), working_meanwhile(meanwhile):
            if parts is None:
                reduction.wait()
            arrived = elements if parts is None else next(parts)
        yield arrived


@contextmanager
def explained(call: str | None = None) -> Iterator[None]:
    """Replaces Horovod's message about ranks that do not take part in a collective by what it means here.

    Args:
        call: what this rank does while others may wait for gradients; None if it waits for gradients itself.
    """
    from horovod.common.exceptions import HorovodInternalError

    try:
        yield
    except HorovodInternalError as error:
        if call is not None:
            raise HorovodInternalError(
                f"this rank is in {call}, which every rank must call in the same place, while another waits for "
                "gradients, is in another call, or has ended or failed. If that rank has shown another error, "
                f"that is the cause. (Horovod: {error})"
            ) from error
        raise HorovodInternalError(
            "some ranks wait for gradients, while another has ended, failed, called something else that every "
            "rank must call (broadcast, add_param_group, state_dict if sharded) or hvd.join(), or trains other "
            "parameters (freeze and unfreeze on every rank). If that rank has shown an error, that is the cause. "
            "If ranks have different numbers of batches, use `with optimizer.join():` around the loop. "
            f"(Horovod: {error})"
        ) from error
