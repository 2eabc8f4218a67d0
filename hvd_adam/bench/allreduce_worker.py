"""A rank of `bench allreduce`: in-place sums over the ranks, and the copies that they are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hvd_adam.bench.interleave import Measure, Times
from hvd_adam.bench.timer import WARM_UP_CALLS, synchronizer, time_calls
from hvd_adam.distributed.launch_env import LaunchInfo

# 4 MB per linear layer, about as in wide models.
LAYER_ELEMENTS = 1 << 20


def prepare(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Measure:
    """Sets this rank up for the task's variant, and returns a function that times one turn.

    Args:
        task: "variant", "elements" (number of float32 in each message), "calls" per turn and "device".
        launch: launcher, rank and size of this process.
        folder: directory shared by the ranks.
    """
    if task["variant"] == "hvd_adam step":
        return _optimizer_step(task)
    connect = {"copy": _copy, "hvd_adam": _horovod, "horovod": _horovod, "torch": _torch}.get(
        task["variant"], _mpi
    )
    make_call = connect(task, launch, folder)
    synchronize = synchronizer(task["device"])
    calls = {str(size): make_call(size) for size in task["elements"]}
    return lambda: {size: time_calls(call, task["calls"], synchronize) for size, call in calls.items()}


Factory = Callable[[int], Callable[[], object]]  # from the number of float32 to a call that sums them


def _zeros(size: int, device: str) -> Any:
    """Returns zeros, which stay finite after any number of sums, in memory that has been written to."""
    import torch  # here: a rank that measures bare MPI must not load it

    return torch.empty(size, device=device).zero_()


def _copy(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Factory:
    def make_call(size: int) -> Callable[[], object]:
        source, target = _zeros(size, task["device"]), _zeros(size, task["device"])
        return lambda: target.copy_(source)

    if task["device"] == "cuda":
        import torch  # here: as above

        torch.cuda.set_device(launch.rank)
    return make_call


def _horovod(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Factory:
    """Horovod with its defaults; "hvd_adam": the buckets of a step, with the settings of `hvd_adam.init`."""
    import torch  # here: a rank that measures bare MPI must not load it

    from hvd_adam.distributed.collectives.pieces import start_allreduce
    from hvd_adam.distributed.context import horovod, init
    from hvd_adam.distributed.gradients.bucket_layout import BUCKET_MIB
    from hvd_adam.optim.memory import zeros

    hvd = horovod()
    if task["variant"] == "hvd_adam":
        init(task["device"])
    else:
        hvd.init()
        if task["device"] == "cuda":
            torch.cuda.set_device(launch.rank)

    def make_call(size: int) -> Callable[[], object]:
        name = f"bench.{size}"
        if task["variant"] == "horovod":
            tensor = _zeros(size, task["device"])
            return lambda: hvd.allreduce_(tensor, op=hvd.Sum, name=name)
        buffer = zeros(size, torch.float32, torch.device(task["device"]))  # as the gradients
        buckets = torch.split(buffer, BUCKET_MIB * 2**20 // buffer.element_size())

        def reduce() -> None:
            reductions = [start_allreduce(bucket, f"{name}.{i}") for i, bucket in enumerate(buckets)]
            for wait in reductions:
                wait()

        return reduce

    return make_call


def _torch(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Factory:
    import torch  # here: as above

    from hvd_adam.bench.step_worker import start_process_group

    if task["device"] == "cuda":
        torch.cuda.set_device(launch.rank)
    start_process_group(task["device"], launch, folder)

    def make_call(size: int) -> Callable[[], object]:
        tensor = _zeros(size, task["device"])
        return lambda: torch.distributed.all_reduce(tensor)

    return make_call


def _mpi(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Factory:
    """MPI without Horovod."""
    import numpy
    from mpi4py import MPI  # here: the import initializes MPI

    def make_call(size: int) -> Callable[[], object]:
        array = numpy.empty(size, dtype=numpy.float32)
        array.fill(0)
        return lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array)

    return make_call


def _optimizer_step(task: dict[str, Any]) -> Measure:
    """Reduces the gradients of one step as `distribute` does, after a backward pass with almost no computation.

    Returns a function that reports two times per size: of `synchronize` alone, and from the start of the backward
    pass, in which the first reductions start, to the end of `synchronize`.
    """
    from hvd_adam.distributed.context import init  # here: as above

    init(task["device"])
    synchronize = synchronizer(task["device"])
    models = {size: _build(size, task["device"]) for size in task["elements"]}

    def measure() -> Times:
        times: Times = {}
        for size, (parameters, optimizer) in models.items():
            times[str(size)], times[f"{size} backward"] = [], []
            for number in range(WARM_UP_CALLS + task["calls"]):
                exposed, total = _time_reduction(parameters, optimizer, synchronize)
                if number >= WARM_UP_CALLS:
                    times[str(size)].append(exposed)
                    times[f"{size} backward"].append(total)
        return times

    return measure


def _build(size: int, device: str) -> tuple[list[Any], Any]:
    """Returns the parameters of a model with `size` elements, and its distributed optimizer."""
    import torch  # here: as above

    from hvd_adam.distributed.api import distribute
    from hvd_adam.optim.adam import Adam

    layers = -(-size // LAYER_ELEMENTS)
    shortest, longer = divmod(size, layers)
    widths = [shortest + (index < longer) for index in range(layers)]
    model = torch.nn.Sequential(*(torch.nn.Linear(width, 1, bias=False) for width in widths)).to(device)
    return list(model.parameters()), distribute(Adam(model.parameters()), model)


def _time_reduction(
    parameters: Iterable[Any], optimizer: Any, synchronize: Callable[[], None]
) -> tuple[float, float]:
    """Returns the seconds of `synchronize` alone, and of the backward pass and `synchronize` together."""
    optimizer.zero_grad()
    loss: Any = sum(parameter.sum() for parameter in parameters)
    synchronize()
    start = time.perf_counter()
    loss.backward()
    middle = time.perf_counter()
    optimizer.synchronize()
    synchronize()
    end = time.perf_counter()
    # zero_grad requires that the update has been made; the weights do not matter here.
    optimizer.step()
    return end - middle, end - start
