"""Launcher, rank and world size of this process, read from the environment without Horovod.

No other module reads the variables of launchers, except `rendezvous`, which sets them when an elastic launcher
assigns new ranks. Imports neither PyTorch nor Horovod, so that the command line can read its rank before either is
loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from hvd_adam.errors import UserError

BUILD_COMMAND = "python -m hvd_adam.build_horovod --install"
SETUP_COMMAND = "bash launch/setup.sh"  # the whole project, on a host that does not have it

# In order of precedence: a process started inside an allocation or by a wrapper inherits the outer variables too.
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
    """Launcher, rank and world size of this process, according to the launcher.

    Attributes:
        launcher: "horovodrun", "mpirun", "srun", "mpiexec", "torchrun" or "none".
        rank: 0 ≤ rank < size.
        size: number of processes that the launcher started, at least 1.
    """

    launcher: str
    rank: int
    size: int


def detect_launcher(environ: Mapping[str, str] = os.environ) -> LaunchInfo:
    """Returns launcher, rank and world size of this process.

    Args:
        environ: the process's environment variables.

    Returns:
        ("none", 0, 1) if no known launcher started the process. An empty variable counts as unset.

    Raises:
        UserError: a rank or world size is not a whole number, or the rank is not below the world size.
    """
    for launcher, rank, size in _LAUNCHERS:
        if environ.get(rank) and environ.get(size):
            info = LaunchInfo(launcher, _whole_number(rank, environ), _whole_number(size, environ))
            if info.rank >= info.size:
                raise UserError(
                    f"{rank} is {environ[rank]!r} and {size} is {environ[size]!r} in the environment: the rank "
                    "must be below the number of ranks; unset both"
                )
            return info
    return LaunchInfo("none", 0, 1)


def _whole_number(name: str, environ: Mapping[str, str]) -> int:
    value = environ[name]
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r} in the environment: it must be a whole number; unset it")
    return int(value)


def require_no_launcher() -> None:
    """Raises UserError if a launcher started several ranks of a command that runs in one process."""
    launch = detect_launcher()
    if launch.size > 1:
        raise UserError(f"started by {launch.launcher} on {launch.size} ranks: start it without a launcher")


def is_elastic() -> bool:
    """Returns whether the launcher is elastic (horovodrun with --min-np or --host-discovery-script)."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def is_on_one_host() -> bool:
    """Returns whether horovodrun has started all ranks on this host; False if it does not tell, or is elastic."""
    size = os.environ.get("HOROVOD_SIZE")
    return bool(size) and size == os.environ.get("HOROVOD_LOCAL_SIZE") and not is_elastic()


@contextmanager
def elastic_disabled() -> Iterator[None]:
    """Makes Horovod treat the launcher as not elastic in this block."""
    value = os.environ.pop("HOROVOD_ELASTIC", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["HOROVOD_ELASTIC"] = value


def refuse_srun_without_pmix(launch: LaunchInfo) -> None:
    """Raises UserError if srun started several ranks without PMIx or PMI, which MPI needs to connect them."""
    # MPI_Init of Open MPI would abort the process with half a page of text that does not name the cause.
    if launch.launcher == "srun" and launch.size > 1 and not ({"PMIX_RANK", "PMI_RANK"} & set(os.environ)):
        raise size_mismatch(launch, 1)


def forget_tune_file() -> None:
    """Removes what Open MPI's mpirun has made of `--tune any`, which is an option of its own, too.

    mpirun looks for it in the whole command, and MPI_Init would report that there is no file of that name. Both
    leave `--tune=any` alone.
    """
    if os.environ.get("OMPI_MCA_mca_base_envar_file_prefix") in ("off", "lossless", "any"):  # noqa: SIM112
        del os.environ["OMPI_MCA_mca_base_envar_file_prefix"]  # noqa: SIM112


def describe_unused_tasks(launch: LaunchInfo, environ: Mapping[str, str] = os.environ) -> str:
    """Returns a warning about a Slurm job with several tasks of which one runs, without a launcher; else "".

    Args:
        launch: of this process.
        environ: the process's environment variables.
    """
    tasks = environ.get("SLURM_NTASKS") or "1"
    if launch.launcher != "none" or not environ.get("SLURM_JOB_ID") or tasks == "1":
        return ""
    return (
        f"the Slurm job has {tasks} tasks, but no launcher started this process, which is the only rank: use "
        "launch/slurm.sh, or `srun --mpi=pmix` in front of the command"
    )


def size_mismatch(launch: LaunchInfo, seen: int) -> UserError:
    """Returns the error, with the remedy, for a launcher that started more processes than Horovod sees."""
    return UserError(
        f"{launch.launcher} started {launch.size} process{'es' * (launch.size > 1)}, but Horovod "
        f"sees {seen}: {_REMEDY[launch.launcher]}"
    )


def gloo_store_address() -> str | None:
    """Returns HOST:PORT of horovodrun's key-value store, through which Gloo connects ranks; None under MPI."""
    names = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
    return ":".join(os.environ[name] for name in names) if all(map(os.environ.get, names)) else None
