"""Rank, world size, device and launcher of this process: `init` starts Horovod and returns a `Cluster`.

    cluster = init()
    model.to(cluster.device)

PyTorch and Horovod are imported inside the functions that need them, so that importing this module, as the
command line does, loads neither.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hvd_adam.distributed import rendezvous
from hvd_adam.distributed.launch_env import (
    BUILD_COMMAND,
    detect_launcher,
    elastic_disabled,
    is_elastic,
    refuse_srun_without_pmix,
    size_mismatch,
)
from hvd_adam.distributed.placement import RankPlacement, assign_gpus, share_cores, use_device
from hvd_adam.errors import UserError

if TYPE_CHECKING:
    import torch

# Set for Horovod and Open MPI where the user has not: they read them once, in hvd.init.
HOROVOD_DEFAULTS = {
    # A rank that never arrives ends the job after ten minutes; stock Horovod waits for ever. Works under MPI;
    # with Gloo Horovod 0.28.1 looks for missing ranks in an empty list (gloo_controller.cc) and finds none.
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "600",
    # Gradients are reduced in fixed groups (distributed.py). Fusing groups further would depend on timing,
    # and with it the order of additions from three ranks on.
    "HOROVOD_DISABLE_GROUP_FUSION": "1",
    # Horovod's thread waits in MPI by polling: without this it takes the core from the rank's own computation,
    # and a step of the cnn on two ranks of two cores takes 103 to 120 ms instead of 68 to 73.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Open MPI 4.1 sums large messages by halves that fall out of the cache: 40 MB on two ranks in 17 ms, against
    # 5.5 ms in a ring with segments of 1 MiB. Messages below 1 MiB are left to Open MPI.
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_dynamic_rules_filename": str(Path(__file__).with_name("openmpi_allreduce.rules")),
}


@dataclass(frozen=True)
class Cluster:
    """This process among all processes of the job.

    Attributes:
        rank: 0 ≤ rank < size, over all hosts.
        size: the world size.
        local_rank: 0 ≤ local_rank < local_size, on this host.
        local_size: processes on this host.
        cross_rank: index of this host among the hosts that have this local_rank.
        cross_size: number of hosts that have this local_rank.
        device: where this rank computes; no other rank of the job computes on the same GPU.
        launcher: as in `LaunchInfo`.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    device: torch.device
    launcher: str


_cluster: Cluster | None = None  # what `init` returned
_numbers = itertools.count()  # of names of collectives, since `init`


def current_rank() -> int:
    """This process's rank: Horovod's, for ranks may have been renumbered; before it has started the launcher's."""
    return detect_launcher().rank if _cluster is None else _cluster.rank


@cache
def horovod() -> ModuleType:
    """Imports `horovod.torch`.

    Raises:
        UserError: Horovod is not installed, was built against another PyTorch, or its library does not load.
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

        hvd.init  # noqa: B018  absent where Horovod only warned that its library is missing
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Horovod's library does not load ({reason}): torch, MPI or CUDA has changed since it was built; "
            f"build it again with `{BUILD_COMMAND}`"
        ) from error
    return hvd


def init(device: str = "auto") -> Cluster:
    """Starts Horovod, gives this rank its device and its share of the host's cores.

    Every rank calls it once, together; later calls return the same `Cluster` without a collective.

    Args:
        device: "auto" (a GPU if the host has one, else the CPU), "cpu" or "cuda".

    Raises:
        UserError: Horovod cannot be loaded; the launcher started more processes than Horovod sees; there are
            more ranks on a host than GPUs, or two ranks share one. Raised on every rank.
    """
    return _start(device, anew=False) if _cluster is None else _cluster


def _start(device: str, *, anew: bool) -> Cluster:
    global _cluster
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {device!r}; use auto, cpu or cuda")
    refuse_srun_without_pmix(detect_launcher())
    hvd = horovod()
    for name, value in HOROVOD_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if is_elastic():
        rendezvous.join(anew=anew)
    with elastic_disabled() if anew else nullcontext():  # else Horovod would ask for a place itself
        hvd.init()
    launch = detect_launcher()
    if hvd.size() != launch.size:
        raise size_mismatch(launch, hvd.size())

    here = RankPlacement.of_this_rank(device)
    places: list[RankPlacement] = hvd.allgather_object(here, name="hvd_adam.places")
    gpus = assign_gpus(places, device)
    share_cores(here, places)
    _cluster = Cluster(
        rank=hvd.rank(),
        size=hvd.size(),
        local_rank=hvd.local_rank(),
        local_size=hvd.local_size(),
        cross_rank=hvd.cross_rank(),
        cross_size=hvd.cross_size(),
        device=use_device(gpus[hvd.rank()]),
        launcher=launch.launcher,
    )
    return _cluster


def restart(device: str = "auto") -> Cluster:
    """Starts Horovod anew among the ranks that are there now; every rank that is left calls it, new ones `init`.

    Under an elastic launcher only: another keeps the addresses of before, at which nobody listens any more.

    Raises:
        RankError: this rank has no place among them, or the launcher is gone.
        HorovodInternalError: another rank was lost meanwhile.
        UserError: as `init`.
    """
    global _cluster, _numbers
    horovod().shutdown()
    _cluster, _numbers = None, itertools.count()
    return _start(device, anew=True)


def collective_prefix() -> str:
    """A prefix for names of collectives that nobody else uses; alike on all ranks if all ask in the same order."""
    return f"hvd_adam.{next(_numbers)}"
