"""Which launcher started this process, as which rank of how many: read from the environment, without Horovod.

No other module reads the variables of launchers, except `rendezvous`, which sets them when ranks are renumbered.
Imports neither PyTorch nor Horovod, so that the command line knows its rank before either is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from hvd_adam.errors import UserError

BUILD_COMMAND = "python -m hvd_adam.build_horovod --install"
SETUP_COMMAND = "bash launch/setup.sh"  # the whole project, on a host that does not have it

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


@dataclass(frozen=True)
class LaunchInfo:
    """What the launcher says of this process, before Horovod has started.

    Attributes:
        launcher: "horovodrun", "mpirun", "srun", "mpiexec", "torchrun" or "none".
        rank: 0 ≤ rank < size.
        size: number of processes the launcher started, ≥ 1.
    """

    launcher: str
    rank: int
    size: int


def detect_launcher(environ: Mapping[str, str] = os.environ) -> LaunchInfo:
    """Reads from the environment which launcher started this process, as which rank of how many."""
    for launcher, rank, size in _LAUNCHERS:
        if rank in environ and size in environ:
            return LaunchInfo(launcher, int(environ[rank]), int(environ[size]))
    return LaunchInfo("none", 0, 1)


def is_elastic() -> bool:
    """Whether the launcher lets ranks come and go (horovodrun with --min-np or --host-discovery-script)."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


@contextmanager
def elastic_disabled() -> Iterator[None]:
    """Hides from Horovod, for the block, that the launcher is elastic."""
    value = os.environ.pop("HOROVOD_ELASTIC", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["HOROVOD_ELASTIC"] = value


def refuse_srun_without_pmix(launch: LaunchInfo) -> None:
    """Raises UserError if srun started several ranks without PMIx or PMI, which MPI needs to connect them."""
    # Open MPI's own MPI_Init would abort the process with half a page that hides the cause.
    if launch.launcher == "srun" and launch.size > 1 and not ({"PMIX_RANK", "PMI_RANK"} & set(os.environ)):
        raise size_mismatch(launch, 1)


def size_mismatch(launch: LaunchInfo, seen: int) -> UserError:
    """The error for a launcher that started more processes than Horovod sees, with the remedy."""
    return UserError(
        f"{launch.launcher} says it started {launch.size} process{'es' * (launch.size > 1)}, but Horovod "
        f"sees {seen}: {_REMEDY[launch.launcher]}"
    )


def gloo_store_address() -> str | None:
    """Where Gloo's ranks meet, as HOST:PORT of horovodrun's key-value store; None where MPI starts them."""
    names = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
    return ":".join(os.environ[name] for name in names) if all(name in os.environ for name in names) else None
