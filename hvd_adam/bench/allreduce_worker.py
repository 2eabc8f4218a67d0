"""A rank of `bench allreduce`: sums over the ranks, in place, and the copies they are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hvd_adam.bench.interleave import Measure, Times
from hvd_adam.bench.timer import DROPPED, finisher, seconds
from hvd_adam.distributed.launch_env import LaunchInfo

# Linear layers of 4 MB each are about what wide models have.
LAYER_ELEMENTS = 1 << 20


def prepare(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Measure:
    """Makes this rank one of the task's variant.

    Args:
        task: "variant", "elements" (float32s of each message), "calls" of a turn and "device".
        launch: what the launcher says of this rank.
        folder: shared by the ranks.
    """
    if task["variant"] == "hvd_adam step":
        return _our_step(task)
    connect = {"copy": _copy, "hvd_adam": _horovod, "horovod": _horovod, "torch": _torch}.get(
        task["variant"], _mpi
    )
    add = connect(task, launch, folder)
    finish = finisher(task["device"])
    calls = {str(size): add(size) for size in task["elements"]}
    return lambda: {size: seconds(call, task["calls"], finish) for size, call in calls.items()}


Maker = Callable[[int], Callable[[], object]]


def _zeros(size: int, device: str) -> Any:
    """Zeros, whose sums stay finite however many are made, in memory that has been written to."""
    import torch  # here: a rank that measures bare MPI needs none

    return torch.empty(size, device=device).zero_()


def _copy(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Maker:
    def add(size: int) -> Callable[[], object]:
        source, target = _zeros(size, task["device"]), _zeros(size, task["device"])
        return lambda: target.copy_(source)

    if task["device"] == "cuda":
        import torch  # here: as above

        torch.cuda.set_device(launch.rank)
    return add


def _horovod(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Maker:
    """Horovod with what `hvd_adam.init` tells it, or as it is."""
    import torch  # here: a rank that measures bare MPI needs neither

    from hvd_adam.distributed.context import horovod, init

    hvd = horovod()
    if task["variant"] == "hvd_adam":
        init(task["device"])
    else:
        hvd.init()
        if task["device"] == "cuda":
            torch.cuda.set_device(launch.rank)

    def add(size: int) -> Callable[[], object]:
        tensor = _zeros(size, task["device"])
        return lambda: hvd.allreduce_(tensor, op=hvd.Sum, name=f"bench.{size}")

    return add


def _torch(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Maker:
    import torch  # here: as above

    from hvd_adam.bench.step_worker import start_process_group

    if task["device"] == "cuda":
        torch.cuda.set_device(launch.rank)
    start_process_group(task["device"], launch, folder)

    def add(size: int) -> Callable[[], object]:
        tensor = _zeros(size, task["device"])
        return lambda: torch.distributed.all_reduce(tensor)

    return add


def _mpi(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Maker:
    """Bare MPI, in a process that knows nothing of Horovod."""
    import numpy
    from mpi4py import MPI  # here: its import starts MPI

    def add(size: int) -> Callable[[], object]:
        array = numpy.empty(size, dtype=numpy.float32)
        array.fill(0)
        return lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array)

    return add


def _our_step(task: dict[str, Any]) -> Measure:
    """The gradients of one step as `distribute` sends them, after a backward pass that computes nothing.

    Reports two times a size: of `synchronize` alone, and from the start of the backward pass, in which the
    first reductions begin, to its end.
    """
    from hvd_adam.distributed.context import init  # here: as above

    init(task["device"])
    finish = finisher(task["device"])
    calls = {size: _optimizer_of(size, task["device"]) for size in task["elements"]}

    def measure() -> Times:
        times: Times = {}
        for size, (parameters, optimizer) in calls.items():
            times[str(size)], times[f"{size} backward"] = [], []
            for number in range(DROPPED + task["calls"]):
                exposed, whole = _reduction(parameters, optimizer, finish)
                if number >= DROPPED:
                    times[str(size)].append(exposed)
                    times[f"{size} backward"].append(whole)
        return times

    return measure


def _optimizer_of(size: int, device: str) -> tuple[list[Any], Any]:
    import torch  # here: as above

    from hvd_adam.distributed.api import distribute
    from hvd_adam.optim.adam import Adam

    layers = -(-size // LAYER_ELEMENTS)
    shortest, longer = divmod(size, layers)
    widths = [shortest + (index < longer) for index in range(layers)]
    model = torch.nn.Sequential(*(torch.nn.Linear(width, 1, bias=False) for width in widths)).to(device)
    return list(model.parameters()), distribute(Adam(model.parameters()), model)


def _reduction(parameters: Iterable[Any], optimizer: Any, finish: Callable[[], None]) -> tuple[float, float]:
    """Seconds of `synchronize` alone, and of backward pass and `synchronize` together."""
    optimizer.zero_grad()
    loss = sum(parameter.sum() for parameter in parameters)
    finish()
    start = time.perf_counter()
    loss.backward()
    middle = time.perf_counter()
    optimizer.synchronize()
    finish()
    end = time.perf_counter()
    # The next zero_grad wants this update to be over; what it does to the weights does not matter here.
    optimizer.step()
    return end - middle, end - start
