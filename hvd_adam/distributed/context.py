"""`init` starts Horovod and returns the `Cluster` of this process: its rank, world size, device and launcher.

    cluster = init()
    model.to(cluster.device)

PyTorch and Horovod are imported inside the functions that need them: the command line imports this module to parse
arguments, and must not load either.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cache
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import cast

from hvd_adam.distributed import rendezvous
from hvd_adam.distributed.cluster import Cluster as Cluster
from hvd_adam.distributed.collectives.waiting import sleep_while_waiting
from hvd_adam.distributed.launch_env import (
    BUILD_COMMAND,
    describe_unused_tasks,
    detect_launcher,
    elastic_disabled,
    forget_tune_file,
    gloo_store_address,
    is_elastic,
    is_on_one_host,
    refuse_srun_without_pmix,
    size_mismatch,
)
from hvd_adam.distributed.placement import (
    RankPlacement,
    assign_gpus,
    batch_policy,
    computes_on_cpus,
    describe_oversubscription,
    keep_freed_memory,
    share_cores,
    use_device,
)
from hvd_adam.errors import UserError

PROCESS_SETS = "HOROVOD_DYNAMIC_PROCESS_SETS"  # Horovod's variable
MESSAGE_BYTES = 4 * 2**20  # between two ranks of a collective of gradients, at most

# Defaults for Horovod and Open MPI, which read them once, in hvd.init. Variables set by the user take precedence.
HOROVOD_DEFAULTS = {
    # Ends the job ten minutes after a rank stops taking part in collectives; stock Horovod waits forever. Works
    # under MPI only: with Gloo, Horovod 0.28.1 looks for missing ranks in an empty list (gloo_controller.cc), and
    # `recovery.collective_timeout` does it.
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "600",
    # Gradients are reduced in fixed buckets (reducer.py). Fusing these further would depend on timing, and so
    # would the order of additions on three ranks and more.
    "HOROVOD_DISABLE_GROUP_FUSION": "1",
    # Names whose negotiation Horovod remembers: one for each bucket, and for each piece of a sharded parameter.
    # With the default of 1024, 10,000 buckets take twice as long.
    "HOROVOD_CACHE_CAPACITY": "65536",
    # Horovod's thread polls while it waits in MPI. Without this option it competes with the rank's own computation
    # for a core: a step of the cnn on two ranks and two cores takes 103 to 120 ms instead of 68 to 73.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Open MPI 4.1 reduces large messages in halves that do not fit into the cache: 40 MB on two ranks take 17 ms,
    # and 5.5 ms in a ring with segments of 1 MiB. Open MPI's own choice remains for messages below 1 MiB.
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_dynamic_rules_filename": str(Path(__file__).with_name("openmpi_allreduce.rules")),
    # Over TCP, Open MPI asks the receiver before it sends more than 64 KiB. The answer waits behind the data that
    # the receiver itself is sending, so the two directions take turns: over 1 Gbit/s a step of the MLP takes
    # 704 ms, and 405 ms without these questions.
    "OMPI_MCA_btl_tcp_eager_limit": str(MESSAGE_BYTES + 4096),
}
# Milliseconds between two looks for new tensors. Under MPI, on an EPYC, 4 KB take 1.1 ms with Horovod's default
# of 1, 0.55 with 0.3, and 0.26 with 0.2 and 0.1; an idle rank needs 0.07 and 0.11 of a core with these. On a
# Xeon they take 0.62 ms with 0.2 and 0.47 with 0.1, a step of the MLP 0.96 of the time, and an idle rank half a
# core with both. Each look under Gloo wakes several threads, but with 2 within a host 4 KB take 2.0 ms instead
# of 0.7, and a sharded step of the cnn 42 ms instead of 38. Between hosts each look sends messages, and is no
# faster with less.
CYCLE_TIME = "HOROVOD_CYCLE_TIME"
_CYCLE_TIME = {"mpi": "0.1", "gloo": "2", "gloo on one host": "0.5"}
_MAX_CYCLE_TIME_MS = 1000  # a collective, and the end of the job, wait for the next look


_cluster: Cluster | None = None  # the result of the last `init` or `restart`
_start_options: Mapping[str, object] = {}  # of the call of `init` that started Horovod
_prefix_numbers = itertools.count()  # restarted by `restart`: new ranks count from 0


def current_cluster() -> Cluster:
    """Returns the `Cluster` of this process, which `init` or `restart` created.

    Where the program has called `hvd.init()` instead of `init`, this is `init()`, which every rank must call.

    Raises:
        UserError: Horovod has not been started.
    """
    if not horovod().is_initialized():
        raise UserError("call hvd_adam.init() first")
    return init()


def running_cluster() -> Cluster | None:
    """Returns the `Cluster` of this process; None for one process without launcher in which nothing was started.

    Does not load Horovod.

    Raises:
        UserError: a launcher started several ranks, but Horovod has not been started.
    """
    hvd = sys.modules.get("horovod.torch")
    if hvd is not None and hvd.is_initialized():
        return current_cluster()
    launch = detect_launcher()
    if launch.size > 1:
        raise UserError(
            f"{launch.launcher} started {launch.size} ranks, but init() has not been called: call it first, or "
            "give rank and size"
        )
    return None


def current_rank() -> int:
    """Returns this process's rank, which an elastic job may change; before `init` the launcher's.

    Does not load Horovod.
    """
    return detect_launcher().rank if _cluster is None else _cluster.rank


@cache
def horovod() -> ModuleType:
    """Imports `horovod.torch`.

    Raises:
        UserError: Horovod is not installed, was built against another version of PyTorch, or its library does not
            load.
    """
    import torch

    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        raise UserError(f"Horovod is not installed in {sys.prefix}; build it with `{BUILD_COMMAND}`")
    metadata = Path(spec.origin).with_name("metadata.json")
    built_with = json.loads(metadata.read_text()).get("pytorch") if metadata.exists() else None
    if built_with is None:
        raise UserError(f"the Horovod in {sys.prefix} has no PyTorch support; build it with `{BUILD_COMMAND}`")
    if built_with != torch.__version__:
        raise UserError(
            f"Horovod was built against torch {built_with}, but torch {torch.__version__} is installed; "
            f"build it again with `{BUILD_COMMAND}`"
        )
    try:
        import horovod.torch as hvd

        hvd.init  # noqa: B018  absent if Horovod only warned that its library is missing
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Horovod's library does not load ({reason}): torch, MPI or CUDA has changed since it was built; "
            f"build it again with `{BUILD_COMMAND}`"
        ) from error
    return cast("ModuleType", hvd)


def horovod_defaults() -> dict[str, str]:
    """Returns what `init` sets for Horovod and Open MPI, unless the user has, by name of the variable."""
    gloo = "gloo on one host" if is_on_one_host() else "gloo"
    controller = "mpi" if gloo_store_address() is None else gloo
    return {**HOROVOD_DEFAULTS, CYCLE_TIME: _CYCLE_TIME[controller]}


def init(device: str = "auto", *, process_sets: bool = False, cycle_time_ms: float | None = None) -> Cluster:
    """Starts Horovod as `hvd_adam.init` does, without its limit for collectives; see there."""
    if cycle_time_ms is not None:
        _check_cycle_time(cycle_time_ms)
    global _start_options
    options = {"process_sets": process_sets or None, "cycle_time_ms": cycle_time_ms}
    if _cluster is not None and horovod().is_initialized():
        for name, value in options.items():
            if value is not None and value != _start_options.get(name):
                message = (
                    f"init({name}={value!r}) has no effect: Horovod runs already; give it to the first init()"
                )
                warnings.warn(message, RuntimeWarning, stacklevel=3)  # of the caller of hvd_adam.init
        return _cluster
    _start_options = options
    if process_sets:
        os.environ.setdefault(PROCESS_SETS, "1")
    return restart(device) if _cluster is not None and is_elastic() else _start(device, cycle_time_ms)


def _check_cycle_time(cycle_time_ms: float) -> None:
    """Raises UserError unless this is a number in the range that `init` accepts."""
    is_number = isinstance(cycle_time_ms, Real) and not isinstance(cycle_time_ms, bool)
    if not is_number or not 0 < float(cycle_time_ms) <= _MAX_CYCLE_TIME_MS:
        raise UserError(
            f"cycle_time_ms is {cycle_time_ms!r}; "
            f"it must be a number above 0, at most {_MAX_CYCLE_TIME_MS}, or None"
        )


def _refuse_unreadable_numbers(names: Iterable[str]) -> None:
    """Raises UserError where one of Horovod's variables is set to no number, which Horovod would take as 0."""
    for name in names:
        value = os.environ.get(name, "0")
        try:
            readable = not name.startswith("HOROVOD_") or 0 <= float(value) < math.inf
        except ValueError:
            readable = False
        if not readable:
            raise UserError(f"{name} is {value!r} in the environment; it must be a number, 0 or above")


def _start(device: str, cycle_time_ms: float | None = None, *, restarting: bool = False) -> Cluster:
    global _cluster
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {device!r}; use auto, cpu or cuda")
    refuse_srun_without_pmix(detect_launcher())
    forget_tune_file()
    hvd = horovod()
    _refuse_finalized_mpi(hvd)
    defaults = horovod_defaults()
    if cycle_time_ms is not None:
        defaults[CYCLE_TIME] = str(float(cycle_time_ms))
    too_late = [name for name in defaults if name not in os.environ] if hvd.is_initialized() else []
    _refuse_unreadable_numbers(defaults)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if is_elastic():
        rendezvous.join(renew=restarting)
    with ExitStack() as stack:
        if restarting:  # else Horovod would request a rank itself
            stack.enter_context(elastic_disabled())
        if gloo_store_address() is not None and computes_on_cpus(device):
            # For the threads of Horovod and Gloo. While a thread sends to a rank, it holds a lock that Gloo's loop
            # needs for what arrives from there. The loop does not wait for the lock, but looks again and again, so
            # where it interrupts the sender it takes its core for nothing (`Pair::handleEvents` in
            # transport/tcp/pair.cc, `Loop::run`).
            stack.enter_context(batch_policy())
        hvd.init()
    sleep_while_waiting()
    launch = detect_launcher()
    if hvd.size() != launch.size:
        raise size_mismatch(launch, hvd.size())
    if too_late and hvd.size() > 1 and hvd.rank() == 0:
        message = (
            "hvd_adam: Horovod was started before init(), so defaults of hvd_adam for it have no effect: "
            f"{', '.join(too_late)}; call init() in place of hvd.init(), or set them in the environment"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=4)  # of the caller of hvd_adam.init

    own = RankPlacement.of_this_rank(device)
    placements: list[RankPlacement] = hvd.allgather_object(own, name="hvd_adam.places")
    gpus = assign_gpus(placements, device)
    share_cores(own, placements)
    chosen = use_device(gpus[hvd.rank()])
    if chosen.type == "cpu":
        keep_freed_memory()
    warning = describe_oversubscription(placements) or describe_unused_tasks(launch)
    if warning and not restarting and hvd.rank() == 0:
        logging.getLogger("hvd_adam").warning(warning)  # hvd_adam.log imports this module
    _cluster = Cluster(
        rank=hvd.rank(),
        size=hvd.size(),
        local_rank=hvd.local_rank(),
        local_size=hvd.local_size(),
        cross_rank=hvd.cross_rank(),
        cross_size=hvd.cross_size(),
        device=chosen,
        launcher=launch.launcher,
    )
    return _cluster


def _refuse_finalized_mpi(hvd: ModuleType) -> None:
    if hvd.is_initialized() or not hvd.mpi_enabled():  # which is false before the first start
        return
    mpi = sys.modules.get("mpi4py.MPI")  # imported before Horovod was started, it keeps MPI
    if mpi is None or mpi.Is_finalized():
        raise UserError(
            "hvd.shutdown() has ended MPI, which cannot start again in the same process: call it only at the end "
            "of the program, or start the ranks with horovodrun --gloo"
        )


def restart(device: str = "auto") -> Cluster:
    """Shuts Horovod down and starts it again with the present ranks of an elastic job.

    Every remaining rank calls it, while new ranks call `init`. Works under an elastic launcher only: other
    launchers do not assign new ranks and addresses.

    Args:
        device: as in `init`.

    Returns:
        The new `Cluster`; rank and size may differ from before.

    Raises:
        RankError: the launcher has removed this host, or does not answer.
        HorovodInternalError: another rank was lost in the meantime.
        UserError: as `init`.
    """
    global _cluster, _prefix_numbers
    horovod().shutdown()
    _cluster, _prefix_numbers = None, itertools.count()
    return _start(device, restarting=True)


def collective_prefix() -> str:
    """Returns a new prefix for names of collectives, identical on all ranks if all call it in the same order."""
    return f"hvd_adam.{next(_prefix_numbers)}"
