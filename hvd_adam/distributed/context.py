"""Who am I: launcher, rank, sizes and device of this process. No other module reads launcher variables, but for
`rendezvous`, which writes them where ranks come and go.

    cluster = init()
    model.to(cluster.device)

PyTorch and Horovod are imported inside the functions that need them, so that the command line can ask
`launched()` for its rank, and answer `--help` or a bad value, before either is loaded.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hvd_adam.distributed import rendezvous
from hvd_adam.errors import AgreedError, UserError

if TYPE_CHECKING:
    import torch

BUILD_COMMAND = "bash launch/setup.sh"

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
class Launched:
    """What the launcher says of this process, before Horovod has started.

    Attributes:
        launcher: "horovodrun", "mpirun", "srun", "mpiexec", "torchrun" or "none".
        rank: 0 ≤ rank < size.
        size: number of processes the launcher started, ≥ 1.
    """

    launcher: str
    rank: int
    size: int


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
        launcher: as in `Launched`.
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

# In order of precedence: what runs inside an allocation or under a wrapper carries the outer variables too.
_LAUNCHERS = (
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE"),
    ("torchrun", "RANK", "WORLD_SIZE"),
)

_REMEDY = {
    "horovodrun": f"Horovod may be built without its controller; rebuild it with `{BUILD_COMMAND}`",
    "mpirun": "the mpirun on PATH is not the one Horovod was built with, or Horovod was built without MPI; "
    f"rebuild it with `{BUILD_COMMAND}`",
    "srun": "start the ranks with `srun --mpi=pmix` (`srun --mpi=list` shows what this Slurm has) "
    "or with mpirun inside the allocation",
    "mpiexec": "this mpiexec is of another MPI than Horovod's; use the mpirun that Horovod was built with",
    "torchrun": "torchrun does not start Horovod; use `horovodrun -np N python -m hvd_adam.train` instead",
    "none": "start the job with horovodrun, mpirun or srun",
}


def launched(environ: Mapping[str, str] = os.environ) -> Launched:
    """Reads from the environment which launcher started this process, as which rank of how many."""
    for launcher, rank, size in _LAUNCHERS:
        if rank in environ and size in environ:
            return Launched(launcher, int(environ[rank]), int(environ[size]))
    return Launched("none", 0, 1)


def is_elastic() -> bool:
    """Whether the launcher lets ranks come and go (horovodrun with --min-np or --host-discovery-script)."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


@contextmanager
def not_elastic() -> Iterator[None]:
    """Hides from Horovod, for the block, that the launcher is elastic."""
    value = os.environ.pop("HOROVOD_ELASTIC", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["HOROVOD_ELASTIC"] = value


def own_rank() -> int:
    """This process's rank: Horovod's, for ranks may have been renumbered; before it has started the launcher's."""
    return launched().rank if _cluster is None else _cluster.rank


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
    _refuse_srun_without_pmix(launched())
    hvd = horovod()
    for name, value in HOROVOD_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if is_elastic():
        rendezvous.join(anew=anew)
    with not_elastic() if anew else nullcontext():  # else Horovod would ask for a place itself
        hvd.init()
    launch = launched()
    if hvd.size() != launch.size:
        raise _size_mismatch(launch, hvd.size())

    here = Place.of_this_rank(device)
    places: list[Place] = hvd.allgather_object(here, name="hvd_adam.places")
    gpus = assign_gpus(places, device)
    _share_cores(here, places)
    _cluster = Cluster(
        rank=hvd.rank(),
        size=hvd.size(),
        local_rank=hvd.local_rank(),
        local_size=hvd.local_size(),
        cross_rank=hvd.cross_rank(),
        cross_size=hvd.cross_size(),
        device=_use(gpus[hvd.rank()]),
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


@contextmanager
def together(cluster: Cluster) -> Iterator[None]:
    """Ends the block on every rank if it failed on one: all raise the first failing rank's `UserError`.

    For work that each rank does by itself and that can fail on one alone (a missing file on one host). The
    block must hold no collective, and every rank must reach its end.

    Raises:
        AgreedError: on every rank, naming the rank and host if it was not rank 0.
    """
    failure = None
    try:
        yield
    except UserError as error:
        failure = f"rank {cluster.rank} on {socket.gethostname()}: {error}" if cluster.rank else str(error)
    failures = horovod().allgather_object(failure, name="hvd_adam.together") if cluster.size > 1 else [failure]
    for first in filter(None, failures):
        raise AgreedError(first)


def require_same(cluster: Cluster, what: str, values: Mapping[str, object]) -> None:
    """Raises AgreedError on every rank, naming the first of `values` that differs from rank 0's.

    Args:
        cluster: this process.
        what: what the values are, for the message ("arguments").
        values: by name; compared by equality, so of plain types.
    """
    with together(cluster):
        own = dict(values), socket.gethostname()
        everyones = horovod().allgather_object(own, name="hvd_adam.same") if cluster.size > 1 else [own]
        first = everyones[0][0]
        for rank, (theirs, host) in enumerate(everyones):
            for name in sorted({*theirs, *first}):
                if theirs.get(name) != first.get(name):
                    raise UserError(
                        f"the ranks have different {what}: {name} is {first.get(name)!r} on rank 0 and "
                        f"{theirs.get(name)!r} on rank {rank} on {host}; start all ranks alike"
                    )


def _refuse_srun_without_pmix(launch: Launched) -> None:
    # Open MPI's own MPI_Init would abort the process with half a page that hides the cause.
    if launch.launcher == "srun" and launch.size > 1 and not ({"PMIX_RANK", "PMI_RANK"} & set(os.environ)):
        raise _size_mismatch(launch, 1)


def _size_mismatch(launch: Launched, seen: int) -> UserError:
    return UserError(
        f"{launch.launcher} says it started {launch.size} process{'es' * (launch.size > 1)}, but Horovod "
        f"sees {seen}: {_REMEDY[launch.launcher]}"
    )


@dataclass(frozen=True)
class Place:
    """Where a rank runs, for the others on its host to compare with.

    Attributes:
        host: its name.
        cores: those that this rank may run on.
        gpus: those that it sees, in its order; equal on ranks of a host that mean the same one.
    """

    host: str
    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    @classmethod
    def of_this_rank(cls, device: str) -> Place:
        """This process's; with device "cpu" it sees no GPU."""
        return cls(socket.gethostname(), cores(), visible_gpus() if device != "cpu" else ())


def cores() -> tuple[int, ...]:
    """The cores that this process may run on, ascending; where the system does not tell, all of the host."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def visible_gpus() -> tuple[str, ...]:
    """An identity for each GPU that this process sees."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(str(getattr(item, "uuid", f"{index} of {visible}")) for index, item in enumerate(properties))


def assign_gpus(places: Sequence[Place], device: str) -> list[int | None]:
    """Which of the GPUs that it sees each rank takes: one of its own, whatever the launcher has bound ranks to.

    Args:
        places: of all ranks, in order.
        device: as in `init`.

    Returns:
        For each rank an index into its `gpus`; None for all where no rank sees any.

    Raises:
        AgreedError: there are not enough, or a rank sees none though it should.
    """
    if device != "cuda" and not any(place.gpus for place in places):
        return [None] * len(places)
    owners: dict[tuple[str, str], int] = {}

    def take(rank: int, asked: set[tuple[str, str]]) -> bool:
        own = [(places[rank].host, gpu) for gpu in places[rank].gpus]
        for gpu in [*(gpu for gpu in own if gpu not in owners), *own]:  # only then one whose owner sees another
            if gpu not in asked:
                asked.add(gpu)
                if gpu not in owners or take(owners[gpu], asked):
                    owners[gpu] = rank
                    return True
        return False

    for rank, place in enumerate(places):
        if not place.gpus:
            raise AgreedError(
                f"rank {rank} on {place.host} sees no GPU; check its driver and CUDA_VISIBLE_DEVICES, "
                "or train on --device cpu"
            )
        if not take(rank, set()):
            there = [other for other in places if other.host == place.host]
            gpus = len({gpu for other in there for gpu in other.gpus})
            raise AgreedError(
                f"{len(there)} ranks on {place.host} for {gpus} GPU{'s' * (gpus > 1)}; start one rank a GPU "
                "(-np, -H host:slots, --ntasks-per-node), or train on --device cpu"
            )
    taken = {rank: gpu for (_, gpu), rank in owners.items()}
    return [place.gpus.index(taken[rank]) for rank, place in enumerate(places)]


def _share_cores(here: Place, places: Sequence[Place]) -> None:
    """Divides the cores among the ranks that may run on them; PyTorch alone gives every rank all."""
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    sharers = sum(other.host == here.host and other.cores == here.cores for other in places)
    torch.set_num_threads(max(1, len(here.cores) // sharers))


def _use(gpu: int | None) -> torch.device:
    import torch

    if gpu is None:
        return torch.device("cpu")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def gloo_store() -> str | None:
    """Where Gloo's ranks meet, as HOST:PORT of horovodrun's key-value store; None where MPI starts them."""
    names = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
    return ":".join(os.environ[name] for name in names) if all(name in os.environ for name in names) else None
